"""Widths: which channels each layer of a model has, all in a dense model, those that remain in a compact one.

A compact model is an ordinary model with other widths (see `sparsity.compact`). Every channel index counts the
channels of the layer that is read, in this model.
"""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Shaped

Ranges = tuple[tuple[int, int], ...]  # channels [start, stop) of each range, in order


@dataclasses.dataclass(frozen=True)
class Stem:
    """The first convolutions of the backbone: three 3x3, or one 7x7.

    Attributes:
      features: outputs of each. The last is the width of the residual stream; it is 0 if no layer reads the stem.
      dead: how many of the first convolutions are removed because their output is constant. The next convolution reads
        a map of ones; where all are removed, the stem is a constant.
      reads: image channels that the first convolution reads; None is all.
    """

    features: tuple[int, ...]
    dead: int = 0
    reads: Ranges | None = None

    @property
    def stream(self) -> int:
        """Width of the residual stream after the stem."""
        return self.features[-1]


@dataclasses.dataclass(frozen=True)
class Block:
    """A residual block.

    Attributes:
      features: outputs of each convolution of the branch. The last is the width of the residual stream after the
        block, or more if heads read its raw output; it is 0 if no layer reads the block.
      shortcut: "identity" (the first channels of the stream), "conv", "constant", or "none": the stream ends before
        this block. Then only the convolutions of the branch in `features` remain, for the heads that read them.
      dead: as in `Stem`, of the branch's convolutions.
      reads: channels of the stream that the branch reads; None is all, and () is none: it reads a map of ones.
      shortcut_reads: channels of the stream that the shortcut's convolution reads; None is all.
      normalized: how many outputs of each convolution, the first ones, enter its BatchNorm; () is all. Only heads
        read the others, at raw points. A convolution of which none enters has no BatchNorm.
    """

    features: tuple[int, ...]
    shortcut: str = "identity"
    dead: int = 0
    reads: Ranges | None = None
    shortcut_reads: Ranges | None = None
    normalized: tuple[int, ...] = ()

    @property
    def stream(self) -> int:
        """Width of the residual stream after it."""
        return 0 if self.shortcut == "none" else self.passed[-1]

    @property
    def passed(self) -> tuple[int, ...]:
        """Outputs of each convolution that enter its BatchNorm."""
        return self.normalized or self.features


@dataclasses.dataclass(frozen=True)
class Head:
    """A DeepLab head.

    Attributes:
      branches: outputs of the 1x1, the three atrous and the pooling branch; 0 if the branch is removed.
      trunk: outputs of the projection and of the 3x3 convolution after it.
      dead: as in `Stem`, of the projection, the 3x3 convolution and the output.
      reads: features that each branch reads; None is all.
      taps: height and width, 3 or 1, of each atrous kernel; 1 where the other taps would meet only padding.
    """

    branches: tuple[int, ...]
    trunk: tuple[int, ...]
    dead: int = 0
    reads: tuple[Ranges | None, ...] = (None,) * 5
    taps: tuple[tuple[int, int], ...] = ((3, 3),) * 3


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A classification head.

    Attributes:
      reads: features that its convolution reads, as one entry; None is all.
      dead: whether its output is constant, so that only the constant remains.
    """

    reads: tuple[Ranges | None] = (None,)
    dead: bool = False


@dataclasses.dataclass(frozen=True)
class Widths:
    """Widths of a whole model.

    Attributes:
      stem: the backbone's stem.
      blocks: the backbone's blocks, up to the last that a head reads.
      heads: one for each task; None for a head of a kind that is not the project's.
      attach: attachment points of the heads, see `multitask.MultiTaskModel`.
    """

    stem: Stem
    blocks: tuple[Block, ...]
    heads: tuple[Head | Classifier | None, ...]
    attach: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the widths as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Widths":
        """Return the widths that `to_json` wrote.

        Raises:
          ValueError: the text was not written by `to_json`.
        """
        try:
            tree = _tuples(json.loads(text))
            return cls(
                Stem(**tree["stem"]),
                tuple(Block(**block) for block in tree["blocks"]),
                tuple(head and (Head if "branches" in head else Classifier)(**head) for head in tree["heads"]),
                tree.get("attach", ()),
            )
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"expected the widths of a model as JSON: {error}") from error


def _tuples(value: Any) -> Any:
    """Return parsed JSON with tuples in place of lists."""
    if isinstance(value, dict):
        return {name: _tuples(part) for name, part in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def select(x: Shaped[Array, "... C"], ranges: Ranges | None) -> Shaped[Array, "... c"]:
    """Return the channels of `ranges`; x itself for None."""
    if ranges is None:
        return x
    parts = [x[..., start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)
