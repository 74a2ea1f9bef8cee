"""Names of the network's layers: short forms, and their order."""

import re
from typing import Any

_BLOCK = re.compile(r"(?:layer|block)(\d+)_(\d+)(?:/|$)")
_INNER = ("expand", "depthwise", "project")  # an inverted residual's layers
_BRANCH = re.compile(rf"conv\d+|{'|'.join(_INNER)}")


def short(path: str) -> str:
    """Return a layer's name without "backbone/" and "/kernel": "layer1_0/conv1"."""
    return path.removeprefix("backbone/").removesuffix("/kernel")


def network_order(path: str) -> tuple[int, int, int, tuple[Any, ...]]:
    """Return a sort key: the stem first, then stages and blocks by number, a block's layers in order, heads last.

    Other names are ordered among the first, by their words and numbers: "conv2" before "conv10".
    """
    name = short(path)
    if name.startswith("head_"):
        return (2, 0, 0, _words(name))
    found = _BLOCK.match(name)
    if not found:
        return (0, 0, 0, _words(name))
    layer = name[found.end() :]
    inner = (f"{_INNER.index(layer)}", layer) if layer in _INNER else _words(layer)
    return (1, int(found[1]), int(found[2]), inner)


def branch(path: str) -> str:
    """Return the block on whose residual branch a layer is, such as "layer1_0"; "" for shortcuts and other layers."""
    block, _, layer = short(path).rpartition("/")
    return block if _BRANCH.fullmatch(layer) and _BLOCK.match(block) else ""


def _words(name: str) -> tuple[str, ...]:
    return tuple(part.zfill(9) if part.isdigit() else part for part in re.split(r"(\d+)", name))
