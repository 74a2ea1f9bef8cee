"""Exact compaction: the network that is left when what the zero groups made useless is taken away.

A group is an input channel of one convolution. A channel that no reader wants goes with the filter and the BatchNorm
entry that make it. The residual stream's channels are put in an order in which those needed longest come first, so that
every block carries a prefix of them, and those that one layer wants lie in few ranges, which it gathers by slices. What
a convolution without live inputs puts out is a constant: it folds into what follows. In evaluation mode the outputs
stay the same up to rounding.
"""

import dataclasses

import jax
import numpy as np
from flax import traverse_util

from mtl_sparse.compaction import liveness
from mtl_sparse.models import deeplab, multitask, resnet
from mtl_sparse.models import widths as widths_lib
from mtl_sparse.runtime.errors import UserError


def compact(
    model: multitask.MultiTaskModel,
    variables,
    *,
    size: tuple[int, int] | None = None,
    multiple: int = 1,
    costs: liveness.Costs | None = None,
):
    """The physically smaller model with the same outputs, and its variables.

    Args:
      model: dense or compact already. Heads of a kind that is not the project's stay as they are.
      variables: {"params", "batch_stats"} of the model.
      size: (height, width) of the images; where given, the atrous taps that would meet only padding at this size (and
        at any smaller one) go, too.
      multiple: widths are filled up to multiples of it with channels that are not needed.
      costs: where gathering channels pays; by default as measured on a CPU.

    Returns:
      (model, variables): the model with its `widths` set; arrays in NumPy, of the dtype they had.

    Raises:
      UserError: another model's variables, another model than MultiTaskModel, a multiple below 1.
    """
    if not isinstance(model, multitask.MultiTaskModel):
        raise UserError(f"compact takes a MultiTaskModel, not {type(model).__name__}")
    if multiple < 1:
        raise UserError(f"compact.multiple={multiple}: it must be at least 1")
    _check_fits(model, variables)
    return _Compactor(model, variables, size, multiple, costs or liveness.Costs()).run()


def _check_fits(model, variables):
    expected = multitask.shapes(model)
    given = {"/".join(path): np.shape(leaf) for path, leaf in traverse_util.flatten_dict(dict(variables)).items()}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise UserError(
                f"these variables are of another model: {name} is {given.get(name, 'absent')} in them, "
                f"{expected.get(name, 'absent')} in the model"
            )


def _spread(wanted: np.ndarray, reads: widths_lib.Ranges | None, width: int) -> np.ndarray:
    """Mask over the `width` channels of a stream, from a mask over those that a layer reads of it."""
    if reads is None:
        return wanted
    mask = np.zeros(width, bool)
    mask[_indices(reads)] = wanted
    return mask


def _indices(ranges: widths_lib.Ranges) -> np.ndarray:
    return np.concatenate([np.arange(start, stop) for start, stop in ranges])


class _Compactor:
    def __init__(self, model, variables, size, multiple, costs):
        self.model, self.layers, self.multiple, self.costs = model, model.layers(), multiple, costs
        self.feature_size = size and tuple(-(-side // resnet.OUTPUT_STRIDE) for side in size)
        variables = jax.device_get(variables)
        self.params = traverse_util.flatten_dict(variables["params"], sep="/")
        self.stats = traverse_util.flatten_dict(variables.get("batch_stats", {}), sep="/")
        self.new_params, self.new_stats = {}, {}

    def run(self):
        places = resnet.places(self.model.depth)[: len(self.layers.blocks)]
        named_heads = [(name, head) for (name, *_), head in zip(self.model.heads, self.layers.heads, strict=True)]
        head_chains = [self._trace_head(*named) for named in named_heads]
        self._readers = list(zip(self.model.points(), self.layers.heads, head_chains, strict=True))
        self._trace_blocks(places)
        self._order_streams()
        stem = self._build_stem()
        blocks = tuple(self._build_block(i, place.name) for i, place in enumerate(places))
        heads = tuple(
            self._build_head(*named, traced, *self._kept_at.get(point, (np.arange(0), 0)))
            for named, (point, _, traced) in zip(named_heads, self._readers, strict=True)
        )
        model = self.model.clone(widths=widths_lib.Widths(stem, blocks, heads, self.model.attach))
        return model, {
            "params": traverse_util.unflatten_dict(self.new_params, sep="/"),
            "batch_stats": traverse_util.unflatten_dict(self.new_stats, sep="/"),
        }

    # Reading the old model.

    def _conv(self, prefix, name, norm, relu) -> liveness.Conv:
        kernel = self.params[f"{prefix}/{name}/kernel"]
        if norm is None:
            return liveness.Conv(
                f"{prefix}/{name}", f"{prefix}/{name}", kernel, {"bias": self.params[f"{prefix}/{name}/bias"]}, relu
            )
        path = f"{prefix}/{norm}"
        values = {part: self.params[f"{path}/{part}"] for part in ("scale", "bias")}
        values |= {part: self.stats[f"{path}/{part}"] for part in ("mean", "var")}
        return liveness.Conv(f"{prefix}/{name}", path, kernel, values, relu)

    def _trace_head(self, task, head):
        """(chain of the trunk, chains of what reads the features), None for a head of another kind."""
        if head is None:
            return None
        prefix = f"head_{task}"
        if isinstance(head, widths_lib.Classifier):
            if head.dead:
                return None, [None]
            conv = self._conv(prefix, "conv", None, True)
            return None, [liveness.trace([conv], 0, np.ones(conv.kernel.shape[-1], bool))]
        names = [("project", "project_bn", True), ("conv", "conv_bn", True), ("out", None, False)][head.dead :]
        convs = [self._conv(prefix, *name) for name in names]
        constant = self.params.get(f"{prefix}/constant")
        need = np.ones(len(constant) if constant is not None else convs[-1].kernel.shape[-1], bool)
        trunk = liveness.trace(convs, head.dead, need, constant)
        branches = [None] * len(head.branches)
        if trunk.wanted is None:
            return trunk, branches
        project = convs[0]
        live, fixed = project.kernel.copy(), 0
        for i, (name, place) in enumerate(_branches(head)):
            if trunk.wanted[place].any():
                chain = liveness.trace([self._conv(prefix, name, f"{name}_bn", True)], 0, trunk.wanted[place])
                if chain.convs:
                    branches[i] = chain
                else:  # a constant into the projection: its BatchNorm takes it
                    fixed += chain.constant @ project.kernel[0, 0, place].astype(np.float64)
                    live[:, :, place] = 0
        mean = (project.norm["mean"] - fixed).astype(project.norm["mean"].dtype)
        convs[0] = dataclasses.replace(project, kernel=live, norm={**project.norm, "mean": mean})
        return liveness.trace(convs, head.dead, need), branches

    def _heads_want(self, point, width) -> np.ndarray:
        """Which of the `width` channels at a point the heads there want."""
        wanted = np.zeros(width, bool)
        for there, head, traced in self._readers:
            if there == point and traced is None:  # a head that is not ours reads the features as they are
                wanted[:] = True
            elif there == point:
                for chain, reads in zip(traced[1], head.reads, strict=True):
                    if chain is not None and chain.wanted is not None:
                        wanted |= _spread(chain.wanted, reads, width)
        return wanted

    def _streams(self):
        """(start, stop) of each residual stream: it is the same before blocks start to stop - 1, but for its width."""
        blocks = self.layers.blocks
        starts = [0] + [i + 1 for i, block in enumerate(blocks) if block.shortcut != "identity"]
        return list(zip(starts, [*starts[1:], len(blocks) + 1], strict=True))

    def _trace_blocks(self, places):
        """Per block: the chains of branch and shortcut, what they want, and which channels are needed before it."""
        count = len(places)
        self._points = ["stem", *(place.name for place in places)]  # before block i at index i
        self.head_wants = [self._heads_want(point, self._stream_width(i)) for i, point in enumerate(self._points)]
        self._pinned = [
            any(point in self._points[start:stop] and traced is None for point, _, traced in self._readers)
            for start, stop in self._streams()
            for _ in range(start, stop)
        ]
        need = self.head_wants[-1] | self._pinned[-1]
        self.needs = [need]  # before block i at index i, after the last block at the end
        self.branches, self.shortcuts, self.wants, self.stops = [], [], [], []
        for i in reversed(range(count)):
            block, prefix = self.layers.blocks[i], f"backbone/{places[i].name}"
            width = self._stream_width(i)
            branch = shortcut = None
            wants = [np.zeros(width, bool), np.zeros(width, bool)]
            inner = {}  # what heads want inside the branch, by the convolution's place in it
            for j in range(block.dead, len(block.features)):
                wanted = self._heads_want(f"{places[i].name}/conv{j + 1}", block.features[j])
                inner |= {j: wanted} if wanted.any() else {}
            stop = len(block.features) if need.any() else 1 + max(inner, default=-1)
            if stop:
                whole = 3 if resnet.STAGES[self.model.depth][0] else 2
                convs = [self._conv(prefix, f"conv{j}", f"bn{j}", j < whole) for j in range(block.dead + 1, stop + 1)]
                read = {j - block.dead: wanted for j, wanted in inner.items()}
                last = need if need.any() else np.zeros(block.features[stop - 1], bool)
                ones = block.reads == ()
                branch = liveness.trace(convs, block.dead, last, np.zeros(len(need)), read, ones)
                if branch.wanted is not None:
                    wants[0] = _spread(branch.wanted, block.reads, width)
            if need.any():
                if block.shortcut == "conv":
                    shortcut = liveness.trace([self._conv(prefix, "downsample_conv", "downsample_bn", False)], 0, need)
                    if shortcut.wanted is not None:
                        wants[1] = _spread(shortcut.wanted, block.shortcut_reads, width)
                elif block.shortcut == "identity":
                    wants[1] = np.pad(need, (0, width - len(need)))
            need = wants[0] | wants[1] | self.head_wants[i] | self._pinned[i]
            self.branches.insert(0, branch)
            self.shortcuts.insert(0, shortcut)
            self.wants.insert(0, wants)
            self.stops.insert(0, stop)
            self.needs.insert(0, need)

    def _stream_width(self, i):
        """Channels of the residual stream before block i."""
        return self.layers.blocks[i - 1].stream if i else self.layers.stem.stream

    # Which channels of the residual stream stay, in which order.

    def _order_streams(self):
        """`order[i]`: the channels before block i that stay, in their new order; at the end, after the last block."""
        count = len(self.layers.blocks)
        self.order, self._kept_at = [None] * (count + 1), {}
        for start, stop in self._streams():
            width = len(self.needs[start])
            readers = []  # the last first
            for i in reversed(range(start, stop)):
                if i < count:
                    readers += [self.wants[i][1]] * (i == stop - 1) + [self.wants[i][0]]
                readers.append(self.head_wants[i])
            readers = [np.pad(mask, (0, width - len(mask))) for mask in readers]
            order = np.arange(width) if self._pinned[start] else liveness.stream_order(readers)
            for i in range(start, stop):
                kept = int(self.needs[i].sum())
                filled = self._padded(kept, width)
                while kept < filled and order[kept] < len(self.needs[i]):  # a compact stream narrows on its way
                    kept += 1
                self.order[i] = order[:kept]
                self._kept_at[self._points[i]] = self.order[i], len(self.needs[i])

    def _padded(self, count, total):
        return min(-(-count // self.multiple) * self.multiple, total)

    def _kept(self, mask):
        """Indices of a mask, filled up to the multiple with further ones."""
        count = self._padded(int(mask.sum()), len(mask))
        return np.sort(np.concatenate([np.flatnonzero(mask), np.flatnonzero(~mask)[: count - int(mask.sum())]]))

    # Writing the new model.

    def _write(self, conv: liveness.Conv, rows, columns):
        """Writes some rows and columns of a convolution; row -1 is of zeros, rows None are all."""
        kernel = conv.kernel
        if rows is not None:
            kernel = np.concatenate([kernel, np.zeros_like(kernel[:, :, :1])], 2)[:, :, rows]
        self.new_params[f"{conv.name}/kernel"] = kernel[..., columns]
        for part, value in conv.norm.items():
            target = self.new_stats if part in ("mean", "var") else self.new_params
            target[f"{conv.norm_name}/{part}"] = value[columns]

    def _write_chain(self, chain: liveness.Chain, rows, last) -> tuple[int, ...]:
        """Writes a chain whose first convolution takes `rows` and whose last puts out `last`; returns its widths."""
        widths = [0] * chain.dead
        for i, conv in enumerate(chain.convs):
            columns = self._columns(chain, i, last)
            self._write(conv, rows, columns)
            widths.append(len(columns))
            rows = columns
        return (*widths[:-1], len(last))

    def _columns(self, chain, i, last):
        return last if last is not None and i == len(chain.convs) - 1 else self._kept(chain.keep[i])

    def _write_constant(self, prefix, *values):
        dtype = next(iter(self.params.values())).dtype
        self.new_params[f"{prefix}/constant"] = np.asarray(sum(values)).astype(dtype)

    def _reads(self, chain: liveness.Chain, wanted, order, old_reads, last):
        """How a chain's first convolution takes its channels: (ranges, their rows in its old kernel)."""
        if chain is None or chain.wanted is None:
            return (() if chain and chain.convs and not chain.dead else None), None
        conv = chain.convs[0]
        rows = np.full(len(wanted), -1)
        old = np.arange(len(wanted)) if old_reads is None else _indices(old_reads)
        rows[old] = np.arange(len(old))
        macs = conv.kernel.shape[0] * conv.kernel.shape[1] * len(self._columns(chain, 0, last))
        ranges = liveness.choose_ranges(wanted[order], macs, self.costs)
        return ranges, rows[order if ranges is None else order[_indices(ranges)]]

    def _build_stem(self):
        stem, last = self.layers.stem, self.order[0]
        count = len(stem.features)
        if not len(last):
            return widths_lib.Stem((0,) * count)
        names = [(f"stem_conv{i}", f"stem_bn{i}", True) for i in range(stem.dead + 1, count + 1)]
        old_constant = self.params.get("backbone/constant")
        chain = liveness.trace(
            [self._conv("backbone", *name) for name in names], stem.dead, self.needs[0], old_constant
        )
        wanted = None if chain.wanted is None else _spread(chain.wanted, stem.reads, 3)
        reads, rows = self._reads(chain, wanted, np.arange(3), stem.reads, last)
        features = self._write_chain(chain, rows, last)
        if not chain.convs:
            self._write_constant("backbone", chain.constant[last])
        return widths_lib.Stem(features, chain.dead, reads)

    def _build_block(self, i, name):
        block, prefix = self.layers.blocks[i], f"backbone/{name}"
        branch, shortcut = self.branches[i], self.shortcuts[i]
        order, last = self.order[i], self.order[i + 1]
        if branch is None:
            return widths_lib.Block((0,) * len(block.features), block.shortcut)
        goes_on = self.needs[i + 1].any()
        if not goes_on:  # only heads read the branch
            last = self._columns(branch, len(branch.convs) - 1, None)
        reads, rows = self._reads(branch, self.wants[i][0], order, block.reads, last)
        features = self._write_chain(branch, rows, last)
        for j in range(branch.dead, self.stops[i]):
            kept = self._columns(branch, j - branch.dead, last)
            self._kept_at[f"{name}/conv{j + 1}"] = kept, block.features[j]
        if not goes_on:
            return widths_lib.Block(features, "none", branch.dead, reads)
        kind = block.shortcut
        shortcut_reads, rows = self._reads(shortcut, self.wants[i][1], order, block.shortcut_reads, last)
        if shortcut is not None:
            kind = "conv" if shortcut.convs else "constant"
            self._write_chain(shortcut, rows, last)
        if not branch.convs or kind == "constant":
            constants = [chain.constant[last] for chain in (branch, shortcut) if chain is not None and not chain.convs]
            if f"{prefix}/constant" in self.params:
                constants.append(self.params[f"{prefix}/constant"][last])
            self._write_constant(prefix, *constants)
        return widths_lib.Block(features, kind, branch.dead, reads, shortcut_reads)

    def _build_head(self, task, head, traced, order, width):
        """A head that reads `order` of the `width` channels at its point."""
        prefix = f"head_{task}"
        if traced is None or isinstance(head, widths_lib.Classifier):
            self.new_params |= {path: value for path, value in self.params.items() if path.startswith(f"{prefix}/")}
            self.new_stats |= {path: value for path, value in self.stats.items() if path.startswith(f"{prefix}/")}
            return head and self._build_classifier(prefix, head, traced[1][0], order, width)
        trunk, branches = traced
        count = len(head.branches)
        widths, reads, taps, rows = [0] * count, [None] * count, list(head.taps), []
        for i, (_, place) in enumerate(_branches(head)):
            if trunk.wanted is None or not trunk.wanted[place].any():
                continue
            chain, columns = branches[i], self._kept(trunk.wanted[place])
            if 0 < i < count - 1:
                taps[i - 1] = self._taps(chain.convs[0].kernel, deeplab.RATES[i - 1])
                chain = dataclasses.replace(chain, convs=[_middle(chain.convs[0], taps[i - 1])])
            wanted = _spread(chain.wanted, head.reads[i], width)
            reads[i], input_rows = self._reads(chain, wanted, order, head.reads[i], columns)
            self._write(chain.convs[0], input_rows, columns)
            widths[i] = len(columns)
            rows.append(place.start + columns)
        outputs = len(trunk.constant) if not trunk.convs else trunk.convs[-1].kernel.shape[-1]
        features = self._write_chain(trunk, np.concatenate(rows) if rows else None, np.arange(outputs))
        if not trunk.convs:
            self._write_constant(prefix, trunk.constant)
        return widths_lib.Head(tuple(widths), features[:2], trunk.dead, tuple(reads), tuple(taps))

    def _build_classifier(self, prefix, head, chain, order, width):
        """The classification head without the inputs that it ignores; its parameters have been taken over."""
        if head.dead:
            return head
        if chain.convs:
            wanted = _spread(chain.wanted, head.reads[0], width)
            every = np.arange(chain.convs[0].kernel.shape[-1])
            reads, rows = self._reads(chain, wanted, order, head.reads[0], every)
            self._write(chain.convs[0], rows, every)
            return widths_lib.Classifier((reads,))
        dense = {}
        for path in [path for path in self.new_params if path.startswith(f"{prefix}/")]:
            dense[path.removeprefix(f"{prefix}/")] = self.new_params.pop(path).astype(np.float64)
        hidden = np.maximum(chain.constant @ dense["fc1/kernel"] + dense["fc1/bias"], 0)
        self._write_constant(prefix, hidden @ dense["fc2/kernel"] + dense["fc2/bias"])
        return widths_lib.Classifier(dead=True)

    def _taps(self, kernel, rate):
        """Height and width of an atrous kernel without the taps that would meet only padding."""
        if self.feature_size is None:
            return kernel.shape[:2]
        return tuple(
            1 if size <= rate else taps for taps, size in zip(kernel.shape[:2], self.feature_size, strict=True)
        )


def _branches(head: widths_lib.Head):
    """(layer name, its place among the projection's inputs as a slice) of each of a head's branches."""
    ends = np.cumsum(head.branches).tolist()
    return [
        (name, slice(end - width, end)) for name, end, width in zip(deeplab.BRANCHES, ends, head.branches, strict=True)
    ]


def _middle(conv: liveness.Conv, taps: tuple[int, int]) -> liveness.Conv:
    """`conv` with only the middle row or column of its kernel where `taps` says 1."""
    kernel = conv.kernel
    for axis in range(2):
        if taps[axis] == 1:
            kernel = np.take(kernel, [kernel.shape[axis] // 2], axis)
    return dataclasses.replace(conv, kernel=kernel)
