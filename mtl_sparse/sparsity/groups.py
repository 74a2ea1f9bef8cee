"""Which parameters are penalised, and how they fall into groups."""

import dataclasses

import jax

SCOPES = ("backbone", "all")
_KERNEL_INPUT_AXIS = 2  # HWIO


@dataclasses.dataclass(frozen=True)
class ConvGroups:
    """The groups of one conv kernel: one for each input channel.

    Attributes:
      path: "/"-joined path of the kernel in the parameter tree.
      axis: the axis whose indices are the groups.
      count: number of groups, the kernel's input channels.
      size: number of weights in one group, n = H * W * O.
    """

    path: str
    axis: int
    count: int
    size: int


def path_name(path) -> str:
    """ "/"-joined name of a jax key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def find(params, scope: str | None = None) -> tuple[ConvGroups, ...]:
    """Lists the penalised conv kernels of `params`: its 4-D leaves, taken as HWIO, in tree order.

    Args:
      params: a parameter tree.
      scope: "backbone" takes the kernels below a node of that name (the paper's shared parameters), "all"
        takes every kernel. None means "backbone" where the tree has such a node, otherwise "all".

    Raises:
      ValueError: an unknown scope, or one that matches no kernel.
    """
    if scope is not None and scope not in SCOPES:
        raise ValueError(f"unknown sparsity scope {scope!r}; the scopes are {', '.join(SCOPES)}")
    kernels = [
        ConvGroups(path_name(path), _KERNEL_INPUT_AXIS, leaf.shape[2], leaf.size // leaf.shape[2])
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
        if leaf.ndim == 4
    ]
    shared = [kernel for kernel in kernels if "backbone" in kernel.path.split("/")]
    found = shared if scope == "backbone" or (scope is None and shared) else kernels
    if not found:
        raise ValueError(f"sparsity scope {scope!r} matches no conv kernel (a 4-D parameter) of this tree")
    return tuple(found)
