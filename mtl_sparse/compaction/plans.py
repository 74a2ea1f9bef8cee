"""The plan of a compaction: which entries of each parameter remain."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_sparse.compaction.graph import path_of
from mtl_sparse.compaction.indices import Indices
from mtl_sparse.runtime.errors import UserError

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What remains of one parameter.

    Attributes:
      shape: the dense parameter's shape.
      dtype: its name.
      keep: axis -> the entries that remain, in their new order; an axis that is absent remains whole. The entry after
        the last one is that of weights which read a constant 1.
      unread: axis -> entries that the function does not read at all, whatever their values; they may be read at another
        size of the inputs.
      constant: values that the parameter takes over from what was removed: those of the entry that reads a constant 1,
        with the shape of the dense parameter but one entry on that axis, or of the whole parameter; None if there are
        none.
    """

    shape: tuple[int, ...]
    dtype: str
    keep: Mapping[int, np.ndarray]
    unread: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
    constant: np.ndarray | None = None

    @property
    def small(self) -> tuple[int, ...]:
        """Shape of the compact parameter."""
        return tuple(len(self.keep[axis]) if axis in self.keep else n for axis, n in enumerate(self.shape))

    @property
    def holds(self) -> Indices:
        """The entries that the compact parameter holds, axis by axis."""
        return tuple(self.keep.get(axis) for axis in range(len(self.shape)))

    @property
    def is_replaced(self) -> bool:
        """Return whether the whole parameter takes over a constant."""
        return self.constant is not None and self.constant.shape == self.shape and not self._reading()

    def _reading(self) -> list[int]:
        """Return the axes with an entry that reads a constant 1."""
        return [axis for axis, kept in self.keep.items() if (kept == self.shape[axis]).any()]

    def cut(self, x: Any, constants: bool) -> Any:
        """Return the entries of an array of the dense shape that remain.

        Args:
          x: the array.
          constants: whether it takes over `constant`; otherwise zeros stand for an entry that reads a constant 1.
        """
        numpy = jnp if isinstance(x, jax.Array) else np
        reads = self._reading()
        if self.is_replaced and constants:
            x = numpy.asarray(self.constant, x.dtype)
        for axis in reads:
            one = self.constant if constants else np.zeros_like(self.constant)
            x = numpy.concatenate([x, numpy.asarray(one, x.dtype)], axis)
        for axis, kept in self.keep.items():
            x = numpy.take(x, kept, axis)
        return x


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of activations with weights.

    Attributes:
      weights: path of the parameter; its primitive and scope where it is computed from several.
      inputs: entries of the summed axis.
      zero: entries whose weights are all zero.
      kept: entries that remain in the weights.
      carried: entries that remain in the activations.
      because: the equation that keeps entries in the activations which these weights do not read, or "".
    """

    weights: str
    inputs: int
    zero: int
    kept: int
    carried: int
    because: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which entries of each parameter remain.

    Attributes:
      leaves: parameter path -> what remains of it.
      products: what was removed in front of each weight; () in a plan that was read from JSON.
      barriers: primitives without a rule, which keep everything that they read.
      constant: paths of outputs that no longer depend on any input.
      partial: the sums that leave out entries, see `origins`.
      fingerprint: the function's fingerprint, if constants are used, see `origins`; else "".
    """

    leaves: Mapping[str, Leaf]
    products: tuple[Product, ...] = ()
    barriers: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    partial: frozenset[str] = frozenset()
    fingerprint: str = ""

    @property
    def parameters(self) -> tuple[int, int]:
        """Number of parameters before and after."""
        leaves = self.leaves.values()
        return sum(math.prod(leaf.shape) for leaf in leaves), sum(math.prod(leaf.small) for leaf in leaves)

    def to_json(self) -> str:
        """Return the plan as JSON, with the fields of `Leaf` for each parameter's path."""
        leaves = {
            path: {
                "shape": leaf.shape,
                "dtype": leaf.dtype,
                "keep": {str(axis): kept.tolist() for axis, kept in leaf.keep.items()},
                "unread": {str(axis): entries.tolist() for axis, entries in leaf.unread.items()},
                "constant": None if leaf.constant is None else leaf.constant.tolist(),
            }
            for path, leaf in self.leaves.items()
        }
        origins = {"partial": sorted(self.partial), "fingerprint": self.fingerprint}
        return json.dumps({"format": _FORMAT, "parameters": leaves, "constant": self.constant, **origins})

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Return the plan that `to_json` wrote.

        Raises:
          UserError: the text is no plan.
        """
        try:
            tree = json.loads(text)
            if tree["format"] != _FORMAT:
                raise ValueError(f"format {tree['format']}")
            leaves = {path: _leaf(entry) for path, entry in tree["parameters"].items()}
            partial, fingerprint = frozenset(tree["partial"]), tree["fingerprint"]
            return cls(leaves, constant=tuple(tree["constant"]), partial=partial, fingerprint=fingerprint)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError("PLAN_UNREADABLE", f"expected the JSON of Plan.to_json, got {error!r}") from error

    def table(self) -> str:
        """Return a Markdown table of each product: what was removed in front of it, and why zero inputs stay."""
        before, after = self.parameters
        lines = [
            f"{before:,} parameters became {after:,}.",
            "",
            "| weights | inputs | zero | kept | carried | kept by |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row.weights} | {row.inputs} | {row.zero} | {row.kept} | {row.carried} | {row.because} |"
            for row in self.products
        ]
        if self.barriers:
            lines += ["", f"Without a rule, so everything they read remains: {', '.join(self.barriers)}."]
        if self.constant:
            lines += ["", f"Constant now, whatever the inputs are: {', '.join(self.constant)}."]
        return "\n".join(lines)


def _leaf(entry: Mapping[str, Any]) -> Leaf:
    keep, unread = (
        {int(axis): np.asarray(entries, int) for axis, entries in entry[name].items()} for name in ("keep", "unread")
    )
    constant = None if entry["constant"] is None else np.asarray(entry["constant"])
    return Leaf(tuple(entry["shape"]), entry["dtype"], keep, unread, constant)


def apply_plan(plan: Plan, tree: Any, *, constants: bool = True) -> Any:
    """Cut parameters, or what belongs to them, by a plan.

    Args:
      plan: the plan.
      tree: the parameters, or a tree that has trees like them, such as the state of an optimizer.
      constants: whether the parameters take over the constant outputs of removed layers. Pass False for gradients,
        and for other trees with the same paths. A tree that only contains such trees never takes them.

    Returns:
      The tree, in which each leaf whose path ends with the path of a parameter, and which has its shape, is cut. Other
      leaves stay as they are.

    Raises:
      UserError: no leaf is one of the plan's parameters, or a parameter has another shape than in the plan.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [path_of(path) for path, _ in leaves]
    exact = set(paths) >= set(plan.leaves)
    owners = {path: path for path in plan.leaves} if exact else _owners(plan, paths, [np.shape(x) for _, x in leaves])
    results = []
    for path, (_, x) in zip(paths, leaves, strict=True):
        if path not in owners:
            results.append(x)
            continue
        leaf = plan.leaves[owners[path]]
        if np.shape(x) != leaf.shape:
            raise UserError(
                "PLAN_DIFFERS",
                f"expected {path} of shape {leaf.shape}, as in the plan, got {np.shape(x)}; apply the plan to the "
                "parameters that it was made for",
            )
        results.append(leaf.cut(x, constants and exact))
    if not owners:
        raise UserError(
            "PLAN_DIFFERS",
            f"expected a tree with the plan's parameters, such as {next(iter(plan.leaves), 'none')!r}, got one with "
            f"{paths[0] if paths else 'no leaves'}; apply the plan to the parameters that it was made for",
        )
    return jax.tree_util.tree_unflatten(treedef, results)


def _owners(plan: Plan, paths: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> dict[str, str]:
    """Return for paths of a tree that contains trees like the parameters the paths of the parameters.

    Complete copies of the parameters' tree come first. A part of a copy, as a masked optimizer has, counts where the
    longest path of a parameter that fits has the same shape.
    """
    shape_of = dict(zip(paths, shapes, strict=True))
    found: dict[str, str] = {}
    for prefix in sorted({"/".join(path.split("/")[:n]) for path in paths for n in range(path.count("/") + 2)}):
        copies = {"/".join(part for part in (prefix, path) if part): path for path in plan.leaves}
        fits = all(shape_of.get(copy) == plan.leaves[path].shape for copy, path in copies.items())
        if fits and not any(copy in found for copy in copies):
            found.update(copies)
    for path in paths:
        parts = path.split("/")
        for start in range(len(parts)) if path not in found else ():
            name = "/".join(parts[start:])
            if name in plan.leaves and plan.leaves[name].shape == shape_of[path]:
                found[path] = name
                break
    return found


def check_fits(plan: Plan, paths: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
    """Check that parameters are the compact parameters of a plan.

    Args:
      plan: the plan.
      paths: the leaves' paths.
      shapes: the leaves' shapes.

    Raises:
      UserError: a leaf is missing, unknown or of another shape.
    """
    for path, leaf_shape in _differences(plan, dict(zip(paths, shapes, strict=True))):
        leaf = plan.leaves.get(path)
        raise UserError(
            "PLAN_DIFFERS",
            f"expected compact parameters with {path} of shape {leaf.small if leaf else 'absent'}, got "
            f"{'absent' if leaf_shape is None else leaf_shape}; pass what apply_plan returns for this plan",
        )


def _differences(plan: Plan, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    for path in [*plan.leaves, *(path for path in shapes if path not in plan.leaves)]:
        leaf = plan.leaves.get(path)
        if leaf is None or shapes.get(path) != leaf.small:
            yield path, shapes.get(path)
