"""The making of a plan: needs, the order of the channels, and where a product gathers its inputs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mtl_sparse.compaction import carrying, liveness
from mtl_sparse.compaction import needs as needs_lib
from mtl_sparse.compaction.carrying import Carried
from mtl_sparse.compaction.facts import Facts
from mtl_sparse.compaction.graph import Graph, Node
from mtl_sparse.compaction.indices import UNIFORM, Index, Indices, Missing, held, listed, tidy
from mtl_sparse.compaction.needs import Needs
from mtl_sparse.compaction.plans import Leaf, Plan, Product
from mtl_sparse.compaction.primitives import RULES, rule_of

Axis = tuple[int, int]  # (variable, axis)
_PRODUCTS = ("dot_general", "conv_general_dilated")


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
            if len(varying) == 1 and node.name not in _PRODUCTS:
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


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a plan.

    Attributes:
      costs: costs that decide where gathering channels pays.
      multiple: widths are filled up to a multiple of it.
    """

    costs: liveness.Costs
    multiple: int = 1


def make(graph: Graph, values: Sequence[np.ndarray], options: Options) -> Plan:
    """Make a plan.

    Args:
      graph: the function.
      values: the leaves of its parameters.
      options: options of the plan.

    Returns:
      The plan.
    """
    facts = Facts(graph, values)
    needs_lib.learn(facts)
    folds = Folds(graph, facts)
    unread = needs_lib.find(Facts(graph, None))
    streams = Streams(graph)
    readers = _readers(graph)
    extra: dict[Axis, np.ndarray] = {}
    while True:
        found = needs_lib.find(facts, extra)
        if _fill(graph, streams, readers, found, options.multiple, extra):
            continue
        holds = _keep(graph, streams, readers, found)
        carried = _carry(graph, found, holds, extra)
        if carried is not None and not folds.drop_failed(carried):
            break
    holds = _gathers(graph, streams, readers, found, holds, carried, options)
    constants = folds.constants(found, holds)
    for place, (axis, _) in constants.items():
        if axis is not None:
            size = graph.shape(graph.params[place])[axis]
            rows = np.append(listed(holds[place][axis], size), size)
            holds[place] = (*holds[place][:axis], rows, *holds[place][axis + 1 :])
    carried = carrying.carry(graph, holds, [(None,) * len(graph.shape(i)) for i in graph.inputs])
    leaves = {}
    for place, (path, variable, index) in enumerate(zip(graph.paths, graph.params, holds, strict=True)):
        aval = graph.avals[variable]
        keep = {axis: np.asarray(kept) for axis, kept in enumerate(index) if kept is not None}
        constant = constants.get(place, (None, None))[1]
        leaves[path] = Leaf(aval.shape, str(aval.dtype), keep, _unread(unread, variable, keep), constant)
    products = tuple(_product(graph, facts, found, carried, reader) for reader in readers)
    barriers = tuple(
        sorted({node.name for node in graph.nodes if node.name not in RULES and any(map(_matters(graph), node.inputs))})
    )
    return Plan(leaves, products, barriers, _constant(graph, found, facts))


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
        for reader in _readers(graph):
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
            if graph.varies[bias] or self._uses[constant] > 1 or made_by is None or made_by.name in _PRODUCTS:
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


def _matters(graph: Graph):
    params = set(graph.params)
    depends = set(params)
    for node in graph.nodes:
        if any(i in depends for i in node.inputs):
            depends.update(node.outputs)
    return lambda variable: graph.varies[variable] or variable in depends


def _readers(graph: Graph) -> list[Reader]:
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


def _mask(needs: Needs, graph: Graph, axis: Axis) -> np.ndarray:
    need = needs.of[axis[0]]
    return np.zeros(graph.shape(axis[0])[axis[1]], bool) if need is None else need[axis[1]]


def _fill(
    graph: Graph,
    streams: Streams,
    readers: Sequence[Reader],
    needs: Needs,
    multiple: int,
    extra: dict[Axis, np.ndarray],
) -> bool:
    """Ask for further entries, so that widths are multiples; return whether there are any."""
    if multiple == 1:
        return False
    more = False
    params = set(graph.params)
    free = {streams.of((i, axis)) for i in params for axis in range(len(graph.shape(i)))}
    free -= {streams.of(reader.weights) for reader in readers}  # they read what the activations hold
    for variable, need in enumerate(needs.of):
        for axis, mask in enumerate(need or ()):
            root, count = streams.of((variable, axis)), int(mask.sum())
            wanted = min(-(-count // multiple) * multiple, len(mask))
            if root not in free or streams.is_pinned(root) or wanted == count or not count:
                continue
            filled = mask.copy()
            filled[np.flatnonzero(~mask)[: wanted - count]] = True
            extra[variable, axis] = filled | extra.get((variable, axis), False)
            more = True
    return more


def _keep(graph: Graph, streams: Streams, readers: Sequence[Reader], needs: Needs) -> list[Indices]:
    """Return the entries of each parameter that are needed, ordered by the readers of their stream."""
    by_stream: dict[Axis, dict[int, list[np.ndarray]]] = {}
    for reader in readers:
        root = streams.of(reader.x)
        if not streams.is_pinned(root):
            masks = by_stream.setdefault(root, {}).setdefault(streams.point(reader.x[0]), [])
            masks.insert(0, _mask(needs, graph, reader.weights))
    ranks = {root: np.argsort(_order(list(points.values()))) for root, points in by_stream.items()}
    holds = []
    for variable in graph.params:
        index: list[Index] = []
        for axis, size in enumerate(graph.shape(variable)):
            kept = np.flatnonzero(_mask(needs, graph, (variable, axis)))
            rank = ranks.get(streams.of((variable, axis)))
            if rank is not None and len(rank) == size:
                kept = kept[np.argsort(rank[kept])]
            index.append(tidy(kept, size))
        holds.append(tuple(index))
    return holds


def _order(points: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Return an order of a stream's channels, given the masks of the readers at each of its points.

    Many readers at one point, such as the branches of several heads, count as one, so that those before them also find
    their channels in few ranges.
    """
    masks: list[np.ndarray] = []
    for at_point in points:
        masks = [*(at_point if len(at_point) <= 2 else [np.logical_or.reduce(at_point)]), *masks]
    return liveness.stream_order(masks)


def _carry(graph: Graph, needs: Needs, holds: Sequence[Indices], extra: dict[Axis, np.ndarray]) -> Carried | None:
    """Carry the entries forward; None if an equation lacks some, which are then added to `extra`."""
    lacking = False

    def missing(place: int, error: Missing) -> None:
        nonlocal lacking
        node = graph.nodes[place]
        outs = (needs.of[i] for i in node.outputs)
        if any(out is not None and all(mask.any() for mask in out) for out in outs):
            axis = (node.inputs[error.operand], error.axis)
            extra[axis] = error.mask | extra.get(axis, False)
            lacking = True

    inputs = [(None,) * len(graph.shape(i)) for i in graph.inputs]
    carried = carrying.carry(graph, holds, inputs, missing)
    return None if lacking else carried


def _gathers(
    graph: Graph,
    streams: Streams,
    readers: Sequence[Reader],
    needs: Needs,
    holds: list[Indices],
    carried: Carried,
    options: Options,
) -> list[Indices]:
    """Choose which inputs each product reads: all that its activations carry, or ranges of them."""
    params = {
        streams.of((variable, axis)): (place, axis)
        for place, variable in enumerate(graph.params)
        for axis in range(len(graph.shape(variable)))
    }
    counts: dict[Axis, int] = {}
    for reader in readers:
        root = streams.of(reader.weights)
        counts[root] = counts.get(root, 0) + 1
    result = [list(index) for index in holds]
    for reader in readers:
        root = streams.of(reader.weights)
        size = graph.shape(reader.x[0])[reader.x[1]]
        index = carried.holds[reader.x[0]][reader.x[1]]
        mask = _mask(needs, graph, reader.weights)
        if root not in params or streams.is_pinned(root) or index is UNIFORM or not mask.any():
            continue
        have = listed(index, size)
        wanted = mask[have]
        if counts[root] == 1:
            ranges = liveness.choose_ranges(wanted, _macs(graph, carried, reader), options.costs)
            rows = np.arange(len(have)) if ranges is None else liveness.indices(ranges)
            wanted_rows = min(-(-len(rows) // options.multiple) * options.multiple, len(have))
            others = np.setdiff1d(np.arange(len(have)), rows)
            rows = np.sort(np.concatenate([rows, others[: wanted_rows - len(rows)]]))
            kept = have[rows]
        else:
            kept = have[wanted]
        place, axis = params[root]
        own = _mask(needs, graph, (graph.params[place], axis))
        if np.isin(np.flatnonzero(own), kept).all():
            result[place][axis] = tidy(kept, size)
    return [tuple(index) for index in result]


def _macs(graph: Graph, carried: Carried, reader: Reader) -> int:
    """Return how many multiply-accumulates one more input costs for each pixel."""
    variable, summed = reader.weights
    shape, index = graph.shape(variable), carried.holds[variable]
    return math.prod(max(1, held(index[axis], n)) for axis, n in enumerate(shape) if axis != summed)


def _unread(needs: Needs, variable: int, keep: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Return the entries that are removed because no equation reads them."""
    need, found = needs.of[variable], {}
    for axis, kept in keep.items():
        size_mask = need[axis] if need is not None else None
        if size_mask is not None and not size_mask.all():
            gone = ~size_mask
            gone[kept[kept < len(gone)]] = False
            if gone.any():
                found[axis] = np.flatnonzero(gone)
    return found


def _product(graph: Graph, facts: Facts, needs: Needs, carried: Carried, reader: Reader) -> Product:
    """Return the report of a product."""
    node = graph.nodes[reader.place]
    (x, x_axis), (weights, axis) = reader.x, reader.weights
    size = graph.shape(weights)[axis]
    kept, have = (held(carried.holds[v][a], size) for v, a in ((weights, axis), (x, x_axis)))
    because = ""
    if have > kept:
        cause = needs.because.get((x, x_axis))
        because = "other products read them" if cause is None else graph.nodes[cause].title
    paths = dict(zip(graph.params, graph.paths, strict=True))
    source, made_by = weights, {v: n for n in graph.nodes for v in n.outputs}
    while source not in paths and source in made_by and len(made_by[source].inputs) >= 1:
        source = made_by[source].inputs[0]
    return Product(paths.get(source, node.title), size, int(facts.zeros(weights, axis).sum()), kept, have, because)


def _constant(graph: Graph, needs: Needs, facts: Facts) -> tuple[str, ...]:
    """Return the paths of the outputs that do not depend on the inputs any more."""
    reached = [False] * len(graph.avals)
    for variable in graph.inputs:
        reached[variable] = True
    for node in graph.nodes:
        for variable in node.inputs:
            need = needs.of[variable]
            if reached[variable] and need is not None and all(mask.any() for mask in need):
                for out in node.outputs:
                    reached[out] = True
    del facts
    return tuple(
        path for path, variable in zip(graph.output_paths, graph.outputs, strict=True) if not reached[variable]
    )
