"""Operands of products: which entries of activations and parameters they multiply, and which entries they make."""

import dataclasses
import math

import numpy as np

from mtl_sparse.compaction.graph import Graph, Node
from mtl_sparse.compaction.primitives import rule_of
from mtl_sparse.compaction.rules import Elementwise
from mtl_sparse.compaction.streams import Axis

Numbers = np.ndarray  # integers of a shape that broadcasts against a parameter's


class Elements:
    """The entries of the axes of all variables, in one numbering; channels are sets of them."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._start: dict[Axis, int] = {}
        self.total = 0
        for variable in range(len(graph.avals)):
            for axis, size in enumerate(graph.shape(variable)):
                self._start[variable, axis] = self.total
                self.total += size

    def __call__(self, axis: Axis) -> np.ndarray:
        """Return the elements of an axis."""
        return self._start[axis] + np.arange(self._graph.shape(axis[0])[axis[1]])


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A product of activations and weights.

    Attributes:
      numbers: elements of the inputs and the outputs, and slots (see `Kernel`), of shapes that broadcast against the
        weights'.
      reads: axes of the activations that it explains.
      makes: axes of the result that it explains.
    """

    numbers: tuple[Numbers, ...]
    reads: tuple[Axis, ...]
    makes: tuple[Axis, ...]


class Products:
    """What the products of activations and weights read and make."""

    def __init__(self, graph: Graph, elements: Elements) -> None:
        self._graph, self._elements = graph, elements
        self.heads, self.made = _find_heads(graph)

    def of(self, node: Node) -> Product | None:
        """Return what a product reads and makes; None where that is not known."""
        k = index_of_weights(node, self._graph)
        if node.name == "dot_general":
            return self._dot(node, k)
        return self._conv(node) if k == 1 and node.params["batch_group_count"] == 1 else None

    def _dot(self, node: Node, k: int) -> Product | None:
        graph, out = self._graph, node.outputs[0]
        contracted, batch = node.params["dimension_numbers"]
        weights, x = node.inputs[k], node.inputs[1 - k]
        if batch[0] or not contracted[0]:
            return None
        chosen = list(zip(contracted[1 - k], contracted[k], strict=True))
        if len(chosen) > 1:  # the axis of attention heads, or the one that is made by a kernel
            chosen = [pair for pair in chosen if (x, pair[0]) in self.heads] or [
                pair for pair in chosen if (x, pair[0]) in self.made
            ]
        if not chosen:
            return None
        x_axis, w_axis = chosen[0]
        rank = len(graph.shape(weights))
        inputs = along(self._elements((x, x_axis)), w_axis, rank)
        free = [axis for axis in range(rank) if axis not in contracted[k]]
        first = 0 if k == 0 else len(graph.shape(out)) - len(free)
        places = {axis: first + i for i, axis in enumerate(free)}
        made = [axis for axis in free if (out, places[axis]) in self.heads] or free[-1:]
        outputs = np.full((1,) * rank, -1)
        if made:
            outputs = along(self._elements((out, places[made[0]])), made[0], rank)
        reads = tuple((x, axis) for axis in contracted[1 - k])
        return Product((inputs, outputs), reads, tuple((out, places[axis]) for axis in made))

    def _conv(self, node: Node) -> Product:
        numbers, (x, weights), out = node.params["dimension_numbers"], node.inputs, node.outputs[0]
        read, made = (x, numbers.lhs_spec[1]), (out, numbers.out_spec[1])
        w_out, w_in = numbers.rhs_spec[:2]
        shape, groups = self._graph.shape(weights), node.params["feature_group_count"]
        outputs = along(self._elements(made), w_out, len(shape))
        if groups == 1:
            return Product((along(self._elements(read), w_in, len(shape)), outputs), (read,), (made,))
        each = shape[w_out] // groups
        place = along(np.arange(shape[w_out]), w_out, len(shape))
        slots = (place // each, along(np.arange(shape[w_in]), w_in, len(shape)), place % each)
        inputs = self._elements(read)[slots[0] * shape[w_in] + slots[1]]
        return Product((inputs, outputs, *slots), (read,), (made,))

    def macs(self, node: Node) -> float:
        """Return the multiply-accumulates of a product."""
        graph, out = self._graph, math.prod(self._graph.shape(node.outputs[0]))
        if node.name == "dot_general":
            contracted = node.params["dimension_numbers"][0][0]
            return float(out * math.prod(graph.shape(node.inputs[0])[axis] for axis in contracted))
        kernel, numbers = graph.shape(node.inputs[1]), node.params["dimension_numbers"]
        return float(out * math.prod(kernel) // kernel[numbers.rhs_spec[0]])


class Parameters:
    """Which parameters the operands of products are made of."""

    def __init__(self, graph: Graph, paths: dict[int, str]) -> None:
        self._graph, self.paths = graph, paths
        self._made_by = {variable: node for node in graph.nodes for variable in node.outputs}
        self._computed = set(graph.params)
        for node in graph.nodes:
            if self._computed.intersection(node.inputs):
                self._computed.update(node.outputs)

    def are_in(self, variable: int) -> bool:
        """Return whether a variable depends on a parameter."""
        return variable in self._computed

    def sources(self, variable: int, numbers: tuple[Numbers, ...]) -> list[tuple[int, tuple[Numbers, ...]]]:
        """Return the parameters that a variable is made of entry by entry, each with the numbers of its entries."""
        graph = self._graph
        while variable not in self.paths:
            node = self._made_by.get(variable)
            if node is None:
                return []
            if node.name in ("reshape", "transpose", "squeeze", "broadcast_in_dim"):
                before = _before(node, graph, numbers)
                if before is None:
                    return []
                numbers = before
            elif not (node.name == "spread" or (node.name in ("slice", "rev") and _is_whole(node, graph, numbers))):
                if not isinstance(rule_of(node.name), Elementwise):
                    return []
                same = dict.fromkeys(i for i in node.inputs if graph.shape(i) == graph.shape(variable))
                found = {leaf: x for i in same for leaf, x in self.sources(i, numbers)}
                return list(found.items())
            variable = node.inputs[0]
        return [(variable, numbers)]


def index_of_weights(node: Node, graph: Graph) -> int:
    """Return which operand of a product depends on no input."""
    return next(k for k in range(2) if not graph.varies[node.inputs[k]])


def _before(node: Node, graph: Graph, numbers: tuple[Numbers, ...]) -> tuple[Numbers, ...] | None:
    """Return the numbers of an operand's entries, given those of the result, for an equation that moves entries."""
    before, shape = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
    if node.name == "reshape":
        return tuple(_collapsed(np.broadcast_to(x, shape).reshape(before)) for x in numbers)
    if node.name == "transpose":
        return tuple(x.transpose(np.argsort(node.params["permutation"])) for x in numbers)
    if node.name == "squeeze":
        removed = tuple(sorted(axis % len(before) for axis in node.params["dimensions"]))
        return tuple(np.expand_dims(x, removed) for x in numbers)
    others = tuple(axis for axis in range(len(shape)) if axis not in node.params["broadcast_dimensions"])
    if any(x.shape[axis] != 1 for x in numbers for axis in others):
        return None
    numbers = tuple(x.squeeze(others) for x in numbers)
    repeated = any(m > n for x in numbers for m, n in zip(x.shape, before, strict=True))
    return None if repeated else numbers


def _is_whole(node: Node, graph: Graph, numbers: tuple[Numbers, ...]) -> bool:
    """Return whether a slice or a reversal leaves the numbered axes as they are."""
    if node.name == "rev":
        return all(x.shape[axis] == 1 for x in numbers for axis in node.params["dimensions"])
    before, after = (graph.shape(i) for i in (node.inputs[0], node.outputs[0]))
    return all(n == 1 or a == b for x in numbers for n, a, b in zip(x.shape, before, after, strict=True))


def _find_heads(graph: Graph) -> tuple[set[Axis], set[Axis]]:
    """Return (axes of attention heads, these axes and those that kernels make).

    Products of activations with each other are computed separately for each entry of a head axis. The batch axis is no
    head axis.
    """
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
                parent[root((node.inputs[link.operand], link.axis))] = root((node.outputs[link.output], link.out_axis))
        if node.name == "dot_general" and all(graph.varies[i] for i in node.inputs):
            batch = node.params["dimension_numbers"][1]
            seeds += [(node.inputs[k], axis) for k in range(2) for axis in batch[k]]
        elif node.name == "dot_general":
            k, out = index_of_weights(node, graph), node.outputs[0]
            contracted, batch = node.params["dimension_numbers"]
            free = len(graph.shape(node.inputs[k])) - len(contracted[k]) - len(batch[k])
            first = len(batch[k]) if k == 0 else len(graph.shape(out)) - free
            made += [(out, axis) for axis in range(first, first + free)]
        elif node.name == "conv_general_dilated":
            made.append((node.outputs[0], node.params["dimension_numbers"].out_spec[1]))
    of_batch = {root((v, axis)) for v in graph.inputs for axis in range(len(graph.shape(v)))}
    heads = {root(axis) for axis in seeds} - of_batch
    makes = {root(axis) for axis in made} - of_batch
    every = [(v, axis) for v in range(len(graph.avals)) for axis in range(len(graph.shape(v))) if graph.varies[v]]
    return {axis for axis in every if root(axis) in heads}, {axis for axis in every if root(axis) in makes | heads}


def along(numbers: np.ndarray, axis: int, rank: int) -> Numbers:
    """Return numbers along one axis of an array with `rank` axes."""
    return numbers.reshape([len(numbers) if i == axis else 1 for i in range(rank)])


def _collapsed(numbers: Numbers) -> Numbers:
    """Return the numbers with one entry along each axis along which they are the same."""
    for axis in range(numbers.ndim):
        first = numbers.take([0], axis)
        if numbers.shape[axis] > 1 and np.array_equal(np.broadcast_to(first, numbers.shape), numbers):
            numbers = first
    return numbers
