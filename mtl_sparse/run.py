"""What a config stands for: checked settings, opened data, tasks, model, optimizer, first state."""

import dataclasses
import difflib
import functools
import math
import pathlib
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline import datasets, loader
from input_pipeline.transforms import VOID, Transform
from mtl_sparse import checkpoints, evaluate, imagenet, optim, processes, weighting
from mtl_sparse import tasks as tasks_lib
from mtl_sparse.errors import UserError
from mtl_sparse.models import multitask
from mtl_sparse.models.resnet import OUTPUT_STRIDE
from mtl_sparse.sparsity import compact as compact_lib

AXIS = "devices"  # the pmap axis of a training step


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes.

    Attributes:
      step: int32 [], steps taken.
      params: {"model": the model's parameters, "weighting": learned loss weights}.
      batch_stats: BatchNorm's running statistics.
      opt_state: of `optim.build`.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self):
        """What `model.apply` takes."""
        return {"params": self.params["model"], "batch_stats": self.batch_stats}


@dataclasses.dataclass(frozen=True)
class Run:
    """A config made real.

    Attributes:
      config: as from configs/nyu.py.
      tasks: its rows of the task table.
      data: sources of stored frames.
      model: with BatchNorm and dropout of the training step's axis, where there are several devices.
      tx: the optimizer.
      steps_per_epoch, total_steps: of the whole run.
      settled_step: from this step on a checkpoint may be the best one, see `optim.settled_step`.
    """

    config: Any
    tasks: tuple[tasks_lib.Task, ...]
    data: datasets.Data
    model: multitask.MultiTaskModel
    tx: Any
    steps_per_epoch: int
    total_steps: int
    settled_step: int

    @functools.cached_property
    def evaluator(self):
        """Of `evaluate.make_evaluator`, compiled once for the whole run."""
        return evaluate.make_evaluator(self.model, self.tasks)

    def evaluated(self, state: TrainState) -> TrainState:
        """The state as a validation and the best checkpoint have it: with the statistics of train.bn_frames, if any.

        Running statistics average those of small batches, whose own normalisation narrows what later layers see; the
        model that is evaluated sees it wider. Those of one large batch fit it (Wu & Johnson 2021, arXiv 2105.07576).
        """
        if not self.config.train.bn_frames:
            return state
        measure, images = self._statistics
        return state.replace(batch_stats=measure(state.variables, images))

    @functools.cached_property
    def _statistics(self):
        """(compiled (variables, images) -> BatchNorm's statistics over the images, without dropout; the images)."""
        model = self.model.clone(bn_momentum=0.0, dropout=0.0, classifier_dropout=(0.0, 0.0))

        def measure(variables, images):
            return model.apply(variables, images, train=True, mutable=["batch_stats"])[1].get("batch_stats", {})

        devices, source = jax.device_count(), self.data.train
        count = max(1, min(self.config.train.bn_frames, len(source)) // devices) * devices
        chosen = [source[int(index)] for index in np.linspace(0, len(source) - 1, count).round()]
        batch = next(
            loader.eval_batches(
                chosen,
                dataclasses.replace(self.eval_transform(), labels=()),
                batch_size=count,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
        )
        images = next(loader.prefetch_to_device(iter([{"image": batch["image"]}])))["image"]
        return jax.pmap(measure, axis_name=AXIS, in_axes=(None, 0), out_axes=None), images

    def train_transform(self) -> Transform:
        return dataclasses.replace(
            self.eval_transform(), flip=self.config.data.flip, max_scale=self.config.data.max_scale
        )

    def eval_transform(self) -> Transform:
        labels = tuple(dict.fromkeys(task.label for task in self.tasks))
        data = self.config.data
        return Transform(
            tuple(data.size), labels, data.depth_target, unit_range=data.unit_range, num_classes=data.num_classes
        )

    def train_batches(self, start_step: int):
        """Host batches from the one of step `start_step` on, without end."""
        return loader.train_batches(
            self.data.train,
            self.train_transform(),
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
            start_step=start_step,
            num_workers=self.config.run.num_workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def eval_batches(self, split: str):
        """Host batches of this process's share of a split, once, padded to what the devices share equally."""
        devices = jax.device_count()
        most = max(len(self.data.train), len(self.data.validation), len(self.data.test))  # one shape for all splits
        size = min(self.config.train.eval_batch_size, most)
        return loader.eval_batches(
            getattr(self.data, split),
            self.eval_transform(),
            batch_size=-(-size // devices) * devices,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def init_state(self) -> TrainState:
        """The state before the first step: a function of the seed, and of the weights that model.init_from names."""
        # Without optimisation: a hundred small random draws run once, but take XLA long to optimise.
        init = jax.jit(self._init, compiler_options={"xla_backend_optimization_level": 0})
        state = init(jax.random.key(self.config.seed))
        source = self.config.model.init_from
        if not source:
            return state
        path = pathlib.Path(source).expanduser()
        if not path.exists():
            raise UserError(f"model.init_from={source!r} does not exist: name a run's folder or a file of weights")
        if path.is_file():
            given = imagenet.start(source, self.model, state.variables)
        else:
            given = checkpoints.read_variables(source, multitask.shapes(self.model))
        params = {**state.params, "model": given["params"]}
        return state.replace(params=params, batch_stats=given["batch_stats"], opt_state=self.tx.init(params))

    @functools.cached_property
    def state_shapes(self) -> TrainState:
        """`init_state` as jax.ShapeDtypeStruct, without computing it."""
        return jax.eval_shape(self._init, jax.random.key(self.config.seed))

    def _init(self, key):
        height, width = self.config.data.size
        variables = self.model.init(key, jnp.zeros((1, height, width, 3)))
        params = {
            "model": variables["params"],
            "weighting": weighting.init(self.config.loss.weighting, [task.name for task in self.tasks]),
        }
        return TrainState(jnp.zeros([], jnp.int32), params, variables.get("batch_stats", {}), self.tx.init(params))


def setup(config) -> Run:
    """Checks a config and opens all that it names.

    Raises:
      UserError: a setting or data that cannot work, named.
    """
    check_config(config)
    tasks = tasks_lib.resolve(config)
    # BatchNorm of a single device has nothing to synchronise, and XLA fuses it better.
    model = multitask.build(config.model, tasks, axis_name=AXIS if jax.device_count() > 1 else None)
    check_length = functools.partial(check_steps, config)
    data = processes.in_turn(lambda: datasets.load(config.data, [task.label for task in tasks], check_length))
    steps_per_epoch, total_steps = check_steps(config, len(data.train))
    tx = optim.build(config, total_steps)
    settled_step = optim.settled_step(config, total_steps)
    return Run(config, tasks, data, model, tx, steps_per_epoch, total_steps, settled_step)


def check_steps(config, images: int) -> tuple[int, int]:
    """Return the steps of an epoch and of the run, for that many training images.

    Raises:
      UserError: fewer images than a batch has, or a run too short for the phases of its penalty.
    """
    steps_per_epoch = images // config.train.batch_size
    if not steps_per_epoch:
        raise UserError(f"train.batch_size={config.train.batch_size}: there are only {images} training images")
    optim.check_steps(config, config.train.epochs * steps_per_epoch)
    return steps_per_epoch, config.train.epochs * steps_per_epoch


def load_model(workdir, config):
    """The model of a run with its best checkpoint's variables, without its data.

    Args:
      workdir: the run's folder.
      config: the run's own, see configs/run.py; settings that do not change the model may differ.

    Returns:
      (model, {"params", "batch_stats"}): the variables as NumPy arrays.

    Raises:
      UserError: no such run, or a model that does not fit its checkpoint.
    """
    model = multitask.build(config.model, tasks_lib.resolve(config))
    return model, checkpoints.read_variables(workdir, multitask.shapes(model))


def compact(config, model, variables):
    """The model without its dead channels, by config.compact and for images of config.data.size: (model, variables)."""
    size = tuple(config.data.size) if config.compact.drop_taps else None
    return compact_lib.compact(model, variables, size=size, multiple=config.compact.multiple)


# Least value of settings by dotted path, and those that are below 1, or at most 1.
_AT_LEAST = {
    "seed": 0,
    "data.num_classes": 1,
    "data.max_scale": 1,
    "data.embedded.frames": 0,
    "data.embedded.seed": 0,
    "loss.label_smoothing": 0,
    "loss.pos_weight": 0,
    "loss.threshold": 0,
    "model.bn_momentum": 0,
    "model.dropout": 0,
    "model.head_features": 1,
    "model.width": 1,
    "optimizer.b1": 0,
    "optimizer.b2": 0,
    "optimizer.eps": 0,
    "optimizer.l2": 0,
    "optimizer.min_learning_rate": 0,
    "optimizer.plateau_epochs": 1,
    "optimizer.plateau_factor": 0,
    "optimizer.weight_decay": 0,
    "sparsity.target_ramp": 0,
    "train.batch_size": 2,  # BatchNorm of pooled features has no spread of one
    "train.bn_frames": 0,
    "train.early_stop_epochs": 0,
    "train.epochs": 1,
    "train.eval_batch_size": 1,
    "compact.multiple": 1,
    "lomt.active": 0,
    "lomt.vote": 0,
    "benchmark.rounds": 1,
    "run.checkpoint_every_steps": 1,
    "run.log_every_steps": 1,
    "run.num_workers": 0,
    "run.progress_every_secs": 0,
    "run.sample_frames": 1,
    "run.skip_not_finite": 0,
    "run.summary_rounds": 0,
}
_BELOW_ONE = (
    "loss.label_smoothing",
    "loss.threshold",
    "model.bn_momentum",
    "model.dropout",
    "optimizer.b1",
    "optimizer.b2",
)
_AT_MOST_ONE = ("optimizer.plateau_factor", "sparsity.target_ramp", "lomt.active", "lomt.vote")
# Tuples by dotted path, and what they hold.
_HOLD = {"tasks": str, "data.size": int, "model.attach": str, "benchmark.batch_sizes": int}
_MOST = 2**31 - 1  # of whole numbers


def check_config(config) -> None:
    """Raises UserError for settings that cannot work; what only the data can tell is checked with the data."""
    values = dict(_leaves(config))
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}={value}: it must be a finite number")
        if isinstance(value, int) and value > _MOST:
            raise UserError(f"{name}={value}: it must be at most {_MOST}")
    for name, kind in _HOLD.items():
        if not all(isinstance(item, kind) for item in values[name]):
            what = "whole numbers" if kind is int else "names"
            raise UserError(f"{name}={tuple(values[name])}: it holds {what}")
    at_least = dict(_AT_LEAST)
    if config.data.embedded.frames > 0:
        at_least |= {"data.embedded.height": 8, "data.embedded.width": 8}
        if config.data.embedded.frames < 12:
            raise UserError(f"data.embedded.frames={config.data.embedded.frames}: it must be 0, or at least 12")
    for name, least in at_least.items():
        if not values[name] >= least:
            raise UserError(f"{name}={values[name]}: it must be at least {least}")
    for name in _BELOW_ONE:
        if not values[name] < 1:
            raise UserError(f"{name}={values[name]}: it must be below 1")
    for name in _AT_MOST_ONE:
        if not values[name] <= 1:
            raise UserError(f"{name}={values[name]}: it must be at most 1")
    if min(config.benchmark.batch_sizes, default=0) < 1:
        raise UserError(f"benchmark.batch_sizes={tuple(config.benchmark.batch_sizes)}: at least one, each at least 1")
    features, dropout = tuple(config.model.classifier_features), tuple(config.model.classifier_dropout)
    numbers = all(isinstance(x, int) for x in features) and all(isinstance(x, int | float) for x in dropout)
    if not (
        numbers and len(features) == len(dropout) == 2 and min(features) >= 1 and all(0 <= rate < 1 for rate in dropout)
    ):
        raise UserError(
            f"model.classifier_features={features}, model.classifier_dropout={dropout}: of its two layers, at least 1 "
            "channel each, and rates from 0 to below 1"
        )
    size = tuple(config.data.size)
    if len(size) != 2 or any(side < OUTPUT_STRIDE or side % OUTPUT_STRIDE for side in size):
        raise UserError(f"data.size={size}: (height, width), both multiples of the output stride {OUTPUT_STRIDE}")
    if config.data.num_classes > VOID:
        raise UserError(
            f"data.num_classes={config.data.num_classes}: expected at most {VOID}, the label of pixels without a class"
        )
    if config.data.depth_target not in ("normalized", "metres"):
        raise UserError(f"unknown data.depth_target={config.data.depth_target!r}; it is 'normalized' or 'metres'")
    devices = jax.device_count()
    if config.train.batch_size % devices:
        raise UserError(f"train.batch_size={config.train.batch_size} does not divide by {devices} devices")
    optim.check(config)
    weighting.check(config.loss.weighting, config.loss.weights, config.tasks)


def unknown_setting(config, name: str) -> str:
    """What to say of config.<name> where there is no such setting: those that come near; "" where there is one."""
    known = dict(_leaves(config))
    if name in known or any(other.startswith(f"{name}.") for other in known):
        return ""
    last = name.rpartition(".")[2]
    near = [other for other in known if other.rpartition(".")[2] == last]
    near += [other for other in difflib.get_close_matches(name, known, n=3) if other not in near]
    nearest = f"; nearest: {', '.join(f'config.{other}' for other in near)}" if near else ""
    return f"there is no setting config.{name}{nearest}"


def _leaves(config, prefix=""):
    """(dotted path, value) of every setting."""
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
