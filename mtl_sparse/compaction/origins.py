"""Where values come from, so that a plan is applied only to functions for which it was made.

A plan drops entries because weights are zero, and it uses constants that it computed. Both are right only for the same
weights, and for constants that come about in the same way. At other sizes of the inputs, and in other functions of the
same parameters, this is checked.
"""

import hashlib
from typing import Any

import jax
import numpy as np

from mtl_sparse.compaction.graph import Graph, Node
from mtl_sparse.compaction.indices import held
from mtl_sparse.compaction.primitives import PRODUCTS
from mtl_sparse.compaction.rules import Step

# parameters of primitives that contain the sizes of whole axes, so that they differ between batch sizes
_SIZES = frozenset("limit_indices new_sizes out_sharding shape sharding sizes slice_sizes".split())
# parameters that depend on JAX's configuration
_CONFIGURED = frozenset("dtype index_dtype new_dtype precision preferred_element_type weak_type".split())


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
            found = self._digests[variable] = _hashed(self._text(variable))
        return found

    def _text(self, variable: int) -> str:
        if variable in self._paths:
            return f"parameter {self._paths[variable]}"
        if variable in self._graph.constants:
            return _constant(self._graph, variable)
        node = self._made_by[variable]
        return " ".join([node.name, *(self.digest(i) for i in node.inputs)])

    def partial(self, node: Node, step: Step | None) -> str:
        """Return the terms of a sum that leaves out entries, as text; "" for any other equation."""
        if step is None or (node.name not in PRODUCTS and node.name != "reduce_sum"):
            return ""
        shapes = [self._graph.shape(i) for i in node.inputs]
        empty = any(
            not held(i, n) for t, s in zip(step.targets, shapes, strict=True) for i, n in zip(t, s, strict=True)
        )
        if not empty and all(step.targets[k][axis] is None for k, axis in summed(node)):
            return ""
        of = ["?" if self._graph.varies[i] else self.digest(i) for i in node.inputs]
        return " ".join([node.name, str(node.params.get("axes", "")), *of])


def fingerprint(graph: Graph) -> str:
    """Return a digest of all equations of a graph, their options and constants, that is the same at any batch size."""
    number: dict[int, str] = {
        variable: f"parameter {path}" for variable, path in zip(graph.params, graph.paths, strict=True)
    }
    number |= {variable: f"input {k}" for k, variable in enumerate(graph.inputs)}
    lines = []
    for place, node in enumerate(graph.nodes):
        operands = [_constant(graph, i) if i in graph.constants else number[i] for i in node.inputs]
        lines.append(" ".join([node.name, _options(node), *operands]))
        number |= {variable: f"{place}.{j}" for j, variable in enumerate(node.outputs)}
    return _hashed("\n".join(lines))


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _constant(graph: Graph, variable: int) -> str:
    """Return the text of a constant."""
    aval, value = graph.avals[variable], graph.constants[variable]
    if not isinstance(aval.dtype, np.dtype) or isinstance(value, jax.core.Tracer):
        return f"constant {aval.shape}"
    array = np.asarray(value)
    content = f"{array.item():.6g}" if array.size == 1 else _hashed(str(array.astype(complex).round(6).tolist()))
    return f"constant {aval.shape} {content}"


def _options(node: Node) -> str:
    """Return the parameters of an equation without those that differ between batch sizes."""
    if node.call is not None:
        return ""
    options: dict[str, Any] = node.params
    if node.name == "iota":
        options = {**options, "length": options["shape"][options["dimension"]]}
    return " ".join(f"{name}={value}" for name, value in sorted(options.items()) if name not in _CONFIGURED | _SIZES)


def summed(node: Node) -> list[tuple[int, int]]:
    """Return the (operand, axis) that a sum or a product sums over."""
    if node.name == "reduce_sum":
        return [(0, axis) for axis in node.params["axes"]]
    if node.name == "dot_general":
        return [(k, axis) for k in range(2) for axis in node.params["dimension_numbers"][0][k]]
    numbers = node.params["dimension_numbers"]
    return [(0, numbers.lhs_spec[1]), (1, numbers.rhs_spec[1])]
