"""Rules of products: where weights are zero, inputs are not needed."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from mtl_sparse.compaction import facts as facts_lib
from mtl_sparse.compaction.facts import Facts, Known
from mtl_sparse.compaction.graph import Graph, Node
from mtl_sparse.compaction.indices import (
    UNIFORM,
    Index,
    Indices,
    held,
    listed,
    meet,
    restrict,
    tidy,
    without_constant,
)
from mtl_sparse.compaction.rules import Link, Need, Rule, Step


def _no_products(node: Node, graph: Graph, ins: Sequence[Indices], links: Sequence[Link]) -> Step:
    """Return the step of a product that sums nothing: zeros, held once along the axes that are not the weights'."""
    shape, dtype = graph.shape(node.outputs[0]), graph.avals[node.outputs[0]].dtype
    out: list[Index] = [UNIFORM] * len(shape)
    for link in links:
        if not graph.varies[node.inputs[link.operand]]:
            out[link.out_axis] = ins[link.operand][link.axis]
    sizes = [held(index, n) for index, n in zip(out, shape, strict=True)]
    return Step(tuple(_nothing(mine) for mine in ins), (tuple(out),), lambda _: [jnp.zeros(sizes, dtype)])


def _common(one: Index, other: Index) -> Index:
    """Return the entries of a contraction that both operands hold; a uniform axis has all."""
    index = meet(one, other)
    return None if index is UNIFORM else index


def _restricted(x: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Return the part of an array within the masks, at the cost of a copy only where something is left out."""
    for axis, mask in enumerate(masks):
        if not mask.all():
            x = np.compress(mask, x, axis)
    return x


class Dot(Rule):
    """`dot_general`."""

    any_order = True

    def links(self, node: Node, graph: Graph) -> Sequence[Link]:
        """Return the links of batch axes and of axes that are not summed."""
        (_, (batch, other_batch)) = node.params["dimension_numbers"]
        links = [Link(0, axis, 0, place) for place, axis in enumerate(batch)]
        links += [Link(1, axis, 0, place) for place, axis in enumerate(other_batch)]
        place = len(batch)
        for k in range(2):
            for axis in self._free(node, graph, k):
                links.append(Link(k, axis, 0, place))
                place += 1
        return links

    def _with_constant(self, node: Node, graph: Graph, ins: Sequence[Indices], k: int, real: Index) -> Step:
        """Return the product of weights with an entry that reads a constant 1."""
        axis, rank = node.params["dimension_numbers"][0][k][0], len(graph.shape(node.outputs[0]))
        places = {link.axis: link.out_axis for link in self.links(node, graph) if link.operand == k}
        out: list[Index] = [UNIFORM] * rank
        for own, place in places.items():
            out[place] = ins[k][own]

        def emit(operands: list[Any]) -> list[Any]:
            row = jnp.squeeze(operands[0], axis)
            kept = [place for own, place in sorted(places.items())]
            return [
                lax.broadcast_in_dim(row, [1 if i not in kept else row.shape[kept.index(i)] for i in range(rank)], kept)
            ]

        mine = list(ins)
        mine[k] = _replaced(ins[k], axis, real)
        return _sum_with(self.carry(node, graph, mine), Step((), (tuple(out),), emit), graph, node, k, axis, ins[k])

    def _free(self, node: Node, graph: Graph, k: int) -> list[int]:
        contracted, batch = node.params["dimension_numbers"]
        used = (*contracted[k], *batch[k])
        return [axis for axis in range(len(graph.shape(node.inputs[k]))) if axis not in used]

    def needs(self, node: Node, facts: Facts, outs: Sequence[Need]) -> list[Need]:
        """Return what the operands need: of the sum, only products whose factors can both differ from zero."""
        if outs[0] is None:
            return [None, None]
        needs = super().needs(node, facts, outs)
        if any(need is None for need in needs):
            return [None, None]
        contracted, _ = node.params["dimension_numbers"]
        masks = self._summed(node, facts, needs)
        for k in range(2):
            for axis, mask in zip(contracted[k], masks, strict=True):
                needs[k][axis] = mask  # type: ignore[index]
        return needs

    def _summed(self, node: Node, facts: Facts, needs: Sequence[Need]) -> list[np.ndarray]:
        """Return which entries of the summed axes can contribute to what is needed."""
        contracted, _ = node.params["dimension_numbers"]
        sizes = [facts.graph.shape(node.inputs[0])[axis] for axis in contracted[0]]
        product = np.ones(sizes, bool)
        for k in range(2):
            for place, axis in enumerate(contracted[k]):
                spread = [1] * len(sizes)
                spread[place] = sizes[place]
                idle = (
                    facts.idle(node.inputs[k], axis, node.inputs[1 - k])
                    if len(sizes) == 1
                    else facts.zeros(node.inputs[k], axis)
                )
                product &= ~idle.reshape(spread)
            value = facts.value(node.inputs[k])
            if value is not None and value.size:
                need = needs[k] or []
                masks = [np.ones_like(m) if axis in contracted[k] else m for axis, m in enumerate(need)]
                part = _restricted(facts_lib.squeezed(value) if all(m.all() for m in masks) else value, masks)
                others = tuple(axis for axis in range(part.ndim) if axis not in contracted[k])
                x = np.asarray((part != 0).any(others))
                product &= x.transpose(np.argsort(np.argsort(contracted[k])))
        return [np.asarray(product.any(tuple(i for i in range(len(sizes)) if i != k))) for k in range(len(sizes))]

    def known(self, node: Node, facts: Facts) -> list[dict[int, Known]]:
        """Return the slices of the result that are sums of constants."""
        graph = facts.graph
        found: dict[int, Known] = {}
        contracted, _ = node.params["dimension_numbers"]
        dtype = graph.avals[node.outputs[0]].dtype
        for link in self.links(node, graph):
            zeros = facts.zeros(node.inputs[link.operand], link.axis)
            if zeros.any():
                before = found.get(link.out_axis)
                mask = zeros if before is None else zeros | before.mask
                found[link.out_axis] = Known(mask, np.zeros(len(zeros), dtype))
        for k in range(2):
            weights, x = facts.value(node.inputs[k]), node.inputs[1 - k]
            if weights is None or weights.ndim != 2 or len(contracted[k]) != 1 or not graph.varies[x]:
                continue
            known = facts.known[x].get(contracted[1 - k][0])
            free = self._free(node, graph, k)
            if known is None or len(free) != 1:
                continue
            weights = weights if contracted[k][0] == 0 else weights.T
            place = next(v.out_axis for v in self.links(node, graph) if v.operand == k and v.axis == free[0])
            constant = sum_of_constants(weights, known, np.ones(1, bool))
            if constant is not None:
                found[place] = _joined(found.get(place), constant, dtype)
        return [found]

    def carry(self, node: Node, graph: Graph, ins: Sequence[Indices]) -> Step:
        """Return the product over the entries that both operands hold."""
        contracted, batch = node.params["dimension_numbers"]
        if len(contracted[0]) == 1:
            for k in range(2):
                axis = contracted[k][0]
                real, constant = without_constant(ins[k][axis], graph.shape(node.inputs[k])[axis])
                if constant:
                    return self._with_constant(node, graph, ins, k, real)
        targets = [list(mine) for mine in ins]
        for a, b in zip(*contracted, strict=True):
            index = _common(ins[1][b], ins[0][a])
            targets[0][a] = targets[1][b] = index
            if held(index, graph.shape(node.inputs[0])[a]) == 0:
                return _no_products(node, graph, ins, self.links(node, graph))
        for a, b in zip(*batch, strict=True):
            targets[0][a] = targets[1][b] = meet(ins[0][a], ins[1][b])
        outs: list[Index] = [None] * len(graph.shape(node.outputs[0]))
        for link in self.links(node, graph):
            outs[link.out_axis] = targets[link.operand][link.axis]
        return self.step(node, graph, targets, [outs])


def _sum_with(step: Step, constant: Step, graph: Graph, node: Node, k: int, axis: int, whole: Indices) -> Step:
    """Return the step of a product whose weights hold an entry that reads a constant 1.

    Args:
      step: the product with the other entries.
      constant: the product of a constant 1 with that entry alone, in place of both operands.
      graph: the graph.
      node: the product.
      k: which operand the weights are.
      axis: their summed axis.
      whole: what the weights hold.

    Returns:
      The sum of both.
    """
    shape = graph.shape(node.outputs[0])
    out = tuple(meet(one, other) for one, other in zip(step.outputs[0], constant.outputs[0], strict=True))
    weights_shape = graph.shape(node.inputs[k])
    empty = any(isinstance(index, np.ndarray) and not len(index) for index in step.targets[k])

    def emit(operands: list[Any]) -> list[Any]:
        last = restrict(operands[k], whole, _replaced(whole, axis, np.array([weights_shape[axis]])), weights_shape)
        y = restrict(constant.emit([last])[0], constant.outputs[0], out, shape)
        y = y.astype(graph.avals[node.outputs[0]].dtype)
        if empty:
            return [y]
        mine = list(operands)
        mine[k] = restrict(operands[k], whole, step.targets[k], weights_shape)
        return [restrict(step.emit(mine)[0], step.outputs[0], out, shape) + y]

    targets = list(step.targets)
    targets[k] = whole
    return Step(tuple(targets), (out,), emit)


def _replaced(index: Indices, axis: int, now: Index) -> Indices:
    return (*index[:axis], now, *index[axis + 1 :])


def _nothing(mine: Indices) -> Indices:
    """Return the index of no entry."""
    return tuple(index if index is UNIFORM else np.arange(0) for index in mine)


def _joined(before: Known | None, now: Known, dtype: Any) -> Known:
    values = now.values.astype(dtype)
    if before is None:
        return Known(now.mask, values)
    return Known(now.mask | before.mask, np.where(before.mask, before.values, values).astype(dtype))


def sum_of_constants(weights: np.ndarray, known: Known, even: np.ndarray) -> Known | None:
    """Return the outputs of a product that depend on constant inputs only.

    Args:
      weights: [I, O].
      known: constant inputs [I].
      even: [1], whether a constant that is not zero gives a constant; not so next to padding.

    Returns:
      Known [O]; None if there are none.
    """
    usable = known.mask if even[0] else known.zeros
    mask = ~(weights[~usable] != 0).any(0)
    terms = ((usable & (known.values != 0))[:, None] & (weights != 0)).any(0)
    if not mask.any():
        return None
    wide = np.result_type(known.values, weights, np.float64)
    values = np.where(usable, known.values.astype(wide), 0) @ np.where(mask, weights, 0).astype(wide)
    mask &= (values != 0) | ~terms  # a sum that is zero by cancellation is not zero where some of its terms are removed
    return Known(mask, values) if mask.any() else None


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Axes and sizes of a convolution: groups G, inputs and outputs of a group."""

    x_channel: int
    k_in: int
    k_out: int
    k_spatial: tuple[int, ...]
    out_channel: int
    groups: int
    inputs: int
    outputs: int

    @classmethod
    def of(cls, node: Node, graph: Graph) -> "_Layout":
        numbers = node.params["dimension_numbers"]
        kernel, groups = graph.shape(node.inputs[1]), node.params["feature_group_count"]
        return cls(
            numbers.lhs_spec[1],
            numbers.rhs_spec[1],
            numbers.rhs_spec[0],
            tuple(numbers.rhs_spec[2:]),
            numbers.out_spec[1],
            groups,
            kernel[numbers.rhs_spec[1]],
            kernel[numbers.rhs_spec[0]] // groups,
        )


class Conv(Rule):
    """`conv_general_dilated`, grouped and depthwise included: a group is removed whole, or the same entries of each."""

    any_order = True

    def links(self, node: Node, graph: Graph) -> Sequence[Link]:
        """Return the links of the batch and of the output channels."""
        if node.params["batch_group_count"] > 1:
            return ()
        numbers, layout = node.params["dimension_numbers"], _Layout.of(node, graph)
        links = [
            Link(0, numbers.lhs_spec[0], 0, numbers.out_spec[0]),
            Link(1, layout.k_out, 0, layout.out_channel),
        ]
        if layout.inputs == layout.outputs == 1:
            links.append(Link(0, layout.x_channel, 0, layout.out_channel))
        return links

    def is_grouped(self, node: Node) -> bool:
        """Return whether channels must keep their order because groups are made of them."""
        return node.params["feature_group_count"] > 1 or node.params["batch_group_count"] > 1

    def needs(self, node: Node, facts: Facts, outs: Sequence[Need]) -> list[Need]:
        """Return the inputs that some weight leads to a needed output, and the weights between both."""
        out = outs[0]
        if out is None or node.params["batch_group_count"] > 1:
            return super().needs(node, facts, outs)
        graph, numbers, at = facts.graph, node.params["dimension_numbers"], _Layout.of(node, facts.graph)
        wanted = out[at.out_channel].reshape(at.groups, at.outputs)
        groups, outputs = wanted.any(1), wanted.any(0)
        alive = np.ones((at.inputs, at.groups, at.outputs), bool)
        value = facts.value(node.inputs[1])
        if value is not None:
            alive = _pattern(value, at)
        alive = alive[:, groups][:, :, outputs]
        idle = (
            facts.idle(node.inputs[0], at.x_channel, node.inputs[1])
            if at.groups == 1
            else facts.zeros(node.inputs[0], at.x_channel)
        )
        zeros = idle.reshape(at.groups, at.inputs)[groups]
        inputs = (alive & ~zeros.T[:, :, None]).any((1, 2))
        x = [np.ones(n, bool) for n in graph.shape(node.inputs[0])]
        kernel = [np.ones(n, bool) for n in graph.shape(node.inputs[1])]
        x[numbers.lhs_spec[0]] = out[numbers.out_spec[0]]
        x[at.x_channel] = np.outer(groups, inputs).reshape(-1)
        kernel[at.k_in], kernel[at.k_out] = inputs, np.outer(groups, outputs).reshape(-1)
        return [x, kernel]

    def known(self, node: Node, facts: Facts) -> list[dict[int, Known]]:
        """Return the output channels that depend on constant inputs only."""
        if node.params["batch_group_count"] > 1:
            return [{}]
        graph, at = facts.graph, _Layout.of(node, facts.graph)
        value, known = facts.value(node.inputs[1]), facts.along(node.inputs[0], at.x_channel)
        if value is None or not graph.varies[node.inputs[0]]:
            return [{}]
        size = at.groups * at.inputs
        known = known or Known(np.zeros(size, bool), np.zeros(size))
        params, spatial = node.params, [graph.shape(node.inputs[1])[axis] for axis in at.k_spatial]
        even = all(n == 1 for n in spatial) and all(side == (0, 0) for side in params["padding"])
        even = even and all(n == 1 for n in params["lhs_dilation"])
        if even or at.groups == 1:
            moved = np.moveaxis(value, (*at.k_spatial, at.k_in, at.k_out), range(value.ndim))
            weights = moved.reshape(-1, at.inputs, at.groups, at.outputs)
        else:
            weights = _pattern(value, at)[None].astype(np.float32)
        masks, values = [], []
        for g in range(at.groups):
            part = Known(*(x[g * at.inputs : (g + 1) * at.inputs] for x in (known.mask, known.values)))
            kernel = weights[:, :, g]
            kernel = kernel[0] if even else (kernel != 0).any(0).astype(np.float32)
            found = sum_of_constants(kernel, part, np.array([even]))
            masks.append(np.zeros(at.outputs, bool) if found is None else found.mask)
            values.append(np.zeros(at.outputs) if found is None else found.values)
        mask = np.concatenate(masks)
        if not mask.any():
            return [{}]
        return [{at.out_channel: Known(mask, np.concatenate(values).astype(graph.avals[node.outputs[0]].dtype))}]

    def carry(self, node: Node, graph: Graph, ins: Sequence[Indices]) -> Step:
        """Return the convolution of what the operands hold."""
        if node.params["batch_group_count"] > 1:
            return super().carry(node, graph, ins)
        numbers, at = node.params["dimension_numbers"], _Layout.of(node, graph)
        real, constant = without_constant(ins[1][at.k_in], at.inputs)
        if constant:
            return self._with_constant(node, graph, ins, real)
        x, kernel = list(ins[0]), list(ins[1])
        shape = graph.shape(node.outputs[0])
        if at.groups == 1:
            kernel[at.k_in] = x[at.x_channel] = _common(kernel[at.k_in], x[at.x_channel])
            groups = 1
        else:
            groups = self._grouped(at, x, kernel)
        if held(kernel[at.k_in], at.inputs) == 0 or groups == 0:
            return _no_products(node, graph, ins, self.links(node, graph))
        if kernel[at.k_out] is UNIFORM:
            kernel[at.k_out] = None
        outs: list[Index] = [None] * len(shape)
        outs[numbers.out_spec[0]] = x[numbers.lhs_spec[0]]
        outs[at.out_channel] = kernel[at.k_out]
        flat = self._is_flat(node, graph, at, x)
        for axis in numbers.lhs_spec[2:]:
            x[axis] = UNIFORM if flat else None
        for axis in at.k_spatial:
            kernel[axis] = None
        if flat:
            for axis in numbers.out_spec[2:]:
                outs[axis] = UNIFORM
        params = {**node.params, "feature_group_count": groups}
        if flat:
            params["window_strides"] = (1,) * len(at.k_spatial)
        return Step((tuple(x), tuple(kernel)), (tuple(outs),), lambda operands: facts_lib.bind(node, operands, params))

    def _with_constant(self, node: Node, graph: Graph, ins: Sequence[Indices], real: Index) -> Step:
        """Return the convolution of weights with an entry that reads a map of ones."""
        numbers, at = node.params["dimension_numbers"], _Layout.of(node, graph)
        shape = list(graph.shape(node.inputs[0]))
        shape[numbers.lhs_spec[0]] = shape[at.x_channel] = 1
        uniform = [UNIFORM if axis in numbers.lhs_spec[2:] else None for axis in range(len(shape))]
        flat = self._is_flat(node, graph, at, uniform)
        params = dict(node.params)
        if flat:
            shape, params["window_strides"] = [1] * len(shape), (1,) * len(at.k_spatial)
        out: list[Index] = [UNIFORM if flat else None] * len(shape)
        out[numbers.out_spec[0]], out[at.out_channel] = UNIFORM, ins[1][at.k_out]

        def emit(operands: list[Any]) -> list[Any]:
            return facts_lib.bind(node, [jnp.ones(shape, operands[0].dtype), operands[0]], params)

        step = self.carry(node, graph, (ins[0], _replaced(ins[1], at.k_in, real)))
        return _sum_with(step, Step((), (tuple(out),), emit), graph, node, 1, at.k_in, ins[1])

    def _is_flat(self, node: Node, graph: Graph, at: _Layout, x: Sequence[Index]) -> bool:
        """Return whether the result is the same everywhere because the input is, and there is no padding."""
        spatial = node.params["dimension_numbers"].lhs_spec[2:]
        return (
            all(x[axis] is UNIFORM for axis in spatial)
            and all(graph.shape(node.inputs[1])[axis] == 1 for axis in at.k_spatial)
            and all(tuple(side) == (0, 0) for side in node.params["padding"])
            and all(n == 1 for n in node.params["lhs_dilation"])
        )

    def _grouped(self, at: _Layout, x: list[Index], kernel: list[Index]) -> int:
        """Choose the groups and the entries that all of them keep; set the indices and return the number of groups.

        Operands that lack some of these entries are found by `carrying`.
        """
        size = at.groups * at.outputs
        held_out = listed(None if kernel[at.k_out] is UNIFORM else kernel[at.k_out], size)
        inner = listed(None if kernel[at.k_in] is UNIFORM else kernel[at.k_in], at.inputs)
        have = None if x[at.x_channel] is UNIFORM else x[at.x_channel]
        all_of = listed(have, at.groups * at.inputs)
        rows = np.arange(at.groups)[:, None] * at.inputs + inner
        holds = np.isin(rows, all_of)
        group_of = held_out // at.outputs
        _, first = np.unique(group_of, return_index=True)
        groups = group_of[np.sort(first)]
        groups = groups[holds[groups].any(1)]
        inner = inner[holds[groups].any(0)]
        held_out = held_out[np.isin(group_of, groups)]
        _, first = np.unique(held_out % at.outputs, return_index=True)
        outputs = (held_out % at.outputs)[np.sort(first)] if len(held_out) else np.arange(0)
        product = (groups[:, None] * at.outputs + outputs).reshape(-1)
        kernel[at.k_out], kernel[at.k_in] = tidy(product, size), tidy(inner, at.inputs)
        x[at.x_channel] = tidy((groups[:, None] * at.inputs + inner).reshape(-1), at.groups * at.inputs)
        return len(groups)


def _pattern(kernel: np.ndarray, at: _Layout) -> np.ndarray:
    """Return which weights differ from zero at some place of the kernel: [I, G, O]."""
    alive: np.ndarray = np.asarray((kernel != 0).any(at.k_spatial))
    if at.k_in > at.k_out:
        alive = alive.T
    return alive.reshape(at.inputs, at.groups, at.outputs)
