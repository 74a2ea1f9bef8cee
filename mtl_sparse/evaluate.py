"""Evaluation over a whole split: per-image sums on the device, added in float64, divided once on the host."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import loader
from mtl_sparse import processes
from mtl_sparse.errors import UserError
from mtl_sparse.models.resnet import OUTPUT_STRIDE
from mtl_sparse.tasks import Task

STRIDED = f"_stride{OUTPUT_STRIDE}"  # suffix of the metrics at the prediction's own resolution, the paper's


def strided_label(label):
    """The labels [B, H, W, ...] that a prediction at the backbone's stride answers for: its cells' middles.

    Those of an image-level task, [B], are what they are.
    """
    return (
        label if label.ndim < 3 else label[:, OUTPUT_STRIDE // 2 :: OUTPUT_STRIDE, OUTPUT_STRIDE // 2 :: OUTPUT_STRIDE]
    )


def upsample(raw, label):
    """Raw predictions [B, h, w, C] bilinearly at the label's resolution [B, H, W, ...]; others as they are."""
    if raw.ndim < 4:
        return raw
    return jax.image.resize(raw, (*label.shape[:3], raw.shape[-1]), "bilinear")


def predict(model, tasks: Sequence[Task], variables, images) -> dict[str, jax.Array]:
    """Images [B, H, W, 3] -> {task: prediction in the label's unit}: [B, H, W, C], or [B] of an attribute."""
    raw = model.apply(variables, images, train=False)
    return {task.name: task.activation(upsample(raw[task.name], images)) for task in tasks}


def eval_sums(variables, batch, *, model, tasks: Sequence[Task]):
    """Sums of one batch, image by image: {task: {"loss", "full" and, of a pixel task, "strided": {name: [B, ...]}}}."""
    raw = model.apply(variables, batch["image"], train=False)
    sums = {}
    for task in tasks:
        label, prediction = batch[task.label], raw[task.name]
        loss, valid = task.elementwise(prediction, strided_label(label))
        axes = tuple(range(1, loss.ndim))
        sums[task.name] = {
            "loss": {"total": jnp.sum(loss, axes), "count": jnp.sum(valid, axes)},
            "full": _sums_of(task, upsample(prediction, label), label, label),
        }
        if label.ndim >= 3:
            strided = _sums_of(task, prediction, strided_label(label), label)
            sums[task.name]["strided"] = strided
    return sums


def _sums_of(task, raw, label, whole):
    """`task.sums` of each image from raw predictions, of the places that `label` has of the `whole` one."""
    named = {"raw": raw} if task.sums_take_raw else {}
    return _sums_of_prediction(task, task.activation(raw), label, whole, **named)


def _sums_of_prediction(task, prediction, label, whole, **named):
    more = (jax.vmap(task.whole)(whole),) if task.whole else ()
    return jax.vmap(task.sums)(prediction, label, *more, **named)


def make_evaluator(model, tasks: Sequence[Task]) -> Callable:
    """Compiles `eval_sums` once; returns evaluate(variables, batches) -> {"<task>/<metric>": value}.

    `variables` are on every local device (`loader.replicate`), `batches` host batches with a `mask`. Every example
    counts once; the result does not depend on the batch size, nor on how many processes have a share of the batches
    each. "<task>/loss" is among the values; where it is not finite, none of the task's metrics is. With `labelled`, the
    name of the split, a task that has no label in it raises UserError.
    """
    sums = functools.partial(eval_sums, model=model, tasks=tasks)
    step = jax.pmap(sums, in_axes=(None, 0), devices=jax.local_devices())

    def evaluate(variables, batches: Iterator[loader.Batch], labelled: str = "") -> dict[str, float]:
        return _values(tasks, (_total(step(variables, loader.shard(batch)), batch) for batch in batches), labelled)

    return evaluate


def _total(sums, batch):
    """Adds the images of one batch, padding left out: [devices, B / devices, ...] -> float64 [...]."""
    real = batch["mask"] > 0

    def add(x):
        x = np.asarray(x)
        return x.reshape(-1, *x.shape[2:])[real].sum(0, dtype=np.float64)

    return jax.tree.map(add, jax.device_get(sums))


def _sum(totals):
    """Sum of the batches' totals, those of all processes."""
    return processes.total(functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), totals))


def _values(tasks, totals, labelled=""):
    total = _sum(totals)
    values = {}
    for task in tasks:
        sums = total[task.name]
        found = dict(task.values(sums["full"]))
        if "strided" in sums:
            found |= {f"{name}{STRIDED}": value for name, value in task.values(sums["strided"]).items()}
        if task.headline not in found:
            raise UserError(f"task {task.name!r}: its headline {task.headline!r} is none of {', '.join(found)}")
        if "loss" in sums:
            count = sums["loss"]["count"]
            if labelled and not count:
                raise UserError(f"no {labelled} frame has a label of task {task.name}; leave it out of config.tasks")
            found = {"loss": float(sums["loss"]["total"] / count) if count else float("nan"), **found}
            if not np.isfinite(found["loss"]):  # argmax and clip would make figures of a prediction that is none
                found = dict.fromkeys(found, float("nan"))
        values |= {f"{task.name}/{name}": value for name, value in found.items()}
    return values


def largest_difference(expected, actual) -> float:
    """Largest difference of two {task: raw prediction}, over the largest value of each task; NaN if one has any.

    An image's few logits count as at least 1: that one of them is near 0 by chance makes its rounding no larger.
    """
    pairs = [(np.asarray(raw, np.float64), np.asarray(actual[task], np.float64)) for task, raw in expected.items()]
    least = [1.0 if a.ndim < 3 else 1e-30 for a, _ in pairs]
    return float(
        np.max([np.max(np.abs(b - a)) / max(np.max(np.abs(a)), x) for (a, b), x in zip(pairs, least, strict=True)])
    )


def constant_predictions(tasks: Sequence[Task], batches: Iterator[loader.Batch]) -> dict[str, np.ndarray]:
    """The constant guess of each task: mean depth, mean normal, frequencies of classes or of an attribute."""

    @jax.jit
    def targets(batch):
        sums = {}
        for task in tasks:
            target, valid = task.target(strided_label(batch[task.label]))
            places = tuple(range(1, valid.ndim))
            kept = valid.reshape(*valid.shape, *(1,) * (target.ndim - valid.ndim))
            sums[task.name] = {"target": jnp.sum(jnp.where(kept, target, 0), places), "count": jnp.sum(valid, places)}
        return jax.tree.map(lambda x: x[None], sums)

    total = _sum(_total(targets(batch), batch) for batch in batches)
    return {name: sums["target"] / np.maximum(sums["count"], 1) for name, sums in total.items()}


def evaluate_constant(tasks: Sequence[Task], constants, batches: Iterator[loader.Batch]) -> dict[str, float]:
    """The metrics of `constants`, computed as a model's are."""

    @jax.jit
    def sums(batch, constants):
        result = {}
        for task in tasks:

            def of(label, task=task):
                guess = jnp.broadcast_to(constants[task.name], task.target(label)[0].shape)
                return _sums_of_prediction(task, guess, label, batch[task.label])

            label = batch[task.label]
            result[task.name] = {"full": of(label)} | ({"strided": of(strided_label(label))} if label.ndim >= 3 else {})
        return jax.tree.map(lambda x: x[None], result)

    constants = jax.tree.map(np.float32, constants)
    return _values(tasks, (_total(sums(batch, constants), batch) for batch in batches))
