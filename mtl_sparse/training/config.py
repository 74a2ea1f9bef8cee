"""Checks of a config's options, before anything slow starts."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from mtl_sparse.compaction import multitask
from mtl_sparse.models.resnet import OUTPUT_STRIDE
from mtl_sparse.runtime import text
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.runtime.labels import VOID
from mtl_sparse.tasks import registry, weighting
from mtl_sparse.training import optimizer

_LARGEST_ZOOM = 10  # of a random crop, which would have no pixels left at larger ones


class Range(NamedTuple):
    """Values that an option may have: `least` <= value, value > `above`, and value < `below` or value <= `most`."""

    least: float
    below: float = math.inf
    most: float = math.inf
    above: float = -math.inf

    def __contains__(self, value: Any) -> bool:
        return self.least <= value < self.below and self.above < value <= self.most

    def __str__(self) -> str:
        if self.above > -math.inf:
            return f"above {self.above}"
        if self.below < math.inf:
            return f"at least {self.least} and below {self.below}"
        return f"from {self.least} to {self.most}" if self.most < math.inf else f"at least {self.least}"


RANGES = {
    "seed": Range(0),
    "data.num_classes": Range(1, most=VOID),  # VOID is the label of pixels without a class
    "data.max_scale": Range(1, most=_LARGEST_ZOOM),
    "data.embedded.frames": Range(0),
    "data.embedded.seed": Range(0),
    "loss.label_smoothing": Range(0, below=1),
    "loss.pos_weight": Range(0),
    "loss.threshold": Range(0, below=1),
    "loss.options.uw_so_temperature": Range(0, above=0),
    "loss.options.dwa_temperature": Range(0, above=0),
    "loss.options.stch_mu": Range(0, above=0),
    "loss.options.stch_warmup_epochs": Range(0),
    "loss.options.famo_learning_rate": Range(0),
    "loss.options.famo_weight_decay": Range(0),
    "loss.options.gradnorm_alpha": Range(0),
    "loss.options.gradnorm_learning_rate": Range(0),
    "loss.options.cagrad_c": Range(0, below=1),
    "loss.options.fairgrad_alpha": Range(0, above=0),
    "model.bn_momentum": Range(0, below=1),
    "model.dropout": Range(0, below=1),
    "model.head_features": Range(1),
    "model.width": Range(1),
    "optimizer.b1": Range(0, below=1),
    "optimizer.b2": Range(0, below=1),
    "optimizer.eps": Range(0),
    "optimizer.l2": Range(0),
    "optimizer.min_learning_rate": Range(0),
    "optimizer.plateau_epochs": Range(1),
    "optimizer.plateau_factor": Range(0, most=1),
    "optimizer.step_epochs": Range(1),
    "optimizer.step_factor": Range(0, most=1),
    "optimizer.weight_decay": Range(0),
    "sparsity.target": Range(0, below=1),
    "sparsity.target_macs": Range(0, below=1),
    "sparsity.target_params": Range(0, below=1),
    "sparsity.head_target": Range(0, below=1),
    "sparsity.macs_exponent": Range(0),
    "sparsity.at_least": Range(1),
    "sparsity.max_removed": Range(0, most=1),
    "sparsity.target_freeze": Range(0, below=1),
    "sparsity.target_ramp": Range(0, most=1),
    "sparsity.start_at": Range(0, below=1),
    "sparsity.warmup": Range(0, below=1),
    "sparsity.debias_at": Range(0, below=1),
    "sparsity.prune_at": Range(0, below=1),
    "train.batch_size": Range(2),  # BatchNorm of pooled features has no variance over one image
    "train.bn_frames": Range(0),
    "train.early_stop_epochs": Range(0),
    "train.epochs": Range(1),
    "train.eval_batch_size": Range(1),
    "compact.multiple": Range(1),
    "lomt.active": Range(0, most=1),
    "lomt.vote": Range(0, most=1),
    "benchmark.rounds": Range(1),
    "run.checkpoint_every_steps": Range(1),
    "run.log_every_steps": Range(1),
    "run.num_workers": Range(0),
    "run.progress_every_secs": Range(0),
    "run.sample_frames": Range(1),
    "run.skip_not_finite": Range(0),
    "run.summary_rounds": Range(0),
}
_EMBEDDED = {"data.embedded.frames": Range(12), "data.embedded.height": Range(8), "data.embedded.width": Range(8)}
# types in tuples
_ITEMS = {
    "tasks": str,
    "data.size": int,
    "model.attach": str,
    "sparsity.exclude": str,
    "benchmark.batch_sizes": int,
}
_LARGEST = 2**31 - 1  # of integers


def check(config) -> None:
    """Check every option that can be checked without the data.

    Raises:
      UserError: an option that cannot work.
    """
    values = dict(leaves(config))
    _check_types(values)
    _check_ranges(values, RANGES)
    if config.data.embedded.frames > 0:
        _check_ranges(values, _EMBEDDED)
    _check_data(config.data)
    _check_classifier(config.model)
    _check_train(config)
    optimizer.check(config)
    weighting.check(config.loss, config.tasks, config.model.attach)
    compact_tasks(config)


def compact_tasks(config) -> tuple[str, ...]:
    """Return the tasks of compact.tasks, in the order of config.tasks: all if the option is "".

    Raises:
      UserError: a name is not in config.tasks or is repeated, or there are only commas.
    """
    given = config.compact.tasks
    if not given:
        return tuple(config.tasks)
    names = [name.strip() for name in given.split(",") if name.strip()]
    return multitask.choose_tasks(names, tuple(config.tasks))


def _check_types(values):
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError("OPTION_NOT_FINITE", f"{name}={value}: expected a finite number")
        if isinstance(value, int) and value > _LARGEST:
            raise UserError("OPTION_OUT_OF_RANGE", f"{name}={value}: expected at most {_LARGEST}")
    for name, kind in _ITEMS.items():
        if not all(isinstance(item, kind) for item in values[name]):
            what = "integers" if kind is int else "names"
            raise UserError("OPTION_TYPE", f"{name}={tuple(values[name])}: expected a tuple of {what}")


def _check_ranges(values, ranges):
    for name, allowed in ranges.items():
        if values[name] not in allowed:
            raise UserError("OPTION_OUT_OF_RANGE", f"{name}={values[name]}: expected {allowed}")


def _check_data(data):
    size = tuple(data.size)
    if len(size) != 2 or any(side < OUTPUT_STRIDE or side % OUTPUT_STRIDE for side in size):
        raise UserError(
            "OPTION_OUT_OF_RANGE",
            f"data.size={size}: expected (height, width), both multiples of the output stride {OUTPUT_STRIDE}",
        )
    if data.depth_target not in registry.DEPTH_TARGETS:
        known = ", ".join(map(repr, registry.DEPTH_TARGETS))
        raise UserError("OPTION_UNKNOWN_VALUE", f"data.depth_target={data.depth_target!r}: expected one of {known}")
    scales = tuple(data.scales)
    if not all(isinstance(scale, int | float) and 1 <= scale <= _LARGEST_ZOOM for scale in scales):
        raise UserError("OPTION_OUT_OF_RANGE", f"data.scales={scales}: expected zoom factors from 1 to {_LARGEST_ZOOM}")
    if scales and data.max_scale > 1:
        raise UserError(
            "OPTION_CONFLICT", f"data.scales={scales} and data.max_scale={data.max_scale} both zoom: set one of them"
        )


def _check_classifier(model):
    features, dropout = tuple(model.classifier_features), tuple(model.classifier_dropout)
    widths = len(features) == 2 and all(isinstance(x, int) and x >= 1 for x in features)
    rates = len(dropout) == 2 and all(isinstance(x, int | float) and 0 <= x < 1 for x in dropout)
    if not (widths and rates):
        raise UserError(
            "OPTION_OUT_OF_RANGE",
            f"model.classifier_features={features}, model.classifier_dropout={dropout}: expected two widths of at "
            "least 1 and two rates from 0 to below 1",
        )


def _check_train(config):
    sizes = tuple(config.benchmark.batch_sizes)
    if min(sizes, default=0) < 1:
        raise UserError("OPTION_OUT_OF_RANGE", f"benchmark.batch_sizes={sizes}: expected integers of at least 1")
    if config.train.early_stop not in ("run", "tasks"):
        raise UserError(
            "OPTION_UNKNOWN_VALUE", f"train.early_stop={config.train.early_stop!r}: expected 'run' or 'tasks'"
        )
    devices = jax.device_count()
    if config.train.batch_size % devices:
        raise UserError(
            "BATCH_NOT_DIVISIBLE",
            f"train.batch_size={config.train.batch_size}: expected a multiple of the number of devices, {devices}",
        )


def check_steps(config, images: int) -> tuple[int, int]:
    """Return (steps of an epoch, steps of the run) for that many training images.

    Raises:
      UserError: DATA_TOO_FEW_IMAGES, if there are fewer images than a batch has; RUN_TOO_SHORT or OPTION_CONFLICT, if
        the phases of the penalty do not fit into the run.
    """
    steps_per_epoch = images // config.train.batch_size
    if not steps_per_epoch:
        raise UserError(
            "DATA_TOO_FEW_IMAGES",
            f"train.batch_size={config.train.batch_size}: expected at least that many training images, got {images}; "
            "use a smaller batch",
        )
    optimizer.check_steps(config, config.train.epochs * steps_per_epoch)
    return steps_per_epoch, config.train.epochs * steps_per_epoch


def unknown_option(config, name: str) -> str:
    """Return a sentence that config.<name> does not exist, with the nearest names; "" if it exists."""
    known = dict(leaves(config))
    if name in known or any(other.startswith(f"{name}.") for other in known):
        return ""
    last = name.rpartition(".")[2]
    near = [other for other in known if other.rpartition(".")[2] == last]
    near += [other for other in text.nearest(name, known) if other not in near]
    nearest = f"; nearest: {', '.join(f'config.{other}' for other in near)}" if near else ""
    return f"there is no option config.{name}{nearest}"


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every option."""
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
