"""The texts of --help and --config_help, without JAX: they must appear at once."""

import ast
import dataclasses
import io
import itertools
import pathlib
import shutil
import sys
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from mtl_sparse.jobs import cli
from mtl_sparse.runtime import text
from mtl_sparse.runtime.errors import UserError

EXAMPLES = (
    ("--config=configs/demo.py", "the demo, in minutes on two cores"),
    ("--config=configs/demo.py --job=compact", "its model without the zero channels"),
    ("--config=configs/demo.py --config.sparsity.target=0.5 --workdir=runs/half", "another target, in another folder"),
    ("--config=configs/sweeps.py:table1:demo --job=sweep", "many runs, with a report"),
    ("--config=configs/run.py:runs/half --job=evaluate", "an existing run, with its options"),
)
_MOST_COLUMNS = 100


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of the config.

    Attributes:
      path: "sparsity.lambda_".
      default: the value in configs/nyu.py, as it is written there.
      meaning: the comment beside it, or the one above it or above the options that it belongs to.
    """

    path: str
    default: str
    meaning: str


def asked_for(arguments: Sequence[str]) -> str | None:
    """Return the text that the command line asks for with --help or --config_help, None if it asks for a job.

    Raises:
      UserError: OPTION_UNKNOWN, if --config_help=PART matches no option.
    """
    given = list(itertools.takewhile(lambda argument: argument != "--", arguments[1:]))
    if any(argument in ("--help", "-help", "-h", "-?") for argument in given):
        return overview()
    for argument in given:
        flag, _, part = argument.partition("=")
        if flag in ("--config_help", "-config_help"):
            return config_help(part, _values(cli.option(cli.normalize(given), "--config")))
    return None


def overview() -> str:
    """Return the text of --help: usage, jobs, configs, flags and examples."""
    program = _program()
    parts = [
        "Train multi-task vision models that are pruned while they train, and remove what was pruned.",
        "Usage:\n  " + f"{program} --config=FILE [--job=JOB] [--workdir=DIR] [--config.OPTION=VALUE ...]",
        "Jobs (--job=JOB; default: train):\n" + _table((name, what) for name, (_, what) in cli.JOBS.items()),
        "Configs (--config=FILE):\n" + _table(_configs()),
        "Flags:\n" + _table(_flags()),
        "Options of the config (--config.OPTION=VALUE):\n"
        + _table(
            [
                ("--config_help", "all options, with their defaults and meanings"),
                ("--config_help=sparsity", "those whose names contain a word"),
                ("--config=FILE --config_help", "the values in a config file as well"),
            ]
        ),
        "Examples:\n" + "\n".join(f"  # {what}\n  {program} {arguments}" for arguments, what in EXAMPLES),
        "--helpfull lists the flags of every library, too. Documentation: docs/index.md.",
    ]
    return "\n\n".join(parts)


def config_help(part: str = "", values: Mapping[str, Any] | None = None) -> str:
    """Return the text of --config_help: options, defaults and meanings.

    Args:
      part: part of the paths of the options to show or, if there are none, of their meanings; "" is all.
      values: path -> value in the config file of the command line.

    Raises:
      UserError: OPTION_UNKNOWN, if no option matches.
    """
    found = options((cli.CONFIGS / "nyu.py").read_text(encoding="utf-8"))
    wanted = part.lower().removeprefix("config.")
    chosen = [option for option in found if wanted in option.path.lower()]
    chosen = chosen or [option for option in found if wanted in option.meaning.lower()]
    if not chosen:
        names = {name for option in found for name in (option.path, *option.path.split("."))}
        near = ", ".join(text.nearest(wanted, names)) or "--config_help, which lists all"
        raise UserError(
            "OPTION_UNKNOWN", f"expected a part of an option's name, got --config_help={part!r}; try {near}"
        )
    lines = ["Options of the config, with the defaults of configs/nyu.py. Set one by --config.OPTION=VALUE."]
    for meaning, group in itertools.groupby(chosen, lambda option: option.meaning):
        lines += ["", *(_assignment(option, values) for option in group)]
        lines += _wrapped(meaning, "      ")
    return "\n".join(lines)


def options(source: str) -> list[Option]:
    """Return the options of the text of a config file: the keywords of `config = create(...)`, with their comments."""
    assigned = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign)]
    (call,) = [node.value for node in assigned if isinstance(node.value, ast.Call) and _name(node) == "config"]
    comments = {}  # line -> (text, whether nothing else is on the line)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# "), not token.line[: token.start[1]].strip()
    return list(_of_call(call, "", "", comments, source))


def _name(node: ast.Assign) -> str:
    return getattr(node.targets[0], "id", "")


def _of_call(call, prefix, of_section, comments, source) -> Iterator[Option]:
    """Yield the options of a `create(...)`. A comment above an option is also that of the next ones without any."""
    above = ""
    for keyword in call.keywords:
        value, shares_line = keyword.value, keyword.lineno == call.lineno
        beside, alone = comments.get(value.end_lineno, ("", False))
        beside = "" if alone or shares_line else beside
        block = "" if shares_line else _block(comments, keyword.lineno)
        above = block or ("" if beside else above)
        meaning = " ".join(filter(None, (block, beside))) or above or of_section
        if isinstance(value, ast.Call):
            own = " ".join(filter(None, (block, beside)))
            yield from _of_call(value, f"{prefix}{keyword.arg}.", own, comments, source)
            above = ""
        else:
            yield Option(f"{prefix}{keyword.arg}", ast.get_source_segment(source, value) or "", meaning)


def _block(comments, line) -> str:
    """Return the comment on the lines directly above a line."""
    lines = list(itertools.takewhile(lambda number: comments.get(number, ("", False))[1], range(line - 1, 0, -1)))
    return " ".join(comments[number][0] for number in reversed(lines))


def _values(config: str) -> dict[str, Any]:
    """Return path -> value of the config file of the command line, {} without one."""
    if not config:
        return {}
    path, argument = cli.split_config(config)
    return dict(_flat(cli.run_file(str(path)).get_config(*[argument] if argument else []).to_dict()))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _assignment(option: Option, values: Mapping[str, Any] | None) -> str:
    """Return the line of an option: its default, or its value in the config file if that differs."""
    default = ast.literal_eval(option.default)
    value = (values or {}).get(option.path, default)
    differs = value != default
    return f"  {option.path}={value!r}  (default: {option.default})" if differs else f"  {option.path}={option.default}"


def _configs() -> Iterator[tuple[str, str]]:
    """Yield each file of configs/ with the first sentence of its docstring."""
    for path in sorted(cli.CONFIGS.glob("*.py")):
        if path.stem != "__init__":
            sentence = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")[0]
            yield f"configs/{path.name}", " ".join(sentence.split())


def _flags() -> Iterator[tuple[str, str]]:
    """Yield each flag of launch.py with its help."""
    module = str(flags.FLAGS.find_module_defining_flag("job"))
    for flag in flags.FLAGS.flags_by_module_dict().get(module, ()):
        default = f" Default: {flag.default}." if flag.default not in (None, "", [], False, 0) else ""
        yield f"--{flag.name}", f"{flag.help}{default}"


def _program() -> str:
    started = {pathlib.Path(argument).name for argument in sys.orig_argv[:3]}  # python launch.py, or -m mtl_sparse
    return "mtl-sparse" if started & {"mtl-sparse", "mtl_sparse"} else "python launch.py"


def _wrapped(what: str, indent: str) -> list[str]:
    width = max(min(shutil.get_terminal_size().columns, _MOST_COLUMNS), len(indent) + 20)
    return textwrap.wrap(what, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _table(rows) -> str:
    """Return two columns: names, and texts wrapped beside them."""
    rows = list(rows)
    indent = " " * (max(len(name) for name, _ in rows) + 4)
    texts = ["\n".join(_wrapped(what, indent))[len(indent) :] for _, what in rows]
    return "\n".join(f"  {name}".ljust(len(indent)) + what for (name, _), what in zip(rows, texts, strict=True))
