"""How sparse a model is: the one definition behind logs, tables and plots."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mtl_sparse.sparsity import groups as groups_lib


@dataclasses.dataclass(frozen=True)
class LayerSparsity:
    """One conv kernel: its groups (input channels), the weights in one group, and how many groups are zero."""

    path: str
    groups: int
    zero_groups: int
    group_size: int


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """Sparsity of the penalised conv kernels.

    Attributes:
      group: fraction of groups that are exactly zero, in [0, 1].
      parameter: fraction of the kernels' weights that lie in zero groups, in [0, 1].
      layers: one entry a kernel, in the order of the parameter tree.
    """

    layers: tuple[LayerSparsity, ...]

    @property
    def group(self) -> float:
        return sum(layer.zero_groups for layer in self.layers) / sum(layer.groups for layer in self.layers)

    @property
    def parameter(self) -> float:
        zero = sum(layer.zero_groups * layer.group_size for layer in self.layers)
        return zero / sum(layer.groups * layer.group_size for layer in self.layers)


@jax.jit
def _zero_groups(kernels):
    """Number of all-zero input channels of each HWIO kernel."""
    return [jnp.sum(jnp.all(kernel == 0, axis=(0, 1, 3))) for kernel in kernels]


def sparsity(params, scope: str | None = None) -> Sparsity:
    """Counts the zero groups of `params` (see `groups.find` for `scope`)."""
    found = groups_lib.find(params, scope)
    leaves = {groups_lib.path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    zeros = jax.device_get(_zero_groups([leaves[entry.path] for entry in found]))
    return Sparsity(
        tuple(
            LayerSparsity(entry.path, entry.count, int(np.asarray(zero)), entry.size)
            for entry, zero in zip(found, zeros, strict=True)
        )
    )
