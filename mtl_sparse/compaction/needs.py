"""The backward pass: which entries of each variable the outputs need."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from mtl_sparse.compaction.facts import Facts
from mtl_sparse.compaction.graph import Graph
from mtl_sparse.compaction.primitives import rule_of
from mtl_sparse.compaction.rules import Need

Extra = Mapping[tuple[int, int], np.ndarray]  # (variable, axis) -> entries that are needed for other reasons


@dataclasses.dataclass(frozen=True)
class Needs:
    """What the outputs need.

    Attributes:
      of: for each variable, what is needed of it.
      because: for a variable and axis that an equation needs whole, the index of that equation.
    """

    of: list[Need]
    because: dict[tuple[int, int], int]


def learn(facts: Facts) -> None:
    """Find the constant slices of all variables, in the order of the equations."""
    for node in facts.graph.nodes:
        if any(facts.graph.varies[i] for i in node.outputs):
            for variable, known in zip(node.outputs, rule_of(node.name).known(node, facts), strict=True):
                facts.known[variable] = known


def find(facts: Facts, extra: Extra | None = None) -> Needs:
    """Find what the outputs need.

    Args:
      facts: the facts of the graph.
      extra: entries that are needed in addition; all entries of the other axes where nothing else needs the variable.

    Returns:
      The needs of each variable.
    """
    graph, extra = facts.graph, extra or {}
    of: list[Need] = [None] * len(graph.avals)
    because: dict[tuple[int, int], int] = {}
    by_variable: dict[int, list[tuple[int, np.ndarray]]] = {}
    for (variable, axis), mask in extra.items():
        by_variable.setdefault(variable, []).append((axis, mask))

    def settle(variable: int) -> Need:
        need, more = of[variable], by_variable.get(variable, [])
        if more:
            need = of[variable] = need or [np.ones(n, bool) for n in graph.shape(variable)]
            for axis, mask in more:
                need[axis] = need[axis] | mask
        return need

    for variable in graph.outputs:
        of[variable] = [np.ones(n, bool) for n in graph.shape(variable)]
    for place in reversed(range(len(graph.nodes))):
        node = graph.nodes[place]
        outs = [settle(i) for i in node.outputs]
        if all(out is None for out in outs):
            continue
        rule = rule_of(node.name)
        for variable, need in zip(node.inputs, rule.needs(node, facts, outs), strict=True):
            if need is None:
                continue
            before = of[variable]
            of[variable] = need if before is None else [a | b for a, b in zip(before, need, strict=True)]
        _blame(graph, place, outs, of, because)
    for variable in graph.params:
        if of[variable] is None and variable in by_variable:
            of[variable] = [np.zeros(n, bool) for n in graph.shape(variable)]
        settle(variable)
    return Needs(of, because)


def _blame(graph: Graph, place: int, outs: list[Need], of: list[Need], because: dict[tuple[int, int], int]) -> None:
    """Record why an equation's operands are needed whole: itself, or what needs its results whole."""
    node = graph.nodes[place]
    linked = {(link.operand, link.axis): link for link in rule_of(node.name).links(node, graph)}
    for k, variable in enumerate(node.inputs):
        need = of[variable]
        if need is None:
            continue
        for axis, mask in enumerate(need):
            if len(mask) < 2 or not mask.all() or (variable, axis) in because:
                continue
            link = linked.get((k, axis))
            out = None if link is None else outs[link.output]
            if link is not None and out is not None:
                cause = because.get((node.outputs[link.output], link.out_axis))
                if cause is not None:
                    because[variable, axis] = cause
            elif node.name not in ("dot_general", "conv_general_dilated"):
                because[variable, axis] = place
