"""One objective from the losses of the tasks: methods with a single backward pass."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Scalar = Float[Array, ""]
Vector = Float[Array, " K"]
State = dict[str, Any]

_TINY = 1e-8  # added to losses before their logarithm, as in FAMO


class Step(NamedTuple):
    """What an objective may depend on, besides the losses.

    Attributes:
      labeled: [K], whether the batch has a label of the task. A task without any adds nothing.
      learned: [K], the parameters that the optimizer learns; see `LEARNED`.
      state: the result of `start` or `update`.
      epoch: int32 [], epochs that have ended.
      key: random key of the step.
      tasks: names of the K tasks.
      options: loss.options of the config.
      weights: [K], loss.weights of the config.
    """

    labeled: Bool[Array, " K"]
    learned: Vector
    state: State
    epoch: Int[Array, ""]
    key: PRNGKeyArray
    tasks: tuple[str, ...]
    options: Any
    weights: Vector


def _sum(values: Vector, step: Step) -> Scalar:
    return jnp.sum(jnp.where(step.labeled, values, 0.0))


def _count(step: Step) -> Scalar:
    return jnp.maximum(jnp.sum(step.labeled), 1).astype(jnp.float32)


def _log(losses: Vector, step: Step) -> Vector:
    """Return the logarithms of the losses, 0 where a task has no label; a loss of 0 is not finite."""
    return jnp.log(jnp.where(step.labeled, losses, 1.0))


def _equal(losses: Vector, step: Step) -> Scalar:
    return _sum(losses, step)


def _fixed(losses: Vector, step: Step) -> Scalar:
    return _sum(step.weights * losses, step)


def _uncertainty(losses: Vector, step: Step) -> Scalar:
    return _sum(jnp.exp(-step.learned) * losses + step.learned, step)


def _imtl_l(losses: Vector, step: Step) -> Scalar:
    return _sum(jnp.exp(step.learned) * losses - step.learned, step)


def _scale_invariant(losses: Vector, step: Step) -> Scalar:
    return _sum(_log(losses, step), step)


def _uw_so(losses: Vector, step: Step) -> Scalar:
    inverse = 1 / jnp.where(step.labeled, jax.lax.stop_gradient(losses), jnp.inf)
    weights = jax.nn.softmax(inverse / step.options.uw_so_temperature, where=step.labeled)
    return _sum(weights * losses, step)


def _dwa(losses: Vector, step: Step) -> Scalar:
    last, before = (_stack(step.state[name], step.tasks) for name in ("last", "before"))
    known = jnp.all(jnp.isfinite(last) & jnp.isfinite(before))
    rates = jnp.where(known, last / jnp.where(known, before, 1), 1)
    return _sum(len(step.tasks) * jax.nn.softmax(rates / step.options.dwa_temperature) * losses, step)


def _random(losses: Vector, step: Step) -> Scalar:
    return _sum(jax.nn.softmax(jax.random.normal(step.key, losses.shape)) * losses, step)


def _geometric(losses: Vector, step: Step) -> Scalar:
    mean = jnp.exp(jnp.sum(_log(losses, step)) / _count(step))
    return jnp.where(jnp.any(step.labeled), mean, 0.0)


def _stch(losses: Vector, step: Step) -> Scalar:
    logs, mu = _log(losses, step), step.options.stch_mu
    nadir = _stack(step.state["mean"], step.tasks)
    relative = (logs - jnp.log(jnp.where(jnp.isfinite(nadir), nadir, 1))) / mu
    smooth = mu * jax.nn.logsumexp(relative, where=step.labeled) * _count(step)
    known = (step.epoch > step.options.stch_warmup_epochs) & jnp.any(step.labeled)
    return jnp.where(known, smooth, _sum(logs, step))


def _famo(losses: Vector, step: Step) -> Scalar:
    weights = jax.nn.softmax(_stack(step.state["logits"], step.tasks), where=step.labeled)
    shifted = jnp.where(step.labeled, losses, 1.0) + _TINY
    scale = jax.lax.stop_gradient(1 / jnp.sum(weights / shifted))
    return _sum(scale * weights * jnp.log(shifted), step)


OBJECTIVES: dict[str, Callable[[Vector, Step], Scalar]] = {
    "uncertainty": _uncertainty,
    "equal": _equal,
    "fixed": _fixed,
    "si": _scale_invariant,
    "uw_so": _uw_so,
    "dwa": _dwa,
    "rlw": _random,
    "gls": _geometric,
    "stch": _stch,
    "imtl_l": _imtl_l,
    "famo": _famo,
}
# Parameter of each task that the optimizer learns, and its initial value.
LEARNED = {"uncertainty": 1.0, "imtl_l": 0.0}
# Methods that divide by a loss or take its logarithm.
NEED_POSITIVE = ("si", "uw_so", "gls", "stch")


def start(name: str, tasks: Sequence[str]) -> State:
    """Return the state of a method before the first step, {quantity: {task: scalar}}; {} if it has none."""
    unknown, zero = ({task: jnp.full([], value) for task in tasks} for value in (jnp.nan, 0.0))
    if name == "dwa":
        return {"sum": zero, "count": zero, "last": unknown, "before": unknown}
    if name == "stch":
        return {"sum": zero, "count": zero, "mean": unknown}
    if name == "famo":
        return {"logits": zero, "optimizer": _famo_optimizer(0.0, 0.0).init(zero)}
    return {}


def update(name: str, losses: Vector, step: Step, after: Vector | None, epoch_ends: Bool[Array, ""]) -> State:
    """Return the state of a method after a step.

    Args:
      name: the method's name.
      losses: [K], of the step.
      step: the inputs of the step besides the losses.
      after: [K], losses of the same batch with the new parameters, for "famo".
      epoch_ends: whether the step is the last of its epoch.
    """
    if name in ("dwa", "stch"):
        return _epoch_means(name, losses, step, epoch_ends)
    if name == "famo" and after is not None:
        return _famo_update(losses, step, after)
    return step.state


def _epoch_means(name: str, losses: Vector, step: Step, epoch_ends: Bool[Array, ""]) -> State:
    """Add the losses to the sums of the epoch, and divide at its end: for STCH only at that of its warm-up."""
    state, tasks = step.state, step.tasks
    total = _stack(state["sum"], tasks) + jnp.where(step.labeled, losses, 0.0)
    count = _stack(state["count"], tasks) + step.labeled
    ends = epoch_ends & (count > 0)
    found = {"sum": jnp.where(epoch_ends, 0.0, total), "count": jnp.where(epoch_ends, 0.0, count)}
    mean = total / jnp.maximum(count, 1)
    if name == "dwa":
        last = _stack(state["last"], tasks)
        found |= {
            "before": jnp.where(ends, last, _stack(state["before"], tasks)),
            "last": jnp.where(ends, mean, last),
        }
    else:
        ends = ends & (step.epoch == step.options.stch_warmup_epochs)
        found["mean"] = jnp.where(ends, mean, _stack(state["mean"], tasks))
    return {quantity: replaced(state[quantity], tasks, values) for quantity, values in found.items()}


def _famo_optimizer(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
    # Weight decay in the gradient, as in the paper's code.
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))


def _famo_update(losses: Vector, step: Step, after: Vector) -> State:
    logits = step.state["logits"]
    change = jnp.where(step.labeled, jnp.log(losses + _TINY) - jnp.log(after + _TINY), 0.0)

    def weighted(logits: Mapping[str, Scalar]) -> Scalar:
        return jnp.sum(jax.nn.softmax(_stack(logits, step.tasks), where=step.labeled) * change)

    tx = _famo_optimizer(step.options.famo_learning_rate, step.options.famo_weight_decay)
    updates, opt_state = tx.update(jax.grad(weighted)(logits), step.state["optimizer"], logits)
    return {"logits": optax.apply_updates(logits, updates), "optimizer": opt_state}


def _stack(values: Mapping[str, Scalar], tasks: Sequence[str]) -> Vector:
    return jnp.stack([values[task] for task in tasks])


def replaced(values: Mapping[str, Scalar], tasks: Sequence[str], new: Vector) -> dict[str, Scalar]:
    """Return {task: scalar} with new values of some tasks."""
    return {**values, **dict(zip(tasks, cast(Sequence[Scalar], new), strict=True))}
