"""HTML pages that need no other file: the shell, tables, plots and images. All text is escaped here."""

import base64
import html
import io
import pathlib
import re
import string
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mtl_sparse.report import svg

_TEMPLATE = pathlib.Path(__file__).with_name("page.html")
_VARIABLE = re.compile(r"var\(--c([0-9a-f]{6})\)")
_NUMBER = re.compile(r"[+-]?\d[\d.,]*(e[+-]?\d+)?( ±.*| to .*|x|%)?( %)?|nan|")


class Section(NamedTuple):
    """A part of a page.

    Attributes:
      name: anchor, unique in the page.
      title: heading, as text.
      body: HTML.
    """

    name: str
    title: str
    body: str


def document(heading: str, lead: str, sections: Iterable[Section], *, refresh: int = 0) -> str:
    """Return a whole page.

    Args:
      heading: text.
      lead: HTML below the heading.
      sections: sections in their order; those without a body are left out.
      refresh: seconds after which a browser loads the page again; 0 for never.
    """
    shown = [one for one in sections if one.body]
    body = "\n".join(f'<h2 id="{one.name}">{text(one.title)}</h2>\n{one.body}' for one in shown)
    colors = sorted(set(_VARIABLE.findall(body)))
    return string.Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        refresh=f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh else "",
        title=f"{text(heading)} · mtl-sparse",
        heading=text(heading),
        lead=lead,
        nav=" ".join(f'<a href="#{one.name}">{text(one.title)}</a>' for one in shown),
        body=body,
        light="".join(f"--c{color}: #{color}; " for color in colors),
        dark="".join(f"--c{color}: #{svg.dark(color)}; " for color in colors),
    )


def text(value: object) -> str:
    """Return a value as escaped text."""
    return html.escape(str(value))


def paragraph(sentence: str, kind: str = "") -> str:
    """Return a paragraph of text."""
    return f'<p class="{kind}">{text(sentence)}</p>' if kind else f"<p>{text(sentence)}</p>"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose columns can be sorted; the first row is the head.

    A column is of numbers if each of its cells begins with one or is empty. Rows whose first cell is
    "published", or begins with "published,", are gray.
    """
    head, *lines = rows
    numeric = [all(_NUMBER.fullmatch(line[i]) for line in lines) for i in range(len(head))]
    kinds = [' class="number"' if one else "" for one in numeric]
    cells = "".join(
        f'<th scope="col"{kind}><button type="button" title="Sort">{text(name)}</button></th>'
        for name, kind in zip(head, kinds, strict=True)
    )
    body = []
    for line in lines:
        kind = ' class="published"' if f"{line[0]},".startswith("published,") else ""
        body.append(
            f"<tr{kind}>{''.join(f'<td{k}>{text(cell)}</td>' for cell, k in zip(line, kinds, strict=True))}</tr>"
        )
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def plot(drawn: str, title: str, note: str = "", *, wide: bool = False) -> str:
    """Return a plot with its title.

    Args:
      drawn: HTML, such as `svg.inline` returns.
      title: text.
      note: how to read it.
      wide: whether it takes the whole width of the page.
    """
    caption = f"<figcaption>{text(note)}</figcaption>" if note else ""
    return (
        f'<figure{" class=wide" if wide else ""}><h3>{text(title)}</h3>{caption}<div class="panels">'
        f"{drawn}</div></figure>"
    )


def cards(entries: Iterable[tuple[str, str, str]]) -> str:
    """Return key figures as cards: name, value, and what the value is compared with."""
    found = [
        f"<div><dt>{text(name)}</dt><dd>{text(value)}{f'<small>{text(note)}</small>' if note else ''}</dd></div>"
        for name, value, note in entries
    ]
    return f'<dl class="cards">{"".join(found)}</dl>' if found else ""


def image(pixels: np.ndarray, alt: str, most: int) -> str:
    """Return an <img> that holds an image, made smaller to be at most `most` pixels wide.

    Args:
      pixels: [H, W, 3], uint8 or values in [0, 1].
      alt: description.
      most: largest width.
    """
    from PIL import Image

    if pixels.dtype != np.uint8:
        pixels = (255 * np.clip(pixels, 0, 1)).round().astype(np.uint8)
    step = -(-pixels.shape[1] // most)
    picture, found = Image.fromarray(np.ascontiguousarray(pixels[::step, ::step, :3])), []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        file = io.BytesIO()
        picture.save(file, kind, **options)
        found.append((len(file.getvalue()), kind, file.getvalue()))
    _, kind, data = min(found)
    encoded = base64.b64encode(data).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img alt="{text(alt)}" {size} src="data:image/{kind};base64,{encoded}">'


def sample_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a grid of images.

    Args:
      head: text above each column.
      lines: HTML of the cells; the first one of each line is its name.
    """
    names = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    cells = f"<thead><tr>{names}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll samples" tabindex="0"><table>{cells}</table></div>'


def legend(entries: Iterable[tuple[Sequence[float], str]]) -> str:
    """Return names beside their colors, RGB in [0, 1]."""
    found = []
    for color, name in entries:
        parts = ", ".join(str(round(255 * part)) for part in color)
        found.append(f'<span><i style="background:rgb({parts})"></i>{text(name)}</span>')
    return f'<p class="classes">{"".join(found)}</p>'


def link(target: str, name: str) -> str:
    """Return a link to a file, by its path relative to the page."""
    return f'<a href="{text(urllib.parse.quote(target))}">{text(name)}</a>'


def commands(entries: Iterable[tuple[str, str]]) -> str:
    """Return shell commands, each below a sentence on what it does."""
    return "".join(f"{paragraph(what)}<pre><code>{text(command)}</code></pre>" for what, command in entries)
