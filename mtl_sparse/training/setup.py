"""Build what a training run needs from its config: tasks, data, model, optimizer."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import optax

from input_pipeline import datasets, loader
from input_pipeline.transforms import Transform
from mtl_sparse.compaction import multitask as multitask_compaction
from mtl_sparse.compaction import rewritten
from mtl_sparse.compaction.rewritten import Model
from mtl_sparse.models import backbones, multitask
from mtl_sparse.runtime import processes
from mtl_sparse.tasks import Task, resolve
from mtl_sparse.training import checkpoints, optimizer
from mtl_sparse.training import config as config_lib

AXIS = "devices"  # the pmap axis of a training step


@dataclasses.dataclass(frozen=True)
class Batches:
    """A run's data as batches of host arrays, this process's part of each.

    Attributes:
      data: random-access sources of stored samples.
      tasks: whose labels a batch has.
      config: the run's config.
    """

    data: datasets.Data
    tasks: tuple[Task, ...]
    config: Any

    def transform(self, train: bool = False) -> Transform:
        """Return the transform of a sample to an example, with the augmentations if `train`."""
        data = self.config.data
        return Transform(
            tuple(data.size),
            tuple(dict.fromkeys(task.label for task in self.tasks)),
            data.depth_target,
            flip=train and data.flip,
            max_scale=data.max_scale if train else 1.0,
            unit_range=data.unit_range,
            num_classes=data.num_classes,
            scales=tuple(data.scales) if train else (),
        )

    def train(self, start_step: int) -> Iterator[loader.Batch]:
        """Return the endless training batches, beginning with the one of step `start_step`."""
        return loader.train_batches(
            self.data.train,
            self.transform(train=True),
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
            start_step=start_step,
            num_workers=self.config.run.num_workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def evaluation(self, split: str) -> Iterator[loader.Batch]:
        """Return the batches of a split, each image once, padded so that all devices get equally many."""
        devices = jax.device_count()
        longest = max(len(self.data.train), len(self.data.validation), len(self.data.test))  # one shape for all splits
        size = min(self.config.train.eval_batch_size, longest)
        return loader.eval_batches(
            getattr(self.data, split),
            self.transform(),
            batch_size=-(-size // devices) * devices,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a training run needs, built from its config.

    Attributes:
      config: a config with the options of configs/nyu.py.
      tasks: specs of config.tasks.
      data: sources of stored samples.
      batches: the same data in batches.
      model: the model; with several devices, BatchNorm and dropout act over the training step's axis.
      tx: the optimizer.
      steps_per_epoch: steps of an epoch.
      total_steps: steps of the run.
      prune_step: step after which the model is pruned at once, None for most runs, see `pruning`.
      settled_step: first step whose checkpoint may be the best one, see `optimizer.settled_step`.
    """

    config: Any
    tasks: tuple[Task, ...]
    data: datasets.Data
    batches: Batches
    model: Model
    tx: optax.GradientTransformation
    steps_per_epoch: int
    total_steps: int
    settled_step: int
    prune_step: int | None = None


def setup(config) -> Run:
    """Check a config and open everything it names.

    Raises:
      UserError: an option or data that cannot work.
    """
    config_lib.check(config)
    tasks = resolve(config)
    # One device's BatchNorm has nothing to synchronize, and XLA fuses it better.
    model = rewritten.build(config.model, tasks, axis_name=AXIS if jax.device_count() > 1 else None)
    check_length = functools.partial(config_lib.check_steps, config)
    data = processes.in_turn(lambda: datasets.load(config.data, [task.label for task in tasks], check_length))
    steps_per_epoch, total_steps = config_lib.check_steps(config, len(data.train))
    return Run(
        config,
        tasks,
        data,
        Batches(data, tasks, config),
        model,
        optimizer.build(config, total_steps),
        steps_per_epoch,
        total_steps,
        optimizer.settled_step(config, total_steps),
        optimizer.prune_step(config, total_steps),
    )


def load_model(workdir: str | pathlib.Path, config: Any) -> tuple[Model, dict[str, Any]]:
    """Load the model of a run with its best checkpoint's variables, without its data.

    Args:
      workdir: the run's folder.
      config: the run's own, see configs/run.py; options that do not change the model may differ.

    Returns:
      (model, {"params", "batch_stats"}): the variables as NumPy arrays.

    Raises:
      UserError: there is no such run, or the model does not fit its checkpoint.
    """
    model = rewritten.build(config.model, resolve(config))
    return model, checkpoints.read_variables(workdir, multitask.shapes(model))


def compact(
    config: Any, model: Model, variables: Any, *, tasks: Sequence[str] | None = None
) -> tuple[Model, dict[str, Any]]:
    """Return a model and its variables without the zero channels, for images of config.data.size and by config.compact.

    Args:
      config: the run's config.
      model: the run's model.
      variables: {"params", "batch_stats"} of the model.
      tasks: tasks whose heads remain; None is those of config.compact.tasks.

    Raises:
      UserError: as `config.compact_tasks`, `compaction.multitask.compact` or `compaction.rewritten.compact`.
    """
    if tasks is None:
        tasks = config_lib.compact_tasks(config)
    size, options = tuple(config.data.size), config.compact
    if config.model.backbone == backbones.RESNET:
        taps_at = size if options.drop_taps else None
        return multitask_compaction.compact(model, variables, tasks=tasks, size=taps_at, multiple=options.multiple)
    if tuple(tasks) != tuple(task for task, *_ in model.heads):
        model, variables = multitask_compaction.with_tasks(model, variables, tasks)
    return rewritten.compact(model, variables, size, drop_taps=options.drop_taps, multiple=options.multiple)
