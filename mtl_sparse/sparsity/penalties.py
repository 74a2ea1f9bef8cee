"""Sparsity penalties: which groups they act on, and their proximal step."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mtl_sparse.sparsity import groups, prox, stats
from mtl_sparse.sparsity.groups import ConvGroups

GROUP_WEIGHTS = ("sqrt_size", "none")


@dataclasses.dataclass(frozen=True)
class Penalty(abc.ABC):
    """A penalty sum_k p(w_k) over conv kernels w_k.

    Attributes:
      scope: which kernels are penalized, see `groups.find`.
      rules: how they fall into groups, see `groups.find`.
    """

    scope: str | None = None
    rules: Mapping[str, int | None] = dataclasses.field(default_factory=lambda: groups.HWIO, kw_only=True)

    def __post_init__(self) -> None:
        """Check the scope."""
        if self.scope not in (*groups.SCOPES, None):
            raise ValueError(f"unknown scope {self.scope!r}; expected one of {', '.join(groups.SCOPES)}, None")

    def kernels(self, params: Any) -> tuple[ConvGroups, ...]:
        """Return the penalized kernels of a parameter tree; () for a tree without leaves."""
        return groups.find(params, self.scope, self.rules) if jax.tree.leaves(params) else ()

    @abc.abstractmethod
    def prox(
        self, z: jax.Array, threshold: jax.Array, learning_rate: Any, metric: jax.Array | None, kernel: ConvGroups
    ) -> jax.Array:
        """Return argmin_x 1/2 |x - z|^2_D + threshold * p(x).

        Args:
          z: the kernel after the optimizer's step.
          threshold: learning rate times lambda, a scalar or one value for each part that `zeros` tells apart.
          learning_rate: that of this step.
          metric: diagonal D of the metric, of z's shape; None is 1.
          kernel: whose groups these are.
        """

    @abc.abstractmethod
    def zeros(self, x: jax.Array, kernel: ConvGroups) -> jax.Array:
        """Return which of the parts that can become zero are zero: bool [groups], or of the kernel's shape."""

    @abc.abstractmethod
    def broadcast(self, parts: jax.Array, kernel: ConvGroups, ndim: int) -> jax.Array:
        """Return a result of `zeros` in a shape that broadcasts against a kernel of `ndim` dimensions."""

    @abc.abstractmethod
    def typical_weight(self, kernel: ConvGroups) -> float:
        """Return the factor of lambda in the penalty of a typical group of this kernel."""


@dataclasses.dataclass(frozen=True)
class GroupLasso(Penalty):
    """The group lasso sum_g c_g |w_g|.

    Attributes:
      weights: c_g, "sqrt_size" (square root of the group's size, as in "Less is More") or "none" (1).
    """

    weights: str = "sqrt_size"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.weights not in GROUP_WEIGHTS:
            raise ValueError(f"unknown group weights {self.weights!r}; expected one of {', '.join(GROUP_WEIGHTS)}")

    def prox(
        self, z: jax.Array, threshold: jax.Array, learning_rate: Any, metric: jax.Array | None, kernel: ConvGroups
    ) -> jax.Array:
        """Return the proximal step, see `Penalty.prox`."""
        del learning_rate
        return prox.group_lasso(z, threshold * self.typical_weight(kernel), metric, group_axis=kernel.axis)

    def zeros(self, x: jax.Array, kernel: ConvGroups) -> jax.Array:
        """Return which groups are zero: bool [groups]."""
        return stats.zero_groups(x, kernel.axis)

    def broadcast(self, parts: jax.Array, kernel: ConvGroups, ndim: int) -> jax.Array:
        """Return a result of `zeros` in a shape that broadcasts against a kernel of `ndim` dimensions."""
        return jnp.expand_dims(parts, kernel.other_axes(ndim))

    def typical_weight(self, kernel: ConvGroups) -> float:
        """Return c_g."""
        return float(kernel.size**0.5) if self.weights == "sqrt_size" else 1.0


@dataclasses.dataclass(frozen=True)
class GroupMCP(GroupLasso):
    """The group minimax concave penalty: slope lambda c_g at zero, flat beyond |w_g| = gamma lambda c_g.

    Attributes:
      gamma: the larger, the nearer to the group lasso. Where gamma * D <= 2 * learning rate, D is raised to equality:
        below it the step has no unique solution.
    """

    gamma: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not (self.gamma is not None and self.gamma > 0):
            raise ValueError(f"group_mcp needs gamma > 0, got {self.gamma}")

    def prox(
        self, z: jax.Array, threshold: jax.Array, learning_rate: Any, metric: jax.Array | None, kernel: ConvGroups
    ) -> jax.Array:
        """Return the proximal step, see `Penalty.prox`."""
        weight = threshold * self.typical_weight(kernel)
        rate, gamma = jnp.asarray(learning_rate, z.dtype), self.gamma or 0.0  # not None, see __post_init__
        d = jnp.maximum(jnp.ones_like(z) if metric is None else metric, 2 * rate / gamma)
        return prox.group_mcp(z, weight, gamma / rate, d, group_axis=kernel.axis)


@dataclasses.dataclass(frozen=True)
class L1(Penalty):
    """The lasso sum_i |w_i|, which zeroes single weights."""

    def prox(
        self, z: jax.Array, threshold: jax.Array, learning_rate: Any, metric: jax.Array | None, kernel: ConvGroups
    ) -> jax.Array:
        """Return the proximal step, see `Penalty.prox`."""
        del learning_rate, kernel
        return prox.l1(z, threshold, metric)

    def zeros(self, x: jax.Array, kernel: ConvGroups) -> jax.Array:
        """Return which weights are zero: bool, of x's shape."""
        del kernel
        return x == 0

    def broadcast(self, parts: jax.Array, kernel: ConvGroups, ndim: int) -> jax.Array:
        """Return `parts`, which has the kernel's shape."""
        del kernel, ndim
        return parts

    def typical_weight(self, kernel: ConvGroups) -> float:
        """Return sqrt(n), which the sum of n weights of about one size has over their norm."""
        return float(kernel.size**0.5)


PENALTIES = {"group_lasso": GroupLasso, "group_mcp": GroupMCP, "l1": L1}


def make(penalty: str | Penalty) -> Penalty:
    """Return the penalty of a name in `PENALTIES`, or `penalty` itself.

    Raises:
      ValueError: an unknown name; "group_mcp", which needs its gamma.
    """
    if isinstance(penalty, Penalty):
        return penalty
    if penalty not in PENALTIES:
        raise ValueError(f"unknown penalty {penalty!r}; expected one of {', '.join(PENALTIES)}")
    return PENALTIES[penalty]()
