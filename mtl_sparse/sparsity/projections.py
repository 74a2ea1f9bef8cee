"""Links after the proximal step: each changes the new values of one set of groups.

In `proximal(..., projections=(...))` they act on the exact result of the proximal step, one after the other. Alone, in
an `optax.chain`, use `hold_norm` and `freeze_zeros`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_sparse.sparsity import groups as groups_lib
from mtl_sparse.sparsity.groups import Groups
from mtl_sparse.sparsity.penalties import GroupLasso, Penalty

NORMS = ("initial", "rms", "unpenalized")


class Step(NamedTuple):
    """What a projection may use of the step of one set of groups; lists have one entry for each of its parameters.

    Attributes:
      groups: the groups.
      penalty: which parts can become zero.
      steps: int32 [], steps taken before this one.
      params: the parameters before the step.
      z: the parameters after the optimizer's step, before the proximal one.
      metric: diagonals of the metric, of z's shapes; None is 1. For an averaged metric, the mean over each group, of
        shapes that broadcast against z's.
      norms: float32 [], those of `initial_norms` where `HoldNorm` holds them; None elsewhere.
    """

    groups: Groups
    penalty: Penalty
    steps: jax.Array
    params: list[jax.Array]
    z: list[jax.Array]
    metric: list[jax.Array] | None
    norms: list[jax.Array | None]


@dataclasses.dataclass(frozen=True)
class FreezeZeros:
    """Keep what is zero at zero from a step on: the debiasing phase, which trains the rest without the penalty.

    Attributes:
      from_step: first step, as the optimizer counts them from 0.
    """

    from_step: int

    def __post_init__(self) -> None:
        """Check the step."""
        if self.from_step < 0:
            raise ValueError(f"from_step must be >= 0, got {self.from_step}")

    def __call__(self, x: list[jax.Array], step: Step) -> list[jax.Array]:
        """Return x with zero where the parameters are zero."""
        dead = step.penalty.spread(step.penalty.zeros(step.params, step.groups), step.params, step.groups)
        return [jnp.where((step.steps >= self.from_step) & zero, 0, a) for zero, a in zip(dead, x, strict=True)]


@dataclasses.dataclass(frozen=True)
class KeepStrongest:
    """Keep the groups that would be zeroed last where fewer are left.

    A large penalty then cannot cut the network in two.

    Attributes:
      kernels: True for all penalized kernels, or a regular expression of whole paths. Of groups that span kernels one
        of them suffices.
      count: number of groups to keep, >= 1; all where a kernel has fewer.
      fraction: fraction of the groups to keep, in [0, 1]; the larger of both counts.
    """

    kernels: bool | str = True
    count: int = 1
    fraction: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.count < 1 or not 0 <= self.fraction <= 1:
            raise ValueError(
                f"expected count >= 1 and fraction in [0, 1], got count={self.count}, fraction={self.fraction}"
            )

    def at_least(self, groups: Groups) -> int:
        """Return how many groups are kept."""
        if not any(names(self.kernels, path) for path in groups.paths):
            return 0
        return min(groups.count, max(self.count, math.ceil(self.fraction * groups.count - 1e-9)))

    def __call__(self, x: list[jax.Array], step: Step) -> list[jax.Array]:
        """Return x, or the strongest groups of z where fewer groups of x are not zero."""
        groups, z = step.groups, step.z
        least = self.at_least(groups)
        if not least:
            return x
        scores = step.penalty.strengths(z, step.metric, groups)
        zero = groups.zeros(x)
        ranks = jnp.argsort(jnp.argsort(-jnp.where(zero, scores, jnp.inf), stable=True))  # what is not zero comes first
        back = groups.spread(zero & (ranks < least), x)
        return [jnp.where(keep, b, a) for keep, a, b in zip(back, x, z, strict=True)]


@dataclasses.dataclass(frozen=True)
class HoldNorm:
    """Scale kernels back to a fixed norm.

    The scale of a kernel that a normalization layer follows is free. Without a fixed norm the penalty shrinks such a
    kernel instead of pruning its groups. A kernel that is entirely zero stays zero until a group regrows, and then
    has its norm immediately; a kernel that is zero at init is free.

    Attributes:
      kernels: True for the penalized kernels whose module has no other parameter: a convolution without a bias is
        followed by a normalization layer. Otherwise a regular expression of whole paths.
      norm: "initial", the kernel's Frobenius norm at init; "rms", the root mean square that its nonzero weights have at
        init, so that the weights that stay are not scaled up where few stay; or "unpenalized", the norm that the step
        has without the penalty, so that weight decay and the optimizer change it as in dense training. The first two
        cancel the weight decay of the kernel.
    """

    kernels: bool | str = True
    norm: str = "initial"

    def __post_init__(self) -> None:
        """Check the norm."""
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; expected one of {', '.join(NORMS)}")

    def paths(self, groups: Sequence[Groups], params: Any) -> list[str]:
        """Return the paths of the kernels whose norm is fixed.

        Raises:
          ValueError: with `kernels=True`, a tree of kernels alone: their biases may have been left out.
        """
        found = [path for one in groups for path in one.paths]
        if self.kernels is not True:
            return [path for path in found if names(self.kernels, path)]
        if not found:
            return []
        # `optax.masked` leaves a node without leaves instead of another optimizer's parameter.
        hidden = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
        flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=hidden)[0]
        ndims = {groups_lib.path_name(path): 0 if hidden(leaf) else leaf.ndim for path, leaf in flat}
        if min(ndims.values()) > 1:
            raise ValueError(
                "fixed norms by default are for kernels without a bias, but this tree holds no parameter besides its "
                "kernels, so biases may have been filtered out of it: pass fixed_norm (or HoldNorm's kernels) as a "
                "regular expression of the kernels that a normalization layer follows ('.*' for all), or "
                "fixed_norm=False"
            )
        modules = {path.rpartition("/")[0] for path, ndim in ndims.items() if ndim < 4}
        return [path for path in found if path.rpartition("/")[0] not in modules]

    def __call__(self, x: list[jax.Array], step: Step) -> list[jax.Array]:
        """Return x at its fixed norms; a kernel without one is returned as it is."""
        return [self._scaled(*arguments) for arguments in zip(x, step.z, step.norms, strict=True)]

    def _scaled(self, x: jax.Array, z: jax.Array, norm: jax.Array | None) -> jax.Array:
        if norm is None:
            return x
        wanted = jnp.linalg.norm(z) if self.norm == "unpenalized" else norm
        if self.norm == "rms":
            wanted = wanted * jnp.sqrt(jnp.mean(x != 0))
        length = jnp.linalg.norm(x)
        return x * jnp.where((length > 0) & (wanted > 0), wanted / jnp.where(length > 0, length, 1), 1)


Projection = FreezeZeros | KeepStrongest | HoldNorm


def names(choice: bool | str, path: str) -> bool:
    """Return whether a choice of kernels has `path`: all (True), none (False), a regular expression of whole paths."""
    return re.fullmatch(choice, path) is not None if isinstance(choice, str) else choice


class ProjectionState(NamedTuple):
    """State of `hold_norm` and `freeze_zeros`."""

    count: jax.Array  # type: ignore[assignment]  # tuple.count is hidden, as in optax; shape=(), int32, steps taken
    norms: jax.Array  # shape=(kernels,), dtype=jnp.float32; from `initial_norms`, of the kernels that are held


def held_paths(projections: Sequence[Projection], groups: Sequence[Groups], params: Any) -> list[str]:
    """Return the paths of the kernels whose norm a `HoldNorm` among the projections fixes."""
    holds = [projection for projection in projections if isinstance(projection, HoldNorm)]
    return holds[0].paths(groups, params) if holds else []


def initial_norms(projections: Sequence[Projection], paths: Sequence[str], params: Any) -> jax.Array:
    """Return the Frobenius norms of the kernels at these paths, which a `HoldNorm` among the projections holds.

    Returns:
      float32 [kernels]; with norm="rms", those that the kernels would have if none of their weights were zero.
    """
    leaves = groups_lib.by_path(params)
    kernels = [leaves[path].astype(jnp.float32) for path in paths]
    norms = [jnp.linalg.norm(kernel) for kernel in kernels]
    if any(isinstance(projection, HoldNorm) and projection.norm == "rms" for projection in projections):
        nonzero = [jnp.sqrt(jnp.mean(kernel != 0)) for kernel in kernels]
        norms = [norm / jnp.where(part > 0, part, 1) for norm, part in zip(norms, nonzero, strict=True)]
    return jnp.stack(norms) if norms else jnp.zeros([0], jnp.float32)


def apply(
    sets: Sequence[Groups],
    updates: optax.Updates,
    params: optax.Params,
    change: Callable[[Groups, list[jax.Array], list[jax.Array]], list[jax.Array]],
) -> optax.Updates:
    """Change the step of each set of groups.

    Args:
      sets: the sets of groups.
      updates: the optimizer's updates.
      params: the parameters before the step.
      change: function of (groups, parameters before the step, parameters after it) that returns the new parameters;
        those after the step are in float32, or in float64 for float64 parameters.

    Returns:
      The updates that bring the parameters there. Where a new parameter is 0, `param + update` is exactly 0; where it
      is what it was after the optimizer's step, the update is the optimizer's. `new - param` would give only the first.
    """
    old, steps = groups_lib.by_path(params), groups_lib.by_path(updates)
    changed: dict[str, jax.Array] = {}
    for groups in sets:
        before = [old[path] for path in groups.paths]
        z = [
            (param + steps[path]).astype(jnp.promote_types(param.dtype, jnp.float32))
            for path, param in zip(groups.paths, before, strict=True)
        ]
        for path, param, a, x in zip(groups.paths, before, z, change(groups, before, z), strict=True):
            update = steps[path]
            changed[path] = jnp.where(x == 0, -param, update + (x - a).astype(update.dtype))
    return jax.tree_util.tree_map_with_path(
        lambda path, update: changed.get(groups_lib.path_name(path), update), updates
    )


def hold_norm(
    kernels: bool | str = True, penalty: Penalty | None = None, norm: str = "initial"
) -> optax.GradientTransformation:
    """Scale kernels back to a fixed norm, as a link of an `optax.chain`.

    Args:
      kernels: see `HoldNorm`.
      penalty: whose kernels are meant; by default those of `GroupLasso()`.
      norm: "initial" or "rms", see `HoldNorm`.

    Returns:
      An optax transformation whose update needs `params`.

    Raises:
      ValueError: norm="unpenalized": a link does not know the step without the penalty.
    """
    if norm == "unpenalized":
        raise ValueError("hold_norm does not know the norm without the penalty; use HoldNorm in proximal's projections")
    return _link(HoldNorm(kernels, norm), penalty)


def freeze_zeros(from_step: int, penalty: Penalty | None = None) -> optax.GradientTransformation:
    """Keep zero groups at zero from a step on, as a link of an `optax.chain`.

    Args:
      from_step: see `FreezeZeros`.
      penalty: which parts of a kernel can be zero; by default the groups of `GroupLasso()`.

    Returns:
      An optax transformation whose update needs `params`.
    """
    return _link(FreezeZeros(from_step), penalty)


def _link(projection: Projection, penalty: Penalty | None) -> optax.GradientTransformation:
    penalty = penalty or GroupLasso()

    def init(params: optax.Params) -> ProjectionState:
        paths = held_paths([projection], penalty.find(params), params)
        return ProjectionState(jnp.zeros([], jnp.int32), initial_norms([projection], paths, params))

    def update(
        updates: optax.Updates, state: ProjectionState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ProjectionState]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        sets = penalty.find(params)
        norms = dict(zip(held_paths([projection], sets, params), state.norms, strict=True))

        def change(groups: Groups, before: list[jax.Array], z: list[jax.Array]) -> list[jax.Array]:
            held = [norms.get(path) for path in groups.paths]
            return projection(z, Step(groups, penalty, state.count, before, z, None, held))

        updates = apply(sets, updates, params, change)
        return updates, ProjectionState(optax.safe_increment(state.count), state.norms)

    return optax.GradientTransformation(init, update)
