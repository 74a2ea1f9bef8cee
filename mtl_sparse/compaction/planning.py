"""The making of a plan: needs, the order of the channels, and where a product gathers its inputs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mtl_sparse.compaction import carrying, liveness
from mtl_sparse.compaction import needs as needs_lib
from mtl_sparse.compaction.carrying import Carried
from mtl_sparse.compaction.facts import Facts
from mtl_sparse.compaction.folding import Folds
from mtl_sparse.compaction.graph import Graph
from mtl_sparse.compaction.indices import UNIFORM, Index, Indices, Missing, held, listed, tidy
from mtl_sparse.compaction.needs import Needs
from mtl_sparse.compaction.origins import Origins, fingerprint
from mtl_sparse.compaction.plans import Leaf, Plan, Product
from mtl_sparse.compaction.primitives import RULES
from mtl_sparse.compaction.streams import Axis, Reader, Streams, find_readers

Values = Sequence[np.ndarray | None]
_MOST_ROUNDS = 1000  # each asks for at least one more entry; in practice there are fewer than ten


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a plan.

    Attributes:
      costs: costs that decide where gathering channels pays.
      multiple: widths are filled up to a multiple of it.
      fold: whether constants are used.
    """

    costs: liveness.Costs
    multiple: int = 1
    fold: bool = True


def make(graph: Graph, others: Sequence[Graph], values: Values, options: Options) -> Plan:
    """Make a plan.

    Args:
      graph: the function.
      others: the function at other sizes of its inputs, for which the plan must serve as well.
      values: the leaves of its parameters; None for one that has no numbers.
      options: options of the plan.

    Returns:
      The plan.
    """
    facts = Facts(graph, values)
    mark, folds = fingerprint(graph), None
    if options.fold and all(fingerprint(other) == mark for other in others):
        needs_lib.learn(facts)
        folds = Folds(graph, facts)
    unread = needs_lib.find(Facts(graph, None), _elsewhere(graph, others, None))
    streams = Streams(graph)
    readers = find_readers(graph)
    extra = _elsewhere(graph, others, values)
    for _ in range(_MOST_ROUNDS):
        found = needs_lib.find(facts, extra)
        if _fill(graph, streams, readers, found, options.multiple, extra):
            continue
        holds = _keep(graph, streams, readers, found)
        carried = _carry(graph, found, holds, extra)
        if carried is not None and not (folds and folds.drop_failed(carried)):
            break
    else:
        raise AssertionError("the needs of the parameters did not settle")
    holds = _gathers(graph, streams, readers, found, holds, carried, options)
    constants = folds.constants(found, holds, carried) if folds is not None else {}
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
    partial = _partial(graph, carried)
    for other in others:
        partial |= _partial(other, carrying.carry(other, holds, [(None,) * len(other.shape(i)) for i in other.inputs]))
    if not constants and not _uses_constants(graph, values, found):
        mark = ""
    return Plan(leaves, products, _barriers(graph), _constant(graph, carried), partial, mark)


def _partial(graph: Graph, carried: Carried) -> frozenset[str]:
    """Return the sums of a graph that leave out entries."""
    origins = Origins(graph)
    found = {origins.partial(node, step) for node, step in zip(graph.nodes, carried.steps, strict=True)}
    return frozenset(found - {""})


def _uses_constants(graph: Graph, values: Values, needs: Needs) -> bool:
    """Return whether more would be needed if constants were not known."""
    without = needs_lib.find(Facts(graph, values))
    for variable in (*graph.params, *graph.inputs):
        more, need = without.of[variable], needs.of[variable]
        if more is not None and (need is None or any((a & ~b).any() for a, b in zip(more, need, strict=True))):
            return True
    return False


def _elsewhere(graph: Graph, others: Sequence[Graph], values: Values | None) -> dict[Axis, np.ndarray]:
    """Return the entries of the parameters of a graph that other graphs of the function need."""
    found: dict[Axis, np.ndarray] = {}
    for other in others:
        needs = needs_lib.find(Facts(other, values))
        for mine, variable in zip(graph.params, other.params, strict=True):
            for axis, mask in enumerate(needs.of[variable] or ()):
                found[mine, axis] = mask | found.get((mine, axis), False)
    return found


def _barriers(graph: Graph) -> tuple[str, ...]:
    """Return the primitives without a rule that read a parameter or an input, or what follows from them."""
    depends, found = {*graph.params, *graph.inputs}, set()
    for node in graph.nodes:
        if any(i in depends for i in node.inputs):
            depends.update(node.outputs)
            if node.name not in RULES:
                found.add(node.name)
    return tuple(sorted(found))


def _needed(needs: Needs, graph: Graph, axis: Axis) -> np.ndarray:
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
            masks.insert(0, _needed(needs, graph, reader.weights))
    ranks = {root: np.argsort(_order(list(points.values()))) for root, points in by_stream.items()}
    holds = []
    for variable in graph.params:
        index: list[Index] = []
        for axis, size in enumerate(graph.shape(variable)):
            kept = np.flatnonzero(_needed(needs, graph, (variable, axis)))
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

    def missing(place: int, origin: int, error: Missing) -> None:
        nonlocal lacking
        outs = (needs.of[i] for i in graph.nodes[place].outputs)
        if any(out is not None and all(mask.any() for mask in out) for out in outs):
            axis = (graph.nodes[origin].inputs[error.operand], error.axis)
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
        mask = _needed(needs, graph, reader.weights)
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
        own = _needed(needs, graph, (graph.params[place], axis))
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


def _constant(graph: Graph, carried: Carried) -> tuple[str, ...]:
    """Return the paths of the outputs that no longer depend on the inputs."""
    reached = [False] * len(graph.avals)
    for variable in graph.inputs:
        reached[variable] = True
    for node, step in zip(graph.nodes, carried.steps, strict=True):
        for variable, target in zip(node.inputs, () if step is None else step.targets, strict=step is not None):
            if reached[variable] and all(held(i, n) for i, n in zip(target, graph.shape(variable), strict=True)):
                for out in node.outputs:
                    reached[out] = True
    return tuple(
        path for path, variable in zip(graph.output_paths, graph.outputs, strict=True) if not reached[variable]
    )
