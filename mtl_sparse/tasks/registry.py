"""Task specs: head, outputs, label, loss, activation and metrics of each task.

To add a task, register its spec, `TASKS["mine"] = lambda config: Task(...)`, and put its name in config.tasks. A name
with an argument, such as `attribute:Smiling`, uses the spec `attribute:`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mtl_sparse.models import multitask
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.tasks import activations, labels, losses, metrics


@dataclasses.dataclass(frozen=True)
class Task:
    """The spec of one task.

    Attributes:
      name: its name in config.tasks and in the model's output dictionary.
      label: key of its label in a sample and a batch.
      outputs: channels of the raw prediction.
      loss: (raw, label) -> (loss, valid), one number for each label, see `losses`. `elementwise` calls and checks it.
      activation: raw -> prediction in the label's unit.
      sums: (prediction, label) of one image -> dictionary of sums, see `metrics`.
      values: sums over a split -> dictionary of floats.
      target: label -> (label in the form of the prediction, valid). Its mean is the constant baseline, which every
        trained model must beat.
      headline: the one metric for short tables.
      higher_is_better: whether a higher headline is better.
      head: a key of `models.multitask.HEADS`.
      sums_take_raw: whether `sums` also takes the raw prediction of the image, as the keyword argument `raw`.
      whole: label of one image at full resolution -> a third argument of `sums`, whose label may be subsampled.
    """

    name: str
    label: str
    outputs: int
    loss: Callable[..., tuple[jax.Array, jax.Array]]
    activation: Callable[[jax.Array], jax.Array]
    sums: Callable[..., metrics.Sums]
    values: Callable[[metrics.Totals], dict[str, float]]
    target: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    headline: str
    higher_is_better: bool
    head: str = "deeplab"
    sums_take_raw: bool = False
    whole: Callable[[jax.Array], Any] | None = None

    def elementwise(self, raw: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return `loss` of raw predictions [B, ...] and labels [B, ...], with its shapes checked.

        Raises:
          UserError: the loss or its mask is not one number for each label. Prediction and label were broadcast.
        """
        loss, valid = self.loss(raw, label)
        shape, given = jnp.shape(loss), jnp.shape(raw)
        if shape != jnp.shape(valid) or shape not in (given, given[:-1]):
            raise UserError(
                "TASK_LOSS_SHAPE",
                f"expected the loss of task {self.name!r} and its mask to be one number for each label, got the shapes "
                f"{shape} and {jnp.shape(valid)} for raw predictions {given} and labels {jnp.shape(label)}",
            )
        return loss, valid


def _segmentation(config: ConfigDict) -> Task:
    classes = config.data.num_classes
    return Task(
        name="segmentation",
        label="segmentation",
        outputs=classes,
        loss=functools.partial(losses.cross_entropy, smoothing=config.loss.label_smoothing),
        activation=activations.probabilities,
        sums=metrics.segmentation_sums,
        values=metrics.segmentation_values,
        target=lambda label: (jax.nn.one_hot(label, classes), label < classes),
        headline="miou",
        higher_is_better=True,
    )


_UNSCALED = {"loss": losses.depth_l1, "activation": activations.metric_depth}
# Value of config.data.depth_target -> the parts of the spec of depth that depend on it.
DEPTH_TARGETS: dict[str, dict[str, Any]] = {
    "normalized": {
        "loss": losses.depth_mse,
        "activation": activations.unit_depth,
        "sums": metrics.depth_sums,
        "values": metrics.normalized_depth_values,
        "headline": "mae_normalized",
    },
    "metres": _UNSCALED
    | {
        "sums": metrics.metric_depth_sums,
        "values": metrics.metric_depth_values,
        "whole": metrics.depth_scale,
        "headline": "mae_normalized",
    },
    "disparity": _UNSCALED | {"sums": metrics.depth_sums, "values": metrics.depth_values, "headline": "mae"},
}


def _depth(config: ConfigDict) -> Task:
    kind = DEPTH_TARGETS[config.data.depth_target]
    return Task(
        name="depth",
        label="depth",
        outputs=1,
        target=lambda label: (label[..., None], labels.has_depth(label)),
        higher_is_better=False,
        **kind,
    )


def _normals(_: ConfigDict) -> Task:
    return Task(
        name="normals",
        label="normals",
        outputs=3,
        loss=losses.one_minus_cosine,
        activation=activations.unit_normals,
        sums=metrics.normals_sums,
        values=metrics.normals_values,
        target=lambda label: (label, labels.has_normal(label)),
        headline="cosine",
        higher_is_better=True,
    )


def _edge(_: ConfigDict) -> Task:
    return Task(
        name="edge",
        label="edge",
        outputs=1,
        loss=losses.binary_cross_entropy,
        activation=activations.probability,
        sums=metrics.edge_sums,
        values=metrics.edge_values,
        target=lambda label: (label[..., None], jnp.ones_like(label, bool)),
        headline="mae",
        higher_is_better=False,
    )


def _attribute(config: ConfigDict) -> Task:
    """Return the spec of the task whether an image has an attribute; `resolve` sets the attribute's name."""
    return Task(
        name="attribute:",
        label="attribute:",
        outputs=1,
        loss=functools.partial(losses.attribute_cross_entropy, pos_weight=config.loss.pos_weight),
        activation=activations.probability,
        sums=functools.partial(metrics.attribute_sums, threshold=config.loss.threshold),
        values=metrics.attribute_values,
        target=lambda label: (label == 1, labels.has_class(label)),
        headline="accuracy",
        higher_is_better=True,
        head="classifier",
        sums_take_raw=True,
    )


TASKS: dict[str, Callable[[ConfigDict], Task]] = {
    "segmentation": _segmentation,
    "depth": _depth,
    "normals": _normals,
    "edge": _edge,
    "attribute:": _attribute,
}


def resolve(config: ConfigDict) -> tuple[Task, ...]:
    """Return the specs of config.tasks, in its order.

    Raises:
      UserError: no task is given, one is unknown or repeated, or a registered spec has another name or an unknown head.
    """
    names = tuple(config.tasks)
    if not names:
        raise UserError("OPTION_MISSING", f"expected at least one task in config.tasks; choose from {', '.join(TASKS)}")
    for name in names:
        if _key(name) not in TASKS or name.endswith(":"):
            known = [f"{key}NAME" if key.endswith(":") else key for key in TASKS]
            raise UserError(
                "TASK_UNKNOWN",
                f"expected config.tasks to name {', '.join(known)}, or tasks of --register=FILE, got {name!r}",
            )
        if names.count(name) > 1:
            raise UserError("TASK_REPEATED", f"expected each task once in config.tasks, got {name!r} more than once")
    specs = tuple(_spec(name, config) for name in names)
    for name, spec in zip(names, specs, strict=True):
        if spec.name != name:
            raise UserError(
                "TASK_SPEC_INVALID",
                f"expected TASKS[{name!r}] to return a spec named {name!r}, got {spec.name!r}; rename one of them",
            )
        if spec.head not in multitask.HEADS:
            raise UserError(
                "TASK_SPEC_INVALID",
                f"expected the head of task {name!r} to be one of {', '.join(multitask.HEADS)}, got {spec.head!r}",
            )
    return specs


def _key(name: str) -> str:
    """Return the key in TASKS of a task's name: the name itself, or what is before its argument."""
    return name if name in TASKS else "".join(name.partition(":")[:2])


def _spec(name: str, config: ConfigDict) -> Task:
    spec = TASKS[_key(name)](config)
    return dataclasses.replace(spec, name=name, label=name) if _key(name) != name else spec
