"""The forward pass: which entries each variable of the compact function holds, and its equations."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mtl_sparse.compaction.graph import Graph
from mtl_sparse.compaction.indices import Indices, Missing, held, lacks, without_constant
from mtl_sparse.compaction.primitives import MOVES, PRODUCTS, rule_of
from mtl_sparse.compaction.rules import Step

# (index of the node that can't be computed, index of the node that lacks entries, what it lacks)
OnMissing = Callable[[int, int, Missing], None]


@dataclasses.dataclass(frozen=True)
class Carried:
    """A compact function, before it is applied to arrays.

    Attributes:
      holds: for each variable, the entries that it holds.
      steps: for each node of the graph, its step; None for one that can't be computed.
      failed: the variables that can't be computed.
    """

    holds: list[Indices]
    steps: list[Step | None]
    failed: frozenset[int]

    def is_empty(self, variable: int) -> bool:
        """Return whether a variable holds nothing."""
        return any(isinstance(index, np.ndarray) and not len(index) for index in self.holds[variable])


def carry(
    graph: Graph, params: Sequence[Indices], inputs: Sequence[Indices], missing: OnMissing | None = None
) -> Carried:
    """Carry the entries that the parameters hold forward through a graph.

    Args:
      graph: the graph.
      params: what each leaf of the parameters holds.
      inputs: what each leaf of the inputs holds.
      missing: called for each equation that can't be computed, because it or one before it lacks entries.

    Returns:
      The compact function.
    """
    holds: list[Indices] = [(None,) * len(aval.shape) for aval in graph.avals]
    for variable, index in zip((*graph.params, *graph.inputs), (*params, *inputs), strict=True):
        holds[variable] = index
    steps: list[Step | None] = []
    failed: dict[int, tuple[int, Missing]] = {}  # variable -> why it can't be computed
    for place, node in enumerate(graph.nodes):
        step, why = None, None
        try:
            step, why = _step(graph, place, holds, failed)
        except Missing as error:
            why = place, error
        if step is None and why is not None:
            failed.update(dict.fromkeys(node.outputs, why))
            if missing is not None:
                missing(place, *why)
        for j, variable in enumerate(node.outputs):
            holds[variable] = tuple(np.arange(0) for _ in graph.shape(variable)) if step is None else step.outputs[j]
        steps.append(step)
    return Carried(holds, steps, frozenset(failed))


def _step(
    graph: Graph, place: int, holds: Sequence[Indices], failed: Mapping[int, tuple[int, Missing]]
) -> tuple[Step | None, tuple[int, Missing] | None]:
    """Return (the step of a node, None), or (None, why an operand that it reads can't be computed)."""
    node = graph.nodes[place]
    ins = [(None,) * len(graph.shape(i)) if i in failed else holds[i] for i in node.inputs]
    _check_constants(graph, place, ins)
    step = rule_of(node.name).carry(node, graph, ins)
    for variable, target in zip(node.inputs, step.targets, strict=True):
        if variable in failed and all(held(i, n) for i, n in zip(target, graph.shape(variable), strict=True)):
            return None, failed[variable]
    _check(graph, node.inputs, ins, step)
    return step, None


def _check_constants(graph: Graph, place: int, ins: Sequence[Indices]) -> None:
    """Check that entries which read a constant 1 are only moved, cast, and read by products."""
    node = graph.nodes[place]
    for k, (variable, index) in enumerate(zip(node.inputs, ins, strict=True)):
        for axis, (entries, size) in enumerate(zip(index, graph.shape(variable), strict=True)):
            if not without_constant(entries, size)[1] or node.name in PRODUCTS:
                continue
            links = [link for link in rule_of(node.name).links(node, graph) if (link.operand, link.axis) == (k, axis)]
            if node.name not in MOVES or not links or links[0].to is not None:
                raise Missing(k, axis, np.ones(size, bool))


def _check(graph: Graph, variables: Sequence[int], ins: Sequence[Indices], step: Step) -> None:
    """Check that the operands of a step hold what it takes."""
    for k, (variable, have, want) in enumerate(zip(variables, ins, step.targets, strict=True)):
        for axis, size in enumerate(graph.shape(variable)):
            mask = lacks(have[axis], want[axis], size)
            if mask is not None:
                raise Missing(k, axis, mask)


def alive(graph: Graph, carried: Carried, outputs: Sequence[int]) -> list[bool]:
    """Return for each node whether the outputs read anything of its results."""
    needed = [False] * len(graph.avals)
    for variable in outputs:
        needed[variable] = True
    found = [False] * len(graph.nodes)
    for place in reversed(range(len(graph.nodes))):
        node, step = graph.nodes[place], carried.steps[place]
        if step is None or not any(needed[i] for i in node.outputs):
            continue
        found[place] = True
        for variable, target in zip(node.inputs, step.targets, strict=True):
            sizes = (held(index, n) for index, n in zip(target, graph.shape(variable), strict=True))
            needed[variable] = needed[variable] or all(sizes)
    return found
