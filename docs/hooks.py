"""Hook of mkdocs.yml: links to files of the repository that are outside of docs/.

On a code host such links work as they are. On the site they become links to the code host, if `repo_url` is set in
mkdocs.yml, and plain text otherwise. A link to a file that does not exist stays, and the strict build reports it.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#:\s]+)(#[^)]*)?\)")


def rewrite(markdown: str, page: str, repo_url: str = "") -> str:
    """Return a page's text with its links to files outside of docs/ changed.

    Args:
      markdown: text of the page.
      page: its path, relative to docs/.
      repo_url: address of the repository on the code host; "" makes plain text of the links.
    """
    folder = (ROOT / "docs" / page).parent

    def change(match: re.Match) -> str:
        text, link, anchor = match.groups()
        path = (folder / link).resolve()
        if path.is_relative_to(ROOT / "docs") or not path.is_relative_to(ROOT) or not path.exists():
            return match.group()
        if repo_url:
            return f"[{text}]({repo_url.rstrip('/')}/blob/main/{path.relative_to(ROOT)}{anchor or ''})"
        return text if text.startswith("`") else f"`{text}`" if "/" in text or "." in text else text

    parts = re.split(r"(?ms)(^```.*?^```)", markdown)  # code blocks stay as they are
    return "".join(part if part.startswith("```") else _LINK.sub(change, part) for part in parts)


def on_page_markdown(markdown: str, page: Any, config: Mapping[str, Any], **_: Any) -> str:
    """Rewrite the links of a page, called by MkDocs."""
    return rewrite(markdown, page.file.src_uri, config["repo_url"] or "")
