"""The table of rules: primitive name -> rule."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtl_sparse.compaction.facts import Facts, Known
from mtl_sparse.compaction.graph import Graph, Node
from mtl_sparse.compaction.products import Conv, Dot
from mtl_sparse.compaction.rules import Elementwise, Link, Linked, Reduce, Rule, Shape
from mtl_sparse.compaction.shaping import Broadcast, Concatenate, Pad, Relabel, Reshape, Slice, Split, Spread, Tile
from mtl_sparse.runtime.errors import UserError

_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz conj
    convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac
    imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or
    polygamma population_count pow real reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor complex sharding_constraint
    layout_constraint name
""".split()


PRODUCTS = ("dot_general", "conv_general_dilated")
# primitives of one operand that move or cast its entries
MOVES = frozenset(
    "broadcast_in_dim convert_element_type copy device_put reshape slice spread squeeze transpose".split()
)


def _moved(node: Node, graph: Graph) -> list[Link]:
    """Return the links of a transpose."""
    del graph
    return [Link(0, axis, 0, place) for place, axis in enumerate(node.params["permutation"])]


def _side_by_side(node: Node, graph: Graph) -> list[Link]:
    """Return the links of each operand to its own result."""
    return [Link(k, axis, k, axis) for k, i in enumerate(node.inputs) for axis in range(len(graph.shape(i)))]


def _stacked(node: Node, graph: Graph) -> list[Link]:
    """Return the links of operands that are joined along a new axis."""
    rank, at = len(graph.shape(node.inputs[0])), node.params["axis"]
    return [Link(k, axis, 0, axis + (axis >= at % (rank + 1))) for k in range(len(node.inputs)) for axis in range(rank)]


def _squeezed(node: Node, graph: Graph) -> list[Link]:
    rank = len(graph.shape(node.inputs[0]))
    removed = {axis % rank for axis in node.params["dimensions"]}
    kept = [axis for axis in range(rank) if axis not in removed]
    return [Link(0, axis, 0, place) for place, axis in enumerate(kept)]


def _along(parameter: str) -> Callable[[Node, Graph], list[Link]]:
    """Return the links of a primitive that works along one axis: all other axes of all operands and results."""

    def links(node: Node, graph: Graph) -> list[Link]:
        rank = len(graph.shape(node.inputs[0]))
        along = node.params[parameter] % rank
        return [
            Link(k, axis, j, axis)
            for k, i in enumerate(node.inputs)
            for j in range(len(node.outputs))
            for axis in range(len(graph.shape(i)))
            if axis != along
        ]

    return links


def _top_k(node: Node, graph: Graph) -> list[Link]:
    rank = len(graph.shape(node.inputs[0]))
    along = node.params.get("axis", rank - 1)
    return [Link(0, axis, j, axis) for axis in range(rank) for j in range(2) if axis != along]


def _reduced(node: Node, graph: Graph) -> list[Link]:
    """Return the links of a reduction of several operands, each with an initial value."""
    rank = len(graph.shape(node.inputs[0]))
    kept = [axis for axis in range(rank) if axis not in node.params["dimensions"]]
    return [
        Link(k, axis, j, place)
        for place, axis in enumerate(kept)
        for j in range(len(node.outputs))
        for k in range(len(node.inputs) // 2)
    ]


def _windowed(node: Node, graph: Graph) -> list[Link]:
    """Return the links of the axes that a window does not reach across."""
    params = node.params
    rank = len(graph.shape(node.outputs[0]))
    operands = [k for k, i in enumerate(node.inputs) if len(graph.shape(i)) == rank]
    return [
        Link(k, axis, j, axis)
        for k in operands
        for j in range(len(node.outputs))
        for axis in range(rank)
        if params["window_dimensions"][axis] == params["window_strides"][axis] == 1
        and tuple(params["padding"][axis]) == (0, 0)
        and all(params.get(name) is None or params[name][axis] == 1 for name in ("base_dilation", "window_dilation"))
    ]


def _sliced(node: Node, graph: Graph) -> list[Link]:
    """Return the links of the axes that a dynamic slice takes whole."""
    shape, out = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
    return [Link(0, axis, 0, axis) for axis in range(len(shape)) if shape[axis] == out[axis]]


def _slice_sizes(node: Node, operands: Sequence[Any], sizes: Sequence[Shape]) -> dict[str, Any]:
    del operands
    return {**node.params, "slice_sizes": sizes[0]}


def _updated(node: Node, graph: Graph) -> list[Link]:
    """Return the links of the axes that a dynamic update covers whole."""
    shape, part = graph.shape(node.inputs[0]), graph.shape(node.inputs[1])
    return [Link(k, axis, 0, axis) for axis in range(len(shape)) if shape[axis] == part[axis] for k in range(2)]


def _gathered(node: Node, graph: Graph) -> list[Link]:
    """Return the links of the axes that a gather takes whole."""
    numbers, sizes = node.params["dimension_numbers"], node.params["slice_sizes"]
    shape = graph.shape(node.inputs[0])
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    window = [a for a in range(len(shape)) if a not in numbers.collapsed_slice_dims and a not in batching]
    return [
        Link(0, axis, 0, place)
        for axis, place in zip(window, numbers.offset_dims, strict=True)
        if sizes[axis] == shape[axis]
    ]


def _gather_sizes(node: Node, operands: Sequence[Any], sizes: Sequence[Shape]) -> dict[str, Any]:
    numbers, before = node.params["dimension_numbers"], list(node.params["slice_sizes"])
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    window = [a for a in range(len(before)) if a not in numbers.collapsed_slice_dims and a not in batching]
    for axis, place in zip(window, numbers.offset_dims, strict=True):
        before[axis] = sizes[0][place]
    del operands
    return {**node.params, "slice_sizes": tuple(before)}


def _scattered(node: Node, graph: Graph) -> list[Link]:
    """Return the links of the axes that a scatter's updates cover whole."""
    numbers = node.params["dimension_numbers"]
    shape, updates = graph.shape(node.inputs[0]), graph.shape(node.inputs[2])
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    window = [a for a in range(len(shape)) if a not in numbers.inserted_window_dims and a not in batching]
    links = []
    for axis, place in zip(window, numbers.update_window_dims, strict=True):
        if updates[place] == shape[axis]:
            links += [Link(0, axis, 0, axis), Link(2, place, 0, axis)]
    return links


class _ScatterAdd(Linked):
    """A scatter that adds: zeros added to zeros are zeros."""

    def known(self, node: Node, facts: Facts) -> list[dict[int, Known]]:
        """Return the slices that are zero in the operand and in the updates."""
        zeros: dict[int, list[np.ndarray]] = {}
        for link in self.links(node, facts.graph):
            zeros.setdefault(link.out_axis, []).append(facts.zeros(node.inputs[link.operand], link.axis))
        dtype = facts.graph.avals[node.outputs[0]].dtype
        masks = {axis: one & other for axis, (one, other) in zeros.items()}
        return [{axis: Known(mask, np.zeros(len(mask), dtype)) for axis, mask in masks.items() if mask.any()}]


def _barrier(node: Node, graph: Graph) -> list[Link]:
    del node, graph
    return []


_BARRIER = Linked(_barrier)
RULES: dict[str, Rule] = {name: Elementwise() for name in _ELEMENTWISE} | {
    "dot_general": Dot(),
    "conv_general_dilated": Conv(),
    "broadcast_in_dim": Broadcast(),
    "reshape": Reshape(),
    "device_put": Linked(_side_by_side, keeps="values", any_order=True),
    "pvary": Linked(_side_by_side, keeps="values", any_order=True),
    "optimization_barrier": Linked(_side_by_side, keeps="values", any_order=True),
    "stack": Linked(_stacked, keeps="values", any_order=True),
    "tile": Tile(),
    "transpose": Linked(_moved, keeps="values"),
    "squeeze": Linked(_squeezed, keeps="values"),
    "concatenate": Concatenate(),
    "slice": Slice(),
    "split": Split(),
    "pad": Pad(),
    "rev": Relabel(),
    "permutation": Relabel(),
    "spread": Spread(),
    "reduce_sum": Reduce("zeros", total=True),
    "reduce_max": Reduce("values"),
    "reduce_min": Reduce("values"),
    "reduce_prod": Reduce(""),
    "reduce_and": Reduce("values"),
    "reduce_or": Reduce("values"),
    "argmax": Reduce(""),
    "argmin": Reduce(""),
    "reduce": Linked(_reduced),
    "reduce_window": Linked(_windowed),
    "reduce_window_max": Linked(_windowed, keeps="values"),
    "reduce_window_min": Linked(_windowed, keeps="values"),
    "reduce_window_sum": Linked(_windowed, keeps="zeros"),
    "select_and_scatter_add": Linked(_windowed),
    "cumsum": Linked(_along("axis"), keeps="zeros"),
    "cumprod": Linked(_along("axis"), keeps="zeros"),
    "cummax": Linked(_along("axis"), keeps="values"),
    "cummin": Linked(_along("axis"), keeps="values"),
    "cumlogsumexp": Linked(_along("axis")),
    "sort": Linked(_along("dimension")),
    "top_k": Linked(_top_k),
    "dynamic_slice": Linked(_sliced, _slice_sizes, keeps="values"),
    "dynamic_update_slice": Linked(_updated),
    "gather": Linked(_gathered, _gather_sizes),
    "scatter": Linked(_scattered),
    "scatter-add": _ScatterAdd(_scattered),
    "scatter_add": _ScatterAdd(_scattered),
    "scatter-mul": Linked(_scattered),
    "scatter_max": Linked(_scattered),
    "scatter_min": Linked(_scattered),
}


def rule_of(name: str) -> Rule:
    """Return the rule of a primitive; that of a barrier if it has none."""
    return RULES.get(name, _BARRIER)


def register_rule(
    primitive: str,
    links: Callable[[Node, Graph], Sequence[Link]],
    adapt: Callable[[Node, Sequence[Any], Sequence[Shape]], dict[str, Any]] | None = None,
) -> None:
    """Register a rule for a primitive, so that it is no barrier.

    Args:
      primitive: name of the primitive, as a jaxpr shows it.
      links: function of (node, graph) that returns the axes that correspond, as a list of `Link`. `node.params` has the
        primitive's parameters, `graph.shape(node.inputs[0])` the shape of its first operand. Entry i of a linked axis
        of a result must depend on no other entry than i of the operand's axis. An axis without a link is needed whole.
      adapt: function of (node, operands, sizes of the results) that returns the primitive's parameters for operands
        that hold fewer entries; None if they do not depend on the sizes.

    Raises:
      UserError: the primitive has a rule of this package.
    """
    if primitive in RULES and not isinstance(RULES[primitive], _Registered):
        raise UserError("RULE_EXISTS", f"expected a primitive without a rule, got {primitive!r}, which has one already")
    RULES[primitive] = _Registered(links, adapt)


class _Registered(Linked):
    """A rule of the user."""
