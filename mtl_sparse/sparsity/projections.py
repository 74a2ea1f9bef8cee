"""Links after the proximal step: each changes a kernel's new value.

In `proximal(..., projections=(...))` they act on the exact result of the proximal step, one after the other. Alone, in
an `optax.chain`, use `hold_norm` and `freeze_zeros`.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_sparse.sparsity import groups
from mtl_sparse.sparsity.groups import ConvGroups
from mtl_sparse.sparsity.penalties import GroupLasso, Penalty

NORMS = ("initial", "unpenalized")


class Step(NamedTuple):
    """What a projection may use of one kernel's step.

    Attributes:
      kernel: its groups.
      penalty: which parts can become zero.
      steps: int32 [], steps taken before this one.
      param: the kernel before the step.
      z: the kernel after the optimizer's step, before the proximal one.
      metric: diagonal of the metric, of z's shape; None is 1.
      norm: float32 [], the kernel's initial norm where `HoldNorm` holds it.
    """

    kernel: ConvGroups
    penalty: Penalty
    steps: jax.Array
    param: jax.Array
    z: jax.Array
    metric: jax.Array | None
    norm: jax.Array | None


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

    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        """Return x with zero where the kernel is zero."""
        dead = step.penalty.broadcast(step.penalty.zeros(step.param, step.kernel), step.kernel, step.param.ndim)
        return jnp.where((step.steps >= self.from_step) & dead, 0, x)


@dataclasses.dataclass(frozen=True)
class KeepStrongest:
    """Keep the group that would be zeroed last where all of a kernel is zero.

    A large penalty then cannot cut the network in two.

    Attributes:
      kernels: True for all penalized kernels, or a regular expression of whole paths.
    """

    kernels: bool | str = True

    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        """Return x, or the strongest group of z if x is zero."""
        if not names(self.kernels, step.kernel.path):
            return x
        z, d = step.z, step.metric
        scores = jnp.sum(jnp.square(z if d is None else d * z), step.kernel.other_axes(z.ndim), keepdims=True)
        strongest = jnp.arange(scores.size).reshape(scores.shape) == jnp.argmax(scores)
        return jnp.where(jnp.any(x != 0), x, jnp.where(strongest, z, 0))


@dataclasses.dataclass(frozen=True)
class HoldNorm:
    """Scale kernels back to a fixed norm.

    The scale of a kernel that a normalization layer follows is free. Without a fixed norm the penalty shrinks such a
    kernel instead of pruning its groups. A wholly zero kernel stays zero until a group regrows, and then has its norm
    at once; a kernel that is zero at init is free.

    Attributes:
      kernels: True for the penalized kernels whose module has no other parameter: a convolution without a bias is
        followed by a normalization layer. Otherwise a regular expression of whole paths.
      norm: "initial", the kernel's Frobenius norm at init, which cancels its weight decay; or "unpenalized", the norm
        that the step has without the penalty, so that weight decay and the optimizer change it as in dense training.
    """

    kernels: bool | str = True
    norm: str = "initial"

    def __post_init__(self) -> None:
        """Check the norm."""
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; expected one of {', '.join(NORMS)}")

    def paths(self, kernels: Sequence[ConvGroups], params: Any) -> list[str]:
        """Return the paths of the kernels whose norm is held.

        Raises:
          ValueError: with `kernels=True`, a tree of kernels alone: their biases may have been left out.
        """
        found = [kernel.path for kernel in kernels]
        if self.kernels is not True:
            return [path for path in found if names(self.kernels, path)]
        if not found:
            return []
        # `optax.masked` leaves a node without leaves in the place of another optimizer's parameter.
        hidden = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
        flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=hidden)[0]
        ndims = {groups.path_name(path): 0 if hidden(leaf) else leaf.ndim for path, leaf in flat}
        if min(ndims.values()) > 1:
            raise ValueError(
                "fixed norms by default are for kernels without a bias, but this tree holds no parameter beside its "
                "kernels, so biases may have been filtered out of it: pass fixed_norm (or HoldNorm's kernels) as a "
                "regular expression of the kernels that a normalization layer follows ('.*' for all), or "
                "fixed_norm=False"
            )
        modules = {path.rpartition("/")[0] for path, ndim in ndims.items() if ndim < 4}
        return [path for path in found if path.rpartition("/")[0] not in modules]

    def __call__(self, x: jax.Array, step: Step) -> jax.Array:
        """Return x at its norm; a kernel that is not held as it is."""
        if step.norm is None:
            return x
        wanted = step.norm if self.norm == "initial" else jnp.linalg.norm(step.z)
        length = jnp.linalg.norm(x)
        return x * jnp.where((length > 0) & (wanted > 0), wanted / jnp.where(length > 0, length, 1), 1)


Projection = FreezeZeros | KeepStrongest | HoldNorm


def names(choice: bool | str, path: str) -> bool:
    """Return whether a choice of kernels has `path`: all (True), none (False), a regular expression of whole paths."""
    return re.fullmatch(choice, path) is not None if isinstance(choice, str) else choice


class ProjectionState(NamedTuple):
    """State of `hold_norm` and `freeze_zeros`."""

    count: jax.Array  # type: ignore[assignment]  # tuple.count is hidden, as in optax; shape=(), int32, steps taken
    norms: jax.Array  # shape=(kernels,), dtype=jnp.float32; initial norms of the kernels that are held


def held_paths(projections: Sequence[Projection], kernels: Sequence[ConvGroups], params: Any) -> list[str]:
    """Return the paths of the kernels that a `HoldNorm` among the projections holds."""
    holds = [projection for projection in projections if isinstance(projection, HoldNorm)]
    return holds[0].paths(kernels, params) if holds else []


def initial_norms(paths: Sequence[str], params: Any) -> jax.Array:
    """Return the Frobenius norms of the kernels at these paths: float32 [kernels]."""
    leaves = groups.by_path(params)
    norms = [jnp.linalg.norm(leaves[path].astype(jnp.float32)) for path in paths]
    return jnp.stack(norms) if norms else jnp.zeros([0], jnp.float32)


def new_update(update: jax.Array, param: jax.Array, z: jax.Array, x: jax.Array) -> jax.Array:
    """Return the update that brings a parameter to x.

    Where x is 0, `param + update` is exactly 0; where x equals z, it is the update that led to z. `x - param` would
    give only the first.
    """
    return jnp.where(x == 0, -param, update + (x - z).astype(update.dtype))


def hold_norm(kernels: bool | str = True, penalty: Penalty | None = None) -> optax.GradientTransformation:
    """Scale kernels back to their initial norm, as a link of an `optax.chain`.

    Args:
      kernels: see `HoldNorm`.
      penalty: whose kernels are meant; by default those of `GroupLasso()`.

    Returns:
      An optax transformation whose update needs `params`.
    """
    return _link(HoldNorm(kernels), penalty)


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
        paths = held_paths([projection], penalty.kernels(params), params)
        return ProjectionState(jnp.zeros([], jnp.int32), initial_norms(paths, params))

    def update(
        updates: optax.Updates, state: ProjectionState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ProjectionState]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        kernels = {kernel.path: kernel for kernel in penalty.kernels(params)}
        norms = dict(zip(held_paths([projection], tuple(kernels.values()), params), state.norms, strict=True))

        def project(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
            kernel = kernels.get(groups.path_name(path))
            if kernel is None:
                return update
            z = (param + update).astype(jnp.promote_types(param.dtype, jnp.float32))
            x = projection(z, Step(kernel, penalty, state.count, param, z, None, norms.get(kernel.path)))
            return new_update(update, param, z, x)

        updates = jax.tree_util.tree_map_with_path(project, updates, params)
        return updates, ProjectionState(optax.safe_increment(state.count), state.norms)

    return optax.GradientTransformation(init, update)
