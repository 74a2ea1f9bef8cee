"""Tracing of a model, from its heads to its stem: which channels does each layer need?"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mtl_sparse.compaction import liveness
from mtl_sparse.compaction.liveness import Chain, Conv, Mask
from mtl_sparse.compaction.weights import Weights
from mtl_sparse.models import deeplab, multitask, resnet
from mtl_sparse.models import widths as widths_lib

Head = widths_lib.Head | widths_lib.Classifier | None


@dataclasses.dataclass(frozen=True)
class TracedHead:
    """What is needed of a head.

    Attributes:
      trunk: a DeepLab head's projection, 3x3 convolution and output; None for a classification head.
      inputs: for each layer that can read the features, its chain; None for one that is not needed.
    """

    trunk: Chain | None
    inputs: tuple[Chain | None, ...]


@dataclasses.dataclass(frozen=True)
class TracedStem:
    """What is needed of the stem.

    Attributes:
      chain: its convolutions.
      wants: image channels that they need; None where they read none.
    """

    chain: Chain
    wants: Mask | None


@dataclasses.dataclass(frozen=True)
class TracedBlock:
    """What is needed of a residual block.

    Attributes:
      branch: its convolutions; None if no layer reads the block.
      shortcut: the shortcut's convolution; None where there is none or it is not needed.
      branch_wants: channels of the stream before the block that the branch needs.
      shortcut_wants: channels of the stream before the block that the shortcut needs.
      stop: how many convolutions of the branch are needed, with those that are removed already.
      entering: for each of the branch's convolutions, which of its outputs the rest of the branch or a head needs after
        its BatchNorm; the others that are needed are read raw.
    """

    branch: Chain | None
    shortcut: Chain | None
    branch_wants: Mask
    shortcut_wants: Mask
    stop: int
    entering: tuple[Mask, ...]


@dataclasses.dataclass(frozen=True)
class Traced:
    """The channels of a model that are needed.

    The residual stream before block i, or after the last block, has the index i in `points`, `head_wants`, `pinned` and
    `needs`.

    Attributes:
      heads: an entry for each head; None for a head that is not one of this project's kinds.
      stem: None if no layer reads it.
      blocks: an entry for each block.
      points: attachment points of the streams.
      streams: (start, stop) of each residual stream: its channels are the same from index start to stop - 1, except
        that it may get narrower.
      head_wants: channels of the stream that the heads read.
      pinned: whether a head that is not this project's reads the stream, so that the order of its channels must stay.
      needs: channels of the stream that any layer needs.
    """

    heads: tuple[TracedHead | None, ...]
    stem: TracedStem | None
    blocks: tuple[TracedBlock, ...]
    points: tuple[str, ...]
    streams: tuple[tuple[int, int], ...]
    head_wants: tuple[Mask, ...]
    pinned: tuple[bool, ...]
    needs: tuple[Mask, ...]


def trace(model: multitask.MultiTaskModel, weights: Weights) -> Traced:
    """Trace what is needed of a model.

    Args:
      model: dense or compact already.
      weights: the model's weights.

    Returns:
      What each part needs of the one before it.
    """
    layers, places = model.layers(), resnet.places(model.depth)
    heads = tuple(
        _trace_head(weights, f"head_{task}", head, zero_features(weights, point))
        for (task, *_), head, point in zip(model.heads, layers.heads, model.points(), strict=True)
    )
    readers = _HeadReaders(model.points(), layers.heads, heads)
    points = ("stem", *(place.name for place in places[: len(layers.blocks)]))
    stream_widths = (layers.stem.stream, *(block.stream for block in layers.blocks))
    streams = _streams(layers.blocks)
    head_wants = tuple(readers.want(point, width) for point, width in zip(points, stream_widths, strict=True))
    pinned = tuple(readers.pin(points[start:stop]) for start, stop in streams for _ in range(start, stop))

    needs: list[Mask] = [head_wants[-1] | pinned[-1]]
    blocks: list[TracedBlock] = []
    for i in reversed(range(len(layers.blocks))):
        block, name = layers.blocks[i], points[i + 1]
        inner, raw = (
            readers.inside(f"{name}/conv{{}}{kind}", block, of)
            for kind, of in (("", block.passed), (":raw", block.features))
        )
        whole = 3 if resnet.STAGES[model.depth][0] else 2
        traced = _trace_block(weights, f"backbone/{name}", block, whole, stream_widths[i], needs[0], inner, raw)
        blocks.insert(0, traced)
        needs.insert(0, traced.branch_wants | traced.shortcut_wants | head_wants[i] | pinned[i])
    stem = _trace_stem(weights, layers.stem, needs[0]) if needs[0].any() else None
    return Traced(heads, stem, tuple(blocks), points, streams, head_wants, pinned, tuple(needs))


def branches(head: widths_lib.Head) -> list[tuple[str, slice]]:
    """Return (layer name, its place among the projection's inputs) of each of a head's branches."""
    ends = np.cumsum(head.branches).tolist()
    return [
        (name, slice(end - width, end)) for name, end, width in zip(deeplab.BRANCHES, ends, head.branches, strict=True)
    ]


def zero_features(weights: Weights, point: str) -> Mask | None:
    """Return which features at an attachment point are zero because their filter is; None where a BatchNorm follows."""
    kernel = weights.params.get(f"backbone/{point.removesuffix(':raw')}/kernel") if point.endswith(":raw") else None
    return None if kernel is None else ~np.any(kernel != 0, (0, 1, 2))


def _without(conv: Conv, reads: widths_lib.Ranges | None, zero: Mask | None) -> Conv:
    """Return a convolution that reads the channels `reads` of features, without its weights for those that are zero."""
    if zero is None:
        return conv
    rows = zero if reads is None else zero[liveness.indices(reads)]
    return dataclasses.replace(conv, kernel=np.where(rows[:, None], 0, conv.kernel).astype(conv.kernel.dtype))


def _trace_head(weights: Weights, prefix: str, head: Head, zero: Mask | None) -> TracedHead | None:
    """Trace a head; `zero` are the features that are always zero."""
    if head is None:
        return None
    if isinstance(head, widths_lib.Classifier):
        if head.dead:
            return TracedHead(None, (None,))
        conv = _without(weights.conv(prefix, "conv", None, True), head.reads[0], zero)
        return TracedHead(None, (liveness.trace([conv], 0, np.ones(conv.kernel.shape[-1], bool)),))
    return _trace_deeplab(weights, prefix, head, zero)


def _trace_deeplab(weights: Weights, prefix: str, head: widths_lib.Head, zero: Mask | None) -> TracedHead:
    layers = (("project", "project_bn", True), ("conv", "conv_bn", True), ("out", None, False))
    convs = [weights.conv(prefix, *layer) for layer in layers[head.dead :]]
    constant = weights.params.get(f"{prefix}/constant")
    need = np.ones(len(constant) if constant is not None else convs[-1].kernel.shape[-1], bool)
    trunk = liveness.trace(convs, head.dead, need, constant)
    inputs: list[Chain | None] = [None] * len(head.branches)
    if trunk.wanted is None:
        return TracedHead(trunk, tuple(inputs))
    project = convs[0]
    live = project.kernel.copy()
    fixed: np.ndarray | int = 0
    for i, (name, place) in enumerate(branches(head)):
        if trunk.wanted[place].any():
            conv = _without(weights.conv(prefix, name, f"{name}_bn", True), head.reads[i], zero)
            chain = liveness.trace([conv], 0, trunk.wanted[place])
            if chain.constant is None:
                inputs[i] = chain
            else:  # the BatchNorm of the projection absorbs a constant input
                fixed += chain.constant @ project.kernel[0, 0, place].astype(np.float64)
                live[:, :, place] = 0
    mean = (project.norm["mean"] - fixed).astype(project.norm["mean"].dtype)
    convs[0] = dataclasses.replace(project, kernel=live, norm={**project.norm, "mean": mean})
    return TracedHead(liveness.trace(convs, head.dead, need), tuple(inputs))


@dataclasses.dataclass(frozen=True)
class _HeadReaders:
    """The heads as readers of the backbone: attachment point, widths and trace of each."""

    points: Sequence[str]
    widths: Sequence[Head]
    traced: Sequence[TracedHead | None]

    def want(self, point: str, width: int) -> Mask:
        """Return which of the `width` channels at an attachment point the heads there need."""
        wanted = np.zeros(width, bool)
        for there, head, traced in zip(self.points, self.widths, self.traced, strict=True):
            if there != point:
                continue
            if head is None or traced is None:  # a head of another kind reads every feature
                wanted[:] = True
                continue
            for chain, reads in zip(traced.inputs, head.reads, strict=True):
                if chain is not None and chain.wanted is not None:
                    wanted |= liveness.expand(chain.wanted, reads, width)
        return wanted

    def inside(self, points: str, block: widths_lib.Block, widths: Sequence[int]) -> dict[int, Mask]:
        """Return what the heads need inside a block: index of a convolution -> which of its outputs.

        Args:
          points: names of the points, with {} for the number of the convolution.
          block: widths of the block.
          widths: number of channels at each point.
        """
        return {
            j: np.pad(wanted, (0, block.features[j] - widths[j]))
            for j in range(block.dead, len(block.features))
            if (wanted := self.want(points.format(j + 1), widths[j])).any()
        }

    def pin(self, points: Sequence[str]) -> bool:
        """Return whether a head of another kind reads one of the points."""
        return any(point in points and traced is None for point, traced in zip(self.points, self.traced, strict=True))


def _streams(blocks: Sequence[widths_lib.Block]) -> tuple[tuple[int, int], ...]:
    starts = [0] + [i + 1 for i, block in enumerate(blocks) if block.shortcut != "identity"]
    return tuple(zip(starts, [*starts[1:], len(blocks) + 1], strict=True))


def _trace_block(
    weights: Weights,
    prefix: str,
    block: widths_lib.Block,
    whole: int,
    width: int,
    need: Mask,
    inner: Mapping[int, Mask],
    raw: Mapping[int, Mask],
) -> TracedBlock:
    """Trace a residual block.

    Args:
      weights: the model's weights.
      prefix: path of the block.
      block: its widths.
      whole: convolutions of a whole branch.
      width: channels of the stream before it.
      need: which channels of the stream after it are needed.
      inner: index of a convolution of the branch -> which of its outputs the heads read after BatchNorm and ReLU.
      raw: the same for what they read before both.
    """
    branch = shortcut = None
    branch_wants, shortcut_wants = np.zeros(width, bool), np.zeros(width, bool)
    stop = len(block.features) if need.any() else 1 + max((*inner, *raw), default=-1)
    entering: tuple[Mask, ...] = ()
    if stop:
        last = np.zeros(block.features[stop - 1], bool)
        if need.any():
            last[: len(need)] = need
        convs = _branch(weights, prefix, block, whole, stop)
        read = {j - block.dead: np.logical_or(inner.get(j, False), raw.get(j, False)) for j in (*inner, *raw)}
        branch = liveness.trace(convs, block.dead, last, np.zeros(len(need)), read, block.reads == ())
        entering = _entering(branch, last, inner, raw)
        if branch.wanted is not None:
            branch_wants = liveness.expand(branch.wanted, block.reads, width)
    if need.any() and block.shortcut == "conv":
        shortcut = liveness.trace([weights.conv(prefix, "downsample_conv", "downsample_bn", False)], 0, need)
        if shortcut.wanted is not None:
            shortcut_wants = liveness.expand(shortcut.wanted, block.shortcut_reads, width)
    elif need.any() and block.shortcut == "identity":
        shortcut_wants = np.pad(need, (0, width - len(need)))
    return TracedBlock(branch, shortcut, branch_wants, shortcut_wants, stop, entering)


def _branch(weights: Weights, prefix: str, block: widths_lib.Block, whole: int, stop: int) -> list[Conv]:
    """Return the convolutions of a block's branch up to number `stop`, of `whole` in a whole branch.

    Outputs that do not enter a BatchNorm get zeros in it and in the next convolution.
    """
    convs = []
    for j in range(block.dead, stop):
        conv = weights.conv(prefix, f"conv{j + 1}", f"bn{j + 1}" if block.passed[j] else None, j + 1 < whole)
        kernel, more = conv.kernel, block.features[j] - block.passed[j]
        if j > block.dead:
            kernel = np.pad(kernel, ((0, 0), (0, 0), (0, block.features[j - 1] - block.passed[j - 1]), (0, 0)))
        norm = {part: np.pad(value, (0, more), constant_values=part == "var") for part, value in conv.norm.items()}
        convs.append(dataclasses.replace(conv, kernel=kernel, norm=norm))
    return convs


def _entering(branch: Chain, last: Mask, inner: Mapping[int, Mask], raw: Mapping[int, Mask]) -> tuple[Mask, ...]:
    """Return which outputs of each convolution of a branch are needed after its BatchNorm, see `TracedBlock`."""
    found = []
    for i in range(len(branch.convs)):
        needed = last
        if i + 1 < len(branch.convs):
            needed = np.any(branch.convs[i + 1].kernel[..., branch.keep[i + 1]] != 0, (0, 1, 3))
        needed = needed | inner.get(branch.dead + i, False)
        if i + 1 < len(branch.convs) and not needed.any():  # the next one keeps one input, as in `liveness.trace`
            needed[np.argmax(raw.get(branch.dead + i, needed))] = True
        found.append(needed)
    return tuple(found)


def _trace_stem(weights: Weights, stem: widths_lib.Stem, need: Mask) -> TracedStem:
    convs = [
        weights.conv("backbone", f"stem_conv{i}", f"stem_bn{i}", True)
        for i in range(stem.dead + 1, len(stem.features) + 1)
    ]
    chain = liveness.trace(convs, stem.dead, need, weights.params.get("backbone/constant"))
    return TracedStem(chain, None if chain.wanted is None else liveness.expand(chain.wanted, stem.reads, 3))
