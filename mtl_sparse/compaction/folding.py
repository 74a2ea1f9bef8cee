"""Constant outputs of removed layers, which the parameters after them take over."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mtl_sparse.compaction.carrying import Carried
from mtl_sparse.compaction.facts import Facts
from mtl_sparse.compaction.graph import Graph, Node
from mtl_sparse.compaction.indices import UNIFORM, Indices, listed
from mtl_sparse.compaction.needs import Needs
from mtl_sparse.compaction.primitives import MOVES, PRODUCTS, rule_of
from mtl_sparse.compaction.streams import Axis, Reader, find_readers


class Folds:
    """Constants that parameters can take over."""

    def __init__(self, graph: Graph, facts: Facts) -> None:
        """Find the parameters that can take over constants, and mark them in the facts."""
        self._graph, self._facts = graph, facts
        self._made_by = {variable: node for node in graph.nodes for variable in node.outputs}
        self._uses: dict[int, int] = {}
        for variable in (*graph.outputs, *(i for node in graph.nodes for i in node.inputs)):
            self._uses[variable] = self._uses.get(variable, 0) + 1
        self._rows: list[tuple[Reader, int, int]] = []  # (reader, place of the parameter, its summed axis)
        self._biases: dict[int, tuple[int, int, int]] = {}  # result -> (place of the parameter, operand, axis)
        inside = {place for region in graph.regions if region.is_custom for place in range(region.start, region.stop)}
        for reader in find_readers(graph):
            node = graph.nodes[reader.place]
            one = node.name != "dot_general" or len(node.params["dimension_numbers"][0][0]) == 1
            source = self._source(reader.weights)
            if reader.place in inside:  # a custom derivative does not know the constant
                continue
            if source is not None and one and self._holds(source[0], node.outputs[0]):
                self._rows.append((reader, *source))
                facts.foldable.add(reader.weights[0])
        for node in graph.nodes:
            self._find_bias(node)

    def _source(self, axis: Axis) -> tuple[int, int] | None:
        """Return (place, axis) of the parameter that a variable is, moved or cast; None if it is more or used twice."""
        graph, (variable, own) = self._graph, axis
        while variable not in graph.params:
            node = self._made_by.get(variable)
            if node is None or node.name not in MOVES or self._uses[variable] > 1:
                return None
            links = [link for link in rule_of(node.name).links(node, graph) if link.out_axis == own]
            if not links or links[0].to is not None or not self._only_moves(node):
                return None
            variable, own = node.inputs[0], links[0].axis
            if not self._holds_cast(graph.avals[variable].dtype, graph.avals[node.outputs[0]].dtype):
                return None
        return (graph.params.index(variable), own) if self._uses[variable] == 1 else None

    def _holds(self, place: int, variable: int) -> bool:
        """Return whether a parameter has as many digits as a variable."""
        return self._holds_cast(self._graph.avals[self._graph.params[place]].dtype, self._graph.avals[variable].dtype)

    @staticmethod
    def _holds_cast(param: Any, value: Any) -> bool:
        return all(jnp.issubdtype(x, jnp.inexact) for x in (param, value)) and param.itemsize >= value.itemsize

    def _only_moves(self, node: Node) -> bool:
        """Return whether an equation moves the entries of its operand, and leaves none out."""
        links = [link for link in rule_of(node.name).links(node, self._graph) if link.to is None]
        shape, linked = self._graph.shape(node.inputs[0]), {link.axis for link in links if link.operand == 0}
        return all(n == 1 or axis in linked for axis, n in enumerate(shape))

    def _find_bias(self, node: Node) -> None:
        """Find a sum of something constant with a parameter that has one entry for each channel."""
        graph, facts = self._graph, self._facts
        if node.name != "add" or not graph.varies[node.outputs[0]]:
            return
        for k in range(2):
            constant, bias = node.inputs[k], node.inputs[1 - k]
            made_by = self._made_by.get(constant)
            if graph.varies[bias] or self._uses[constant] > 1 or made_by is None or made_by.name in PRODUCTS:
                continue
            for axis, known in facts.known[node.outputs[0]].items():
                source = self._source((bias, axis)) if len(graph.shape(bias)) > axis and known.mask.all() else None
                if source is None or not self._holds(source[0], node.outputs[0]):
                    continue
                if graph.shape(graph.params[source[0]]) == (len(known.mask),):
                    self._biases[node.outputs[0]] = (source[0], k, axis)
                    facts.folded[node.outputs[0]] = k
                    graph.replaced.add(bias)

    def _drop(self, out: int) -> None:
        """Give up a sum."""
        self._graph.replaced.discard(self._made_by[out].inputs[1 - self._facts.folded[out]])
        del self._biases[out], self._facts.folded[out]

    def drop_failed(self, carried: Carried) -> bool:
        """Give up the sums whose constant operand is still computed; return whether there were any."""
        failed = [out for out, (_, k, _) in self._biases.items() if not carried.is_empty(self._made_by[out].inputs[k])]
        for out in failed:
            self._drop(out)
        return bool(failed)

    def constants(
        self, needs: Needs, holds: Sequence[Indices], carried: Carried
    ) -> dict[int, tuple[int | None, np.ndarray]]:
        """Return what the parameters take over: place -> (axis of the entry that reads 1 or None, values).

        Weights take over the constants that they do not read any more.
        """
        graph, facts = self._graph, self._facts
        found: dict[int, tuple[int | None, np.ndarray]] = {}
        for reader, place, axis in self._rows:
            known = facts.known[reader.x[0]].get(reader.x[1])
            value, need = facts.value(graph.params[place]), needs.of[reader.weights[0]]
            if (
                known is None
                or value is None
                or need is None
                or not all(m.any() for a, m in enumerate(need) if a != reader.weights[1])
            ):
                continue
            spread = [1] * value.ndim
            spread[axis] = -1
            gone = known.mask.copy()
            have = carried.holds[reader.x[0]][reader.x[1]]
            if have is not UNIFORM:
                read = np.intersect1d(listed(holds[place][axis], len(gone)), listed(have, len(gone)))
                gone[read] = False
            wide = np.result_type(known.values, value, np.float64)
            inputs = np.where(gone, known.values, 0).astype(wide).reshape(spread)
            row = (value.astype(wide) * inputs).sum(axis, keepdims=True)
            if row.any():
                found[place] = (axis, row.astype(value.dtype))
        for out, (place, _, axis) in self._biases.items():
            if needs.of[out] is not None:
                found[place] = (None, facts.known[out][axis].values.astype(graph.avals[graph.params[place]].dtype))
        return found
