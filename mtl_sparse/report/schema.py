"""Typed schemas of the JSON files in the folders of runs and sweeps.

A class for each kind of file: `Results` (results.json), `Timing` (benchmark.json), `Latency` (latency.json), `Sweep`
(sweep.json), `Choices` (lomt.json), and `CompactLayer`, of which compact.json is a list. Each file has the integer key
"version". Files without it are of version 0, and `migrate` brings them to the newest version. Names of fields are those
of the keys, without a trailing underscore.
"""

import dataclasses
import functools
import itertools
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from mtl_sparse.runtime import files
from mtl_sparse.runtime.errors import UserError

VERSION = 1  # of every kind of file; when a key changes, raise it and extend `migrate`
# Targets of what compaction leaves: option of config.sparsity, name in `ModelSize`, name in texts.
SIZE_TARGETS = (("target_macs", "macs", "MACs"), ("target_params", "parameters", "parameters"))
IMPORTANCES = ("norm", "taylor")  # of groups, for config.sparsity.prune; its other values are folders of runs
DENSE, EVEN, UNEVEN = "dense", "even", "uneven"  # patterns of zero groups, see `PatternTiming`
# Options that are on by default, and what runs did that were made before these options existed.
_EARLIER_OPTIONS: dict[str, dict[str, Any]] = {
    "sparsity": {
        "keep_connected": False,
        "groups": "input",
        "macs_exponent": 0.5,
        "at_least": 1,
        "max_removed": 1.0,
        "prune_at": 0.5,
        "norm": "initial",
    },
    "model": {"backbone": "resnet"},
    "train": {"early_stop": "run"},
    "optimizer": {"step_epochs": 100, "step_factor": 0.5},
    "loss": {
        "gradients_of": "params",
        "options": {
            "uw_so_temperature": 1.0,
            "dwa_temperature": 2.0,
            "stch_mu": 1.0,
            "stch_warmup_epochs": 4,
            "famo_learning_rate": 0.025,
            "famo_weight_decay": 1e-3,
            "gradnorm_alpha": 1.5,
            "gradnorm_learning_rate": 0.025,
            "cagrad_c": 0.4,
            "fairgrad_alpha": 2.0,
        },
    },
}


class Schema:
    """Base of the dataclasses below: conversion from and to JSON values.

    Attributes:
      kind: stem of the file's name; "" for objects inside a file, which have no version.
    """

    kind: ClassVar[str] = ""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object of the newest version, without the fields that are None."""
        fields = dataclasses.fields(typing.cast(Any, self))
        values = {_key(field): _encode(getattr(self, field.name)) for field in fields}
        version = {"version": VERSION} if self.kind else {}
        return version | {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the dataclass of a JSON object of this or an earlier version; ignore keys that it does not know.

        Raises:
          UserError: SCHEMA_TOO_NEW for a later version, FILE_DAMAGED for a missing key or a value of another type.
        """
        return _decode(cls, migrate(cls.kind, value) if cls.kind else value, cls.kind)

    @classmethod
    def read(cls, path: pathlib.Path) -> Self:
        """Return the dataclass of a JSON file.

        Raises:
          UserError: FILE_MISSING, or as `from_json`.
        """
        value = files.read_json(path)
        try:
            return cls.from_json(value)
        except UserError as error:
            raise UserError(error.code, f"{path}: {error}") from error

    def write(self, path: pathlib.Path) -> None:
        """Write a JSON file atomically."""
        files.write_json(path, self.to_json())


@dataclasses.dataclass(frozen=True)
class Headline(Schema):
    """The main metric of a task.

    Attributes:
      metric: its name in `Results.test`, such as "depth/mae_normalized".
      higher_is_better: whether a larger value is better.
    """

    metric: str
    higher_is_better: bool


@dataclasses.dataclass(frozen=True)
class LayerSparsity(Schema):
    """Sparsity of one conv kernel.

    Attributes:
      path: "/"-joined path in the parameter tree.
      groups: number of groups (input channels).
      zero_groups: number of groups that are exactly zero.
      group_size: number of weights in one group.
      zero_weights: number of weights that are exactly zero; None in files of the first runs.
    """

    path: str
    groups: int
    zero_groups: int
    group_size: int
    zero_weights: int | None = None


@dataclasses.dataclass(frozen=True)
class CoupledSparsity(Schema):
    """Sparsity of a set of groups that span kernels.

    Attributes:
      name: the first kernel that reads these channels.
      groups: number of groups (channels).
      zero_groups: number of groups that are exactly zero.
    """

    name: str
    groups: int
    zero_groups: int


@dataclasses.dataclass(frozen=True)
class RunSparsity(Schema):
    """Sparsity of a run's penalized conv kernels.

    Attributes:
      group: fraction of groups that are exactly zero.
      parameter: fraction of weights in zero groups.
      weight: fraction of weights that are exactly zero; None in files of the first runs.
      lambda_: strength of the penalty at the end of training.
      target: target fraction of zero groups (l1: weights), 0 for a fixed lambda and for targets of MACs or parameters.
      penalty: name of the penalty; "l1" acts on single weights.
      dead_layers: paths of the kernels without a non-zero group.
      dead_blocks: paths of the residual blocks with a dead layer on their branch.
      layers: an entry for each kernel.
      coupled: an entry for each set of groups that span kernels; None where each kernel has its own groups.
    """

    group: float
    parameter: float
    weight: float | None
    lambda_: float
    target: float
    penalty: str
    dead_layers: tuple[str, ...]
    dead_blocks: tuple[str, ...]
    layers: tuple[LayerSparsity, ...]
    coupled: tuple[CoupledSparsity, ...] | None = None


@dataclasses.dataclass(frozen=True)
class PartSize(Schema):
    """Parameters of the backbone or of a head, and its multiply-accumulate operations per image."""

    parameters: int
    macs: int


@dataclasses.dataclass(frozen=True)
class ModelSize(Schema):
    """Parameters of a model, and its multiply-accumulate operations per image.

    Attributes:
      parameters: number of trainable parameters.
      macs: multiply-accumulate operations per image.
      parts: size of each part, "backbone" or "head_depth"; None in files of earlier versions.
    """

    parameters: int
    macs: int
    parts: dict[str, PartSize] | None = None


@dataclasses.dataclass(frozen=True)
class Size(Schema):
    """Sizes of a run's model: as trained, and after exact compaction."""

    trained: ModelSize
    compact: ModelSize


@dataclasses.dataclass(frozen=True)
class Results(Schema):
    """results.json: the best checkpoint of a finished run.

    Attributes:
      test: test metrics by name, "<task>/<metric>".
      constant: the same metrics of the constant baseline.
      headlines: task -> its main metric.
      sparsity: sparsity of the best checkpoint.
      size: size of the model; None in files of early runs, and where the zeros make every output
        constant (not of a ResNet).
      step: step of the best checkpoint.
      stopped: task -> step after which it was no longer trained, of the tasks that had stopped by then; None if none.
      seed: seed of the run.
      frames: split -> number of images.
      config: the run's config.json.
      versions: package -> version.
      device: number and kind of the devices.
    """

    kind: ClassVar[str] = "results"

    test: dict[str, float]
    constant: dict[str, float]
    headlines: dict[str, Headline]
    sparsity: RunSparsity
    size: Size | None
    step: int
    seed: int
    frames: dict[str, int]
    config: dict[str, Any]
    versions: dict[str, str]
    device: str
    stopped: dict[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class TimingRow(Schema):
    """Latency, throughput and memory of one model at one batch size, see `compaction.speed.compare`.

    Attributes:
      part: "backbone" or "model".
      model: "dense", "sparse" or "compact".
      batch: images per call.
      parameters: number of trainable parameters.
      macs: multiply-accumulate operations per image.
      median_ms: median latency of a call, in milliseconds.
      p90_ms: 90th percentile of the latency, in milliseconds.
      speedup: median over the rounds of the first model's latency over this one's.
      images_per_second: throughput.
      gmacs_per_second: throughput in 10^9 multiply-accumulate operations.
      memory_mib: memory of the compiled program, in MiB.
    """

    part: str
    model: str
    batch: int
    parameters: int
    macs: int
    median_ms: float
    p90_ms: float
    speedup: float
    images_per_second: float
    gmacs_per_second: float
    memory_mib: float


@dataclasses.dataclass(frozen=True)
class Timing(Schema):
    """benchmark.json: a run's model timed dense, with its zeros, and compact.

    Attributes:
      device: what the model was timed on.
      size: (height, width) of the images; () if unknown.
      rounds: calls of each model; 0 if unknown.
      compact: options of the compaction; {} if unknown.
      group_sparsity: fraction of groups that are exactly zero.
      rows: an entry for each batch size, part and model.
    """

    kind: ClassVar[str] = "benchmark"

    device: str
    size: tuple[int, ...] = ()
    rounds: int = 0
    compact: dict[str, Any] = dataclasses.field(default_factory=dict)
    group_sparsity: float = dataclasses.field(kw_only=True)
    rows: tuple[TimingRow, ...] = dataclasses.field(kw_only=True)


@dataclasses.dataclass(frozen=True)
class PatternTiming(Schema):
    """Time of one compact model with random zero groups.

    Attributes:
      pattern: "dense", "even" for the same fraction of zero groups in all layers, "uneven" for a random one in each.
      batch: images per call.
      macs_left: multiply-accumulates left after compaction, as a fraction.
      median_ms: median latency of a call, in milliseconds.
      time_left: median over the rounds of the latency as a fraction of the dense model's.
    """

    pattern: str
    batch: int
    macs_left: float
    median_ms: float
    time_left: float


@dataclasses.dataclass(frozen=True)
class Latency(Schema):
    """latency.json: how the time of compact models depends on the multiply-accumulates that they have left.

    Attributes:
      device: what the models were timed on.
      size: (height, width) of the images.
      rounds: calls of each model.
      groups: which groups are zero, "input" or "coupled".
      rows: an entry for each batch size and model.
    """

    kind: ClassVar[str] = "latency"

    device: str
    size: tuple[int, ...]
    rounds: int
    groups: str
    rows: tuple[PatternTiming, ...]

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes."""
        return tuple(dict.fromkeys(row.batch for row in self.rows))

    def curve(self, batch: int) -> tuple[list[float], list[float]]:
        """Return (MACs left, time left) of the dense and the even models, both ascending.

        Where noise makes a smaller model slower than a larger one, it gets the larger one's time.
        """
        rows = sorted(
            (row for row in self.rows if row.batch == batch and row.pattern != UNEVEN), key=lambda row: -row.macs_left
        )
        times = itertools.accumulate((row.time_left for row in rows), min)
        return [row.macs_left for row in rows][::-1], list(times)[::-1]

    def time_left(self, batch: int, macs_left: float) -> float:
        """Return the predicted part of the dense model's time, by interpolation between the models that were timed."""
        return float(np.interp(macs_left, *self.curve(batch)))

    def macs_left(self, batch: int, time_left: float) -> float:
        """Return the MACs that may be left for a part of the dense model's time; NaN where no model was so fast."""
        macs, times = self.curve(batch)
        return float(np.interp(time_left, times, macs, left=np.nan))

    def errors(self, batch: int) -> list[float]:
        """Return (predicted - measured) / measured of each uneven model, which the prediction does not use."""
        rows = [row for row in self.rows if row.batch == batch and row.pattern == UNEVEN]
        return [self.time_left(batch, row.macs_left) / row.time_left - 1 for row in rows]


@dataclasses.dataclass(frozen=True)
class Sweep(Schema):
    """sweep.json: name of each trial's folder -> options of the trial, by dotted path."""

    kind: ClassVar[str] = "sweep"

    trials: dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Choice(Schema):
    """Where LOMT attaches a task's head.

    Attributes:
      layer: deepest conv layer that the task keeps, such as "layer3_3/conv1".
      point: attachment point of the head, one of `resnet.points`: for the last layer of a block and for its shortcut,
        the output of the block.
      kept: the conv layers that the task keeps, in the order of the network.
      active: conv layer -> fraction of its groups that are non-zero, for each run.
      folders: the runs' folders.
    """

    layer: str
    point: str
    kept: tuple[str, ...]
    active: dict[str, tuple[float, ...]]
    folders: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Choices(Schema):
    """lomt.json: where LOMT attaches the heads.

    Attributes:
      depth: depth of the ResNet; without meaning for another backbone.
      active: a layer is active in a run if more than this fraction of its groups is non-zero.
      vote: a layer is kept if it is active in at least this fraction of the runs.
      tasks: task -> choice.
    """

    kind: ClassVar[str] = "lomt"

    depth: int
    active: float
    vote: float
    tasks: dict[str, Choice]


@dataclasses.dataclass(frozen=True)
class CompactLayer(Schema):
    """An entry of compact.json: one conv layer before and after compaction, see `compaction.explain.explain`.

    Attributes:
      layer: path of the layer.
      groups: number of groups (input channels).
      zero: number of groups that are exactly zero.
      groups_after: groups of the compact layer, 0 if it was removed.
      zero_after: zero groups of the compact layer.
      parameters: number of weights of the kernel.
      parameters_after: weights of the compact kernel.
      macs: multiply-accumulate operations per image.
      macs_after: operations of the compact layer.
      why: what was removed, or why zero groups stay.
    """

    kind: ClassVar[str] = "compact"

    layer: str
    groups: int
    zero: int
    groups_after: int
    zero_after: int
    parameters: int
    parameters_after: int
    macs: int
    macs_after: int
    why: str


def migrate(kind: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object in the newest version; the one given stays as it is.

    Args:
      kind: stem of the file's name: "results", "benchmark", "latency", "sweep", "lomt", "compact", or "config", whose
        version is in the options that it has.
      value: the object, of any version up to the newest.

    Raises:
      UserError: SCHEMA_TOO_NEW for a later version, FILE_DAMAGED for a value that is no JSON object.
    """
    if not isinstance(value, Mapping):
        raise UserError("FILE_DAMAGED", f"expected {kind}.json to hold an object, got {value!r:.60}")
    if kind == "config":
        return _with_earlier_options(value)
    version = value.get("version", 0)
    if not isinstance(version, int):
        raise UserError("FILE_DAMAGED", f"expected an integer version in {kind}.json, got version={version!r:.60}")
    if version > VERSION:
        raise UserError(
            "SCHEMA_TOO_NEW",
            f"expected {kind}.json of version {VERSION} or earlier, got version={version}; "
            "use the release of mtl-sparse that wrote it, or a later one",
        )
    if version == 0 and kind == "results":
        value = _results_of_version_0(value)
    return {**value, "version": VERSION}


def _with_earlier_options(config):
    """Return a config with the options that it was made before."""
    earlier = {name: options for name, options in _EARLIER_OPTIONS.items() if name in config}
    found = {**config, **{name: options | dict(_object(config, name)) for name, options in earlier.items()}}
    if "norm_decays" in _object(found, "sparsity"):
        decays = found["sparsity"].pop("norm_decays") and found["sparsity"].get("fixed_norm", True)
        found["sparsity"]["norm"] = "unpenalized" if decays else "initial"
    return found


def _results_of_version_0(value):
    """Return results with what the first runs did not write, as their config has it."""
    found = dict(value)
    if isinstance(value.get("config"), Mapping):
        found["config"] = _with_earlier_options(value["config"])
    if isinstance(value.get("sparsity"), Mapping):
        options = _object(_object(found, "config"), "sparsity")
        layers = [layer for layer in value["sparsity"].get("layers") or () if isinstance(layer, Mapping)]
        found["sparsity"] = {
            "lambda": options.get("lambda_", 0.0),
            "target": options.get("target", 0.0),
            "penalty": options.get("penalty", "group_lasso"),
            "dead_layers": [layer.get("path") for layer in layers if layer.get("zero_groups") == layer.get("groups")],
            "dead_blocks": [],
            **value["sparsity"],
        }
    return found


def _object(value, name):
    """Return the JSON object of a name, {} if there is none."""
    found = value.get(name)
    return found if isinstance(found, Mapping) else {}


def _key(field: dataclasses.Field) -> str:
    return field.name.rstrip("_")


def _encode(value):
    """Return a field's value as a JSON value."""
    if isinstance(value, Schema):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _encode(part) for key, part in value.items()}
    return [_encode(part) for part in value] if isinstance(value, tuple | list) else value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode(expected: Any, value: Any, where: str) -> Any:
    """Return a JSON value as one of the expected type: a schema, X | None, tuple[X, ...], dict[str, X] or a scalar."""
    if expected is Any:
        return value
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is types.UnionType:
        return None if value is None else _decode(arguments[0], value, where)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_decode(arguments[0], part, f"{where}[{i}]") for i, part in enumerate(value))
    if isinstance(value, Mapping):
        if origin is dict:
            return {key: _decode(arguments[1], part, f"{where}/{key}") for key, part in value.items()}
        if isinstance(expected, type) and issubclass(expected, Schema):
            return _decode_object(expected, value, where)
    elif origin is None and isinstance(value, (int, float) if expected is float else expected):
        return value
    name = expected.__name__ if isinstance(expected, type) and origin is None else str(expected)
    raise UserError("FILE_DAMAGED", f"expected {where} to be {name}, got {value!r:.60}")


def _decode_object(cls, value, where):
    given = {}
    for field in dataclasses.fields(cls):
        key, expected = _key(field), _hints(cls)[field.name]
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if key in value:
            given[field.name] = _decode(expected, value[key], f"{where}/{key}")
        elif typing.get_origin(expected) is types.UnionType:
            given[field.name] = None
        elif not has_default:
            keys = ", ".join(value) or "no key"
            raise UserError("FILE_DAMAGED", f"expected {where} to have the key {key!r}, got {keys}")
    return cls(**given)
