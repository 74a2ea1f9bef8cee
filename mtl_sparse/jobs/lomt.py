"""LOMT: each task's head where that task's own sparsity pattern ends ("Giving each task what it needs").

Single-task sparse models say how deep a task needs the backbone: a layer is kept if more than a small fraction of its
groups is non-zero in every run. The multi-task model then has each task's head at the deepest layer that the task
keeps, and nothing behind the last of them.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from mtl_sparse.jobs import sweep
from mtl_sparse.models import layers as layer_names
from mtl_sparse.models import resnet
from mtl_sparse.report import page, plots, records, study, tables
from mtl_sparse.runtime import files
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.training import config as config_lib


@dataclasses.dataclass(frozen=True)
class Choice:
    """Where a task's head goes.

    Attributes:
      layer: deepest conv layer that the task keeps, such as "layer3_3/conv1".
      point: where its output is read, of `resnet.points`: a block's last layer and its shortcut are read behind it.
      kept: the conv layers that the task keeps, in the order of the network.
      active: conv layer -> fraction of its groups that is non-zero, for each run.
      folders: of the runs.
    """

    layer: str
    point: str
    kept: tuple[str, ...]
    active: dict[str, tuple[float, ...]]
    folders: tuple[str, ...]


def choose(runs: Sequence[Mapping[str, float]], depth: int, active: float, vote: float) -> tuple[str, str, tuple]:
    """(layer, point, layers that are kept) of a task.

    Args:
      runs: for each single-task run, conv layer -> fraction of its groups that is non-zero.
      depth: of the ResNet.
      active: a layer is active in a run if more than this fraction of its groups is non-zero (the paper's: 0.01).
      vote: a layer is kept if it is active in at least this fraction of the runs (the paper's: 1, all).

    Raises:
      UserError: no layer is kept.
    """
    layers = sorted(runs[0], key=layer_names.network_order)
    votes = {layer: np.mean([run[layer] > active for run in runs]) for layer in layers}
    kept = tuple(layer for layer in layers if votes[layer] >= vote - 1e-9)
    if not kept:
        raise UserError(
            f"no layer has more than {active:g} of its groups left in {vote:.0%} of {len(runs)} runs: train with a "
            "smaller sparsity.lambda_, or lower lomt.vote"
        )
    return kept[-1], point_of(kept[-1], depth), kept


def point_of(layer: str, depth: int) -> str:
    """Where the output of a conv layer is read: inside its block, or behind it for the last one and the shortcut."""
    if layer in resnet.points(depth):
        return layer
    block, inner, _ = layer.partition("/")
    return block if inner else "stem"


def read_choices(config, folders: Sequence[str | pathlib.Path]) -> dict[str, Choice]:
    """The choice for each of config.tasks, by their single-task sparse runs in some runs' and sweeps' folders.

    Other runs, dense ones and those of several tasks, are left out; of several settings, those with config.sparsity are
    taken.

    Raises:
      UserError: a task without such runs, with several rows of them, or of another depth; unfinished runs.
    """
    found = study.read(folders)
    where = ", ".join(map(str, folders))
    name = found.rows[0].config["data"]["name"]
    if name != config.data.name:
        raise UserError(f"the runs in {where} are of {name}, and data.name is {config.data.name}")
    unfinished = _unfinished(config, folders)
    if unfinished:
        names = ", ".join(unfinished[:3])
        raise UserError(f"{len(unfinished)} single-task runs have not finished ({names}): give the command again then")
    choices = {}
    for task in config.tasks:
        rows = [row for row in found.rows if row.tasks == (task,) and not row.is_dense]
        same = [row for row in rows if row.config["sparsity"] == json.loads(config.sparsity.to_json())]
        rows = same if len(rows) > 1 and same else rows
        if not rows:
            raise UserError(f"there is no single-task sparse run of {task} in {where}")
        if len(rows) > 1:
            kinds = "; ".join(", ".join(f"{key}={row.settings[key]}" for key in row.settings) for row in rows[:3])
            raise UserError(f"{task} has single-task runs of several settings ({kinds}): give the folders of one")
        (row,) = rows
        theirs = row.config["model"]
        if theirs["depth"] != config.model.depth or row.attach or theirs["widths"]:
            kind = " cut short" if row.attach else ", compact" if theirs["widths"] else ""
            raise UserError(
                f"the runs of {task} are of a ResNet-{theirs['depth']}{kind}, and model.depth is {config.model.depth}: "
                "the layers must be the same"
            )
        runs = [_active(run) for run in row.runs.values()]
        layer, point, kept = choose(runs, config.model.depth, config.lomt.active, config.lomt.vote)
        active = {name: tuple(run[name] for run in runs) for name in sorted(runs[0], key=layer_names.network_order)}
        choices[task] = Choice(layer, point, kept, active, tuple(map(str, row.folders.values())))
    return choices


def _unfinished(config, folders) -> list[str]:
    """The sweeps' trials that have not finished and may be of one of the tasks alone."""
    names, singles = [], [[task] for task in config.tasks]
    for folder in (pathlib.Path(folder).expanduser() for folder in folders):
        if (folder / "sweep.json").exists():
            trials = files.read_json(folder / "sweep.json")["trials"]
            wanted = [name for name, settings in trials.items() if settings.get("tasks", singles[0]) in singles]
            names += [name for name in wanted if not records.is_finished(folder / name)]
    return names


def _check(config, settings, options):
    """What can be told before anything is trained."""
    if config.model.attach or config.model.widths:
        raise UserError("--job=lomt chooses model.attach: leave it and model.widths empty, or train with --job=train")
    if len(config.tasks) < 2:
        raise UserError(f"--job=lomt needs several tasks, not {', '.join(config.tasks) or 'none'}")
    if config.sparsity.lambda_ == 0 and config.sparsity.target == 0:
        raise UserError("--job=lomt needs sparse runs: set sparsity.lambda_ or sparsity.target")
    if not (0 <= config.lomt.active < 1 and 0 < config.lomt.vote <= 1):
        raise UserError(
            f"lomt.active={config.lomt.active}, lomt.vote={config.lomt.vote}: from 0 to below 1, and from above 0 to 1"
        )
    if any(set(one) != {"seed"} for one in settings):
        raise UserError(f"the trials of --job=lomt differ in their seed alone, not in {', '.join(settings[0])}")
    if options.shard != (0, 1):
        raise UserError("--job=lomt has no --shard: its second part needs all of the first; it has --max_parallel")
    config_lib.check(config)


def _active(results) -> dict[str, float]:
    """Fraction of non-zero groups of each of the backbone's conv layers, from a run's results.json."""
    return {
        layer_names.short(entry["path"]): (entry["groups"] - entry["zero_groups"]) / entry["groups"]
        for entry in results["sparsity"]["layers"]
        if entry["path"].startswith("backbone/")
    }


def run_job(
    config,
    workdir: str | pathlib.Path,
    settings: Sequence[Mapping[str, Any]],
    options: sweep.Options,
    folders: Sequence[str | pathlib.Path] = (),
) -> pathlib.Path:
    """`--job=lomt`: choose, train with the heads there and, to compare, with all at the end, and report.

    Args:
      config: of the multi-task model.
      workdir: gets lomt.json, plots/attachments.png, multi_task/ (a sweep), report/ and, unless `folders` are given,
        single_task/ (the sweep to choose by).
      settings: of each trial, such as its seed.
      options: how the sweeps go.
      folders: of single-task sparse runs, or of sweeps with such.

    Returns:
      The path of the report.

    Raises:
      UserError: as `sweep.run_job` and `read_choices`; settings that cannot be; a folder of another choice.
    """
    _check(config, settings, options)
    workdir = pathlib.Path(workdir).expanduser()
    if not folders:
        folders = [workdir / "single_task"]
        logging.info("Single-task runs first: %d tasks, %d runs each", len(config.tasks), len(settings))
        alone = {task: {"tasks": (task,)} for task in config.tasks}
        if config.loss.weighting == "fixed":
            for task, weight in zip(config.tasks, config.loss.weights, strict=True):
                alone[task]["loss.weights"] = (weight,)
        singles = [{**alone[task], **values} for task in config.tasks for values in settings]
        sweep.run_job(config, folders[0], singles, options)
    choices = read_choices(config, folders)
    found = {"depth": config.model.depth, "active": config.lomt.active, "vote": config.lomt.vote}
    found["tasks"] = {task: dataclasses.asdict(choice) for task, choice in choices.items()}
    (workdir / "plots").mkdir(parents=True, exist_ok=True)
    if (workdir / "lomt.json").exists():
        before = {task: one["point"] for task, one in files.read_json(workdir / "lomt.json")["tasks"].items()}
        if before != {task: choice.point for task, choice in choices.items()}:
            raise UserError(f"{workdir}/lomt.json has another choice, by other runs or lomt.*: give another --workdir")
    files.write_json(workdir / "lomt.json", found)
    plots.save(plots.attachments(found), workdir / "plots" / "attachments.png")
    attach = tuple(choices[task].point for task in config.tasks)
    print(table(choices, config.model.depth))
    print(f"\n--config.model.attach={','.join(attach)}\n{workdir / 'plots' / 'attachments.png'}\n")
    end = (resnet.points(config.model.depth)[-1],) * len(attach)
    if attach == end:
        logging.warning("Every task keeps the backbone to its end: the multi-task model is the plain one")
    both = [{"model.attach": points, **values} for points in ((), attach) if points != end for values in settings]
    sweep.run_job(config, workdir / "multi_task", both, options)
    singles = [folder for choice in choices.values() for folder in choice.folders]
    return page.write([*singles, workdir / "multi_task"], workdir / "report")


def table(choices: Mapping[str, Choice], depth: int) -> str:
    """The choices as a Markdown table."""
    lines = [("task", "deepest layer kept", "head reads", "layers kept", "runs")]
    for task, choice in choices.items():
        kept = f"{len(choice.kept)} of {len(choice.active)}"
        lines.append((task, choice.layer, choice.point, kept, str(len(choice.folders))))
    last = max((choice.point for choice in choices.values()), key=resnet.points(depth).index)
    return tables.markdown(lines) + f"\n\nnothing behind {last} is built"
