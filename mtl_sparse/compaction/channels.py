"""The channels of a function: which inputs and outputs of its kernels are the same channel.

A channel is a set of entries of activations that an equation passes on: through a normalization, an activation, a
residual sum, a concatenation, a depthwise convolution. It is made by kernels (their outputs) and read by kernels (their
inputs). This is the graph that groups of weights and the cost of a pruned model are found from.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from scipy.sparse import coo_matrix, csgraph

from mtl_sparse.compaction import graph as graph_lib
from mtl_sparse.compaction.graph import Graph, Node
from mtl_sparse.compaction.operands import Elements, Numbers, Parameters, Product, Products, along, index_of_weights
from mtl_sparse.compaction.primitives import PRODUCTS, rule_of
from mtl_sparse.compaction.shaping import segments
from mtl_sparse.compaction.streams import Axis
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.sparsity.groups import path_name

Places = frozenset[int]  # indices of `Channels.events`


@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A parameter that activations are multiplied with: a kernel of a convolution, a dense layer or an attention.

    Attributes:
      path: the parameter's path.
      shape: the parameter's shape.
      inputs: channel that each entry reads, int32, of a shape that broadcasts against the parameter's.
      outputs: channel that each entry contributes to, likewise.
      macs: multiply-accumulates of one entry, for the example inputs.
      read: fraction of the entries that the function reads; less than 1 where taps of an atrous convolution meet only
        padding.
      slots: for each entry of a grouped convolution (its group, its input and its output among those of the group),
        likewise; compaction removes whole groups, and the same inputs and outputs of all groups. Otherwise ().
      makers: events that make what it reads.
      readers: events that read what it makes.
    """

    path: str
    shape: tuple[int, ...]
    inputs: Numbers
    outputs: Numbers
    macs: float
    read: float = 1.0
    slots: tuple[Numbers, ...] = ()
    makers: Places = frozenset()
    readers: Places = frozenset()

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Needed:
    """Channels that are needed whole at a point of the function, by an equation that mixes them or as an output.

    Attributes:
      channels: the channels.
      makers: events that make them.
    """

    channels: np.ndarray
    makers: Places = frozenset()


@dataclasses.dataclass(frozen=True, eq=False)
class Free:
    """Channels that depend on the inputs without a kernel, such as those of the image."""

    channels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Vector:
    """A parameter whose entries belong to channels, such as a bias or an embedding of positions.

    Attributes:
      size: number of entries.
      channels: channel of each entry, int32, of a shape that broadcasts against the parameter's.
      readers: events that read what it is combined with.
    """

    size: int
    channels: Numbers
    readers: Places = frozenset()


@dataclasses.dataclass(frozen=True, eq=False)
class Channels:
    """The channels of a function.

    Attributes:
      count: number of channels.
      events: the kernels, where channels are needed whole, and where they begin, in the order of the function.
      vectors: path -> parameter whose entries belong to channels.
      others: number of entries of all other parameters.
      other_macs: multiply-accumulates of products with weights that are computed from parameters in a way that is not
        followed, such as a product of two.
    """

    count: int
    events: tuple[Kernel | Needed | Free, ...]
    vectors: dict[str, Vector]
    others: int
    other_macs: float = 0.0

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
    paths = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    found = _Finder(graph, dict(zip(graph.params, paths, strict=True))).find()
    if not found.kernels:
        raise UserError(
            "NO_KERNELS",
            "expected a function that multiplies its inputs with parameters by a convolution or a matrix product, got "
            "one without; pass the parameters as the first argument, and loops over layers with unroll=True",
        )
    return found


class _Finder:
    """Walks over the equations: what they link, and what they read and make."""

    def __init__(self, graph: Graph, paths: dict[int, str]) -> None:
        self._graph, self._elements = graph, Elements(graph)
        self._parameters, self._products = Parameters(graph, paths), Products(graph, self._elements)
        self._edges: list[tuple[np.ndarray, np.ndarray]] = []
        self._flows: list[list[tuple[Axis, Axis]]] = [[] for _ in graph.nodes]  # axes that an equation passes on
        self._kernels: dict[int, tuple[Kernel, Product]] = {}  # node's place -> kernel, with elements for channels
        self._first: dict[int, tuple[Numbers, ...]] = {}  # parameter -> elements of its first reader
        self._vectors: dict[int, list[tuple[Numbers, Axis]]] = {}  # parameter -> elements, axis that it meets
        self._needed: dict[int, list[Axis]] = {}  # node's place -> axes that it needs whole
        self._free: dict[int, list[Axis]] = {}  # node's place -> axes of its results that it makes of anything
        self._other_macs = 0.0

    def find(self) -> Channels:
        """Return the channels of the function."""
        graph = self._graph
        self._free[-1] = [(v, axis) for v in graph.inputs for axis in range(len(graph.shape(v)))]
        for place, node in enumerate(graph.nodes):
            if not any(graph.varies[i] for i in node.outputs):
                continue
            explained: set[Axis] = set()
            if node.name in PRODUCTS and not all(graph.varies[i] for i in node.inputs):
                explained = self._product(place, node)
            linked = self._link(place, node, explained)
            self._needed[place], self._free[place] = (
                [
                    (v, axis)
                    for k, v in enumerate(variables)
                    for axis in range(len(graph.shape(v)))
                    if graph.varies[v] and (v, axis) not in explained and (is_result, k, axis) not in linked
                ]
                for is_result, variables in ((False, node.inputs), (True, node.outputs))
            )
        self._needed[len(graph.nodes)] = [(v, axis) for v in graph.outputs for axis in range(len(graph.shape(v)))]
        return self._collect()

    def _link(self, place: int, node: Node, explained: set[Axis]) -> set[tuple[bool, int, int]]:
        """Add the edges of an equation, and what it passes on except axes that its kernel explains.

        Returns:
          The axes that are linked, as (is a result, its index, axis).
        """
        graph = self._graph
        linked: set[tuple[bool, int, int]] = set()
        for link in rule_of(node.name).links(node, graph):
            before, after = (node.inputs[link.operand], link.axis), (node.outputs[link.output], link.out_axis)
            one, other = self._elements(before), self._elements(after)
            if link.to is None and len(one) != len(other):
                continue
            linked |= {(False, link.operand, link.axis), (True, link.output, link.out_axis)}
            to = np.arange(len(one)) if link.to is None else link.to
            if graph.varies[before[0]]:
                self._edges.append((one[to >= 0], other[to[to >= 0]]))
                if not explained.issuperset((before, after)):
                    self._flows[place].append((before, after))
            elif link.to is None and node.name not in PRODUCTS:
                self._vector(before, after)
        if node.name == "reshape":
            linked |= self._reshape(place, node)
        return linked

    def _reshape(self, place: int, node: Node) -> set[tuple[bool, int, int]]:
        """Link an axis that is merged from several, or split into several, with the one that has the channels."""
        graph = self._graph
        linked: set[tuple[bool, int, int]] = set()
        (x,), (y,) = node.inputs, node.outputs
        if 0 in graph.shape(x):
            return linked
        heads, made = self._products.heads, self._products.made
        for one, other in segments(graph.shape(x), graph.shape(y)):
            merged: Axis
            if len(one) == 1 and len(other) > 1:
                merged, parts = (x, one[0]), [(y, axis) for axis in other]
                chosen = [part for part in parts if part in heads]
            elif len(other) == 1 and len(one) > 1:
                merged, parts = (y, other[0]), [(x, axis) for axis in one]
                chosen = [part for part in parts if part in heads] or [part for part in parts if part in made]
            else:
                continue
            if len(chosen) != 1:
                continue
            sizes = [graph.shape(v)[axis] for v, axis in parts]
            along = np.indices(sizes)[parts.index(chosen[0])].reshape(-1)
            self._edges.append((self._elements(merged), self._elements(chosen[0])[along]))
            self._flows[place].append((merged, chosen[0]) if merged[0] == x else (chosen[0], merged))
            linked |= {(v == y, 0, axis) for v, axis in (merged, *parts)}
        return linked

    def _product(self, place: int, node: Node) -> set[Axis]:
        """Record the kernel of a product; return the axes of the activations and of the result that it explains."""
        graph, product = self._graph, self._products.of(node)
        weights = node.inputs[index_of_weights(node, graph)]
        sources = self._parameters.sources(weights, product.numbers) if product else []
        if product is None or len(sources) != 1:
            self._other_macs += self._products.macs(node) if self._parameters.are_in(weights) else 0
            return set()
        ((leaf, numbers),) = sources
        for before, now in zip(self._first.setdefault(leaf, numbers)[:2], numbers[:2], strict=True):
            one, other = np.broadcast_arrays(before, now)
            self._edges.append((one.reshape(-1), other.reshape(-1)))
        shape = graph.shape(leaf)
        size = math.prod(shape)
        read = min(1.0, math.prod(graph.shape(weights)) / size)
        inputs, outputs, *slots = numbers
        macs = self._products.macs(node) / size
        kernel = Kernel(self._parameters.paths[leaf], shape, inputs, outputs, macs, read, tuple(slots))
        self._kernels[place] = kernel, product
        return {*product.reads, *product.makes}

    def _vector(self, axis: Axis, after: Axis) -> None:
        """Record that the entries of a parameter along an axis meet those of a result."""
        numbers = along(self._elements(after), axis[1], len(self._graph.shape(axis[0])))
        for leaf, (elements,) in self._parameters.sources(axis[0], (numbers,)):
            self._vectors.setdefault(leaf, []).append((elements, after))

    def _collect(self) -> Channels:
        """Number the channels that a kernel reads or makes, and replace elements by them."""
        channel, count = self._channels()

        def numbered(elements: Numbers) -> Numbers:
            return np.where(elements >= 0, channel[elements], -1).astype(np.int32)

        order = _Order(self._flows)
        for place in range(-1, len(self._graph.nodes) + 1):
            needed, free = (
                np.unique(np.concatenate([np.arange(0), *(numbered(self._elements(axis)) for axis in axes)]))
                for axes in (self._needed.get(place, []), self._free.get(place, []))
            )
            if (needed >= 0).any():
                order.add(place, Needed(needed[needed >= 0]), reads=self._needed[place])
            if place in self._kernels:
                kernel, product = self._kernels[place]
                kernel = dataclasses.replace(kernel, inputs=numbered(kernel.inputs), outputs=numbered(kernel.outputs))
                order.add(place, kernel, product.reads, product.makes)
            if (free >= 0).any():
                order.add(place, Free(free[free >= 0]), makes=self._free[place])
        events, readers = order.events()
        kernels, paths = {kernel.path for kernel, _ in self._kernels.values()}, self._parameters.paths
        vectors: dict[str, Vector] = {}
        for leaf, uses in self._vectors.items():
            found = [(numbered(x), axis) for x, axis in uses if paths[leaf] not in kernels and (numbered(x) >= 0).all()]
            if found:
                together = frozenset().union(*(readers.get(axis, ()) for _, axis in found))
                vectors[paths[leaf]] = Vector(math.prod(self._graph.shape(leaf)), found[0][0], together)
        rest = [leaf for leaf, path in paths.items() if path not in kernels and path not in vectors]
        others = sum(math.prod(self._graph.shape(leaf)) for leaf in rest)
        return Channels(count, events, vectors, others, self._other_macs)

    def _channels(self) -> tuple[np.ndarray, int]:
        """Return (channel of each element, -1 where no kernel reads or makes it; number of channels)."""
        one, other = (
            np.concatenate([edge[i] for edge in self._edges] or [np.arange(0)]).astype(np.int64) for i in range(2)
        )
        valid = (one >= 0) & (other >= 0)
        total = self._elements.total
        edges = coo_matrix((np.ones(valid.sum(), bool), (one[valid], other[valid])), (total, total))
        _, label = csgraph.connected_components(edges, directed=False)
        used = [np.arange(0)]
        for kernel, _ in self._kernels.values():
            used += [label[x[x >= 0]] for x in (kernel.inputs, kernel.outputs)]
        names = np.unique(np.concatenate(used))
        channel = np.full(label.max(initial=-1) + 1, -1)
        channel[names] = np.arange(len(names))
        return channel[label], len(names)


class _Order:
    """Events in the order of the function, and which of them make what others read."""

    def __init__(self, flows: Sequence[Sequence[tuple[Axis, Axis]]]) -> None:
        self._flows = flows
        self._events: list[Kernel | Needed | Free] = []
        self._reads: list[list[tuple[Axis, int]]] = [[] for _ in range(len(flows) + 2)]  # by place + 1
        self._makes: list[list[tuple[Axis, int]]] = [[] for _ in range(len(flows) + 2)]

    def add(
        self, place: int, event: Kernel | Needed | Free, reads: Sequence[Axis] = (), makes: Sequence[Axis] = ()
    ) -> None:
        """Add an event of the equation at a place; the taps of one convolution are one event."""
        last = self._events[-1] if self._events else None
        if isinstance(event, Kernel) and isinstance(last, Kernel) and last.path == event.path:
            macs, read = event.macs + last.macs, event.read + last.read
            if read < 1 + 1e-6:
                self._events.pop()
                event = dataclasses.replace(event, macs=macs, read=min(1.0, read))
        self._reads[place + 1] += [(axis, len(self._events)) for axis in reads]
        self._makes[place + 1] += [(axis, len(self._events)) for axis in makes]
        self._events.append(event)

    def events(self) -> tuple[tuple[Kernel | Needed | Free, ...], dict[Axis, Places]]:
        """Return (the events, for each axis the events that read it)."""
        made: dict[Axis, int] = {}  # sets of events as bits
        read: dict[Axis, int] = {}
        makers, readers = [0] * len(self._events), [0] * len(self._events)
        flows = [(), *self._flows, ()]
        for place, passed in enumerate(flows):
            for axis, index in self._reads[place]:
                makers[index] |= made.get(axis, 0)
            for one, other in passed:
                made[other] = made.get(other, 0) | made.get(one, 0)
            for axis, index in self._makes[place]:
                made[axis] = made.get(axis, 0) | 1 << index
        for place in reversed(range(len(flows))):
            for axis, index in self._makes[place]:
                readers[index] |= read.get(axis, 0)
            for one, other in flows[place]:
                read[one] = read.get(one, 0) | read.get(other, 0)
            for axis, index in self._reads[place]:
                read[axis] = read.get(axis, 0) | 1 << index
        sets = {
            bits: frozenset(i for i in range(len(self._events)) if bits >> i & 1)
            for bits in {*makers, *readers, *read.values()}
        }
        events: list[Kernel | Needed | Free] = []
        for event, before, after in zip(self._events, makers, readers, strict=True):
            if isinstance(event, Kernel):
                event = dataclasses.replace(event, makers=sets[before], readers=sets[after])
            elif isinstance(event, Needed):
                event = dataclasses.replace(event, makers=sets[before])
            events.append(event)
        return tuple(events), {axis: sets[bits] for axis, bits in read.items()}
