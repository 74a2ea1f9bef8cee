"""What of a chain of convolutions is needed, in which order a stream's channels lie, and what a layer takes."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mtl_sparse.models import resnet
from mtl_sparse.models import widths as widths_lib


@dataclasses.dataclass(frozen=True)
class Costs:
    """What decides whether a layer gathers its channels, in ns a pixel; see docs/benchmarks.md for the measurement.

    Attributes:
      mac: of a multiply-accumulate.
      copy: of copying one channel.
      split: of one range more.
    """

    mac: float = 0.01
    copy: float = 0.4
    split: float = 3.0


@dataclasses.dataclass
class Conv:
    """A convolution with what follows it: BatchNorm {scale, bias, mean, var} or only {bias}, and a ReLU or none."""

    name: str
    norm_name: str
    kernel: np.ndarray
    norm: dict[str, np.ndarray]
    relu: bool

    def after(self, y):
        """What follows the convolution, of its output y [..., O], in float64."""
        norm = {name: value.astype(np.float64) for name, value in self.norm.items()}
        if "mean" in norm:
            y = (y - norm["mean"]) / np.sqrt(norm["var"] + resnet.BN_EPSILON) * norm["scale"]
        y = y + norm["bias"]
        return np.maximum(y, 0) if self.relu else y


@dataclasses.dataclass
class Chain:
    """Convolutions one after the other, seen from the outputs that are needed.

    Attributes:
      convs: those that are left.
      dead: how many are gone in front of them.
      keep: for each of `convs`, the outputs that are needed, bool [O].
      wanted: inputs that the first one wants, bool [I]; None where it reads no inputs.
      constant: the chain's output [O] where no convolution is left.
    """

    convs: list[Conv]
    dead: int
    keep: list[np.ndarray]
    wanted: np.ndarray | None = None
    constant: np.ndarray | None = None


def trace(convs: Sequence[Conv], dead: int, need: np.ndarray, constant=None, read=None, ones: bool = False) -> Chain:
    """Follows `need`, the needed outputs, backwards through `convs`.

    Args:
      convs: those that are there; `dead` are gone in front of them.
      need: bool [O], of the last one.
      constant: the chain's output where there are none.
      read: {place in convs: bool [O]}, what heads read of the others' outputs.
      ones: whether the first one reads a map of ones, as it does where some are gone.
    """
    if not convs:
        return Chain([], dead, [], constant=constant)
    read, keep = read or {}, []
    for i in reversed(range(len(convs))):
        need = need | read.get(i, False)
        keep.insert(0, need)
        need = np.any(convs[i].kernel[..., need] != 0, (0, 1, 3))
        if not need.any():
            if not any(place < i for place in read):
                return _fold(convs[i:], dead + i, keep, {place - i for place in read})
            # What is in front stays for its readers; this one keeps one of those inputs, with zero weights.
            need[np.argmax(read.get(i - 1, need))] = True
    return Chain(list(convs), dead, keep, None if dead or ones else need)


def _fold(convs, dead, keep, read):
    """Chain whose first convolution has no live input: its constant output goes as far as it stays a constant.

    It does not go past those at the places `read`, which put out a map.
    """
    value = np.zeros(convs[0].kernel.shape[2])
    for i, conv in enumerate(convs):
        kernel = np.einsum("hwio,i->hwo", conv.kernel.astype(np.float64), value)
        uneven = kernel.shape[:2] != (1, 1) and kernel[..., keep[i]].any()  # zero padding makes borders differ
        if uneven or i in read:
            ones = dataclasses.replace(conv, kernel=kernel[:, :, None].astype(conv.kernel.dtype))
            return Chain([ones, *convs[i + 1 :]], dead + i, keep[i:])
        value = conv.after(kernel[0, 0] if kernel.shape[:2] == (1, 1) else np.zeros(kernel.shape[-1]))
    return Chain([], dead + len(convs), [], constant=value)


def stream_order(readers: Sequence[np.ndarray]) -> np.ndarray:
    """Order of a stream's channels by who reads them; `readers` are masks [C], the last reader first.

    Channels that later readers want come first, and by a Gray code, so that the last two readers find theirs in one
    range, the one before in two, then four.
    """
    rank = np.logical_xor.accumulate(np.stack(readers), axis=0)
    return np.lexsort(tuple(~rank[::-1]))


def choose_ranges(wanted: np.ndarray, macs: int, costs: Costs) -> widths_lib.Ranges | None:
    """Which channels a layer takes: all (None), or ranges that hold the wanted ones, by what costs least.

    Args:
      wanted: bool [C].
      macs: multiply-accumulates that a channel more costs the layer, a pixel.
    """
    channel = costs.copy + macs * costs.mac
    ranges = []
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
