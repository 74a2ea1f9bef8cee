"""The forward pass: which entries each variable of the compact function holds, and its equations."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from mtl_sparse.compaction.graph import Graph
from mtl_sparse.compaction.indices import Indices, Missing, held, lacks
from mtl_sparse.compaction.primitives import rule_of
from mtl_sparse.compaction.rules import Step

OnMissing = Callable[[int, Missing], None]  # (index of the node, what is missing)


@dataclasses.dataclass(frozen=True)
class Carried:
    """A compact function, before it is applied to arrays.

    Attributes:
      holds: for each variable, the entries that it holds.
      steps: for each node of the graph, its step; None for one that can't be computed, because nothing needs it.
    """

    holds: list[Indices]
    steps: list[Step | None]

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
      missing: called for each equation whose operands lack entries; its results then hold nothing.

    Returns:
      The compact function.
    """
    holds: list[Indices] = [(None,) * len(aval.shape) for aval in graph.avals]
    for variable, index in zip((*graph.params, *graph.inputs), (*params, *inputs), strict=True):
        holds[variable] = index
    steps: list[Step | None] = []
    for place, node in enumerate(graph.nodes):
        ins = [holds[i] for i in node.inputs]
        try:
            step: Step | None = rule_of(node.name).carry(node, graph, ins)
            _check(graph, node.inputs, ins, step)
        except Missing as error:
            step = None
            if missing is not None:
                missing(place, error)
        for j, variable in enumerate(node.outputs):
            holds[variable] = tuple(np.arange(0) for _ in graph.shape(variable)) if step is None else step.outputs[j]
        steps.append(step)
    return Carried(holds, steps)


def _check(graph: Graph, variables: Sequence[int], ins: Sequence[Indices], step: Step | None) -> None:
    assert step is not None
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
