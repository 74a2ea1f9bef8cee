"""Constants that parameters take over from the layers that put them out."""

from collections.abc import Sequence

import numpy as np

from mtl_sparse.compaction.carrying import Carried
from mtl_sparse.compaction.facts import Facts
from mtl_sparse.compaction.graph import Graph, Node
from mtl_sparse.compaction.indices import Indices, listed
from mtl_sparse.compaction.needs import Needs
from mtl_sparse.compaction.primitives import rule_of
from mtl_sparse.compaction.streams import PRODUCTS, Axis, Reader, find_readers

_SAME = frozenset(
    {"broadcast_in_dim", "convert_element_type", "copy", "device_put", "reshape", "slice", "squeeze", "transpose"}
)


class Folds:
    """Constants that parameters can take over from the layers that put them out."""

    def __init__(self, graph: Graph, facts: Facts) -> None:
        """Find the parameters that can, and mark them in the facts."""
        self._graph, self._facts = graph, facts
        self._made_by = {variable: node for node in graph.nodes for variable in node.outputs}
        self._uses: dict[int, int] = {}
        for variable in (*graph.outputs, *(i for node in graph.nodes for i in node.inputs)):
            self._uses[variable] = self._uses.get(variable, 0) + 1
        self._rows: list[tuple[Reader, int, int]] = []  # (reader, place of the parameter, its summed axis)
        self._biases: dict[int, tuple[int, int, int]] = {}  # result -> (place of the parameter, operand, axis)
        for reader in find_readers(graph):
            node = graph.nodes[reader.place]
            one = node.name != "dot_general" or len(node.params["dimension_numbers"][0][0]) == 1
            source = self._source(reader.weights)
            if source is not None and one:
                self._rows.append((reader, *source))
                facts.foldable.add(reader.weights[0])
        for node in graph.nodes:
            self._find_bias(node)

    def _source(self, axis: Axis) -> tuple[int, int] | None:
        """Return (place, axis) of the parameter that a variable is, moved or cast; None if it is more or used twice."""
        graph, (variable, own) = self._graph, axis
        while variable not in graph.params:
            node = self._made_by.get(variable)
            if node is None or node.name not in _SAME or self._uses[variable] > 1:
                return None
            links = [link for link in rule_of(node.name).links(node, graph) if link.out_axis == own]
            if not links or links[0].to is not None or not self._only_moves(node):
                return None
            variable, own = node.inputs[0], links[0].axis
        return (graph.params.index(variable), own) if self._uses[variable] == 1 else None

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
                if source is not None and graph.shape(graph.params[source[0]]) == (len(known.mask),):
                    self._biases[node.outputs[0]] = (source[0], k, axis)
                    facts.folded[node.outputs[0]] = k

    def drop_failed(self, carried: Carried) -> bool:
        """Give up the sums whose constant operand is still computed; return whether there were any."""
        failed = [out for out, (_, k, _) in self._biases.items() if not carried.is_empty(self._made_by[out].inputs[k])]
        for out in failed:
            del self._biases[out], self._facts.folded[out]
        return bool(failed)

    def constants(self, needs: Needs, holds: Sequence[Indices]) -> dict[int, tuple[int | None, np.ndarray]]:
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
            gone[listed(holds[place][axis], len(gone))] = False
            inputs = np.where(gone, known.values, 0).astype(np.float64).reshape(spread)
            row = (value.astype(np.float64) * inputs).sum(axis, keepdims=True)
            if row.any():
                found[place] = (axis, row.astype(value.dtype))
        for out, (place, _, axis) in self._biases.items():
            if needs.of[out] is not None:
                found[place] = (None, facts.known[out][axis].values.astype(graph.avals[graph.params[place]].dtype))
        return found
