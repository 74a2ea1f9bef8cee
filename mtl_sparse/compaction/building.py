"""Building of the compact model: the widths and the weights of each part."""

import dataclasses
from collections.abc import Sequence
from typing import cast

import numpy as np

from mtl_sparse.compaction import liveness, ordering, tracing
from mtl_sparse.compaction.liveness import Chain, Conv, Indices, Mask
from mtl_sparse.compaction.ordering import Kept
from mtl_sparse.compaction.weights import Weights
from mtl_sparse.models import deeplab
from mtl_sparse.models import widths as widths_lib

Reads = widths_lib.Ranges | None


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the compact model.

    Attributes:
      multiple: widths are filled up to a multiple of it.
      costs: costs that decide whether a layer gathers its channels.
      feature_size: (height, width) of the features, for which atrous taps that meet only padding are removed; None
        keeps all taps.
    """

    multiple: int
    costs: liveness.Costs
    feature_size: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class _Outputs:
    """Outputs of a convolution that remain.

    Attributes:
      channels: their indices in the old model, in the new order.
      passed: how many of them, the first ones, enter what follows the convolution.
    """

    channels: Indices
    passed: int


class Builder:
    """Builds the parts of a compact model, one after the other.

    Attributes:
      written: weights of the compact model so far.
    """

    def __init__(self, old: Weights, options: Options) -> None:
        """Create a builder that has written nothing.

        Args:
          old: weights of the old model.
          options: options of the compact model.
        """
        self._old, self._options = old, options
        self.written = Weights()

    def stem(self, old: widths_lib.Stem, traced: tracing.TracedStem | None, last: Indices) -> widths_lib.Stem:
        """Write the stem.

        Args:
          old: its widths in the old model.
          traced: what is needed of it.
          last: channels of the stream after it that remain.

        Returns:
          Its new widths.
        """
        if traced is None:
            return widths_lib.Stem((0,) * len(old.features))
        outputs = self._chain_outputs(traced.chain, last)
        count = len(outputs[0].channels) if outputs else len(last)
        reads, rows = self._reads(traced.chain, traced.wants, np.arange(3), old.reads, count)
        features = self._write_chain(traced.chain, rows, outputs, len(last))
        if traced.chain.constant is not None:
            self._write_constant("backbone", [traced.chain.constant[last]])
        return widths_lib.Stem(features, traced.chain.dead, reads)

    def block(
        self, name: str, old: widths_lib.Block, traced: tracing.TracedBlock, before: Indices, after: Kept
    ) -> tuple[widths_lib.Block, dict[str, Kept]]:
        """Write a residual block.

        Args:
          name: its name.
          old: its widths in the old model.
          traced: what is needed of it.
          before: channels of the stream before it that remain.
          after: channels of the stream after it that remain.

        Returns:
          (its new widths, the channels that remain at each attachment point inside it).
        """
        branch, shortcut, prefix = traced.branch, traced.shortcut, f"backbone/{name}"
        if branch is None:
            return widths_lib.Block((0,) * len(old.features), old.shortcut), {}
        last, outputs = after.channels, self._outputs(branch, traced.entering, after.channels)
        count = len(outputs[0].channels) if outputs else len(last)
        reads, rows = self._reads(branch, traced.branch_wants, before, old.reads, count)
        features = self._write_chain(branch, rows, outputs, len(last))
        passed = (*(0 for _ in range(branch.dead)), *(one.passed for one in outputs))
        normalized = passed if outputs and passed != features else ()
        inner = {}
        for j, one in enumerate(outputs, branch.dead):
            inner[f"{name}/conv{j + 1}"] = Kept(one.channels[: one.passed], old.passed[j])
            inner[f"{name}/conv{j + 1}:raw"] = Kept(one.channels, old.features[j])
        if not len(last):  # only heads read the branch
            return widths_lib.Block(features, "none", branch.dead, reads, normalized=normalized), inner
        kind, shortcut_reads = old.shortcut, None
        if shortcut is not None:
            shortcut_reads, rows = self._reads(shortcut, traced.shortcut_wants, before, old.shortcut_reads, len(last))
            kind = "conv" if shortcut.convs else "constant"
            self._write_chain(shortcut, rows, self._chain_outputs(shortcut, last), len(last))
        if not branch.convs or kind == "constant":
            constants = [branch.constant, None if shortcut is None else shortcut.constant]
            constants.append(self._old.params.get(f"{prefix}/constant"))
            self._write_constant(prefix, [constant[last] for constant in constants if constant is not None])
        return widths_lib.Block(features, kind, branch.dead, reads, shortcut_reads, normalized), inner

    def head(self, task: str, old: tracing.Head, traced: tracing.TracedHead | None, features: Kept) -> tracing.Head:
        """Write a head.

        Args:
          task: its task.
          old: its widths in the old model; None for a head of another kind, which is copied.
          traced: what is needed of it.
          features: channels that remain where it reads.

        Returns:
          Its new widths.
        """
        prefix = f"head_{task}"
        if isinstance(old, widths_lib.Head) and traced is not None and traced.trunk is not None:
            return self._deeplab(prefix, old, traced.trunk, traced.inputs, features)
        if isinstance(old, widths_lib.Classifier) and traced is not None and traced.inputs[0] is not None:
            return self._classifier(prefix, old, traced.inputs[0], features)
        self._copy(prefix)
        return old

    def _deeplab(
        self,
        prefix: str,
        old: widths_lib.Head,
        trunk: Chain,
        inputs: Sequence[Chain | None],
        features: Kept,
    ) -> widths_lib.Head:
        count = len(old.branches)
        widths: list[int] = [0] * count
        reads: list[Reads] = [None] * count
        taps, trunk_rows = list(old.taps), []
        for i, (_, place) in enumerate(tracing.branches(old)):
            if trunk.wanted is None or not trunk.wanted[place].any():
                continue
            chain = cast(Chain, inputs[i])  # a branch that the trunk needs has convolutions and inputs
            columns = self._kept(trunk.wanted[place])
            if 0 < i < count - 1:
                taps[i - 1] = self._taps(chain.convs[0].kernel, deeplab.RATES[i - 1])
                chain = dataclasses.replace(chain, convs=[_middle(chain.convs[0], taps[i - 1])])
            wanted = liveness.expand(cast(Mask, chain.wanted), old.reads[i], features.width)
            reads[i], rows = self._reads(chain, wanted, features.channels, old.reads[i], len(columns))
            self._write(chain.convs[0], rows, columns)
            widths[i] = len(columns)
            trunk_rows.append(place.start + columns)
        outputs = len(trunk.constant) if trunk.constant is not None else trunk.convs[-1].kernel.shape[-1]
        rows = np.concatenate(trunk_rows) if trunk_rows else None
        trunk_features = self._write_chain(trunk, rows, self._chain_outputs(trunk, np.arange(outputs)), outputs)
        if trunk.constant is not None:
            self._write_constant(prefix, [trunk.constant])
        return widths_lib.Head(tuple(widths), trunk_features[:2], trunk.dead, tuple(reads), tuple(taps))

    def _classifier(
        self, prefix: str, old: widths_lib.Classifier, chain: Chain, features: Kept
    ) -> widths_lib.Classifier:
        if chain.constant is None:
            self._copy(prefix)
            wanted = liveness.expand(cast(Mask, chain.wanted), old.reads[0], features.width)
            outputs = np.arange(chain.convs[0].kernel.shape[-1])
            reads, rows = self._reads(chain, wanted, features.channels, old.reads[0], len(outputs))
            self._write(chain.convs[0], rows, outputs)
            return widths_lib.Classifier((reads,))
        dense = {path: value.astype(np.float64) for path, value in self._old.below(prefix).params.items()}
        hidden = np.maximum(chain.constant @ dense[f"{prefix}/fc1/kernel"] + dense[f"{prefix}/fc1/bias"], 0)
        self._write_constant(prefix, [hidden @ dense[f"{prefix}/fc2/kernel"] + dense[f"{prefix}/fc2/bias"]])
        return widths_lib.Classifier(dead=True)

    def _reads(
        self, chain: Chain, wanted: Mask | None, order: Indices, old_reads: Reads, count: int
    ) -> tuple[Reads, Indices | None]:
        """Choose how a chain's first convolution reads its channels.

        Args:
          chain: the chain.
          wanted: which channels in front of it it needs.
          order: channels in front of it that remain, in their new order.
          old_reads: channels that the convolution reads in the old model.
          count: outputs of the convolution that remain.

        Returns:
          (ranges that it reads in the new model, their rows in the old kernel; -1 for a row of zeros, None for all).
        """
        if chain.wanted is None or wanted is None:
            return (() if chain.convs and not chain.dead else None), None
        kernel = chain.convs[0].kernel
        rows = np.full(len(wanted), -1)
        old = np.arange(len(wanted)) if old_reads is None else liveness.indices(old_reads)
        rows[old] = np.arange(len(old))
        macs = kernel.shape[0] * kernel.shape[1] * count
        ranges = liveness.choose_ranges(wanted[order], macs, self._options.costs)
        return ranges, rows[order if ranges is None else order[liveness.indices(ranges)]]

    def _taps(self, kernel: np.ndarray, rate: int) -> tuple[int, int]:
        """Return height and width of an atrous kernel without the taps that would meet only padding."""
        height, width = kernel.shape[:2]
        if self._options.feature_size is None:
            return height, width
        rows, columns = self._options.feature_size
        return (1 if rows <= rate else height), (1 if columns <= rate else width)

    def _kept(self, mask: Mask) -> Indices:
        return ordering.kept_indices(mask, self._options.multiple)

    def _outputs(self, branch: Chain, entering: Sequence[Mask], stream: Indices) -> list[_Outputs]:
        """Return what remains of each convolution of a branch: what enters its BatchNorm, then what heads read raw.

        Args:
          branch: the branch.
          entering: see `tracing.TracedBlock`.
          stream: channels of the stream after the block that remain, which the last convolution makes.
        """
        outputs = []
        for i, (keep, enters) in enumerate(zip(branch.keep, entering, strict=True)):
            first = self._kept(enters)
            if i == len(branch.convs) - 1 and len(stream):
                first = stream
            raw = keep.copy()
            raw[first] = False
            rest = np.setdiff1d(np.arange(len(keep)), first)
            if raw.any():
                count = ordering.padded(len(first) + int(raw.sum()), len(keep), self._options.multiple) - len(first)
                rest = np.sort(np.concatenate([rest[raw[rest]], rest[~raw[rest]]])[:count])
            outputs.append(_Outputs(np.concatenate([first, rest[: len(rest) * raw.any()]]), len(first)))
        return outputs

    def _chain_outputs(self, chain: Chain, last: Indices) -> list[_Outputs]:
        """Return what remains of each convolution of a chain whose outputs are `last`; all of it is passed on."""
        kept = [*(self._kept(keep) for keep in chain.keep[:-1]), last] if chain.convs else []
        return [_Outputs(channels, len(channels)) for channels in kept]

    def _write(self, conv: Conv, rows: Indices | None, columns: Indices, normalized: int | None = None) -> None:
        """Write the given rows and columns of a convolution; row -1 is zeros, and None is all rows.

        Its BatchNorm takes the first `normalized` columns; None is all, and 0 is no BatchNorm.
        """
        kernel = conv.kernel
        if rows is not None:
            kernel = np.concatenate([kernel, np.zeros_like(kernel[:, :, :1])], 2)[:, :, rows]
        self.written.params[f"{conv.name}/kernel"] = kernel[..., columns]
        for part, value in conv.norm.items() if normalized != 0 else ():
            target = self.written.stats if part in ("mean", "var") else self.written.params
            target[f"{conv.norm_name}/{part}"] = value[columns[:normalized]]

    def _write_chain(
        self, chain: Chain, rows: Indices | None, outputs: Sequence[_Outputs], last: int
    ) -> tuple[int, ...]:
        """Write a chain.

        Args:
          chain: the chain.
          rows: what its first convolution takes.
          outputs: what remains of each of its convolutions.
          last: width of the constant if there are none.

        Returns:
          The widths of its convolutions, 0 for those that are removed.
        """
        widths = [0] * chain.dead
        for conv, one in zip(chain.convs, outputs, strict=True):
            self._write(conv, rows, one.channels, one.passed)
            widths.append(len(one.channels))
            rows = one.channels[: one.passed]
        return tuple(widths) if outputs else (*widths[:-1], last)

    def _write_constant(self, prefix: str, values: Sequence[np.ndarray]) -> None:
        self.written.params[f"{prefix}/constant"] = np.asarray(sum(values)).astype(self._old.dtype)

    def _copy(self, prefix: str) -> None:
        """Copy all weights below `prefix`."""
        part = self._old.below(prefix)
        self.written.params.update(part.params)
        self.written.stats.update(part.stats)


def _middle(conv: Conv, taps: tuple[int, int]) -> Conv:
    """Return a convolution with only the middle row or column of its kernel where `taps` is 1."""
    kernel = conv.kernel
    for axis in range(2):
        if taps[axis] == 1:
            kernel = np.take(kernel, [kernel.shape[axis] // 2], axis)
    return dataclasses.replace(conv, kernel=kernel)
