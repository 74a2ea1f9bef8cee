"""Which parameters are penalized, and how they fall into groups."""

import abc
import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SCOPES = ("backbone", "all")
HWIO = {r".*": -2}  # rules of Flax's convolutions: a group is an input channel


class Groups(abc.ABC):
    """Groups of weights, in one or several parameters. Each weight of these parameters is in one group.

    Attributes:
      name: name in reports.
      paths: "/"-joined paths of the parameters.
      count: number of groups.
      sizes: number of weights in each group: one number for all, or float [count].
      costs: what each group costs, float [count], such as its multiply-accumulates; None if it is not known.
    """

    name: str
    paths: tuple[str, ...]
    count: int
    sizes: Any
    costs: np.ndarray | None

    @abc.abstractmethod
    def totals(self, *terms: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Return the sum of each term over each group: [count]; a term has one array for each parameter."""

    @abc.abstractmethod
    def largest(self, x: Sequence[jax.Array]) -> jax.Array:
        """Return the largest entry of each group: [count]."""

    @abc.abstractmethod
    def spread(self, values: jax.Array, x: Sequence[jax.Array]) -> list[jax.Array]:
        """Return values of the groups [count] as arrays that broadcast against the parameters `x`."""

    def zeros(self, x: Sequence[jax.Array]) -> jax.Array:
        """Return which groups are exactly zero: bool [count]."""
        return self.largest([(array != 0).astype(jnp.int8) for array in x]) == 0

    def norms(self, x: Sequence[jax.Array]) -> jax.Array:
        """Return the Euclidean norm of each group: [count]."""
        return jnp.sqrt(self.totals([jnp.square(array) for array in x])[0])


@dataclasses.dataclass(frozen=True)
class ConvGroups(Groups):
    """Groups along one axis of one parameter, such as the input channels of a conv kernel.

    Attributes:
      path: "/"-joined path of the parameter.
      axis: the axis whose indices are the groups, >= 0.
      count: number of groups: in HWIO, the kernel's input channels.
      size: number of weights in one group: in HWIO, n = H * W * O.
      costs: see `Groups`.
    """

    path: str
    axis: int
    count: int
    size: int
    costs: np.ndarray | None = dataclasses.field(default=None, compare=False)

    @property
    def name(self) -> str:  # type: ignore[override]
        """The parameter's path."""
        return self.path

    @property
    def paths(self) -> tuple[str, ...]:  # type: ignore[override]
        """The parameter's path."""
        return (self.path,)

    @property
    def sizes(self) -> float:
        """Number of weights in a group."""
        return float(self.size)

    def other_axes(self, ndim: int) -> tuple[int, ...]:
        """Return the axes within a group of a parameter with `ndim` dimensions."""
        return tuple(axis for axis in range(ndim) if axis != self.axis)

    def totals(self, *terms: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Return the sums over the groups, see `Groups.totals`."""
        arrays = [array for (array,) in terms]
        return _sums(self.other_axes(arrays[0].ndim), arrays)

    def largest(self, x: Sequence[jax.Array]) -> jax.Array:
        """Return the largest entry of each group: [count]."""
        (array,) = x
        return jnp.max(array, self.other_axes(array.ndim))

    def spread(self, values: jax.Array, x: Sequence[jax.Array]) -> list[jax.Array]:
        """Return values of the groups [count] as an array that broadcasts against the parameter."""
        return [jnp.expand_dims(values, self.other_axes(x[0].ndim))]


@dataclasses.dataclass(frozen=True, eq=False)
class CoupledGroups(Groups):
    """Groups given by their numbers, in one or several parameters: a channel's input slices over all its readers.

    Attributes:
      name: name in reports.
      paths: "/"-joined paths of the parameters.
      numbers: for each parameter, the group of each entry, int32, of a shape that broadcasts against the parameter's.
      count: number of groups.
      sizes: number of weights in each group, float [count].
      costs: see `Groups`.
    """

    name: str
    paths: tuple[str, ...]
    numbers: tuple[np.ndarray, ...]
    count: int
    sizes: np.ndarray
    costs: np.ndarray | None = None

    def totals(self, *terms: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Return the sums over the groups, see `Groups.totals`."""
        found: list[jax.Array] = []
        for k, number in enumerate(self.numbers):
            parts = _sums(_summed(number), [term[k] for term in terms])
            totals = [self._add(part, number) for part in parts]
            found = [a + b for a, b in zip(found, totals, strict=True)] if found else totals
        return tuple(found)

    def largest(self, x: Sequence[jax.Array]) -> jax.Array:
        """Return the largest entry of each group: [count]."""
        found = []
        for array, number in zip(x, self.numbers, strict=True):
            part = jnp.max(array, _summed(number)).reshape(-1)
            if not self._in_order(number):
                lowest = jnp.iinfo(part.dtype).min if part.dtype.kind == "i" else -jnp.inf
                part = jnp.full(self.count, lowest, part.dtype).at[number.reshape(-1)].max(part)
            found.append(part)
        return functools.reduce(jnp.maximum, found)

    def spread(self, values: jax.Array, x: Sequence[jax.Array]) -> list[jax.Array]:
        """Return values of the groups [count] as arrays that broadcast against the parameters."""
        del x
        return [values.reshape(number.shape) if self._in_order(number) else values[number] for number in self.numbers]

    def _in_order(self, number: np.ndarray) -> bool:
        return number.size == self.count and np.array_equal(number.reshape(-1), np.arange(self.count))

    def _add(self, part: jax.Array, number: np.ndarray) -> jax.Array:
        """Return the sums over each group [count] of values that have the numbers' shape without axes of length 1."""
        flat = part.reshape(-1)
        return flat if self._in_order(number) else jnp.zeros(self.count, flat.dtype).at[number.reshape(-1)].add(flat)


def _summed(number: np.ndarray) -> tuple[int, ...]:
    return tuple(axis for axis, size in enumerate(number.shape) if size == 1)


def _sums(axes: tuple[int, ...], terms: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Return sums over axes of several terms, in one pass over their inputs."""
    zero = jnp.zeros([], terms[0].dtype)
    add = lambda left, right: tuple(a + b for a, b in zip(left, right, strict=True))  # noqa: E731
    return tuple(jax.lax.reduce(tuple(terms), (zero,) * len(terms), add, axes))


def path_name(path: Any) -> str:
    """Return the "/"-joined name of a jax key path, without the `value` of a box around a parameter (NNX, metadata)."""
    if len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: Any) -> dict[str, jax.Array]:
    """Return the leaves of a tree by their "/"-joined path, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def find(params: Any, scope: str | None = None, rules: Mapping[str, int | None] = HWIO) -> tuple[ConvGroups, ...]:
    """List the penalized conv kernels of `params`, in tree order. Conv kernels are the 4-D leaves.

    Args:
      params: a parameter tree.
      scope: "backbone" takes the kernels below a node of that name (the paper's shared parameters), "all"
        takes every kernel. None means "backbone" where the tree has such a node, otherwise "all".
      rules: regular expression of whole paths -> the axis whose indices are the groups, or None for kernels
        that are not penalized. Every kernel in scope must match exactly one. A depthwise kernel [H, W, 1, C],
        for instance, needs -1.

    Raises:
      ValueError: an unknown scope, a scope that matches no kernel, or a kernel that matches no rule or several.
    """
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"unknown sparsity scope {scope!r}; the scopes are {', '.join(SCOPES)}")
    kernels = {path: leaf for path, leaf in by_path(params).items() if leaf.ndim == 4}
    shared = {path: leaf for path, leaf in kernels.items() if "backbone" in path.split("/")}
    in_scope = shared if scope == "backbone" or (scope is None and shared) else kernels
    matches = {path: [rule for rule in rules if re.fullmatch(rule, path)] for path in in_scope}
    for path, matching in matches.items():
        if len(matching) != 1:
            raise ValueError(
                f"conv kernel {path} matches {'no rule' if not matching else 'the rules ' + ' and '.join(matching)}; "
                f"it must match exactly one of {', '.join(rules)}"
            )
    found = tuple(
        _groups(path, in_scope[path], axis) for path, (rule,) in matches.items() if (axis := rules[rule]) is not None
    )
    if not found:
        raise ValueError(f"sparsity scope {scope!r} matches no conv kernel (a 4-D parameter) of this tree")
    return found


def check_fit(groups: Sequence[Groups], params: Any) -> None:
    """Check that a tree has the parameters of the groups, and that no parameter is in two sets of groups.

    Raises:
      ValueError: it lacks one, or one is in two sets.
    """
    paths, leaves = [path for one in groups for path in one.paths], by_path(params)
    missing = [path for path in paths if path not in leaves]
    if missing:
        near = difflib.get_close_matches(missing[0], leaves, 3)
        raise ValueError(
            f"expected a tree with the parameters of the groups, got one without {missing[0]}"
            + (f" (it has {', '.join(near)})" if near else "")
            + "; find the groups with the tree that the optimizer gets"
        )
    double = [path for path in set(paths) if paths.count(path) > 1]
    if double:
        raise ValueError(f"expected each parameter in one set of groups, got {double[0]} in several")


def _groups(path: str, kernel: jax.Array, axis: int) -> ConvGroups:
    axis = range(kernel.ndim)[axis]
    return ConvGroups(path, axis, kernel.shape[axis], kernel.size // kernel.shape[axis])
