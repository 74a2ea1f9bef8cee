"""Streams: axes whose entries correspond, and the products that read them."""

import dataclasses

from mtl_sparse.compaction.graph import Graph
from mtl_sparse.compaction.primitives import PRODUCTS, rule_of

Axis = tuple[int, int]  # (variable, axis)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A product of activations with weights.

    Attributes:
      place: index of its node.
      x: the activations and their summed axis.
      weights: the weights and their summed axis.
    """

    place: int
    x: Axis
    weights: Axis


def find_readers(graph: Graph) -> list[Reader]:
    """Return the products of activations with weights, in order."""
    found = []
    for place, node in enumerate(graph.nodes):
        if node.name == "conv_general_dilated" and node.params["feature_group_count"] == 1:
            numbers = node.params["dimension_numbers"]
            pairs = [((0, numbers.lhs_spec[1]), (1, numbers.rhs_spec[1]))]
        elif node.name == "dot_general":
            contracted = node.params["dimension_numbers"][0]
            pairs = [((0, a), (1, b)) for a, b in zip(*contracted, strict=True)]
        else:
            continue
        for one, other in pairs:
            first, second = (node.inputs[one[0]], one[1]), (node.inputs[other[0]], other[1])
            if graph.varies[first[0]] != graph.varies[second[0]]:
                x, weights = (first, second) if graph.varies[first[0]] else (second, first)
                found.append(Reader(place, x, weights))
    return found


class Streams:
    """Axes whose entries correspond, as sets: the channels of a residual stream are one."""

    def __init__(self, graph: Graph) -> None:
        """Find the sets of a graph."""
        self._parent: dict[Axis, Axis] = {}
        self._pinned: set[Axis] = set()
        for node in graph.nodes:
            rule = rule_of(node.name)
            linked: set[tuple[bool, int, int]] = set()
            for link in rule.links(node, graph):
                one, other = (node.inputs[link.operand], link.axis), (node.outputs[link.output], link.out_axis)
                linked |= {(False, link.operand, link.axis), (True, link.output, link.out_axis)}
                if link.to is None:
                    self._join(one, other)
                else:
                    self._pinned |= {one, other}
            if not rule.any_order or rule.is_grouped(node):
                for is_output, variables in ((False, node.inputs), (True, node.outputs)):
                    for k, variable in enumerate(variables):
                        for axis in range(len(graph.shape(variable))):
                            if (is_output, k, axis) not in linked:
                                self._pinned.add((variable, axis))
        for variable in (*graph.inputs, *graph.outputs):
            self._pinned |= {(variable, axis) for axis in range(len(graph.shape(variable)))}
        self._pinned = {self.of(axis) for axis in self._pinned}

        self._before: dict[int, int] = {}  # a variable that depends on the inputs through one operand -> that operand
        for node in graph.nodes:
            varying = [i for i in node.inputs if graph.varies[i]]
            if len(varying) == 1 and node.name not in PRODUCTS:
                self._before.update(dict.fromkeys(node.outputs, varying[0]))

    def point(self, variable: int) -> int:
        """Return the sum, the concatenation or the product that a variable follows from."""
        while variable in self._before:
            variable = self._before[variable]
        return variable

    def of(self, axis: Axis) -> Axis:
        """Return the representative of the set that an axis is in."""
        root = axis
        while (parent := self._parent.get(root, root)) != root:
            root = parent
        while axis != root:
            axis, self._parent[axis] = self._parent.get(axis, root), root
        return root

    def _join(self, one: Axis, other: Axis) -> None:
        first, second = self.of(one), self.of(other)
        if first != second:
            self._parent[second] = first

    def is_pinned(self, axis: Axis) -> bool:
        """Return whether the order of the entries must stay."""
        return self.of(axis) in self._pinned
