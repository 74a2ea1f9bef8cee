"""One training step as a pure function, and compiled for all devices."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_sparse.models import multitask
from mtl_sparse.tasks import Task, labels, weighting
from mtl_sparse.tasks.weighting import by_gradients, by_losses
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
    steps_per_epoch: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one step on one device; to be pmapped over `AXIS`.

    Args:
      state: the same on every device.
      batch: this device's part of the global batch, {"image": [B, H, W, 3], label: [B, H, W, ...] or [B]}.
      seed: seed of the dropout and of random weights; an argument, so that runs with different seeds share one compiled
        program.
      model: the model.
      tasks: the tasks to train. Heads of the model without one stay as they are.
      tx: the optimizer.
      loss_config: config.loss.
      skip_not_finite: whether a step whose loss or gradient is not finite changes nothing but the step count;
        an epoch that it ends still ends for the weighting.
      steps_per_epoch: steps of an epoch, for weightings that depend on it.

    Returns:
      (state, {"loss", "grad_norm", "learning_rate", "lambda", "<task>/loss", ...}): scalars over the global batch.
      With a weighting by gradients, "loss" is the sum of the tasks' losses. The loss of a task without a label in the
      batch is NaN. With skip_not_finite, "skipped" is 1 if the step was skipped.
    """
    options: dict[str, Any] = {"model": model, "tasks": tasks, "loss_config": loss_config}
    found = gradients(state, batch, seed, **options, steps_per_epoch=steps_per_epoch)
    step = found.step
    updates, opt_state = tx.update(found.grads, state.opt_state, state.params)
    params = _with_frozen(step, optax.apply_updates(state.params, updates), found.labeled)
    batch_stats = {**state.batch_stats, **{name: found.batch_stats[name] for name in step.parts(found.batch_stats)}}
    scalars = {
        "loss": found.loss,
        # Not optax.tree.norm: XLA would write its squares to memory, since Adam needs them, too.
        "grad_norm": jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(found.grads))),
        "learning_rate": optimizer.learning_rate(opt_state),
        "lambda": optimizer.lambda_(opt_state),
    }
    shown = jnp.where(found.labeled, found.losses, jnp.nan)
    scalars |= {f"{task.name}/loss": shown[i] for i, task in enumerate(tasks)}
    if loss_config.weighting == "uncertainty":
        scalars |= {f"{task}/log_variance": value for task, value in params["weighting"].items()}
    elif loss_config.weighting not in ("equal", "fixed"):
        scalars |= {f"{task.name}/weight": found.weights[i] for i, task in enumerate(tasks)}
    new = TrainState(state.step + 1, params, batch_stats, opt_state, found.update(params))
    if skip_not_finite:
        finite = jnp.isfinite(found.loss) & jnp.isfinite(scalars["grad_norm"])
        kept = state.replace(step=new.step, weighting=found.skipped)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, kept)
        scalars["skipped"] = 1 - finite.astype(jnp.int32)
    return new, scalars


def gradients(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    seed: jax.Array | int,
    *,
    model: multitask.MultiTaskModel,
    tasks: Sequence[Task],
    loss_config: Any,
    steps_per_epoch: int = 1,
) -> "_Found":
    """Return the gradients and losses of a batch on one device; to be pmapped. For the arguments, see `train_step`."""
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    step = _Step(model, tuple(tasks), loss_config, state, batch, key, steps_per_epoch)
    return _by_gradients(step) if weighting.needs_gradients(loss_config.weighting, tasks) else _by_losses(step)


@dataclasses.dataclass(frozen=True)
class _Step:
    """What the parts of a step share; attributes as the arguments of `train_step`."""

    model: multitask.MultiTaskModel
    tasks: tuple[Task, ...]
    loss_config: Any
    state: TrainState
    batch: Mapping[str, jax.Array]
    key: jax.Array
    steps_per_epoch: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    def parts(self, tree: Mapping[str, Any]) -> list[str]:
        """Return the names of the model's parts in a tree that are trained: not the heads of other tasks."""
        trained = {f"head_{name}" for name in self.names}
        return [name for name in tree if not name.startswith("head_") or name in trained]

    def apply(self, params: Any, **options: Any) -> tuple[Any, Any]:
        """Return (output of the model in training mode, the new BatchNorm statistics of the parts that ran)."""
        images = self.batch["image"]
        variables = {"params": params, "batch_stats": self.state.batch_stats}
        rngs = {"dropout": self.key}
        out, updates = self.model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs, **options)
        return out, updates["batch_stats"]

    def losses(self, raw: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Return (mean losses [K], number of labels [K]) of raw predictions, both over the global batch."""
        losses, counts = [], []
        for task in self.tasks:
            loss, valid = task.elementwise(raw[task.name], labels.strided(self.batch[task.label]))
            total, count = jax.lax.psum((jnp.sum(loss), jnp.sum(valid)), AXIS)
            losses.append(total / jnp.maximum(count, 1))
            counts.append(count)
        return jnp.stack(losses), jnp.stack(counts)

    def context(self, labeled: jax.Array, learned: Mapping[str, jax.Array]) -> by_losses.Step:
        """Return what the objective depends on besides the losses."""
        config, count = self.loss_config, len(self.tasks)
        weights = tuple(config.weights)
        by_name = dict(zip((name for name, _, _ in self.model.heads), weights, strict=False))
        return by_losses.Step(
            labeled=labeled,
            learned=jnp.stack([learned[name] for name in self.names]) if learned else jnp.zeros(count),
            state=self.state.weighting,
            epoch=self.state.step // self.steps_per_epoch,
            key=jax.random.fold_in(self.key, 1),
            tasks=self.names,
            options=config.options,
            weights=jnp.array([by_name.get(name, 1.0) for name in self.names]),
        )


class _Found(NamedTuple):
    """Gradients and losses of a step.

    Attributes:
      loss: the objective.
      losses: [K], of the tasks.
      labeled: [K], whether the batch has a label of the task.
      weights: [K], derivative of the objective by each loss, or the weights of the gradients.
      batch_stats: new statistics of BatchNorm.
      grads: gradients, a tree like the parameters.
      update: new parameters -> new state of the weighting.
      skipped: new state of the weighting if the step is skipped.
      step: the step that these values belong to.
    """

    loss: jax.Array
    losses: jax.Array
    labeled: jax.Array
    weights: jax.Array
    batch_stats: Any
    grads: Any
    update: Callable[[Any], Any]
    skipped: Any
    step: _Step


def _over_devices(grads: Any) -> Any:
    # psum makes the losses sums over all devices, so each device's gradient counts the losses of the others, too.
    return jax.lax.pmean(grads, AXIS) if jax.lax.axis_size(AXIS) > 1 else grads  # with one device it would be a copy


def _by_losses(step: _Step) -> _Found:
    """Return the gradients of one objective of all losses."""
    name = step.loss_config.weighting
    objective = by_losses.OBJECTIVES.get(name, by_losses.OBJECTIVES["equal"])

    def total_loss(params: Any) -> tuple[jax.Array, Any]:
        raw, batch_stats = step.apply(params["model"])
        losses, counts = step.losses(raw)
        context = step.context(counts > 0, params["weighting"])
        return objective(losses, context), (losses, counts > 0, batch_stats)

    params = step.state.params
    (loss, (losses, labeled, batch_stats)), grads = jax.value_and_grad(total_loss, has_aux=True)(params)
    context = step.context(labeled, params["weighting"])
    ends = (step.state.step + 1) % step.steps_per_epoch == 0

    def update(new: Any) -> Any:
        after = step.losses(step.apply(new["model"])[0])[0] if name == "famo" else None
        return by_losses.update(name, losses, context, after, ends)

    without = context._replace(labeled=jnp.zeros_like(labeled))
    skipped = by_losses.update(name, losses, without, None, ends)
    weights = jax.grad(objective)(losses, context)
    return _Found(loss, losses, labeled, weights, batch_stats, _over_devices(grads), update, skipped, step)


def _by_gradients(step: _Step) -> _Found:
    """Return the weighted sum of the tasks' gradients in the backbone, and the gradients of their losses in the heads.

    The heads run once. With loss.gradients_of="params" the backbone has a backward pass for each task, and with
    "features" one for all.
    """
    config, state = step.loss_config, step.state
    shared = {"backbone": state.params["model"]["backbone"]}
    heads = {name: value for name, value in state.params["model"].items() if name != "backbone"}
    features, pull, shared_stats = jax.vjp(lambda params: step.apply(params, only_features=True), shared, has_aux=True)

    def of_heads(params: Any, features: Any) -> tuple[jax.Array, Any]:
        raw, batch_stats = step.apply(params, features=features)
        losses, counts = step.losses(raw)
        return losses, (counts > 0, batch_stats)

    losses, pull_heads, (labeled, head_stats) = jax.vjp(of_heads, heads, features, has_aux=True)
    head_grads, cotangents = pull_heads(jnp.ones_like(losses))
    places = {name: i for i, (name, _, _) in enumerate(step.model.heads)}
    read_by = [places[name] for name in step.names]

    def combined(weights: Mapping[int, Any]) -> Any:
        """Return the gradient in the backbone of a weighted sum of the tasks' losses, by place of their heads."""
        found = [weights[i] * one if i in weights else jnp.zeros_like(one) for i, one in enumerate(cotangents)]
        return pull(tuple(found))[0]

    if config.gradients_of == "params":
        # Not in a loop: XLA runs the bodies of loops on one core of a CPU.
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[combined({i: 1}) for i in read_by])
        stacked = _over_devices(stacked)
        gramian = weighting.gramian(stacked)
    else:
        of_features = jnp.stack([cotangents[i] for i in read_by]) / jax.lax.axis_size(AXIS)  # see `_over_devices`
        gramian = jax.lax.psum(weighting.gramian(of_features), AXIS)
    weights = _gradient_weights(step, gramian)
    if config.gradients_of == "params":
        grads = jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1, precision=jax.lax.Precision.HIGHEST), stacked)
    else:
        scales = {i: weights[k].astype(cotangents[i].dtype) for k, i in enumerate(read_by)}
        grads = _over_devices(combined(scales))
    all_grads = {
        "model": {**grads, **_over_devices(head_grads)},
        "weighting": jax.tree.map(jnp.zeros_like, state.params["weighting"]),
    }

    def update(_: Any) -> Any:
        if config.weighting != weighting.GRADNORM:
            return state.weighting
        return by_gradients.gradnorm_update(state.weighting, step.names, losses, labeled, gramian, config.options)

    batch_stats = {**head_stats, **{name: value for name, value in shared_stats.items() if name in shared}}
    return _Found(jnp.sum(losses), losses, labeled, weights, batch_stats, all_grads, update, state.weighting, step)


def _gradient_weights(step: _Step, gramian: jax.Array) -> jax.Array:
    config, options = step.loss_config, step.loss_config.options
    if config.weighting == weighting.GRADNORM:
        return by_gradients.gradnorm_weights(step.state.weighting, step.names)
    return weighting.gradient_weights(
        config.weighting,
        gramian,
        key=jax.random.fold_in(step.key, 1),
        cagrad_c=options.cagrad_c,
        fairgrad_alpha=options.fairgrad_alpha,
    )


def _with_frozen(step: _Step, params: Any, labeled: jax.Array) -> Any:
    """Return new parameters, with the old ones of heads that are not trained and of tasks without a label."""
    old = step.state.params
    trained = step.parts(old["model"])
    model = {name: params["model"][name] if name in trained else old["model"][name] for name in old["model"]}
    # Adam's momentum would change the loss weight of a task that has no label in this batch.
    kept = dict(old["weighting"])
    for i, name in enumerate(step.names):
        if name in kept:
            kept[name] = jnp.where(labeled[i], params["weighting"][name], kept[name])
    return {**params, "model": model, "weighting": kept}


def make_train_step(
    run: Run, tasks: Sequence[Task] | None = None
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """Compile `train_step` of a run for the devices of all processes.

    The state and the scalars have no axis of devices: with one, XLA copies the whole state in every step.

    Args:
      run: the result of `setup`.
      tasks: those of its tasks that are trained; None is all.

    Returns:
      A function (state, batch) -> (state, scalars). It reuses the buffers of the state that it is given.
    """
    config = run.config
    step = functools.partial(
        train_step,
        model=run.model,
        tasks=run.tasks if tasks is None else tuple(tasks),
        tx=run.tx,
        loss_config=config.loss,
        skip_not_finite=config.run.skip_not_finite > 0,
        steps_per_epoch=run.steps_per_epoch,
    )
    mapped = jax.pmap(step, axis_name=AXIS, in_axes=(None, 0, None), out_axes=None, donate_argnums=0)
    return lambda state, batch: mapped(state, batch, np.uint32(config.seed))
