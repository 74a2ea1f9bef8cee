"""Which channels of the residual stream remain, and in which order."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mtl_sparse.compaction import liveness
from mtl_sparse.compaction.liveness import Indices, Mask
from mtl_sparse.compaction.tracing import Traced


@dataclasses.dataclass(frozen=True)
class Kept:
    """Channels that remain of a layer or a stream.

    Attributes:
      channels: their indices in the old model, in the new order.
      width: number of channels in the old model.
    """

    channels: Indices
    width: int


def order_streams(traced: Traced, multiple: int) -> tuple[Kept, ...]:
    """Order the channels of each residual stream, so that those that are needed longest come first.

    Every block then carries a prefix of them.

    Args:
      traced: what is needed of the model.
      multiple: widths are padded to a multiple of it.

    Returns:
      For each index of the streams in `traced`, the channels that remain there.
    """
    kept_channels = []
    for start, stop in traced.streams:
        width = len(traced.needs[start])
        order = np.arange(width) if traced.pinned[start] else liveness.stream_order(_readers(traced, start, stop))
        for i in range(start, stop):
            kept = int(traced.needs[i].sum())
            filled = padded(kept, width, multiple)
            while kept < filled and order[kept] < len(traced.needs[i]):  # the stream of a compact model gets narrower
                kept += 1
            kept_channels.append(Kept(order[:kept], len(traced.needs[i])))
    return tuple(kept_channels)


def _readers(traced: Traced, start: int, stop: int) -> Sequence[Mask]:
    """Return which channels each reader of a stream needs, the last reader first."""
    width, readers = len(traced.needs[start]), []
    for i in reversed(range(start, stop)):
        if i < len(traced.blocks):
            block = traced.blocks[i]
            readers += [block.shortcut_wants] * (i == stop - 1) + [block.branch_wants]
        readers.append(traced.head_wants[i])
    return [np.pad(mask, (0, width - len(mask))) for mask in readers]


def padded(count: int, total: int, multiple: int) -> int:
    """Return `count` rounded up to a multiple, at most `total`."""
    return min(-(-count // multiple) * multiple, total)


def kept_indices(mask: Mask, multiple: int) -> Indices:
    """Return the indices of a mask, with further ones up to a multiple."""
    wanted = int(mask.sum())
    count = padded(wanted, len(mask), multiple)
    return np.sort(np.concatenate([np.flatnonzero(mask), np.flatnonzero(~mask)[: count - wanted]]))
