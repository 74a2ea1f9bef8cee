"""Which parameters are penalized, and how they fall into groups."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax

SCOPES = ("backbone", "all")
HWIO = {r".*": -2}  # rules of Flax's convolutions: a group is an input channel


@dataclasses.dataclass(frozen=True)
class ConvGroups:
    """The groups of one conv kernel.

    Attributes:
      path: "/"-joined path of the kernel in the parameter tree.
      axis: the axis whose indices are the groups, >= 0.
      count: number of groups: in HWIO, the kernel's input channels.
      size: number of weights in one group: in HWIO, n = H * W * O.
    """

    path: str
    axis: int
    count: int
    size: int

    def other_axes(self, ndim: int) -> tuple[int, ...]:
        """Return the axes within a group of a kernel with `ndim` dimensions."""
        return tuple(axis for axis in range(ndim) if axis != self.axis)


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


def _groups(path: str, kernel: jax.Array, axis: int) -> ConvGroups:
    axis = range(kernel.ndim)[axis]
    return ConvGroups(path, axis, kernel.shape[axis], kernel.size // kernel.shape[axis])
