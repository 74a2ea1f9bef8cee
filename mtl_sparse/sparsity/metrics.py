"""The metric of a proximal step: the diagonal D of |x - z|^2_D, from the inner optimizer's state."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

ADAM_METRICS = ("adaptive", "group", "fisher", "uncorrected", "plain")


class Metric(NamedTuple):
    """The metric of one step.

    Attributes:
      diagonal: tree like the parameters with the positive diagonal D, or None for the Euclidean metric.
      gradient: tree like the parameters with D times the step of a learning rate of 1, without the penalty. A zero
        group stays zero while its norm in this tree is at most lambda times the group's weight.
      averaged: whether the metric of a group is the mean of D over its weights, so that the proximal step scales the
        group as a whole. A zero group then stays zero while this mean times the norm of the step is at most lambda
        times the group's weight.
    """

    diagonal: Any
    gradient: Any
    averaged: bool = False


# (inner state, updates of the inner optimizer, learning rate) -> Metric
MetricFn = Callable[[Any, Any, Any], Metric]


def plain(state: Any, updates: Any, learning_rate: Any) -> Metric:
    """Return the Euclidean metric, D = 1, which is right for any optimizer whose step is its gradient's direction."""
    del state
    return Metric(None, _per_learning_rate(updates, learning_rate))


def _per_learning_rate(updates: Any, learning_rate: Any) -> Any:
    return jax.tree.map(lambda update: update / jnp.maximum(learning_rate, 1e-30), updates)


def from_state(diagonal: Callable[[Any], Any]) -> MetricFn:
    """Return the metric whose diagonal is a function of the inner optimizer's state.

    Args:
      diagonal: (inner state) -> tree like the parameters, positive.
    """

    def metric(state: Any, updates: Any, learning_rate: Any) -> Metric:
        d = diagonal(state)
        return Metric(d, jax.tree.map(jnp.multiply, d, _per_learning_rate(updates, learning_rate)))

    return metric


@dataclasses.dataclass(frozen=True)
class AdamMetric:
    """Adam's metric D = sqrt(v) + eps (Deleu & Bengio 2021, arXiv 2102.03869), for any optimizer with Adam's state.

    b1, b2 and eps must equal those of the inner optimizer, whose state does not hold them.

    Attributes:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: Adam's epsilon, outside the square root.
      kind: "adaptive", with the bias-corrected v; "group", the mean of the same over each group (for the group lasso);
        "fisher", D = v, a running estimate of the diagonal of the empirical Fisher information (for group l0);
        "uncorrected", the published form, which prunes harder in the first steps (31 times in the very first, at b2 =
        0.999); or "plain", D = 1.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    kind: str = "adaptive"

    def __post_init__(self) -> None:
        """Check the kind."""
        if self.kind not in ADAM_METRICS:
            raise ValueError(f"unknown metric {self.kind!r}; expected one of {', '.join(ADAM_METRICS)}")

    def __call__(self, state: Any, updates: Any, learning_rate: Any) -> Metric:
        """Return the metric of a step.

        Args:
          state: the inner optimizer's state after its update.
          updates: unused; weight decay in them does not belong to Adam's step.
          learning_rate: unused.

        Raises:
          ValueError: the state holds no `optax.ScaleByAdamState`, or several.
        """
        del updates, learning_rate
        adam = adam_state(state)
        count = jnp.maximum(adam.count, 1).astype(jnp.float32)
        m_correction, v_correction = (1 - b**count for b in (self.b1, self.b2))
        corrected = self.kind in ("adaptive", "group")

        def diagonal(v: jax.Array) -> jax.Array:
            if self.kind == "fisher":
                d = v / v_correction + 1e-20  # not 0, so that groups without gradients have a rank, too
            else:
                d = jnp.sqrt(v / (v_correction if corrected else 1)) + self.eps
            return jnp.where(adam.count > 0, d, 1)  # 1 while a wrapper such as optax.apply_if_finite skips Adam's steps

        def gradient(m: jax.Array, v: jax.Array) -> jax.Array:
            step = m / m_correction
            if corrected:  # D cancels the denominator of Adam's step
                return step
            step /= jnp.sqrt(v / v_correction) + self.eps
            return step * (1 if self.kind == "plain" else diagonal(v))

        return Metric(
            None if self.kind == "plain" else jax.tree.map(diagonal, adam.nu),
            jax.tree.map(gradient, adam.mu, adam.nu),
            averaged=self.kind == "group",
        )


def adam_state(state: Any) -> optax.ScaleByAdamState:
    """Return the one `optax.ScaleByAdamState` in an optimizer's state.

    Raises:
      ValueError: there is none, or there are several.
    """
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
    found = [node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node)]
    if len(found) != 1:
        raise ValueError(
            f"Adam's metric needs one optax.ScaleByAdamState in the inner optimizer's state, found {len(found)}; pass "
            "metric=None for the Euclidean metric, or a function of the state"
        )
    return found[0]
