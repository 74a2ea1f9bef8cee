"""Where values come from, so that a plan is applied only to functions for which it was made.

A plan drops entries because weights are zero, and keeps constants that it computed. Both are right only for the same
weights, and for constants that come about in the same way. At another size of the inputs, and in another function of
the same parameters, this is checked.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mtl_sparse.compaction.graph import Graph, Node
from mtl_sparse.compaction.indices import held
from mtl_sparse.compaction.primitives import PRODUCTS
from mtl_sparse.compaction.rules import Step

Origin = str | list[Any]  # a digest, "?" for anything that depends on the inputs, or [primitive, options, *operands]

_ANY = "?"
_OPTIONS = ("axes", "axis", "dimension", "new_dtype", "padding", "padding_config", "permutation", "y")
_DEEPEST = 12


class Origins:
    """The origins of a graph's variables."""

    def __init__(self, graph: Graph) -> None:
        """Create the origins of a graph."""
        self._graph = graph
        self._made_by = {variable: node for node in graph.nodes for variable in node.outputs}
        self._paths = dict(zip(graph.params, graph.paths, strict=True))
        self._digests: dict[int, str] = {}

    def digest(self, variable: int) -> str:
        """Return a digest of how a variable that depends on no input is computed."""
        found = self._digests.get(variable)
        if found is None:
            found = hashlib.sha256(self._text(variable).encode()).hexdigest()[:16]
            self._digests[variable] = found
        return found

    def _text(self, variable: int) -> str:
        if variable in self._paths:
            return f"parameter {self._paths[variable]}"
        if variable in self._graph.constants:
            value = self._graph.constants[variable]
            numeric = isinstance(self._graph.avals[variable].dtype, np.dtype)
            return f"constant {np.unique(np.asarray(value))[:8].tolist()}" if numeric else "key"
        node = self._made_by[variable]
        return " ".join([node.name, _options(node), *(self.digest(i) for i in node.inputs)])

    def of(self, variable: int, follow: Callable[[int], bool], depth: int = 0) -> Origin:
        """Return the origin of a variable.

        Args:
          variable: the variable.
          follow: whether the origin of a variable that depends on the inputs matters.
          depth: how far the variable is from the one that the origin is of.
        """
        if not self._graph.varies[variable]:
            return self.digest(variable)
        node = self._made_by.get(variable)
        if node is None or depth == _DEEPEST or not follow(variable):
            return _ANY
        follow_here = (lambda _: False) if node.name in PRODUCTS else follow
        return [node.name, _options(node), *(self.of(i, follow_here, depth + 1) for i in node.inputs)]

    def agrees(self, variable: int, origin: Origin) -> bool:
        """Return whether a variable has an origin, which may be that of another graph's."""
        if isinstance(origin, str):
            return (
                self._graph.varies[variable]
                if origin == _ANY
                else (not self._graph.varies[variable] and self.digest(variable) == origin)
            )
        node = self._made_by.get(variable)
        if node is None or not self._graph.varies[variable] or [node.name, _options(node)] != origin[:2]:
            return False
        operands = origin[2:]
        return len(operands) == len(node.inputs) and all(map(self.agrees, node.inputs, operands))

    def partial(self, node: Node, step: Step | None) -> str:
        """Return what a sum that leaves out entries is of; "" for any other equation."""
        if step is None or (node.name not in PRODUCTS and node.name != "reduce_sum"):
            return ""
        shapes = [self._graph.shape(i) for i in node.inputs]
        if any(not held(i, n) for t, s in zip(step.targets, shapes, strict=True) for i, n in zip(t, s, strict=True)):
            whole = False  # nothing is summed
        else:
            whole = all(step.targets[k][axis] is None for k, axis in _summed(node))
        if whole:
            return ""
        of = [_ANY if self._graph.varies[i] else self.digest(i) for i in node.inputs]
        return " ".join([node.name, _options(node), *of])


def _options(node: Node) -> str:
    found: Mapping[str, Any] = node.params
    return " ".join(f"{name}={found[name]}" for name in _OPTIONS if name in found and node.name not in PRODUCTS)


def _summed(node: Node) -> list[tuple[int, int]]:
    """Return the (operand, axis) that an equation sums over."""
    if node.name == "reduce_sum":
        return [(0, axis) for axis in node.params["axes"]]
    if node.name == "dot_general":
        return [(k, axis) for k in range(2) for axis in node.params["dimension_numbers"][0][k]]
    numbers = node.params["dimension_numbers"]
    return [(0, numbers.lhs_spec[1]), (1, numbers.rhs_spec[1])]
