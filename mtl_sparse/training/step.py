"""One training step as a pure function, and compiled for all devices."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_sparse.models import multitask
from mtl_sparse.tasks import Task, labels, weighting
from mtl_sparse.training import optimizer
from mtl_sparse.training.setup import AXIS, Run
from mtl_sparse.training.state import TrainState


def train_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    seed: jax.Array | int,
    *,
    model: multitask.MultiTaskModel,
    tasks: Sequence[Task],
    tx: optax.GradientTransformation,
    loss_config: Any,
    skip_not_finite: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one step on one device; to be pmapped over `AXIS`.

    Args:
      state: the same on every device.
      batch: this device's part of the global batch, {"image": [B, H, W, 3], label: [B, H, W, ...] or [B]}.
      seed: seed of the dropout; an argument, so that runs with different seeds share one compiled program.
      model: the model.
      tasks: the tasks to train.
      tx: the optimizer.
      loss_config: config.loss.
      skip_not_finite: whether a step whose loss or gradient is not finite changes nothing but the step count.

    Returns:
      (state, {"loss", "grad_norm", "learning_rate", "lambda", "<task>/loss", ...}): scalars over the global batch. The
      loss of a task without a label in the batch is NaN. With skip_not_finite, "skipped" is 1 if the step was skipped.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def total_loss(params):
        raw, updates = model.apply(
            {"params": params["model"], "batch_stats": state.batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        losses, counts = {}, {}
        for task in tasks:
            loss, valid = task.elementwise(raw[task.name], labels.strided(batch[task.label]))
            total, counts[task.name] = jax.lax.psum((jnp.sum(loss), jnp.sum(valid)), AXIS)
            losses[task.name] = total / jnp.maximum(counts[task.name], 1)
        weights = tuple(loss_config.weights)
        combined = weighting.combine(loss_config.weighting, params["weighting"], losses, weights, counts)
        return combined, (losses, counts, updates["batch_stats"])

    (loss, (losses, counts, batch_stats)), grads = jax.value_and_grad(total_loss, has_aux=True)(state.params)
    if jax.lax.axis_size(AXIS) > 1:  # with one device it would be a copy
        # psum makes the losses sums over all devices, so each device's gradient counts the losses of the others, too.
        grads = jax.lax.pmean(grads, AXIS)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Adam's momentum would change the loss weight of a task that has no label in this batch.
    old = state.params["weighting"]
    kept = {task: jnp.where(counts[task] > 0, value, old[task]) for task, value in params["weighting"].items()}
    params = {**params, "weighting": kept}
    scalars = {
        "loss": loss,
        # Not optax.tree.norm: XLA would write its squares to memory, since Adam needs them, too.
        "grad_norm": jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(grads))),
        "learning_rate": optimizer.learning_rate(opt_state),
        "lambda": optimizer.lambda_(opt_state),
    }
    scalars |= {f"{task}/loss": jnp.where(counts[task] > 0, value, jnp.nan) for task, value in losses.items()}
    scalars |= {f"{task}/log_variance": value for task, value in params["weighting"].items()}
    new = TrainState(state.step + 1, params, batch_stats, opt_state)
    if skip_not_finite:
        finite = jnp.isfinite(loss) & jnp.isfinite(scalars["grad_norm"])
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state).replace(step=new.step)
        scalars["skipped"] = 1 - finite.astype(jnp.int32)
    return new, scalars


def make_train_step(
    run: Run,
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """Compile `train_step` of a run for the devices of all processes.

    The state and the scalars have no axis of devices: with one, XLA copies the whole state in every step.

    Args:
      run: from `setup`.

    Returns:
      A function (state, batch) -> (state, scalars). It reuses the buffers of the state that it is given.
    """
    config = run.config
    step = functools.partial(
        train_step,
        model=run.model,
        tasks=run.tasks,
        tx=run.tx,
        loss_config=config.loss,
        skip_not_finite=config.run.skip_not_finite > 0,
    )
    mapped = jax.pmap(step, axis_name=AXIS, in_axes=(None, 0, None), out_axes=None, donate_argnums=0)
    return lambda state, batch: mapped(state, batch, np.uint32(config.seed))
