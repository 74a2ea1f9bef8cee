"""The tasks, one row each: head, outputs, label, loss, activation, metrics.

A task of your own is one more row: `TASKS["mine"] = lambda config: Task(...)`, and its name in config.tasks. A name
with an argument, `attribute:Smiling`, takes the row `attribute:`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mtl_sparse.models import multitask
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.tasks import activations, labels, losses, metrics


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      name: as in config.tasks and in the model's output dictionary.
      label: key of its label in a frame and a batch.
      outputs: channels of the raw prediction.
      loss: (raw, label) -> (loss, valid), both of the label's places, see `losses`; `elementwise` calls and checks it.
      activation: raw -> prediction in the label's unit.
      sums: (prediction, label) of one image -> dict of sums, see `metrics`.
      values: sums over a split -> dict of floats.
      target: (label) -> (the label in the prediction's form, valid); its mean is the constant guess that every trained
        model must beat.
      headline: the one metric of short tables.
      higher_is_better: whether more of the headline is better.
      head: a key of `models.multitask.HEADS`.
      sums_take_raw: whether `sums` also takes the raw prediction of the image, as the keyword argument `raw`.
      whole: label of one image at its full resolution -> a third argument of `sums`, which may get fewer of its places.
    """

    name: str
    label: str
    outputs: int
    loss: Callable
    activation: Callable
    sums: Callable
    values: Callable
    target: Callable
    headline: str
    higher_is_better: bool
    head: str = "deeplab"
    sums_take_raw: bool = False
    whole: Callable | None = None

    def elementwise(self, raw, label):
        """`loss` of raw predictions [B, ...] and labels [B, ...].

        Raises:
          UserError: (loss, valid) of other shapes: a prediction and a label that were broadcast against each other.
        """
        loss, valid = self.loss(raw, label)
        shape, given = jnp.shape(loss), jnp.shape(raw)
        if shape != jnp.shape(valid) or shape not in (given, given[:-1]):
            raise UserError(
                f"the loss of task {self.name!r} has the shape {shape} and its mask {jnp.shape(valid)}, of "
                f"raw predictions {given} and labels {jnp.shape(label)}: it must be one number a label"
            )
        return loss, valid


def _segmentation(config):
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


def _depth(config):
    common = {
        "name": "depth",
        "label": "depth",
        "outputs": 1,
        "target": lambda label: (label[..., None], labels.has_depth(label)),
        "headline": "mae_normalized",
        "higher_is_better": False,
    }
    if config.data.depth_target == "metres":
        return Task(
            loss=losses.depth_l1,
            activation=activations.metric_depth,
            sums=metrics.metric_depth_sums,
            values=metrics.metric_depth_values,
            whole=metrics.depth_scale,
            **common,
        )
    return Task(
        loss=losses.depth_mse,
        activation=activations.unit_depth,
        sums=metrics.depth_sums,
        values=metrics.normalized_depth_values,
        **common,
    )


def _normals(config):
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


def _edge(config):
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


def _attribute(config):
    """Whether an image has the attribute of the task's name."""
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


TASKS = {
    "segmentation": _segmentation,
    "depth": _depth,
    "normals": _normals,
    "edge": _edge,
    "attribute:": _attribute,
}


def resolve(config) -> tuple[Task, ...]:
    """The rows of config.tasks, in its order.

    Raises:
      UserError: no task, an unknown one, or one twice.
    """
    names = tuple(config.tasks)
    if not names:
        raise UserError(f"config.tasks is empty; choose from {', '.join(TASKS)}")
    for name in names:
        if _key(name) not in TASKS or name.endswith(":"):
            known = [f"{key}NAME" if key.endswith(":") else key for key in TASKS]
            raise UserError(
                f"unknown task {name!r} in config.tasks; the tasks are {', '.join(known)}, and those of --register=FILE"
            )
        if names.count(name) > 1:
            raise UserError(f"task {name!r} stands twice in config.tasks")
    rows = tuple(_row(name, config) for name in names)
    for name, row in zip(names, rows, strict=True):
        if row.name != name:
            raise UserError(f"TASKS[{name!r}] makes a task of the name {row.name!r}; give it its own")
        if row.head not in multitask.HEADS:
            raise UserError(f"task {name!r} has the unknown head {row.head!r}; one of {', '.join(multitask.HEADS)}")
    return rows


def _key(name):
    return name if name in TASKS else "".join(name.partition(":")[:2])


def _row(name, config):
    row = TASKS[_key(name)](config)
    return dataclasses.replace(row, name=name, label=name) if _key(name) != name else row
