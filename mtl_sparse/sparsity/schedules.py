"""Schedules of the penalty's lambda."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Phases:
    """When the penalty acts: not before `start_step`, then a linear warm-up, and not from `end_step` on.

    Attributes:
      start_step: steps without a penalty before it starts.
      warmup_steps: steps over which lambda then grows linearly from 0.
      end_step: first step without a penalty again (the debiasing phase); None is never.

    Raises:
      ValueError: a number of steps below 0.
    """

    start_step: int = 0
    warmup_steps: int = 0
    end_step: int | None = None

    def __post_init__(self) -> None:
        """Check the steps."""
        for name in ("start_step", "warmup_steps", "end_step"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")

    def factor(self, count: Any) -> Any:
        """Return the factor of lambda in [0, 1] after `count` steps."""
        value: Any = 1.0
        if self.start_step or self.warmup_steps:
            since = count + (not self.warmup_steps) - self.start_step
            value = jnp.clip(since / max(self.warmup_steps, 1), 0, 1)
        return value if self.end_step is None else jnp.where(count >= self.end_step, 0, value)


def concrete(value: Any) -> Any:
    """Return a scalar with a known value as a Python float; anything else, such as a schedule or a tracer, as it is."""
    is_scalar = isinstance(value, int | float | np.number | np.ndarray | jax.Array) and np.ndim(value) == 0
    return float(value) if is_scalar and not isinstance(value, jax.core.Tracer) else value


def phased(
    lambda_: optax.ScalarOrSchedule, start_step: int = 0, warmup_steps: int = 0, end_step: int | None = None
) -> Callable[[Any], Any]:
    """Return a schedule of lambda with phases, see `Phases`.

    Args:
      lambda_: a number, or an optax schedule of the steps taken.
      start_step: steps without a penalty before it starts.
      warmup_steps: steps over which lambda then grows linearly from 0.
      end_step: first step without a penalty again; None is never.

    Raises:
      ValueError: a number that is not >= 0, or a number of steps below 0.
    """
    lambda_ = concrete(lambda_)
    if isinstance(lambda_, float) and not lambda_ >= 0:
        raise ValueError(f"lambda_ must be a number >= 0, got {lambda_}")
    phases = Phases(start_step, warmup_steps, end_step)

    def schedule(count: Any) -> Any:
        value = jnp.asarray(lambda_(count) if callable(lambda_) else lambda_, jnp.float32)
        return value * phases.factor(count)

    return schedule
