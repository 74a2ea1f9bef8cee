"""The channels of a function: which inputs and outputs of its kernels are the same channel.

A channel is a set of entries of activations that an equation passes on: through a normalization, an activation, a
residual sum, a concatenation, a depthwise convolution. It is made by kernels (their outputs) and read by kernels (their
inputs). This is the graph that groups of weights and the cost of a pruned model are found from.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix, csgraph

from mtl_sparse.compaction import graph as graph_lib
from mtl_sparse.compaction.graph import Graph, Node
from mtl_sparse.compaction.primitives import rule_of
from mtl_sparse.compaction.rules import Elementwise
from mtl_sparse.compaction.shaping import segments
from mtl_sparse.compaction.streams import Axis
from mtl_sparse.runtime.errors import UserError

Numbers = np.ndarray  # integers of a shape that broadcasts against a parameter's


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A parameter that activations are multiplied with: a kernel of a convolution, a dense layer or an attention.

    Attributes:
      path: of the parameter.
      shape: of the parameter.
      inputs: channel that each entry reads, int32, of a shape that broadcasts against the parameter's.
      outputs: channel that each entry contributes to, likewise.
      macs: multiply-accumulates of one entry, for the example inputs.
      read: fraction of the entries that the function reads; less than 1 where taps of an atrous convolution meet only
        padding.
    """

    path: str
    shape: tuple[int, ...]
    inputs: Numbers
    outputs: Numbers
    macs: float
    read: float = 1.0

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Needed:
    """Channels that are needed whole at a point of the function, by an equation that mixes them or as an output."""

    channels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """The channels of a function.

    Attributes:
      count: number of channels.
      events: the kernels, and where channels are needed whole, in the order of the function.
      sources: channels that depend on the inputs without a kernel, such as those of the image.
      vectors: path -> channel of each entry, of parameters that have one entry a channel, such as biases.
      others: number of entries of all other parameters.
    """

    count: int
    events: tuple[Kernel | Needed, ...]
    sources: np.ndarray
    vectors: dict[str, Numbers]
    others: int

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernels, in order."""
        return tuple(event for event in self.events if isinstance(event, Kernel))


def of(fn: Any, params: Any, *inputs: Any, unroll: bool = False) -> Channels:
    """Find the channels of a function.

    Args:
      fn: pure function of (params, *inputs).
      params: pytree of arrays or of `jax.ShapeDtypeStruct`.
      *inputs: example inputs, of the same.
      unroll: whether to unroll `lax.scan`.

    Returns:
      Its channels.

    Raises:
      UserError: the function has side effects, or multiplies its inputs with none of its parameters.
    """
    graph = graph_lib.trace(fn, params, inputs, unroll=unroll)
    found = _Finder(graph).find()
    if not found.kernels:
        raise UserError(
            "NO_KERNELS",
            "expected a function that multiplies its inputs with parameters by a convolution or a matrix product, got "
            "one without; pass the parameters as the first argument, and loops over layers with unroll=True",
        )
    return found


class _Finder:
    """Elements are the entries of the axes of all variables, in one numbering; channels are sets of elements."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        starts = np.cumsum([0, *(sum(graph.shape(v)) for v in range(len(graph.avals)))])
        self._start = {}
        for variable in range(len(graph.avals)):
            place = int(starts[variable])
            for axis, size in enumerate(graph.shape(variable)):
                self._start[variable, axis] = place
                place += size
        self._total = int(starts[-1])
        self._made_by = {variable: node for node in graph.nodes for variable in node.outputs}
        self._leaf = dict(zip(graph.params, graph.paths, strict=True))
        self._edges: list[tuple[np.ndarray, np.ndarray]] = []
        self._read: dict[int, Kernel] = {}  # node's place -> kernel, with elements for channels
        self._first: dict[int, tuple[Numbers, Numbers]] = {}  # parameter -> elements of its first reader
        self._vectors: dict[int, Numbers] = {}
        self._heads = self._find_heads()

    def elements(self, axis: Axis) -> np.ndarray:
        """Return the elements of an axis."""
        return self._start[axis] + np.arange(self._graph.shape(axis[0])[axis[1]])

    def find(self) -> Channels:
        graph = self._graph
        needed: dict[int, list[np.ndarray]] = {}
        sources: list[np.ndarray] = [
            self.elements((v, axis)) for v in graph.inputs for axis in range(len(graph.shape(v)))
        ]
        for place, node in enumerate(graph.nodes):
            if not any(graph.varies[i] for i in node.outputs):
                continue
            linked = self._link(node)
            if node.name in ("conv_general_dilated", "dot_general") and not all(graph.varies[i] for i in node.inputs):
                linked |= self._product(place, node)
            for k, variable in enumerate(node.inputs):
                if graph.varies[variable]:
                    free = [a for a in range(len(graph.shape(variable))) if (False, k, a) not in linked]
                    needed.setdefault(place, []).extend(self.elements((variable, axis)) for axis in free)
            for k, variable in enumerate(node.outputs):
                free = [a for a in range(len(graph.shape(variable))) if (True, k, a) not in linked]
                sources += [self.elements((variable, axis)) for axis in free]
        last = [self.elements((v, axis)) for v in graph.outputs for axis in range(len(graph.shape(v)))]
        needed[len(graph.nodes)] = last
        return self._collect(needed, sources)

    def _link(self, node: Node) -> set[tuple[bool, int, int]]:
        """Add the edges of an equation; return its axes that have some, as (is a result, its index, axis)."""
        graph, linked = self._graph, set()
        for link in rule_of(node.name).links(node, graph):
            variable, out = node.inputs[link.operand], node.outputs[link.output]
            one, other = self.elements((variable, link.axis)), self.elements((out, link.out_axis))
            if link.to is None and len(one) != len(other):
                continue
            linked |= {(False, link.operand, link.axis), (True, link.output, link.out_axis)}
            to = np.arange(len(one)) if link.to is None else link.to
            if graph.varies[variable]:
                self._edges.append((one[to >= 0], other[to[to >= 0]]))
            elif link.to is None and node.name not in ("dot_general", "conv_general_dilated"):
                self._vector(variable, link.axis, other)
        if node.name == "reshape":
            linked |= self._reshape(node)
        return linked

    def _reshape(self, node: Node) -> set[tuple[bool, int, int]]:
        """Link an axis that is merged from several, or split into several, with the one that has the channels."""
        graph = self._graph
        linked: set[tuple[bool, int, int]] = set()
        (x,), (y,) = node.inputs, node.outputs
        if 0 in graph.shape(x):
            return linked
        for one, other in segments(graph.shape(x), graph.shape(y)):
            merged: Axis
            if len(one) == 1 and len(other) > 1:
                merged, parts, side = (x, one[0]), [(y, axis) for axis in other], False
                chosen = [part for part in parts if part in self._heads]
            elif len(other) == 1 and len(one) > 1:
                merged, parts, side = (y, other[0]), [(x, axis) for axis in one], True
                chosen = [part for part in parts if part in self._heads] or [p for p in parts if p in self._made]
            else:
                continue
            if len(chosen) != 1:
                continue
            sizes = [graph.shape(v)[axis] for v, axis in parts]
            along = np.indices(sizes)[parts.index(chosen[0])].reshape(-1)
            self._edges.append((self.elements(merged), self.elements(chosen[0])[along]))
            linked |= {(side, 0, merged[1])} | {(not side, 0, axis) for _, axis in parts}
        return linked

    def _product(self, place: int, node: Node) -> set[tuple[bool, int, int]]:
        """Record the kernel of a product; return the axes of the activations and of the result that it explains."""
        graph = self._graph
        k = next(k for k in range(2) if not graph.varies[node.inputs[k]])
        if node.name == "dot_general":
            found = self._dot(node, k)
        else:
            found = self._conv(node) if k == 1 and node.params["batch_group_count"] == 1 else None
        if found is None:
            return set()
        inputs, outputs, explained = found
        weights = node.inputs[k]
        sources = self._sources(weights, (inputs, outputs))
        if len(sources) != 1:
            return set()
        leaf, (inputs, outputs) = sources[0]
        if leaf in self._first:
            for before, now in zip(self._first[leaf], (inputs, outputs), strict=True):
                one, other = np.broadcast_arrays(before, now)
                self._edges.append((one.reshape(-1), other.reshape(-1)))
        self._first.setdefault(leaf, (inputs, outputs))
        size = math.prod(graph.shape(leaf))
        read = math.prod(graph.shape(weights)) / size
        self._read[place] = Kernel(
            self._leaf[leaf], graph.shape(leaf), inputs, outputs, self._macs(node) / size, min(1.0, read)
        )
        return explained

    def _dot(self, node: Node, k: int) -> tuple[Numbers, Numbers, set[tuple[bool, int, int]]] | None:
        """Return (inputs, outputs) as elements that broadcast against the weights, and the axes that this explains."""
        graph = self._graph
        contracted, batch = node.params["dimension_numbers"]
        weights, x = node.inputs[k], node.inputs[1 - k]
        if batch[0] or not contracted[0]:
            return None
        pairs = list(zip(contracted[1 - k], contracted[k], strict=True))
        if len(pairs) > 1:  # the axis of attention heads, or the one that is made by a kernel
            chosen = [pair for pair in pairs if (x, pair[0]) in self._heads] or [
                pair for pair in pairs if (x, pair[0]) in self._made
            ]
        else:
            chosen = pairs
        if not chosen:
            return None
        x_axis, w_axis = chosen[0]
        rank = len(graph.shape(weights))
        inputs = _along(self.elements((x, x_axis)), w_axis, rank)
        free = [axis for axis in range(rank) if axis not in contracted[k]]
        out_rank = len(graph.shape(node.outputs[0]))
        first = 0 if k == 0 else out_rank - len(free)
        places = {axis: first + i for i, axis in enumerate(free)}
        made = [axis for axis in free if (node.outputs[0], places[axis]) in self._heads] or free[-1:]
        outputs = np.full((1,) * rank, -1)
        explained = {(False, 1 - k, axis) for axis in contracted[1 - k]}
        if made:
            outputs = _along(self.elements((node.outputs[0], places[made[0]])), made[0], rank)
        explained |= {(True, 0, places[axis]) for axis in made}
        return inputs, outputs, explained

    def _conv(self, node: Node) -> tuple[Numbers, Numbers, set[tuple[bool, int, int]]]:
        """Return the same of a convolution, whose second operand are the weights."""
        graph, numbers = self._graph, node.params["dimension_numbers"]
        x_axis, out_axis = numbers.lhs_spec[1], numbers.out_spec[1]
        w_out, w_in = numbers.rhs_spec[:2]
        shape = graph.shape(node.inputs[1])
        groups = node.params["feature_group_count"]
        x, y = self.elements((node.inputs[0], x_axis)), self.elements((node.outputs[0], out_axis))
        outputs = _along(y, w_out, len(shape))
        inputs = np.repeat(x.reshape(groups, shape[w_in]), shape[w_out] // groups, axis=0)  # [O, I]
        if groups == 1:
            return _along(x, w_in, len(shape)), outputs, {(False, 0, x_axis), (True, 0, out_axis)}
        target = [1] * len(shape)
        target[w_in], target[w_out] = shape[w_in], shape[w_out]
        inputs = (inputs if w_out < w_in else inputs.T).reshape(target)
        return inputs, outputs, {(False, 0, x_axis), (True, 0, out_axis)}

    def _macs(self, node: Node) -> float:
        """Return the multiply-accumulates of a product."""
        graph, out = self._graph, math.prod(self._graph.shape(node.outputs[0]))
        if node.name == "dot_general":
            return float(out * math.prod(graph.shape(node.inputs[0])[axis] for axis in self._contracted(node)))
        kernel, numbers = graph.shape(node.inputs[1]), node.params["dimension_numbers"]
        return float(out * math.prod(kernel) // kernel[numbers.rhs_spec[0]])

    @staticmethod
    def _contracted(node: Node) -> Sequence[int]:
        return node.params["dimension_numbers"][0][0]

    def _sources(self, variable: int, numbers: tuple[Numbers, ...]) -> list[tuple[int, tuple[Numbers, ...]]]:
        """Return the parameters that a variable is made of entry by entry, each with the numbers of its entries."""
        graph = self._graph
        while variable not in self._leaf:
            node = self._made_by.get(variable)
            if node is None:
                return []
            shape = graph.shape(variable)
            if node.name == "reshape":
                before = graph.shape(node.inputs[0])
                numbers = tuple(_collapsed(np.broadcast_to(x, shape).reshape(before)) for x in numbers)
            elif node.name == "transpose":
                numbers = tuple(x.transpose(np.argsort(node.params["permutation"])) for x in numbers)
            elif node.name == "squeeze":
                rank = len(graph.shape(node.inputs[0]))
                removed = tuple(sorted(axis % rank for axis in node.params["dimensions"]))
                numbers = tuple(np.expand_dims(x, removed) for x in numbers)
            elif node.name == "broadcast_in_dim":
                places = node.params["broadcast_dimensions"]
                before = graph.shape(node.inputs[0])
                others = tuple(axis for axis in range(len(shape)) if axis not in places)
                if any(x.shape[axis] != 1 for x in numbers for axis in others):
                    return []
                numbers = tuple(x.squeeze(others) for x in numbers)
                if any(m > n for x in numbers for m, n in zip(x.shape, before, strict=True)):
                    return []
            elif not (node.name == "spread" or (node.name in ("slice", "rev") and self._is_whole(node, numbers))):
                if not isinstance(rule_of(node.name), Elementwise):
                    return []
                same = dict.fromkeys(i for i in node.inputs if graph.shape(i) == shape)
                found = {leaf: x for i in same for leaf, x in self._sources(i, numbers)}
                return list(found.items())
            variable = node.inputs[0]
        return [(variable, numbers)]

    def _is_whole(self, node: Node, numbers: tuple[Numbers, ...]) -> bool:
        """Return whether a slice or a reversal leaves the numbered axes as they are."""
        if node.name == "rev":
            return all(x.shape[axis] == 1 for x in numbers for axis in node.params["dimensions"])
        before, after = (self._graph.shape(i) for i in (node.inputs[0], node.outputs[0]))
        return all(n == 1 or a == b for x in numbers for n, a, b in zip(x.shape, before, after, strict=True))

    def _vector(self, variable: int, axis: int, elements: np.ndarray) -> None:
        """Record that a parameter has one entry a channel."""
        shape = self._graph.shape(variable)
        if math.prod(shape) == shape[axis]:
            for leaf, (numbers,) in self._sources(variable, (_along(elements, axis, len(shape)),)):
                self._vectors.setdefault(leaf, numbers)

    def _find_heads(self) -> set[Axis]:
        """Return the axes of attention heads; sets `_made`, the axes that kernels make.

        Heads are the axes along which activations are multiplied with each other separately, and which are not the axis
        of the batch.
        """
        graph = self._graph
        parent: dict[Axis, Axis] = {}

        def root(axis: Axis) -> Axis:
            while parent.get(axis, axis) != axis:
                axis = parent[axis]
            return axis

        seeds: list[Axis] = []
        made: list[Axis] = []
        for node in graph.nodes:
            if not any(graph.varies[i] for i in node.outputs):
                continue
            for link in rule_of(node.name).links(node, graph):
                if link.to is None and graph.varies[node.inputs[link.operand]]:
                    parent[root((node.inputs[link.operand], link.axis))] = root(
                        (node.outputs[link.output], link.out_axis)
                    )
            if node.name == "dot_general" and all(graph.varies[i] for i in node.inputs):
                batch = node.params["dimension_numbers"][1]
                seeds += [(node.inputs[k], axis) for k in range(2) for axis in batch[k]]
            elif node.name == "dot_general":
                k = next(k for k in range(2) if not graph.varies[node.inputs[k]])
                contracted, batch = node.params["dimension_numbers"]
                rank, out = len(graph.shape(node.inputs[k])), node.outputs[0]
                free = rank - len(contracted[k]) - len(batch[k])
                out_rank = len(graph.shape(out))
                places = range(len(batch[k]), len(batch[k]) + free) if k == 0 else range(out_rank - free, out_rank)
                made += [(out, axis) for axis in places]
            elif node.name == "conv_general_dilated":
                made.append((node.outputs[0], node.params["dimension_numbers"].out_spec[1]))
        of_batch = {root((v, axis)) for v in graph.inputs for axis in range(len(graph.shape(v)))}
        heads = {root(axis) for axis in seeds} - of_batch
        makes = {root(axis) for axis in made} - of_batch
        every = [(v, axis) for v in range(len(graph.avals)) for axis in range(len(graph.shape(v))) if graph.varies[v]]
        self._made = {axis for axis in every if root(axis) in makes | heads}
        return {axis for axis in every if root(axis) in heads}

    def _collect(self, needed: dict[int, list[np.ndarray]], sources: list[np.ndarray]) -> Channels:
        """Number the channels that a kernel reads or makes, and replace elements by them."""
        one, other = (
            np.concatenate([edge[i] for edge in self._edges] or [np.arange(0)]).astype(np.int64) for i in range(2)
        )
        valid = (one >= 0) & (other >= 0)
        one, other = one[valid], other[valid]
        edges = coo_matrix((np.ones(len(one), bool), (one, other)), (self._total, self._total))
        _, label = csgraph.connected_components(edges, directed=False)
        used = np.concatenate(
            [np.arange(0)]
            + [label[x[x >= 0]] for kernel in self._read.values() for x in (kernel.inputs, kernel.outputs)]
        )
        channel = np.full(label.max(initial=-1) + 2, -1)
        names = np.unique(used)
        channel[names] = np.arange(len(names))

        def numbered(x: Numbers) -> Numbers:
            return np.where(x >= 0, channel[label[x]], -1).astype(np.int32)

        events: list[Kernel | Needed] = []
        for place in range(len(self._graph.nodes) + 1):
            if place in needed:
                found = np.unique(np.concatenate([np.arange(0), *(numbered(x) for x in needed[place])]))
                if (found >= 0).any():
                    events.append(Needed(found[found >= 0]))
            if place in self._read:
                kernel = self._read[place]
                kernel = dataclasses.replace(kernel, inputs=numbered(kernel.inputs), outputs=numbered(kernel.outputs))
                last = events[-1] if events else None
                if isinstance(last, Kernel) and last.path == kernel.path:  # the taps of one convolution
                    macs, read = kernel.macs + last.macs, min(1.0, kernel.read + last.read)
                    events[-1] = dataclasses.replace(kernel, macs=macs, read=read)
                else:
                    events.append(kernel)
        graph = self._graph
        kernels = {kernel.path for kernel in self._read.values()}
        vectors = {
            self._leaf[leaf]: numbered(x)
            for leaf, x in self._vectors.items()
            if self._leaf[leaf] not in kernels and (numbered(x) >= 0).all()
        }
        others = sum(
            math.prod(graph.shape(v)) for v, path in self._leaf.items() if path not in kernels and path not in vectors
        )
        free = np.unique(np.concatenate([np.arange(0), *(numbered(x) for x in sources)]))
        return Channels(len(names), tuple(events), free[free >= 0], vectors, others)


def _along(numbers: np.ndarray, axis: int, rank: int) -> Numbers:
    """Return numbers along one axis of an array with `rank` axes."""
    return numbers.reshape([len(numbers) if i == axis else 1 for i in range(rank)])


def _collapsed(numbers: Numbers) -> Numbers:
    """Return the numbers with one entry along each axis along which they are the same."""
    for axis in range(numbers.ndim):
        first = numbers.take([0], axis)
        if numbers.shape[axis] > 1 and np.array_equal(np.broadcast_to(first, numbers.shape), numbers):
            numbers = first
    return numbers
