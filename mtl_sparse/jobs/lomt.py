"""`--job=lomt`: attach each task's head where that task's own sparsity pattern ends.

"Giving each task what it needs": single-task sparse models show how deep a backbone a task needs. A layer is kept if
more than a small fraction of its groups is non-zero in every run. In the multi-task model, each task's head is attached
to the deepest layer that the task keeps, and the backbone ends at the deepest of them.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from mtl_sparse.jobs import sweep
from mtl_sparse.models import backbones
from mtl_sparse.models import layers as layer_names
from mtl_sparse.report import page, plots, records, study, tables
from mtl_sparse.report.schema import Choice, Choices, Results, Sweep
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.training import config as config_lib


def choose(
    runs: Sequence[Mapping[str, float]], points: Sequence[str], active: float, vote: float, raw: bool = False
) -> tuple[str, str, tuple[str, ...]]:
    """Return (layer, attachment point, layers that are kept) of a task.

    Args:
      runs: for each single-task run, conv layer -> fraction of its groups that is non-zero.
      points: attachment points of the backbone, in order.
      active: a layer is active in a run if more than this fraction of its groups is non-zero (0.01 in the paper).
      vote: a layer is kept if it is active in at least this fraction of the runs (1 in the paper: all).
      raw: see `point_of`.

    Raises:
      UserError: LOMT_NO_LAYER if no layer is kept.
    """
    layers = sorted(runs[0], key=layer_names.network_order)
    votes = {layer: np.mean([run[layer] > active for run in runs]) for layer in layers}
    kept = tuple(layer for layer in layers if votes[layer] >= vote - 1e-9)
    if not kept:
        raise UserError(
            "LOMT_NO_LAYER",
            f"expected a layer with more than {active:g} of its groups left in {vote:.0%} of {len(runs)} runs, got "
            "none; train with a smaller sparsity.lambda_, or lower lomt.vote",
        )
    return kept[-1], point_of(kept[-1], points, raw), kept


def point_of(layer: str, points: Sequence[str], raw: bool = False) -> str:
    """Return the attachment point of a conv layer: for a block's last layer and shortcut, the output of the block.

    With `raw`, it is the layer's own output, before BatchNorm and ReLU, as in the reference implementation. Shortcuts
    and the stem have no such point.

    Args:
      layer: its name.
      points: attachment points of the backbone, in order.
      raw: whether to prefer raw points.

    Returns:
      The point of the layer, or else of the innermost module around it; the first point for a stem, which ends before
      all others, and the last for a layer that no point is named after.
    """
    names = ([f"{layer}:raw"] if raw else []) + [layer]
    while "/" in names[-1]:
        names.append(names[-1].rpartition("/")[0])
    found = next((name for name in names if name in points), None)
    return found or (points[0] if layer.startswith("stem") else points[-1])


def read_choices(config, folders: Sequence[str | pathlib.Path]) -> dict[str, Choice]:
    """Return the choice for each of config.tasks, from their single-task sparse runs.

    Dense runs and those of several tasks are left out. If a task has runs with several options, those with the options
    of config.sparsity are used.

    Args:
      config: the multi-task model's config.
      folders: folders of runs and sweeps.

    Raises:
      UserError: RUN_NOT_FINISHED; LOMT_RUNS for a task without such runs, with several rows of them, or with runs of
        another model or data set.
    """
    found = study.read(folders)
    where = ", ".join(map(str, folders))
    name = found.rows[0].config["data"]["name"]
    if name != config.data.name:
        raise UserError("LOMT_RUNS", f"expected runs on data.name={config.data.name}, got {name} in {where}")
    unfinished = _unfinished(config, folders)
    if unfinished:
        names = ", ".join(unfinished[:3])
        raise UserError(
            "RUN_NOT_FINISHED",
            f"{len(unfinished)} single-task runs have not finished, such as {names}; run the command again when they "
            "have",
        )
    return {task: _choice(config, task, found, where) for task in config.tasks}


def _choice(config, task: str, found: study.Study, where: str) -> Choice:
    """Return the choice for a task."""
    row = _row(config, task, found, where)
    theirs, ours = (
        {name: model[name] for name in ("backbone", "depth")} for model in (row.config["model"], config.model)
    )
    compact = row.config["model"]["widths"]
    if theirs != ours or row.attach or compact:
        kind = " with model.attach" if row.attach else ", compact" if compact else ""
        is_resnet = [one["backbone"] == backbones.RESNET for one in (ours, theirs)]
        wanted = f"model.depth={ours['depth']}" if is_resnet[0] else f"model.backbone={ours['backbone']}"
        got = f"a ResNet-{theirs['depth']}" if is_resnet[1] else theirs["backbone"]
        raise UserError("LOMT_RUNS", f"expected runs of {task} with the layers of {wanted}, got {got}{kind}")
    runs = [_active(run) for run in row.runs.values()]
    layer, point, kept = choose(runs, _points(config), config.lomt.active, config.lomt.vote, config.lomt.raw)
    active = {name: tuple(run[name] for run in runs) for name in sorted(runs[0], key=layer_names.network_order)}
    return Choice(layer, point, kept, active, tuple(map(str, row.folders.values())))


def _points(config) -> tuple[str, ...]:
    """Return the attachment points of a config's backbone."""
    return backbones.find(config.model.backbone, config.model.depth).points


def _row(config, task: str, found: study.Study, where: str) -> study.Row:
    """Return the one row of a task's single-task sparse runs."""
    rows = [row for row in found.rows if row.tasks == (task,) and not row.is_dense]
    same = [row for row in rows if row.config["sparsity"] == json.loads(config.sparsity.to_json())]
    rows = same if len(rows) > 1 and same else rows
    if not rows:
        raise UserError("LOMT_RUNS", f"expected single-task sparse runs of {task}, got none in {where}")
    if len(rows) > 1:
        kinds = "; ".join(", ".join(f"{key}={row.settings[key]}" for key in row.settings) for row in rows[:3])
        raise UserError(
            "LOMT_RUNS",
            f"expected single-task runs of {task} that differ in their seed only, got {kinds}; give the folders of one "
            "of them",
        )
    return rows[0]


def _unfinished(config, folders: Sequence[str | pathlib.Path]) -> list[str]:
    """Return the trials of sweeps that have not finished and may be of one of the tasks alone."""
    names, singles = [], [[task] for task in config.tasks]
    for folder in (pathlib.Path(folder).expanduser() for folder in folders):
        if (folder / "sweep.json").exists():
            trials = Sweep.read(folder / "sweep.json").trials
            wanted = [name for name, settings in trials.items() if settings.get("tasks", singles[0]) in singles]
            names += [name for name in wanted if not records.is_finished(folder / name)]
    return names


def _check(config, settings: Sequence[Mapping[str, Any]], options: sweep.Options) -> None:
    """Raise UserError for options that cannot work, before anything is trained."""
    if config.model.attach or config.model.widths:
        raise UserError(
            "OPTION_CONFLICT",
            "--job=lomt chooses model.attach itself; leave model.attach and model.widths empty, or use --job=train",
        )
    if len(config.tasks) < 2:
        raise UserError("TASK_MISSING", f"--job=lomt expects several tasks, got {', '.join(config.tasks) or 'none'}")
    if config.sparsity.lambda_ == 0 and config.sparsity.target == 0:
        raise UserError("OPTION_MISSING", "--job=lomt needs sparse runs; set sparsity.lambda_ or sparsity.target")
    if not (0 <= config.lomt.active < 1 and 0 < config.lomt.vote <= 1):
        raise UserError(
            "OPTION_OUT_OF_RANGE",
            "expected lomt.active of at least 0 and below 1, and lomt.vote above 0 and at most 1, got "
            f"lomt.active={config.lomt.active}, lomt.vote={config.lomt.vote}",
        )
    if any(set(one) != {"seed"} for one in settings):
        raise UserError(
            "OPTION_CONFLICT", f"--job=lomt expects trials that differ in seed only, got {', '.join(settings[0])}"
        )
    if options.shard != (0, 1):
        raise UserError(
            "OPTION_CONFLICT",
            "--job=lomt has no --shard, because its second part needs all of the first; use --max_parallel",
        )
    config_lib.check(config)


def _active(results: Results) -> dict[str, float]:
    """Return the fraction of non-zero groups of each of the backbone's conv layers.

    With coupled groups, a kernel that reads a residual stream has weights for each channel that another kernel needs.
    So a layer on a residual branch is only as active as the least active layer of the branch: if one of them is zero,
    the branch adds a constant.
    """
    found = {
        layer_names.short(layer.path): (layer.groups - layer.zero_groups) / layer.groups
        for layer in results.sparsity.layers
        if layer.path.startswith("backbone/")
    }
    if not results.sparsity.coupled:
        return found
    least: dict[str, float] = {}
    for name, part in found.items():
        block = layer_names.branch(name)
        least[block] = min(part, least.get(block, 1.0))
    return {name: least[block] if (block := layer_names.branch(name)) else part for name, part in found.items()}


def run_job(
    config,
    workdir: str | pathlib.Path,
    settings: Sequence[Mapping[str, Any]],
    options: sweep.Options,
    folders: Sequence[str | pathlib.Path] = (),
) -> pathlib.Path:
    """Choose attachment points, train with the heads there and, for comparison, with all heads at the end, and report.

    Args:
      config: config of the multi-task model.
      workdir: receives lomt.json, plots/attachments.png, multi_task/ (a sweep), report/ and, unless `folders` are
        given, single_task/ (the sweep to choose from).
      settings: options of each trial: its seed.
      options: how the sweeps run.
      folders: folders of single-task sparse runs, or of sweeps with such runs.

    Returns:
      The path of the report.

    Raises:
      UserError: options that cannot work; RUN_DIFFERS if the folder holds another choice; any error of
        `sweep.run_job` and `read_choices`.
    """
    _check(config, settings, options)
    workdir = pathlib.Path(workdir).expanduser()
    if not folders:
        folders = [workdir / "single_task"]
        logging.info("Single-task runs first: %d tasks, %d runs each", len(config.tasks), len(settings))
        sweep.run_job(config, folders[0], _single_tasks(config, settings), options)
    choices = read_choices(config, folders)
    _write(config, workdir, choices)
    attach = tuple(choices[task].point for task in config.tasks)
    points = _points(config)
    print(table(choices, points))
    print(f"\n--config.model.attach={','.join(attach)}\n{workdir / 'plots' / 'attachments.png'}\n")
    end = (points[-1],) * len(attach)
    if attach == end:
        logging.warning("Every task keeps the backbone to its end: the multi-task model is the plain one")
    both = [{"model.attach": read, **values} for read in ((), attach) if read != end for values in settings]
    sweep.run_job(config, workdir / "multi_task", both, options)
    runs: list[str | pathlib.Path] = [folder for choice in choices.values() for folder in choice.folders]
    return page.write([*runs, workdir / "multi_task"], workdir / "report")


def _single_tasks(config, settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the options of the single-task runs."""
    alone: dict[str, dict[str, Any]] = {task: {"tasks": (task,)} for task in config.tasks}
    if config.loss.weighting == "fixed":
        for task, weight in zip(config.tasks, config.loss.weights, strict=True):
            alone[task]["loss.weights"] = (weight,)
    return [{**alone[task], **values} for task in config.tasks for values in settings]


def _write(config, workdir: pathlib.Path, tasks: Mapping[str, Choice]) -> None:
    """Write lomt.json and its plot; raise UserError if the folder holds another choice."""
    path = workdir / "lomt.json"
    (workdir / "plots").mkdir(parents=True, exist_ok=True)
    if path.exists():
        before = {task: choice.point for task, choice in Choices.read(path).tasks.items()}
        if before != {task: choice.point for task, choice in tasks.items()}:
            raise UserError(
                "RUN_DIFFERS", f"{path} has another choice, from other runs or lomt.*; give another --workdir"
            )
    choices = Choices(config.model.depth, config.lomt.active, config.lomt.vote, dict(tasks))
    choices.write(path)
    plots.save(plots.attachments(choices), workdir / "plots" / "attachments.png")


def table(choices: Mapping[str, Choice], points: Sequence[str]) -> str:
    """Return the choices as a Markdown table, and the end of the backbone."""
    lines = [("task", "deepest layer kept", "head reads", "layers kept", "runs")]
    for task, choice in choices.items():
        kept = f"{len(choice.kept)} of {len(choice.active)}"
        lines.append((task, choice.layer, choice.point, kept, str(len(choice.folders))))
    last = max((choice.point for choice in choices.values()), key=points.index)
    return f"{tables.markdown(lines)}\n\nthe backbone ends at {last}"
