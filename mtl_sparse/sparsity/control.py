"""Target sparsity: find lambda while training, in place of a search over runs."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from mtl_sparse.sparsity.schedules import Phases

# In the first penalized step, lambda is within this factor of the median over groups of the lambda that keeps a group
# zero in the step: beyond it a start that is far off only takes longer to correct.
_REACH = 30.0
# Lambda of a penalty that does not shrink, as a fraction of what zeroes the least important group that is to stay.
_BELOW = 0.999


@dataclasses.dataclass(frozen=True)
class TargetSparsity:
    """A sparsity to reach, and how.

    The scheduled sparsity rises from 0 to `sparsity` as 1 - (1 - u)^3 (Zhu & Gupta 2017, arXiv 1710.01878)
    over the first `ramp` of the run. In each step the gap between it and the measured one moves log lambda: by
    the gap, with a weight that grows with the steps (early, groups are only on their way to zero), and by the
    change of the gap, because pruning takes a larger lambda than keeping what is pruned. From `freeze` on
    lambda stays as it is.

    A penalty that does not shrink, `GroupL0`, acts at once. Then each step zeroes the least important groups, a
    fraction of them as large as the gap, and from `freeze` on no more. `gain`, `damping`, `slew`, `initial` and the
    warm-up of `phases` have no effect.

    Attributes:
      sparsity: fraction of groups (under l1: of weights) to be zero, or the value of `measure` to reach, in [0, 1).
      total_steps: steps of the run, from the first one with a penalty.
      ramp: fraction of them over which the scheduled sparsity rises, in (0, freeze].
      freeze: fraction of them after which lambda is constant, in (0, 1].
      gain: change of log lambda over as many steps as the ramp has, for a gap of 1, at the ramp's end.
      damping: change of log lambda for a change of the gap by 1.
      slew: largest change of log lambda over as many steps as the ramp has.
      initial: lambda that the search starts from, > 0.
      phases: when the penalty acts; `total_steps` counts from its start.
      measure: function of the parameters that returns the sparsity after a step, float32 [] in [0, 1], such as the
        fraction of multiply-accumulates that compaction would remove, `1 - cost.left(params)["macs"]` of
        `compaction.cost.from_function`; None is the fraction of groups that are zero.

    Raises:
      ValueError: a value out of its range.
    """

    sparsity: float
    total_steps: int
    ramp: float = 0.4
    freeze: float = 0.75
    gain: float = 80.0
    damping: float = 20.0
    slew: float = 20.0
    initial: float = 1e-5
    phases: Phases = dataclasses.field(default_factory=Phases)
    measure: Callable[[Any], jax.Array] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"target sparsity must be in [0, 1), got {self.sparsity}")
        if not 0 < self.ramp <= self.freeze <= 1:
            raise ValueError(f"a target needs 0 < ramp <= freeze <= 1, got ramp={self.ramp}, freeze={self.freeze}")
        if not self.total_steps > 0:
            raise ValueError(f"a target needs total_steps > 0, got {self.total_steps}")
        if not self.initial > 0:
            raise ValueError(f"a target needs an initial lambda_ > 0 to start from, got {self.initial}")

    def scheduled(self, step: ArrayLike) -> jax.Array:
        """Return the sparsity that the schedule asks for after `step` steps with a penalty."""
        left = 1 - jnp.clip(jnp.asarray(step) / (self.ramp * self.total_steps), 0, 1)
        return self.sparsity * (1 - left**3)


Target = TargetSparsity


class ControlState(NamedTuple):
    """State of the controller."""

    log_lambda: jax.Array  # shape=(), dtype=jnp.float32
    gap: jax.Array  # shape=(), dtype=jnp.float32; scheduled - measured sparsity after the last step


def by_rank(
    target: TargetSparsity, state: ControlState, critical: jax.Array, zero: jax.Array, step: ArrayLike
) -> tuple[ControlState, jax.Array]:
    """Choose the lambda of step number `step` with a penalty that does not shrink: it zeroes the groups of lowest rank.

    The gap that the last step left, taken as a fraction of the groups, is zeroed. A target in zero groups is not
    exceeded; one in MACs or parameters can be, where the groups of a step cost more than the mean.

    Args:
      target: the sparsity to reach, and how.
      state: the controller after the last step.
      critical: float32 [groups], the lambda that would zero each group in this step; infinite for those that stay.
      zero: bool [groups], which are zero.
      step: int32 [], 1 for the first step with a penalty.

    Returns:
      (the controller, lambda of the groups that are not zero: just too small for the least important one that stays, or
      just large enough for the last one that may be zeroed). The controller's lambda, that of zero groups, is the
      largest one so far; outside of the steps in which lambda is adjusted it is unchanged, and the other one is 0.
    """
    adjusts = _adjusts(target, step)
    more = jnp.floor(jnp.maximum(state.gap, 0) * critical.size).astype(int)
    order = jnp.sort(jnp.where(zero, -jnp.inf, critical).astype(jnp.float32))
    may = jnp.sum(jnp.isfinite(critical) | zero)  # groups that are zero or may be zeroed
    count = jnp.minimum(jnp.sum(zero) + more, jnp.minimum(may, critical.size - 1))  # one group stays in any case
    least = order[jnp.clip(count, 0, may - 1)]
    lambda_ = jnp.where(count < may, _BELOW, 1 / _BELOW) * jnp.where(jnp.isfinite(least), least, 0)
    log_lambda = jnp.log(jnp.maximum(lambda_, 1e-30))
    highest = jnp.where(jnp.asarray(step) <= 1, log_lambda, jnp.maximum(state.log_lambda, log_lambda))
    return (
        state._replace(log_lambda=jnp.where(adjusts, highest, state.log_lambda)),
        jnp.where(adjusts, lambda_, 0),
    )


def after_rank(target: TargetSparsity, state: ControlState, measured: ArrayLike, step: ArrayLike) -> ControlState:
    """Record the gap after step number `step`, see `by_rank` and `update`."""
    gap = jnp.where(_adjusts(target, step), target.scheduled(step) - measured, state.gap)
    return state._replace(gap=gap)


def init(lambda_: float) -> ControlState:
    """Return the controller's first state, which starts the search at `lambda_`."""
    return ControlState(jnp.asarray(math.log(lambda_), jnp.float32), jnp.zeros([], jnp.float32))


def clamp(target: TargetSparsity, state: ControlState, scale: ArrayLike, step: ArrayLike) -> ControlState:
    """Bring lambda within reach of this step's gradients, before step number `step` with a penalty uses it.

    This limits what a start that is far too large or too small does in the first penalized steps. The upper limit
    rises with the steps, because pruning the last groups that a target needs can take a much larger lambda.

    Args:
      target: as in `update`.
      state: the controller before the step.
      scale: float32 [], the median over groups of the lambda that keeps a group zero in this step; NaN, where no group
        has one, leaves lambda as it is.
      step: int32 [], 1 for the first step with a penalty.

    Returns:
      The controller; outside of the steps in which lambda is adjusted it is unchanged.
    """
    known = jnp.asarray(scale) > 0
    middle = jnp.where(known, jnp.log(jnp.where(known, scale, 1)), state.log_lambda)
    ramp_steps = target.ramp * target.total_steps
    risen = target.slew * (jnp.asarray(step) - 1) / ramp_steps
    log_lambda = jnp.clip(state.log_lambda, middle - math.log(_REACH), middle + math.log(_REACH) + risen)
    return state._replace(log_lambda=jnp.where(_adjusts(target, step), log_lambda, state.log_lambda))


def update(target: TargetSparsity, state: ControlState, measured: ArrayLike, step: ArrayLike) -> ControlState:
    """Move lambda by the sparsity that was measured after step number `step` with a penalty.

    Args:
      target: the sparsity to reach, and how.
      state: the controller that the step used, from `clamp`.
      measured: float32 [], sparsity after this step.
      step: int32 [], 1 for the first step with a penalty.

    Returns:
      The controller after the step.
    """
    ramp_steps = target.ramp * target.total_steps
    gap = target.scheduled(step) - measured
    move = target.gain * gap * jnp.asarray(step) / ramp_steps**2 + target.damping * (gap - state.gap)
    move = jnp.clip(move, -target.slew / ramp_steps, target.slew / ramp_steps)
    adjusts = _adjusts(target, step)
    log_lambda = jnp.where(adjusts, state.log_lambda + move, state.log_lambda)
    return ControlState(log_lambda, jnp.where(adjusts, gap, state.gap))


def _adjusts(target: TargetSparsity, step: Any) -> jax.Array:
    return (step > 0) & (step <= target.freeze * target.total_steps)
