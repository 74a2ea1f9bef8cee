"""What compaction knows of each primitive: which axes of its operands and its results correspond.

Most rules are a list of links: entry i of an operand's axis is entry i of a result's axis. From the links follow what
an operand needs, given what its results need, and which entries the results hold, given those of the operands. An axis
without a link is needed whole. A primitive without a rule has no links: it is a barrier.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtl_sparse.compaction import facts as facts_lib
from mtl_sparse.compaction.facts import Facts, Known
from mtl_sparse.compaction.graph import Graph, Node
from mtl_sparse.compaction.indices import UNIFORM, Index, Indices, held, meet

Need = list[np.ndarray] | None  # for each axis, which entries are needed; None if nothing is
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Link:
    """Entries of an operand's axis that are entries of a result's axis.

    Attributes:
      operand: index of the operand.
      axis: the operand's axis.
      output: index of the result.
      out_axis: the result's axis.
      to: entry i of the operand is entry to[i] of the result, -1 if it is none of them; None if it is entry i.
    """

    operand: int
    axis: int
    output: int
    out_axis: int
    to: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """An equation of the compact function.

    Attributes:
      targets: which entries of each operand it takes.
      outputs: which entries its results hold.
      emit: function of the operands' arrays that returns the results' arrays.
    """

    targets: tuple[Indices, ...]
    outputs: tuple[Indices, ...]
    emit: Callable[[list[Any]], list[Any]]


class Rule:
    """A barrier: every entry of every axis is needed, and nothing is known of the results.

    Attributes:
      keeps: what stays true along a link: "values" if a slice that is constant stays the same constant, "zeros" if one
        that is zero stays zero, "" if neither.
      any_order: whether entries of an axis without a link may come in any order.
    """

    keeps = ""
    any_order = False

    def links(self, node: Node, graph: Graph) -> Sequence[Link]:
        """Return which axes correspond."""
        del node, graph
        return ()

    def is_grouped(self, node: Node) -> bool:
        """Return whether entries of an axis without a link must keep their order after all."""
        del node
        return False

    def needs(self, node: Node, facts: Facts, outs: Sequence[Need]) -> list[Need]:
        """Return what the operands need, given what the results need."""
        graph = facts.graph
        if all(out is None for out in outs):
            return [None] * len(node.inputs)
        needs = [[np.zeros(n, bool) for n in graph.shape(i)] for i in node.inputs]
        free = [[True] * len(masks) for masks in needs]
        reached = [False] * len(node.inputs)
        for link in self.links(node, graph):
            free[link.operand][link.axis] = False
            out = outs[link.output]
            if out is not None:
                reached[link.operand] = True
                mask = out[link.out_axis]
                if link.to is not None:
                    mask = (link.to >= 0) & mask[link.to] if len(mask) else np.zeros(len(link.to), bool)
                needs[link.operand][link.axis] = needs[link.operand][link.axis] | mask
        for masks, unlinked in zip(needs, free, strict=True):
            for axis, whole in enumerate(unlinked):
                if whole:
                    masks[axis] = np.ones(len(masks[axis]), bool)
        linked = [not all(whole) for whole in free]
        return [masks if reach or not some else None for masks, reach, some in zip(needs, reached, linked, strict=True)]

    def known(self, node: Node, facts: Facts) -> list[dict[int, Known]]:
        """Return the constant slices of each result."""
        graph = facts.graph
        found: list[dict[int, Known]] = [{} for _ in node.outputs]
        if not self.keeps:
            return found
        by_axis: dict[tuple[int, int], list[Link]] = {}
        for link in self.links(node, graph):
            by_axis.setdefault((link.output, link.out_axis), []).append(link)
        for (j, axis), links in by_axis.items():
            out = node.outputs[j]
            if not isinstance(graph.avals[out].dtype, np.dtype):
                continue
            known = self._along(node, facts, links, Known.nothing(graph.shape(out)[axis], graph.avals[out].dtype))
            if known is not None and known.mask.any():
                found[j][axis] = known
        return found

    def _along(self, node: Node, facts: Facts, links: Sequence[Link], nothing: Known) -> Known | None:
        """Return the constant slices along an axis of a result, given the links to it; None if there are none."""
        mask, values = nothing.mask.copy(), nothing.values.copy()
        for place, link in enumerate(links):
            known = facts.along(node.inputs[link.operand], link.axis)
            if known is None:
                if link.to is None:
                    return None
                continue
            constant = known.mask if self.keeps == "values" else known.zeros
            if link.to is None:  # every operand must hold the same constant
                mask = constant if place == 0 else mask & constant & (values == known.values)
                values = known.values.astype(values.dtype)
            else:
                inside = constant & (link.to >= 0)
                mask[link.to[inside]], values[link.to[inside]] = True, known.values[inside]
        return Known(mask, values)

    def carry(self, node: Node, graph: Graph, ins: Sequence[Indices]) -> Step:
        """Return the equation of the compact function, given the entries that the operands hold."""
        targets: list[list[Index]] = [[None] * len(graph.shape(i)) for i in node.inputs]
        outs: list[list[Index]] = [[None] * len(graph.shape(i)) for i in node.outputs]
        for group in _classes(self.links(node, graph)):
            index: Index = UNIFORM
            for side, k, axis in group:
                if side == 0:
                    index = meet(index, ins[k][axis])
            for side, k, axis in group:
                (targets if side == 0 else outs)[k][axis] = index
        return self.step(node, graph, targets, outs)

    def step(
        self, node: Node, graph: Graph, targets: Sequence[Sequence[Index]], outs: Sequence[Sequence[Index]]
    ) -> Step:
        """Return a step that applies the primitive."""
        sizes = [
            tuple(held(index, n) for index, n in zip(out, graph.shape(i), strict=True))
            for out, i in zip(outs, node.outputs, strict=True)
        ]

        def emit(operands: list[Any]) -> list[Any]:
            return facts_lib.bind(node, operands, self.adapt(node, operands, sizes))

        return Step(tuple(tuple(t) for t in targets), tuple(tuple(o) for o in outs), emit)

    def adapt(self, node: Node, operands: Sequence[Any], sizes: Sequence[Shape]) -> dict[str, Any]:
        """Return the primitive's parameters for operands and results that hold fewer entries."""
        del operands, sizes
        return node.params


def _classes(links: Sequence[Link]) -> list[list[tuple[int, int, int]]]:
    """Return the sets of corresponding axes, each as (0 for an operand or 1 for a result, its index, axis)."""
    groups: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
    for link in links:
        one, other = (0, link.operand, link.axis), (1, link.output, link.out_axis)
        first, second = groups.setdefault(one, [one]), groups.setdefault(other, [other])
        if first is not second:
            first.extend(second)
            groups.update(dict.fromkeys(second, first))
    return list({id(group): group for group in groups.values()}.values())


class Elementwise(Rule):
    """Entries correspond on every axis; operands without axes are the same for all."""

    keeps = "values"

    def links(self, node: Node, graph: Graph) -> Sequence[Link]:
        """Return links of each axis; an operand with one entry where the result has more is repeated."""
        shape = graph.shape(node.outputs[0])
        return [
            Link(k, axis, j, axis)
            for k, i in enumerate(node.inputs)
            for j in range(len(node.outputs))
            for axis, size in enumerate(graph.shape(i))
            if size == shape[axis]
        ]

    def carry(self, node: Node, graph: Graph, ins: Sequence[Indices]) -> Step:
        """Return the equation for the entries that all operands hold."""
        replaced = [k for k, i in enumerate(node.inputs) if i in graph.replaced]
        if node.name == "add" and replaced and _is_empty(ins[1 - replaced[0]]):
            return self._second(node, graph, ins, replaced[0])
        shape = graph.shape(node.outputs[0])
        index: list[Index] = [UNIFORM if any(graph.shape(i) for i in node.inputs) else None] * len(shape)
        repeated = [[n != size for n, size in zip(graph.shape(i), shape, strict=False)] for i in node.inputs]
        for mine, once in zip(ins, repeated, strict=True):
            for axis, other in enumerate(mine):
                index[axis] = index[axis] if once[axis] else meet(index[axis], other)
        targets = [
            [mine[axis] if once[axis] else index[axis] for axis in range(len(mine))]
            for mine, once in zip(ins, repeated, strict=True)
        ]
        return self.step(node, graph, targets, [index] * len(node.outputs))

    def _second(self, node: Node, graph: Graph, ins: Sequence[Indices], k: int) -> Step:
        """Return the step of a sum that is its operand k."""
        shape, mine = graph.shape(node.outputs[0]), graph.shape(node.inputs[k])
        out = tuple(UNIFORM if n != size else i for i, n, size in zip(ins[k], mine, shape, strict=True))
        return Step(tuple(ins), (out,), lambda operands: [operands[k]])

    def needs(self, node: Node, facts: Facts, outs: Sequence[Need]) -> list[Need]:
        """Return what the operands need; a constant that is folded into the other operand of a sum needs nothing."""
        needs = super().needs(node, facts, outs)
        folded = facts.folded.get(node.outputs[0])
        return needs if folded is None else [None if k == folded else need for k, need in enumerate(needs)]

    def known(self, node: Node, facts: Facts) -> list[dict[int, Known]]:
        """Return the slices whose operands are all constant, and products with zero."""
        graph, out = facts.graph, node.outputs[0]
        if len(node.outputs) > 1 or not isinstance(graph.avals[out].dtype, np.dtype):
            return [{} for _ in node.outputs]
        found: dict[int, Known] = {}
        varying = [i for i in node.inputs if graph.varies[i]]
        product = node.name in ("mul", "and")
        axes = set(range(len(graph.shape(out)))) if product else {a for i in varying for a in facts.known[i]}
        for axis in axes:
            known = _all_constant(node, facts, axis)
            if product or node.name == "div":
                factors = node.inputs if product else node.inputs[:1]
                zeros = np.zeros(graph.shape(out)[axis], bool)
                for i in factors:
                    if graph.shape(i):
                        zeros |= facts.zeros(i, axis)
                if zeros.any():
                    known = known or Known(zeros, np.zeros(len(zeros), graph.avals[out].dtype))
                    known = Known(known.mask | zeros, np.where(zeros, 0, known.values).astype(known.values.dtype))
            if known is not None and known.mask.any():
                found[axis] = known
        return [found]


def _is_empty(index: Indices) -> bool:
    return any(isinstance(axis, np.ndarray) and not len(axis) for axis in index)


def _all_constant(node: Node, facts: Facts, axis: int) -> Known | None:
    """Return the slices along an axis that are constant in every operand, with the equation's value of them."""
    graph, out = facts.graph, node.outputs[0]
    size = graph.shape(out)[axis]
    mask, operands = np.ones(size, bool), []
    for i in node.inputs:
        if not graph.shape(i):
            value = None if graph.varies[i] else facts.value(i)
            if value is None:
                return None
            operands.append(value)
            continue
        known = facts.along(i, axis)
        if known is None:
            return None
        mask = mask & known.mask  # an operand with one entry is repeated
        operands.append(np.broadcast_to(known.values, size))
    if not mask.any():
        return None
    aval = type(graph.avals[out])((size,), graph.avals[out].dtype)
    values = facts_lib.evaluate(node, operands, [aval])[0]
    return None if values is None else Known(mask, np.asarray(values))


class Linked(Rule):
    """A rule given as functions.

    Attributes:
      keeps: see `Rule`.
      any_order: see `Rule`.
    """

    def __init__(
        self,
        links: Callable[[Node, Graph], Sequence[Link]],
        adapt: Callable[[Node, Sequence[Any], Sequence[Shape]], dict[str, Any]] | None = None,
        keeps: str = "",
        any_order: bool = False,
    ) -> None:
        """Create a rule.

        Args:
          links: function of (equation, graph) that returns its links.
          adapt: function of (equation, operands, sizes of the results) that returns the primitive's parameters.
          keeps: see `Rule`.
          any_order: see `Rule`.
        """
        self._links, self._adapt, self.keeps, self.any_order = links, adapt, keeps, any_order

    def links(self, node: Node, graph: Graph) -> Sequence[Link]:
        """Return which axes correspond."""
        return self._links(node, graph)

    def adapt(self, node: Node, operands: Sequence[Any], sizes: Sequence[Shape]) -> dict[str, Any]:
        """Return the primitive's parameters for fewer entries."""
        return node.params if self._adapt is None else self._adapt(node, operands, sizes)


class Reduce(Linked):
    """A reduction over axes: their entries are all needed, except that a sum does not need zeros."""

    def __init__(self, keeps: str, total: bool = False) -> None:
        """Create a rule.

        Args:
          keeps: see `Rule`.
          total: whether it is a sum.
        """
        super().__init__(_reduced, keeps=keeps, any_order=True)
        self._total = total

    def needs(self, node: Node, facts: Facts, outs: Sequence[Need]) -> list[Need]:
        """Return what the operand needs."""
        needs = super().needs(node, facts, outs)
        if self._total and needs[0] is not None:
            for axis in node.params["axes"]:
                needs[0][axis] = needs[0][axis] & ~facts.zeros(node.inputs[0], axis)
        return needs

    def carry(self, node: Node, graph: Graph, ins: Sequence[Indices]) -> Step:
        """Return the sum over the entries that the operand holds, which are all that are not zero."""
        if not self._total:
            return super().carry(node, graph, ins)
        axes = node.params["axes"]
        target = [None if i in axes and index is UNIFORM else index for i, index in enumerate(ins[0])]
        return self.step(node, graph, [target], [[index for i, index in enumerate(target) if i not in axes]])


def _reduced(node: Node, graph: Graph) -> list[Link]:
    axes = node.params["axes"]
    kept = [axis for axis in range(len(graph.shape(node.inputs[0]))) if axis not in axes]
    return [Link(0, axis, j, place) for place, axis in enumerate(kept) for j in range(len(node.outputs))]
