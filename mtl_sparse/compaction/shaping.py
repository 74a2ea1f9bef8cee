"""Rules of primitives that move entries: reshape, concatenate, slice, split, pad, reverse, broadcast."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from mtl_sparse.compaction.facts import Facts, Known
from mtl_sparse.compaction.graph import Graph, Node
from mtl_sparse.compaction.indices import UNIFORM, Index, Indices, held, listed, meet, positions, take, tidy
from mtl_sparse.compaction.rules import Link, Need, Rule, Shape, Step


class Slice(Rule):
    """A slice: its entries are selected from those that the operand holds."""

    keeps = "values"

    def links(self, node: Node, graph: Graph) -> Sequence[Link]:
        """Return a link for each axis."""
        shape, params = graph.shape(node.inputs[0]), node.params
        steps = params["strides"] or (1,) * len(shape)
        links = []
        for axis, (n, start, stop, step) in enumerate(
            zip(shape, params["start_indices"], params["limit_indices"], steps, strict=True)
        ):
            to = None
            if (start, stop, step) != (0, n, 1):
                to = np.full(n, -1)
                to[start:stop:step] = np.arange(len(range(start, stop, step)))
            links.append(Link(0, axis, 0, axis, to))
        return links

    def carry(self, node: Node, graph: Graph, ins: Sequence[Indices]) -> Step:
        """Return the selection of those entries."""
        target, out = [], []
        for link, index in zip(self.links(node, graph), ins[0], strict=True):
            n = graph.shape(node.outputs[0])[link.axis]
            wanted, holds = _mapped(link.to, index, graph.shape(node.inputs[0])[link.axis], n)
            target.append(wanted)
            out.append(holds)
        return Step((tuple(target),), (tuple(out),), lambda operands: operands)


def _mapped(to: np.ndarray | None, index: Index, size: int, out_size: int) -> tuple[Index, Index]:
    """Return (entries of the operand that are in the result, entries of the result that they are)."""
    if to is None or index is UNIFORM:
        return index, index
    have = listed(index, size)
    wanted = have[to[have] >= 0]
    return tidy(wanted, size), tidy(to[wanted], out_size)


class Split(Rule):
    """A split of one axis into several results."""

    keeps = "values"

    def links(self, node: Node, graph: Graph) -> Sequence[Link]:
        """Return links to each result."""
        links, start, axis = [], 0, node.params["axis"]
        shape = graph.shape(node.inputs[0])
        for j, size in enumerate(node.params["sizes"]):
            to = np.full(shape[axis], -1)
            to[start : start + size] = np.arange(size)
            links += [Link(0, a, j, a, to if a == axis else None) for a in range(len(shape))]
            start += size
        return links

    def carry(self, node: Node, graph: Graph, ins: Sequence[Indices]) -> Step:
        """Return the parts of the entries that the operand holds."""
        axis, mine = node.params["axis"], ins[0]
        size = graph.shape(node.inputs[0])[axis]
        outs, places = [], []
        for link in self.links(node, graph):
            if link.axis != axis:
                continue
            wanted, holds = _mapped(link.to, mine[axis], size, node.params["sizes"][link.output])
            outs.append((*mine[:axis], holds, *mine[axis + 1 :]))
            places.append(None if mine[axis] is UNIFORM else positions(mine[axis], listed(wanted, size), size))

        def emit(operands: list[Any]) -> list[Any]:
            return [operands[0] if part is None else take(operands[0], part, axis) for part in places]

        return Step((mine,), tuple(outs), emit)


class Concatenate(Rule):
    """A concatenation: each part contributes the entries that it holds."""

    keeps = "values"

    def links(self, node: Node, graph: Graph) -> Sequence[Link]:
        """Return links of each operand."""
        links, start, axis = [], 0, node.params["dimension"]
        for k, i in enumerate(node.inputs):
            shape = graph.shape(i)
            to = start + np.arange(shape[axis])
            links += [Link(k, a, 0, a, to if a == axis else None) for a in range(len(shape))]
            start += shape[axis]
        return links

    def carry(self, node: Node, graph: Graph, ins: Sequence[Indices]) -> Step:
        """Return the concatenation of what the operands hold."""
        axis, out_shape = node.params["dimension"], graph.shape(node.outputs[0])
        shared: list[Index] = [UNIFORM] * len(out_shape)
        for mine in ins:
            shared = [meet(one, other) for one, other in zip(shared, mine, strict=True)]
        targets, parts, start = [], [], 0
        for i, mine in zip(node.inputs, ins, strict=True):
            size = graph.shape(i)[axis]
            index = None if mine[axis] is UNIFORM else mine[axis]
            targets.append((*shared[:axis], index, *shared[axis + 1 :]))
            parts.append(start + listed(index, size))
            start += size
        shared[axis] = tidy(np.concatenate(parts), out_shape[axis])
        return Step(tuple(targets), (tuple(shared),), lambda operands: [lax.concatenate(operands, axis)])


class Tile(Rule):
    """A repetition of the operand along its axes."""

    keeps = "values"

    def links(self, node: Node, graph: Graph) -> Sequence[Link]:
        """Return a link for each repetition of each axis."""
        shape, out = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
        extra, links = len(out) - len(shape), []
        for axis, n in enumerate(shape):
            times = out[axis + extra] // n if n else 1
            steps = [None] if times == 1 else [r * n + np.arange(n) for r in range(times)]
            links += [Link(0, axis, 0, axis + extra, to) for to in steps]
        return links

    def carry(self, node: Node, graph: Graph, ins: Sequence[Indices]) -> Step:
        """Return the repetition of what the operand holds."""
        shape, out = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
        extra = len(out) - len(shape)
        holds: list[Index] = [UNIFORM] * extra
        reps = []
        for n, total, index in zip(shape, out[extra:], ins[0], strict=True):
            times = total // n if n else 1
            reps.append(1 if index is UNIFORM else times)
            if index is UNIFORM or times == 1:
                holds.append(index)
            else:
                parts = [r * n + listed(index, n) for r in range(times)]
                holds.append(tidy(np.concatenate(parts), total))

        def emit(operands: list[Any]) -> list[Any]:
            return [jnp.tile(operands[0], (*(1,) * extra, *reps))]

        return Step((tuple(ins[0]),), (tuple(holds),), emit)


class Pad(Rule):
    """Padding: what the operand holds, and what is added."""

    def links(self, node: Node, graph: Graph) -> Sequence[Link]:
        """Return a link for each axis."""
        links = []
        for axis, (n, (low, high, inner)) in enumerate(
            zip(graph.shape(node.inputs[0]), node.params["padding_config"], strict=True)
        ):
            to = None
            if (low, high, inner) != (0, 0, 0):
                to = low + np.arange(n) * (1 + inner)
                to[(to < 0) | (to >= graph.shape(node.outputs[0])[axis])] = -1
            links.append(Link(0, axis, 0, axis, to))
        return links

    def known(self, node: Node, facts: Facts) -> list[dict[int, Known]]:
        """Return the constant slices of the operand, and those that are added."""
        graph = facts.graph
        padding = None if graph.varies[node.inputs[1]] else facts.value(node.inputs[1])
        if padding is None:
            return [{}]
        found: dict[int, Known] = {}
        padded = [link.axis for link in self.links(node, graph) if link.to is not None]
        for link in self.links(node, graph):
            known = facts.along(node.inputs[0], link.axis) if graph.varies[node.inputs[0]] else None
            n = graph.shape(node.outputs[0])[link.axis]
            values = np.full(n, padding)
            if any(axis != link.axis for axis in padded):  # other axes add their padding to these slices
                if known is None:
                    continue
                mask = known.mask & (known.values == padding)
            else:
                mask = np.zeros(graph.shape(node.inputs[0])[link.axis], bool) if known is None else known.mask
            now = np.ones(n, bool) if link.to is not None else mask
            if link.to is not None:
                inside = link.to >= 0
                now[link.to[inside]] = mask[inside]
                if known is not None:
                    values[link.to[inside]] = known.values[inside]
            elif known is not None:
                values = known.values
            if now.any():
                found[link.axis] = Known(now, values)
        return [found]

    def carry(self, node: Node, graph: Graph, ins: Sequence[Indices]) -> Step:
        """Return the padding of what the operand holds."""
        shape, out_shape, config = (
            graph.shape(node.inputs[0]),
            graph.shape(node.outputs[0]),
            node.params["padding_config"],
        )
        target, out, tables, plain = [], [], {}, []
        for link, index in zip(self.links(node, graph), ins[0], strict=True):
            axis = link.axis
            if link.to is not None and index is UNIFORM:
                index = None
            target.append(index)
            if link.to is None or index is None:
                out.append(index)
                plain.append(config[axis])
                continue
            have, to = listed(index, shape[axis]), link.to
            table = np.full(out_shape[axis], -2)  # -2: not held; len(have): padding
            covered = np.zeros(out_shape[axis], bool)
            covered[to[to >= 0]] = True
            table[~covered] = len(have)
            inside = to[have] >= 0
            table[to[have[inside]]] = np.flatnonzero(inside)
            holds = np.flatnonzero(table >= 0)
            tables[axis] = table[holds]
            out.append(tidy(holds, out_shape[axis]))
            plain.append((0, 1, 0))

        def emit(operands: list[Any]) -> list[Any]:
            x = lax.pad(operands[0], operands[1], plain)
            for axis, table in tables.items():
                x = jnp.take(x, table, axis, mode="clip")
            return [x]

        return Step((tuple(target), ()), (tuple(out),), emit)


class Relabel(Rule):
    """A reversal or a permutation: the array stays as it is, its entries get other numbers."""

    keeps = "values"

    def links(self, node: Node, graph: Graph) -> Sequence[Link]:
        """Return a link for each axis."""
        shape = graph.shape(node.inputs[0])
        if node.name == "rev":
            reversed_axes = node.params["dimensions"]
            return [Link(0, a, 0, a, np.arange(n)[::-1] if a in reversed_axes else None) for a, n in enumerate(shape)]
        axis, order = node.params["axis"], node.params["order"]
        return [Link(0, a, 0, a, np.argsort(order) if a == axis else None) for a in range(len(shape))]

    def carry(self, node: Node, graph: Graph, ins: Sequence[Indices]) -> Step:
        """Return the operand with its entries renumbered; an axis that is held whole is reversed."""
        shape, outs, turned = graph.shape(node.inputs[0]), [], []
        for link, index in zip(self.links(node, graph), ins[0], strict=True):
            if link.to is None or index is UNIFORM:
                outs.append(index)
            elif index is None and node.name == "rev":
                turned.append(link.axis)
                outs.append(None)
            else:
                outs.append(tidy(link.to[listed(index, shape[link.axis])], shape[link.axis]))
        return Step(
            (tuple(ins[0]),), (tuple(outs),), lambda operands: [lax.rev(operands[0], turned)] if turned else operands
        )


class Spread(Rule):
    """A copy that holds no axis once."""

    keeps = "values"

    def links(self, node: Node, graph: Graph) -> Sequence[Link]:
        """Return a link for each axis."""
        return [Link(0, axis, 0, axis) for axis in range(len(graph.shape(node.inputs[0])))]

    def carry(self, node: Node, graph: Graph, ins: Sequence[Indices]) -> Step:
        """Return the operand."""
        del node, graph
        whole = tuple(None if index is UNIFORM else index for index in ins[0])
        return Step((whole,), (whole,), lambda operands: operands)


class Broadcast(Rule):
    """A broadcast, held once along the axes that it repeats."""

    keeps = "values"
    any_order = True

    def links(self, node: Node, graph: Graph) -> Sequence[Link]:
        """Return links of the axes that are not repeated."""
        shape, out = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
        return [
            Link(0, axis, 0, place)
            for axis, place in enumerate(node.params["broadcast_dimensions"])
            if shape[axis] == out[place]
        ]

    def carry(self, node: Node, graph: Graph, ins: Sequence[Indices]) -> Step:
        """Return the operand with further axes."""
        outs: list[Index] = [UNIFORM] * len(graph.shape(node.outputs[0]))
        target: list[Index] = [None] * len(ins[0])
        for link in self.links(node, graph):
            outs[link.out_axis] = target[link.axis] = ins[0][link.axis]
        dimensions = node.params["broadcast_dimensions"]

        def emit(operands: list[Any]) -> list[Any]:
            sizes = [1] * len(outs)
            for axis, place in enumerate(dimensions):
                sizes[place] = operands[0].shape[axis]
            return [lax.broadcast_in_dim(operands[0], sizes, dimensions)]

        # the other operands are the sizes of a dynamic shape
        return Step((tuple(target), *ins[1:]), (tuple(outs),), emit)


Segment = tuple[tuple[int, ...], tuple[int, ...]]  # axes before, axes after


def segments(before: Shape, after: Shape) -> list[Segment]:
    """Return the smallest groups of axes that a reshape maps onto each other, without axes of one entry."""
    found: list[Segment] = []
    i = j = 0
    while i < len(before) or j < len(after):
        if i < len(before) and before[i] == 1:
            i += 1
            continue
        if j < len(after) and after[j] == 1:
            j += 1
            continue
        one, other, left, right = [i], [j], before[i], after[j]
        while left != right:
            if left < right:
                i += 1
                one.append(i)
                left *= before[i]
            else:
                j += 1
                other.append(j)
                right *= after[j]
        i, j = i + 1, j + 1
        found.append((tuple(one), tuple(other)))
    return found


class Reshape(Rule):
    """A reshape, by its smallest groups of axes: one axis to one, several to one, or one to several."""

    def _segments(self, node: Node, graph: Graph) -> list[Segment]:
        before, after = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
        return segments(before, after) if 0 not in before else []

    def links(self, node: Node, graph: Graph) -> Sequence[Link]:
        """Return the links of axes that stay."""
        return [Link(0, a[0], 0, b[0]) for a, b in self._segments(node, graph) if len(a) == len(b) == 1]

    def needs(self, node: Node, facts: Facts, outs: Sequence[Need]) -> list[Need]:
        """Return what the operand needs."""
        graph, out = facts.graph, outs[0]
        if out is None:
            return [None]
        before = graph.shape(node.inputs[0])
        need = [np.ones(n, bool) for n in before]
        for one, other in self._segments(node, graph):
            if len(one) == 1:
                need[one[0]] = _outer([out[axis] for axis in other])
            elif len(other) == 1:
                for axis, mask in zip(one, _project(out[other[0]], [before[axis] for axis in one]), strict=True):
                    need[axis] = mask
        return [need]

    def known(self, node: Node, facts: Facts) -> list[dict[int, Known]]:
        """Return the constant slices of axes that stay or are merged, and the zeros of axes that are split."""
        graph = facts.graph
        found: dict[int, Known] = {}
        before, after = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
        for one, other in self._segments(node, graph):
            sizes = [before[axis] for axis in one]
            for place, axis in enumerate(one):
                known = facts.known[node.inputs[0]].get(axis)
                if known is None:
                    continue
                if len(other) == 1:
                    spread = [1] * len(one)
                    spread[place] = sizes[place]
                    mask, values = (
                        np.broadcast_to(x.reshape(spread), sizes).reshape(-1) for x in (known.mask, known.values)
                    )
                    if other[0] in found:
                        old = found[other[0]]
                        values = np.where(old.mask, old.values, values)
                        mask = mask | old.mask
                    found[other[0]] = Known(mask, values)
                elif len(one) == 1:
                    zeros = known.zeros.reshape([after[i] for i in other])
                    for k, out_axis in enumerate(other):
                        all_zero = np.asarray(zeros.all(tuple(i for i in range(len(other)) if i != k)))
                        if all_zero.any():
                            found[out_axis] = Known(all_zero, np.zeros(len(all_zero), known.values.dtype))
        return [found]

    def carry(self, node: Node, graph: Graph, ins: Sequence[Indices]) -> Step:
        """Return the reshape of what the operand holds."""
        before, after = graph.shape(node.inputs[0]), graph.shape(node.outputs[0])
        target: list[Index] = [None] * len(before)
        out: list[Index] = [None] * len(after)
        for one, other in self._segments(node, graph):
            mine = [ins[0][axis] for axis in one]
            if all(index is UNIFORM for index in mine) and (len(one) == 1 or len(other) == 1):
                for axis in one:
                    target[axis] = UNIFORM
                for axis in other:
                    out[axis] = UNIFORM
            elif len(one) == len(other) == 1:
                target[one[0]] = out[other[0]] = mine[0]
            elif len(other) == 1:
                lists = [listed(None if i is UNIFORM else i, before[a]) for i, a in zip(mine, one, strict=True)]
                for axis, index in zip(one, mine, strict=True):
                    target[axis] = None if index is UNIFORM else index
                places = np.ravel_multi_index(np.ix_(*lists), [before[axis] for axis in one]).reshape(-1)
                out[other[0]] = tidy(places, after[other[0]])
            elif len(one) == 1:
                size = before[one[0]]
                parts = _parts(listed(mine[0], size), [after[axis] for axis in other])
                product = np.ravel_multi_index(np.ix_(*parts), [after[axis] for axis in other]).reshape(-1)
                target[one[0]] = tidy(product, size)
                for axis, part in zip(other, parts, strict=True):
                    out[axis] = tidy(part, after[axis])
        sizes = [held(index, n) for index, n in zip(out, after, strict=True)]
        return Step((tuple(target),), (tuple(out),), lambda operands: [lax.reshape(operands[0], sizes)])


def _outer(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mask of a merged axis from the masks of its parts."""
    found = masks[0]
    for mask in masks[1:]:
        found = (found[:, None] & mask).reshape(-1)
    return found


def _project(mask: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Return the masks of an axis's parts that contain its mask."""
    x = mask.reshape(sizes)
    return [np.asarray(x.any(tuple(i for i in range(len(sizes)) if i != k))) for k in range(len(sizes))]


def _parts(entries: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Return the lists of an axis's parts whose product is a list of entries, or contains it."""
    if not len(entries):
        return [np.arange(0), *(np.arange(n) for n in sizes[1:])]
    parts = []
    for coordinate in np.unravel_index(entries, sizes):
        _, first = np.unique(coordinate, return_index=True)
        parts.append(coordinate[np.sort(first)])
    return parts
