"""Sparsity penalties: which groups they act on, and their proximal step."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mtl_sparse.sparsity import groups as groups_lib
from mtl_sparse.sparsity import prox
from mtl_sparse.sparsity.groups import Groups

GROUP_WEIGHTS = ("sqrt_size", "none", "macs")
Arrays = Sequence[jax.Array]  # one for each parameter that the groups are in


@dataclasses.dataclass(frozen=True)
class Penalty(abc.ABC):
    """A penalty sum_k p(w_k) over sets of groups w_k.

    Attributes:
      scope: which kernels are penalized, see `groups.find`.
      rules: how they fall into groups, see `groups.find`.
      groups: the groups themselves, such as those of `compaction.groups.from_function`; None finds them by `scope` and
        `rules`.
      shrinks: whether the proximal step moves what it does not zero; if not, a target chooses lambda by rank.
    """

    shrinks: ClassVar[bool] = True

    scope: str | None = None
    rules: Mapping[str, int | None] = dataclasses.field(default_factory=lambda: groups_lib.HWIO, kw_only=True)
    groups: Sequence[Groups] | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the scope."""
        if self.scope not in (*groups_lib.SCOPES, None):
            raise ValueError(f"unknown scope {self.scope!r}; expected one of {', '.join(groups_lib.SCOPES)}, None")

    def find(self, params: Any) -> tuple[Groups, ...]:
        """Return the penalized groups of a parameter tree; () for a tree without leaves.

        Raises:
          ValueError: see `groups.find`; or the tree lacks a parameter of `groups`.
        """
        if not jax.tree.leaves(params):
            return ()
        if self.groups is None:
            return groups_lib.find(params, self.scope, self.rules)
        groups_lib.check_fit(self.groups, params)
        return tuple(self.groups)

    @abc.abstractmethod
    def prox(
        self, z: Arrays, threshold: Any, learning_rate: Any, metric: Arrays | None, groups: Groups
    ) -> list[jax.Array]:
        """Return argmin_x 1/2 |x - z|^2_D + threshold * p(x).

        Args:
          z: the parameters of the groups after the optimizer's step.
          threshold: learning rate times lambda for each part that `zeros` distinguishes, as a tree like its result.
          learning_rate: that of this step.
          metric: diagonal D of the metric, of z's shapes; None is 1.
          groups: the groups.
        """

    @abc.abstractmethod
    def zeros(self, x: Arrays, groups: Groups) -> Any:
        """Return which of the parts that can become zero are zero: bool [groups.count], or a list like x."""

    @abc.abstractmethod
    def spread(self, parts: Any, x: Arrays, groups: Groups) -> list[jax.Array]:
        """Return a result of `zeros` as arrays that broadcast against the parameters `x`."""

    @abc.abstractmethod
    def factors(self, groups: Groups) -> float | np.ndarray:
        """Return the factor of lambda in the penalty of a typical group: one number, or float [groups.count]."""

    def critical(
        self, z: Arrays, slope: Arrays, metric: Arrays | None, learning_rate: Any, groups: Groups
    ) -> jax.Array:
        """Return the lambda that decides whether each group is zero: [groups.count].

        Args:
          z: the parameters of the groups after the optimizer's step.
          slope: D times the step of a learning rate of 1, without the penalty, of z's shapes.
          metric: diagonal D of the metric, of z's shapes; None is 1.
          learning_rate: that of this step.
          groups: the groups.

        Returns:
          The lambda up to which a zero group stays zero; 0 where there is none.
        """
        del z, metric, learning_rate
        return groups.norms(slope) / self.factors(groups)

    def strengths(self, z: Arrays, metric: Arrays | None, groups: Groups) -> jax.Array:
        """Return what orders the groups by how late they are zeroed: [groups.count]; for arguments, see `critical`."""
        ds = metric or [jnp.ones([], a.dtype) for a in z]
        return groups.totals([jnp.square(d * a) for a, d in zip(z, ds, strict=True)])[0]


@dataclasses.dataclass(frozen=True)
class GroupLasso(Penalty):
    """The group lasso sum_g c_g |w_g|.

    Attributes:
      weights: c_g, "sqrt_size" (square root of the group's size n_g, as in "Less is More"), "none" (1), or "macs":
        sqrt(n_g) (q_g / q)^exponent with the cost of a weight q_g = costs_g / n_g and its mean q over all weights. It
        needs `groups` with costs.
      exponent: exponent of "macs": at 0 it is "sqrt_size", at 0.5 c_g is proportional to sqrt(costs_g).
    """

    weights: str = "sqrt_size"
    exponent: float = dataclasses.field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.weights not in GROUP_WEIGHTS:
            raise ValueError(f"unknown group weights {self.weights!r}; expected one of {', '.join(GROUP_WEIGHTS)}")
        if self.weights == "macs" and not (self.groups and all(one.costs is not None for one in self.groups)):
            raise ValueError(
                "group weights 'macs' need groups with costs; pass groups=compaction.groups.from_function(fn, params, "
                "*inputs)"
            )

    def prox(
        self, z: Arrays, threshold: Any, learning_rate: Any, metric: Arrays | None, groups: Groups
    ) -> list[jax.Array]:
        """Return the proximal step, see `Penalty.prox`."""
        del learning_rate
        return prox.group_lasso_over(groups, z, threshold * self.factors(groups), metric)

    def zeros(self, x: Arrays, groups: Groups) -> jax.Array:
        """Return which groups are zero: bool [groups.count]."""
        return groups.zeros(x)

    def spread(self, parts: Any, x: Arrays, groups: Groups) -> list[jax.Array]:
        """Return a result of `zeros` as arrays that broadcast against the parameters `x`."""
        return groups.spread(parts, x)

    def factors(self, groups: Groups) -> float | np.ndarray:
        """Return c_g, see `Penalty.factors`."""
        if self.weights == "none":
            return 1.0
        root = groups.sizes**0.5
        if self.weights == "sqrt_size":
            return root
        every = self.groups or ()
        mean = sum(np.sum(np.asarray(one.costs)) for one in every) / sum(
            np.sum(one.sizes * np.ones(one.count)) for one in every
        )
        return root * (np.asarray(groups.costs) / groups.sizes / mean) ** self.exponent


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
        self, z: Arrays, threshold: Any, learning_rate: Any, metric: Arrays | None, groups: Groups
    ) -> list[jax.Array]:
        """Return the proximal step, see `Penalty.prox`."""
        weight = threshold * self.factors(groups)
        rate, gamma = jnp.asarray(learning_rate, z[0].dtype), self.gamma or 0.0  # not None, see __post_init__
        ds = [jnp.ones_like(a) for a in z] if metric is None else metric
        return prox.group_mcp_over(groups, z, weight, gamma / rate, [jnp.maximum(d, 2 * rate / gamma) for d in ds])


@dataclasses.dataclass(frozen=True)
class GroupL0(GroupLasso):
    """The weighted number of groups that are not zero, sum_g c_g [w_g != 0]; the others are not shrunk.

    With `weights="none"` it counts groups. The attributes are those of the group lasso.
    """

    shrinks = False

    def prox(
        self, z: Arrays, threshold: Any, learning_rate: Any, metric: Arrays | None, groups: Groups
    ) -> list[jax.Array]:
        """Return the proximal step, see `Penalty.prox`."""
        del learning_rate
        return prox.group_l0_over(groups, z, threshold * self.factors(groups), metric)

    def critical(
        self, z: Arrays, slope: Arrays, metric: Arrays | None, learning_rate: Any, groups: Groups
    ) -> jax.Array:
        """Return the lambda that would zero each group in this step, see `Penalty.critical`."""
        del slope
        return self.strengths(z, metric, groups) / jnp.maximum(learning_rate, 1e-30)

    def strengths(self, z: Arrays, metric: Arrays | None, groups: Groups) -> jax.Array:
        """Return what orders the groups by how late they are zeroed, see `Penalty.strengths`."""
        return prox.half_squares(groups, z, metric) / self.factors(groups)


@dataclasses.dataclass(frozen=True)
class L1(Penalty):
    """The lasso sum_i |w_i|, which zeroes single weights."""

    def prox(
        self, z: Arrays, threshold: Any, learning_rate: Any, metric: Arrays | None, groups: Groups
    ) -> list[jax.Array]:
        """Return the proximal step, see `Penalty.prox`."""
        del learning_rate, groups
        ds = [None] * len(z) if metric is None else metric
        return [prox.l1(*arguments) for arguments in zip(z, threshold, ds, strict=True)]

    def zeros(self, x: Arrays, groups: Groups) -> list[jax.Array]:
        """Return which weights are zero: bool, of the shapes of x."""
        del groups
        return [array == 0 for array in x]

    def spread(self, parts: Any, x: Arrays, groups: Groups) -> list[jax.Array]:
        """Return `parts`, which have the parameters' shapes."""
        del x, groups
        return parts

    def factors(self, groups: Groups) -> float | np.ndarray:
        """Return sqrt(n), the ratio of the sum of n weights of similar size to their norm."""
        return groups.sizes**0.5


PENALTIES = {"group_lasso": GroupLasso, "group_mcp": GroupMCP, "group_l0": GroupL0, "l1": L1}


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
