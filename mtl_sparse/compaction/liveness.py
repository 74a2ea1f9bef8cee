"""Which channels of a chain of convolutions are needed, how a stream is ordered, and which ranges a layer reads."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from mtl_sparse.models import resnet
from mtl_sparse.models import widths as widths_lib

Mask = Bool[np.ndarray, "C"]
Indices = Int[np.ndarray, "C"]
Values = Float[np.ndarray, "C"]


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs that decide whether a layer gathers its channels, in ns per pixel; docs/benchmarks.md has the measurement.

    Attributes:
      mac: cost of a multiply-accumulate.
      copy: cost of copying one channel.
      split: cost of one more range.
    """

    mac: float = 0.01
    copy: float = 0.4
    split: float = 3.0


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution, followed by a normalization or a bias, and by a ReLU or nothing.

    Attributes:
      name: path of the convolution.
      norm_name: path of the layer that has `norm`.
      kernel: HWIO.
      norm: BatchNorm's {scale, bias, mean, var}, or only {bias}, each [O].
      relu: whether a ReLU follows.
    """

    name: str
    norm_name: str
    kernel: Float[np.ndarray, "H W I O"]
    norm: Mapping[str, Values]
    relu: bool

    def after(self, y: Float[np.ndarray, "... O"]) -> Float[np.ndarray, "... O"]:
        """Apply what follows the convolution to its output, in float64."""
        norm = {name: value.astype(np.float64) for name, value in self.norm.items()}
        if "mean" in norm:
            y = (y - norm["mean"]) / np.sqrt(norm["var"] + resnet.BN_EPSILON) * norm["scale"]
        y = y + norm["bias"]
        return np.maximum(y, 0) if self.relu else y


@dataclasses.dataclass(frozen=True)
class Chain:
    """Consecutive convolutions, traced back from the outputs that are needed.

    Attributes:
      convs: those that remain.
      dead: how many are removed before them.
      keep: for each of `convs`, which outputs are needed [O].
      wanted: which inputs the first one needs [I]; None where it reads no inputs.
      constant: the chain's output [O] where no convolution remains.
    """

    convs: Sequence[Conv]
    dead: int
    keep: Sequence[Mask]
    wanted: Mask | None = None
    constant: Values | None = None


def trace(
    convs: Sequence[Conv],
    dead: int,
    need: Mask,
    constant: Values | None = None,
    read: Mapping[int, Mask] | None = None,
    ones: bool = False,
) -> Chain:
    """Trace the needed outputs back through a chain of convolutions.

    Args:
      convs: convolutions of the chain.
      dead: how many convolutions before them are removed already.
      need: which outputs of the last one are needed.
      constant: the chain's output if there are no convolutions.
      read: index in `convs` -> which of its outputs the heads read.
      ones: whether the first one reads a map of ones; it does where some are removed before it.

    Returns:
      The chain that is needed.
    """
    if not convs:
        return Chain([], dead, [], constant=constant)
    read = read or {}
    keep: list[Mask] = []
    for i in reversed(range(len(convs))):
        need = need | read.get(i, False)
        keep.insert(0, need)
        need = np.any(convs[i].kernel[..., need] != 0, (0, 1, 3))
        if not need.any():
            if not any(index < i for index in read):
                return _fold(convs[i:], dead + i, keep, {index - i for index in read})
            # The convolutions before stay for their readers; this one keeps one of those inputs, with zero weights.
            need[np.argmax(read.get(i - 1, need))] = True
    return Chain(list(convs), dead, keep, None if dead or ones else need)


def _fold(convs: Sequence[Conv], dead: int, keep: Sequence[Mask], read: set[int]) -> Chain:
    """Fold the constant output of a first convolution without live inputs into the convolutions after it.

    Folding ends at the first output that is not the same everywhere, and at the convolutions `read`, whose output must
    remain a map.
    """
    value: Values = np.zeros(convs[0].kernel.shape[2])
    for i, conv in enumerate(convs):
        kernel = np.einsum("hwio,i->hwo", conv.kernel.astype(np.float64), value)
        uneven = kernel.shape[:2] != (1, 1) and kernel[..., keep[i]].any()  # zero padding makes borders differ
        if uneven or i in read:
            ones = dataclasses.replace(conv, kernel=kernel[:, :, None].astype(conv.kernel.dtype))
            return Chain([ones, *convs[i + 1 :]], dead + i, keep[i:])
        value = conv.after(kernel[0, 0] if kernel.shape[:2] == (1, 1) else np.zeros(kernel.shape[-1]))
    return Chain([], dead + len(convs), [], constant=value)


def stream_order(readers: Sequence[Mask]) -> Indices:
    """Return an order of a stream's channels in which each reader finds its channels in few ranges.

    Channels that later readers need come first, sorted by a Gray code: the last two readers find theirs in one range,
    the reader before them in two, the next in four.

    Args:
      readers: which channels each reader needs; the last reader first.

    Returns:
      The channels in their new order.
    """
    rank = np.logical_xor.accumulate(np.stack(readers), axis=0)
    return np.lexsort(tuple(~rank[::-1]))


def choose_ranges(wanted: Mask, macs: int, costs: Costs) -> widths_lib.Ranges | None:
    """Choose the channels that a layer reads: all, or ranges that contain the needed ones, whichever costs less.

    Args:
      wanted: which channels the layer needs.
      macs: multiply-accumulates per pixel that one more channel costs the layer.
      costs: costs of computing, copying and splitting.

    Returns:
      The ranges; None is all channels.
    """
    channel = costs.copy + macs * costs.mac
    ranges: list[list[int]] = []
    for index in np.flatnonzero(wanted).tolist():
        if ranges and (index - ranges[-1][1]) * channel < costs.split:
            ranges[-1][1] = index + 1
        elif ranges and index == ranges[-1][1]:
            ranges[-1][1] += 1
        else:
            ranges.append([index, index + 1])
    taken = sum(stop - start for start, stop in ranges)
    if taken * channel + len(ranges) * costs.split >= len(wanted) * macs * costs.mac:
        return None
    return tuple((start, stop) for start, stop in ranges)


def indices(ranges: widths_lib.Ranges) -> Indices:
    """Return the channels of the ranges."""
    return np.concatenate([np.arange(start, stop) for start, stop in ranges])


def expand(wanted: Mask, reads: widths_lib.Ranges | None, width: int) -> Mask:
    """Return a mask over a stream from a mask over the channels that a layer reads of it.

    Args:
      wanted: over the channels of `reads`.
      reads: channels that the layer reads; None is all.
      width: channels of the stream.

    Returns:
      Mask [width].
    """
    if reads is None:
        return wanted
    mask = np.zeros(width, bool)
    mask[indices(reads)] = wanted
    return mask
