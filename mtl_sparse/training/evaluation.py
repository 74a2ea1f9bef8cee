"""Evaluation over a whole split: sums per image on the device, added in float64, divided once on the host."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from input_pipeline import loader
from mtl_sparse.models import multitask
from mtl_sparse.models.resnet import OUTPUT_STRIDE
from mtl_sparse.runtime import compile_cache, processes, progress
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.tasks import Task, labels
from mtl_sparse.training.setup import AXIS, Run
from mtl_sparse.training.state import TrainState

STRIDED = f"_stride{OUTPUT_STRIDE}"  # suffix of the metrics at the resolution of the raw prediction, as in the paper


def upsample(raw: jax.Array, label: jax.Array) -> jax.Array:
    """Resize raw predictions bilinearly to the label's resolution.

    Args:
      raw: [B, h, w, C]; an array with fewer axes, of an attribute, is returned unchanged.
      label: [B, H, W, ...].

    Returns:
      [B, H, W, C].
    """
    if raw.ndim < 4:
        return raw
    return jax.image.resize(raw, (*label.shape[:3], raw.shape[-1]), "bilinear")


def predict(
    model: multitask.MultiTaskModel,
    tasks: Sequence[Task],
    variables: Mapping[str, Any],
    images: Float[Array, "B H W 3"],
) -> dict[str, jax.Array]:
    """Return the predictions of a model in the units of the labels.

    Args:
      model: the model.
      tasks: the tasks whose predictions to return.
      variables: {"params", "batch_stats"}.
      images: normalized images.

    Returns:
      task -> [B, H, W, C], or [B] for an attribute.
    """
    raw: Any = model.apply(variables, images, train=False)
    return {task.name: task.activation(upsample(raw[task.name], images)) for task in tasks}


def eval_sums(
    variables: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    *,
    model: multitask.MultiTaskModel,
    tasks: Sequence[Task],
) -> dict[str, dict[str, dict[str, jax.Array]]]:
    """Return the sums that the losses and metrics of each image of a batch need.

    Args:
      variables: {"params", "batch_stats"}.
      batch: {"image": [B, H, W, 3], label: [B, H, W, ...] or [B]}.
      model: the model.
      tasks: the tasks to evaluate.

    Returns:
      task -> {"loss": {"total", "count"}, "full": sums at the label's resolution, "strided": sums at the resolution of
      the raw prediction, for pixel tasks}; each sum is [B, ...].
    """
    raw: Any = model.apply(variables, batch["image"], train=False)
    sums: dict[str, dict[str, dict[str, jax.Array]]] = {}
    for task in tasks:
        label, prediction = batch[task.label], raw[task.name]
        loss, valid = task.elementwise(prediction, labels.strided(label))
        axes = tuple(range(1, loss.ndim))
        sums[task.name] = {
            "loss": {"total": jnp.sum(loss, axes), "count": jnp.sum(valid, axes)},
            "full": _sums_of(task, upsample(prediction, label), label, label),
        }
        if label.ndim >= 3:
            sums[task.name]["strided"] = _sums_of(task, prediction, labels.strided(label), label)
    return sums


def _sums_of(task, raw, label, whole):
    """Return `task.sums` of each image from raw predictions, at the positions of the `whole` label that `label` has."""
    named = {"raw": raw} if task.sums_take_raw else {}
    return _sums_of_prediction(task, task.activation(raw), label, whole, **named)


def _sums_of_prediction(task, prediction, label, whole, **named):
    more = (jax.vmap(task.whole)(whole),) if task.whole else ()
    return jax.vmap(task.sums)(prediction, label, *more, **named)


class Evaluator:
    """Evaluation of a run's model on its splits, compiled once.

    Every image counts once: the result depends neither on the batch size nor on the number of processes.
    """

    def __init__(self, run: Run) -> None:
        """Prepare the evaluation; it is compiled in the first call.

        Args:
          run: the result of `setup`.
        """
        self._run = run
        sums = functools.partial(eval_sums, model=run.model, tasks=run.tasks)
        step = jax.pmap(sums, in_axes=(None, 0), devices=jax.local_devices())
        self._step = compile_cache.announced(step, "evaluation")

    def __call__(self, variables: Any, split: str, *, require_labels: bool = False) -> dict[str, float]:
        """Evaluate on a split.

        Args:
          variables: {"params", "batch_stats"} on every local device, see `loader.replicate`.
          split: "train", "validation" or "test".
          require_labels: whether a task without a label in the split is an error.

        Returns:
          {"<task>/<metric>": value}, with "<task>/loss" among them. If a task's loss is not finite, all its values
          are NaN.

        Raises:
          UserError: DATA_LABEL_MISSING, if a task has no label in the split; TASK_SPEC_INVALID, if its headline is not
            among its metrics.
        """
        with progress.phase(f"evaluating the {split} split"):
            batches = self._run.batches.evaluation(split)
            return self.evaluate(variables, batches, labelled=split if require_labels else "")

    def evaluate(self, variables: Any, batches: Iterable[loader.Batch], *, labelled: str = "") -> dict[str, float]:
        """Evaluate on batches.

        Args:
          variables: as in `__call__`.
          batches: host arrays, with a "mask" that is 0 for padding.
          labelled: name of the split, if every task must have a label in it, for the error; "" for any split.

        Returns:
          As `__call__`.

        Raises:
          UserError: as `__call__`.
        """
        totals = (_total(self._step(variables, loader.shard(batch)), batch) for batch in batches)
        return _values(self._run.tasks, totals, labelled)

    def with_statistics(self, state: TrainState, frozen: Sequence[str] = ()) -> TrainState:
        """Return the state with BatchNorm's statistics of train.bn_frames images; 0 keeps the running ones.

        The heads of the tasks in `frozen` keep theirs.

        Running statistics average those of small batches, whose normalization narrows what later layers see, so that
        the evaluated model sees wider inputs. The statistics of one large batch fit it (Wu & Johnson 2021, arXiv
        2105.07576).
        """
        if not self._run.config.train.bn_frames:
            return state
        measure, images = self._statistics
        kept = {name: value for name, value in state.batch_stats.items() if name.removeprefix("head_") in frozen}
        return state.replace(batch_stats={**measure(state.variables, images), **kept})

    @functools.cached_property
    def _statistics(self):
        """The compiled function (variables, images) -> BatchNorm's statistics without dropout, and the images."""
        run = self._run
        model = run.model.clone(bn_momentum=0.0, dropout=0.0, classifier_dropout=(0.0, 0.0))

        def measure(variables, images):
            return model.apply(variables, images, train=True, mutable=["batch_stats"])[1].get("batch_stats", {})

        devices, source = jax.device_count(), run.data.train
        count = max(1, min(run.config.train.bn_frames, len(source)) // devices) * devices
        chosen = [source[int(index)] for index in np.linspace(0, len(source) - 1, count).round()]
        batch = next(
            loader.eval_batches(
                chosen,
                dataclasses.replace(run.batches.transform(), labels=()),
                batch_size=count,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
        )
        images = next(loader.prefetch_to_device(iter([{"image": batch["image"]}])))["image"]
        return jax.pmap(measure, axis_name=AXIS, in_axes=(None, 0), out_axes=None), images


def _total(sums: Any, batch: loader.Batch) -> Any:
    """Add up the images of one batch without padding: [devices, B / devices, ...] -> float64 [...]."""
    real = batch["mask"] > 0

    def add(x):
        x = np.asarray(x)
        return x.reshape(-1, *x.shape[2:])[real].sum(0, dtype=np.float64)

    return jax.tree.map(add, jax.device_get(sums))


def _sum(totals: Iterable[Any]) -> Any:
    """Return the sum of the totals of the batches of all processes."""
    return processes.total(functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), totals))


def _values(tasks: Sequence[Task], totals: Iterable[Any], labelled: str = "") -> dict[str, float]:
    """Return {"<task>/<metric>": value} from the totals of batches; for `labelled`, see `Evaluator.evaluate`."""
    total = _sum(totals)
    values: dict[str, float] = {}
    for task in tasks:
        sums = total[task.name]
        found = dict(task.values(sums["full"]))
        if "strided" in sums:
            found |= {f"{name}{STRIDED}": value for name, value in task.values(sums["strided"]).items()}
        if task.headline not in found:
            raise UserError(
                "TASK_SPEC_INVALID",
                f"task {task.name!r}: expected its headline to be one of its metrics {', '.join(found)}, got "
                f"{task.headline!r}",
            )
        if "loss" in sums:
            count = sums["loss"]["count"]
            if labelled and not count:
                raise UserError(
                    "DATA_LABEL_MISSING",
                    f"expected labels of task {task.name!r} in the {labelled} split, got none; remove it from "
                    "config.tasks",
                )
            found = {"loss": float(sums["loss"]["total"] / count) if count else float("nan"), **found}
            if not np.isfinite(found["loss"]):  # argmax and clip would turn NaN into valid numbers
                found = dict.fromkeys(found, float("nan"))
        values |= {f"{task.name}/{name}": value for name, value in found.items()}
    return values


def constant_predictions(tasks: Sequence[Task], batches: Iterable[loader.Batch]) -> dict[str, np.ndarray]:
    """Return the constant baseline of each task: mean depth, mean normal, frequencies of classes or of an attribute.

    Args:
      tasks: the tasks.
      batches: batches of the training split, once, with a "mask".

    Returns:
      task -> prediction for every image and pixel: [C], or a scalar.
    """

    @jax.jit
    def targets(batch):
        sums = {}
        for task in tasks:
            target, valid = task.target(labels.strided(batch[task.label]))
            axes = tuple(range(1, valid.ndim))
            kept = valid.reshape(*valid.shape, *(1,) * (target.ndim - valid.ndim))
            sums[task.name] = {"target": jnp.sum(jnp.where(kept, target, 0), axes), "count": jnp.sum(valid, axes)}
        return jax.tree.map(lambda x: x[None], sums)

    total = _sum(_total(targets(batch), batch) for batch in batches)
    return {name: sums["target"] / np.maximum(sums["count"], 1) for name, sums in total.items()}


def evaluate_constant(
    tasks: Sequence[Task], constants: Mapping[str, np.ndarray], batches: Iterable[loader.Batch]
) -> dict[str, float]:
    """Evaluate constant predictions with the metrics of the tasks.

    Args:
      tasks: the tasks.
      constants: the result of `constant_predictions`.
      batches: host arrays, with a "mask".

    Returns:
      {"<task>/<metric>": value}, without losses.
    """

    @jax.jit
    def sums(batch, constants):
        result = {}
        for task in tasks:

            def of(label, task=task):
                prediction = jnp.broadcast_to(constants[task.name], task.target(label)[0].shape)
                return _sums_of_prediction(task, prediction, label, batch[task.label])

            label = batch[task.label]
            result[task.name] = {"full": of(label)} | (
                {"strided": of(labels.strided(label))} if label.ndim >= 3 else {}
            )
        return jax.tree.map(lambda x: x[None], result)

    constants = jax.tree.map(np.float32, constants)
    return _values(tasks, (_total(sums(batch, constants), batch) for batch in batches))
