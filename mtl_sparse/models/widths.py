"""Which channels each layer of a model has: all of them in a dense model, what is left in a compact one.

A compact model is an ordinary model with other widths (see `sparsity.compact`). Every channel index counts the
channels of the layer that is read, as they are in this model.
"""

import dataclasses
import json

import jax.numpy as jnp

Ranges = tuple[tuple[int, int], ...]  # channels [start, stop) of each range, in order


@dataclasses.dataclass(frozen=True)
class Stem:
    """The convolutions in front: three 3x3, or one 7x7.

    Attributes:
      features: outputs of each; the last is the width of the residual stream. 0 in the last: nobody reads it.
      dead: how many of the first convolutions are gone because nothing reaches what is left of them: the next one
        reads a map of ones; where all are gone, the stem is a constant.
      reads: image channels that the first one takes; None is all.
    """

    features: tuple[int, ...]
    dead: int = 0
    reads: Ranges | None = None

    @property
    def stream(self) -> int:
        """Width of the residual stream after it."""
        return self.features[-1]


@dataclasses.dataclass(frozen=True)
class Block:
    """A residual block.

    Attributes:
      features: outputs of each convolution of the branch; the last is the width of the residual stream after the
        block. 0 in the last: nobody reads it.
      shortcut: "identity" (the first channels of the stream), "conv", "constant", or "none": the stream ends before
        this block, of which there is only the branch, as far as `features` goes, for the heads that read it.
      dead: as in `Stem`, of the branch's convolutions.
      reads, shortcut_reads: channels of the stream that the branch and the shortcut's convolution take; None is all,
        and () none: the branch reads a map of ones.
    """

    features: tuple[int, ...]
    shortcut: str = "identity"
    dead: int = 0
    reads: Ranges | None = None
    shortcut_reads: Ranges | None = None

    @property
    def stream(self) -> int:
        """Width of the residual stream after it."""
        return 0 if self.shortcut == "none" else self.features[-1]


@dataclasses.dataclass(frozen=True)
class Head:
    """A DeepLab head.

    Attributes:
      branches: outputs of the 1x1, the three atrous and the pooling branch; 0: it is gone.
      trunk: outputs of the projection and the 3x3 convolution behind it.
      dead: as in `Stem`, of the projection, the 3x3 convolution and the output.
      reads: features that each branch takes; None is all.
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
      reads: features that its convolution takes, as one entry; None is all.
      dead: whether nothing reaches it: it is a constant then.
    """

    reads: tuple[Ranges | None] = (None,)
    dead: bool = False


@dataclasses.dataclass(frozen=True)
class Widths:
    """Of a whole model.

    Attributes:
      stem, blocks: of the backbone, as far as a head reads.
      heads: one a task, None for one that is not the project's.
      attach: the attachment points that the model was made for, see `multitask.MultiTaskModel`.
    """

    stem: Stem
    blocks: tuple[Block, ...]
    heads: tuple[Head | Classifier | None, ...]
    attach: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Widths":
        """Raises ValueError for a text that is not of `to_json`."""
        try:
            tree = _tuples(json.loads(text))
            return cls(
                Stem(**tree["stem"]),
                tuple(Block(**block) for block in tree["blocks"]),
                tuple(head and (Head if "branches" in head else Classifier)(**head) for head in tree["heads"]),
                tree.get("attach", ()),
            )
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"not the widths of a model: {error}") from error


def _tuples(value):
    if isinstance(value, dict):
        return {name: _tuples(part) for name, part in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def select(x, ranges: Ranges | None):
    """The channels of `ranges` of x [..., C]; x itself for None."""
    if ranges is None:
        return x
    parts = [x[..., start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)
