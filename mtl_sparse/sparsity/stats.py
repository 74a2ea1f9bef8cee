"""How sparse a model is: the one definition for the optimizer's target, logs, tables and plots."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_sparse.sparsity import groups as groups_lib
from mtl_sparse.sparsity.groups import Groups

_BRANCH = re.compile(r"conv\d+")  # names of the layers on a residual block's branch, one after the other


@dataclasses.dataclass(frozen=True)
class LayerSparsity:
    """One conv kernel.

    Attributes:
      path: "/"-joined path in the parameter tree.
      groups: number of groups (input channels).
      zero_groups: how many of them are exactly zero.
      group_size: number of weights in one group.
      zero_weights: number of weights that are exactly zero, in zero groups or not.
    """

    path: str
    groups: int
    zero_groups: int
    group_size: int
    zero_weights: int


@dataclasses.dataclass(frozen=True)
class CoupledSparsity:
    """Groups that may span kernels.

    Attributes:
      name: name of the set, such as the path of the first kernel that reads the channels.
      groups: number of groups (channels).
      zero_groups: how many of them are exactly zero, in all kernels.
    """

    name: str
    groups: int
    zero_groups: int


@dataclasses.dataclass(frozen=True)
class Sparsity:
    """Sparsity of the penalized conv kernels.

    Attributes:
      layers: one entry for each kernel, in the order of the tree.
      coupled: one entry for each set of groups that span kernels; () where each kernel has its own groups.
    """

    layers: tuple[LayerSparsity, ...]
    coupled: tuple[CoupledSparsity, ...] = ()

    @property
    def group(self) -> float:
        """Fraction of groups that are exactly zero, in [0, 1]."""
        sets = self.coupled or self.layers
        return sum(one.zero_groups for one in sets) / sum(one.groups for one in sets)

    @property
    def parameter(self) -> float:
        """Fraction of the kernels' weights that lie in zero groups, in [0, 1]."""
        return sum(layer.zero_groups * layer.group_size for layer in self.layers) / self._weights

    @property
    def weight(self) -> float:
        """Fraction of the kernels' weights that are exactly zero, in zero groups or not: what l1 makes."""
        return sum(layer.zero_weights for layer in self.layers) / self._weights

    @property
    def dead_layers(self) -> tuple[str, ...]:
        """Paths of the kernels all of whose groups are zero: their output is constant."""
        return tuple(layer.path for layer in self.layers if layer.zero_groups == layer.groups)

    @property
    def dead_blocks(self) -> tuple[str, ...]:
        """Residual blocks (nodes that hold conv1, conv2, ...) with a zero layer on their branch: it adds a constant."""
        dead = set(self.dead_layers)
        blocks: dict[str, bool] = {}
        for layer in self.layers:
            block, _, module = layer.path.rpartition("/")[0].rpartition("/")
            if _BRANCH.fullmatch(module) and block.rpartition("/")[2] not in ("", "params", "backbone"):
                blocks[block] = blocks.get(block, False) or layer.path in dead
        return tuple(block for block, has_dead in blocks.items() if has_dead)

    @property
    def _weights(self) -> int:
        return sum(layer.groups * layer.group_size for layer in self.layers)


def zero_groups(kernel: jax.Array, axis: int) -> jax.Array:
    """Return which groups of a kernel are exactly zero: bool [kernel.shape[axis]]."""
    return jnp.all(kernel == 0, tuple(i for i in range(kernel.ndim) if i != axis))


@jax.jit(static_argnums=1)
def _count(kernels: list[jax.Array], axes: tuple[int, ...]) -> list[tuple[jax.Array, jax.Array]]:
    return [
        (jnp.sum(zero_groups(kernel, axis)), jnp.sum(kernel == 0)) for kernel, axis in zip(kernels, axes, strict=True)
    ]


def sparsity(
    params: Any,
    scope: str | None = None,
    rules: Mapping[str, int | None] = groups_lib.HWIO,
    *,
    groups: Sequence[Groups] | None = None,
) -> Sparsity:
    """Count the zero groups of a parameter tree.

    Args:
      params: the tree.
      scope: which kernels count, see `groups.find`.
      rules: how they fall into groups, see `groups.find`.
      groups: the groups of the run, if they span kernels. `Sparsity.group` then counts them; `layers` still has the
        kernels that `scope` and `rules` name.

    Raises:
      ValueError: as `groups.find`.
    """
    found = groups_lib.find(params, scope, rules)
    leaves = groups_lib.by_path(params)
    counts = jax.device_get(_count([leaves[entry.path] for entry in found], tuple(entry.axis for entry in found)))
    layers = tuple(
        LayerSparsity(entry.path, entry.count, int(zeros), entry.size, int(weights))
        for entry, (zeros, weights) in zip(found, counts, strict=True)
    )
    coupled = tuple(
        CoupledSparsity(one.name, one.count, int(jnp.sum(one.zeros([leaves[path] for path in one.paths]))))
        for one in groups or ()
    )
    return Sparsity(layers, coupled)
