"""Plots of a study: metrics and sparsity against lambda, sparsity over the run, layers, Pareto plot, latency."""

import pathlib
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps

from mtl_sparse.models import layers as layer_names
from mtl_sparse.report import plots, records
from mtl_sparse.report import study as study_lib
from mtl_sparse.report.schema import Results, Timing
from mtl_sparse.report.study_tables import setting, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Make = Callable[[study_lib.Study], "Figure | None"]
_Of = Callable[[study_lib.Row], study_lib.Figure | None]


def draw(study: study_lib.Study, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Draw the plots that the runs of a study allow into a folder; return their paths by title."""
    folder.mkdir(exist_ok=True)
    found = {}
    makers: dict[str, _Make] = {"Metrics against lambda": metrics_over_lambda}
    makers["Zero groups against lambda"] = sparsity_over_lambda
    if study.is_ablation:
        makers = {"Effect of each change": ablation}
    makers |= {
        "Metrics against sparsity": pareto,
        "Sparsity over the run": sparsity_over_steps,
        "Groups left by layer": groups_per_layer,
        "Latency against sparsity": latency,
        "Weightings of the tasks": weightings,
        "Predictions": predictions,
    }
    for title, make in makers.items():
        figure = make(study)
        if figure is not None:
            found[title] = plots.save(figure, folder / f"{make.__name__}.png")
    return found


def label(study: study_lib.Study, row: study_lib.Row, without: Collection[str] = ()) -> str:
    """Return the tasks of a row and its options; in an ablation, the options that differ from the first row.

    Args:
      study: has the row.
      row: to be named; options that have no effect in it are left out.
      without: options to leave out.
    """
    options = row.changes if study.is_ablation else row.settings
    names = sorted(name for name in options if name not in ("tasks", *without) and setting(row, name))
    return ", ".join([setting(row, "tasks"), *(f"{short(name)} {setting(row, name)}" for name in names)])


def ablation(study: study_lib.Study) -> "Figure":
    """Plot each row's metrics and % zero groups beside those of the first row: mean and standard deviation."""
    rows = study.rows
    labels = [setting(row, "changes") for row in rows]
    if len({row.tasks for row in rows}) > 1:
        labels = [f"{setting(row, 'tasks')}: {text}" for row, text in zip(rows, labels, strict=True)]
    labels = [textwrap.fill(text, 46) for text in labels]
    heights = [1 + text.count("\n") for text in labels]
    places = np.cumsum(heights) - np.array(heights) / 2
    panels: dict[str, _Of] = {_zero_label(rows): lambda row: _scaled(_zero(row))}
    panels |= {_metric_label(study, task, task.removeprefix("attribute:")): _figure_of(task) for task in study.tasks}
    figure = plots.new_figure(figsize=(3.5 + 2.3 * len(panels), 1 + 0.22 * sum(heights)))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, of) in zip(axes, panels.items(), strict=True):
        values = [of(row) for row in rows]
        if values[0]:
            axis.axvline(values[0].mean, color="0.8", linewidth=1, zorder=0)
        for place, row, value in zip(places, rows, values, strict=True):
            if value:
                color = "0.55" if row.is_dense else _color(0.3, 2)
                axis.errorbar(value.mean, place, xerr=np.nan_to_num(value.std), fmt="o", capsize=2, color=color)
        axis.set(xlabel=name)
    axes[0].set(ylim=(sum(heights), 0))
    axes[0].set_yticks(places, labels, fontsize=8)
    return plots.plain(figure)


def _metric_label(study, task, shown):
    """Return the axis label of a task's metric."""
    _, name, higher = study.metric(task)
    return f"{shown} {name} {'↑' if higher else '↓'}"


def _figure_of(task: str) -> _Of:
    """Return the function row -> figure of a task's metric, None for a row without the task."""
    return lambda row: row.figure(task) if task in row.tasks else None


def _scaled(figure, factor=100):
    return study_lib.Figure(factor * figure.mean, factor * figure.std, figure.n)


def _color(index, count):
    return colormaps["viridis"](0.9 * index / max(count - 1, 1))


def _lambda_lines(study):
    """Return label -> rows that differ in lambda only, by rising lambda; {} if lambda never varies."""
    lines: dict[str, list[study_lib.Row]] = {}
    for row in study.rows:
        lines.setdefault(label(study, row, ("sparsity.lambda_",)), []).append(row)
    lines = {name: sorted(rows, key=_lambda) for name, rows in lines.items()}
    return lines if any(len({_lambda(row) for row in rows}) > 1 for rows in lines.values()) else {}


def _lambda(row):
    return row.config["sparsity"]["lambda_"]


def _places(rows, smallest):
    """Return lambdas on a logarithmic axis, with 0 a decade below the smallest one."""
    return _places_of([_lambda(row) for row in rows], smallest)


def _places_of(lambdas, smallest):
    return np.array([value or smallest / 10 for value in lambdas])


def _over_lambda(study: study_lib.Study, panels: Mapping[str, _Of]) -> "Figure | None":
    """Plot figures against lambda, in a panel for each label and function; a line for each set of rows."""
    lines = _lambda_lines(study)
    if not lines:
        return None
    smallest = min(_lambda(row) for rows in lines.values() for row in rows if _lambda(row) > 0)
    figure = plots.new_figure(figsize=(4.2 * len(panels), 3.6 + 0.1 * len(lines)))
    for axis, (name, of) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, (line, rows) in enumerate(lines.items()):
            values = [(place, of(row)) for place, row in zip(_places(rows, smallest), rows, strict=True)]
            shown = [(place, value) for place, value in values if value]
            if shown:
                x, y = [place for place, _ in shown], [value.mean for _, value in shown]
                error = np.nan_to_num([value.std for _, value in shown])
                axis.errorbar(x, y, error, marker="o", capsize=2, color=_color(i, len(lines)), label=line)
        axis.set(xscale="log", xlabel="lambda", ylabel=name)
        lambdas = sorted({_lambda(row) for rows in lines.values() for row in rows})
        axis.set_xticks(_places_of(lambdas, smallest), [f"{value:g}" for value in lambdas], fontsize=8)
        axis.minorticks_off()
    _legend(figure)
    return plots.plain(figure)


def _legend(figure):
    """Add one legend below all panels, with as many entries side by side as their length allows."""
    entries: dict[str, Any] = {}
    for axis in figure.axes:
        entries |= {name: handle for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    columns = max(1, int(figure.get_figwidth() / (0.6 + 0.06 * max(map(len, entries), default=1))))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=7
    )


def metrics_over_lambda(study: study_lib.Study) -> "Figure | None":
    """Plot each task's metric against lambda (Fig. 3a of the paper); return None if lambda never varies."""
    return _over_lambda(study, {_metric_label(study, task, task): _figure_of(task) for task in study.tasks})


def sparsity_over_lambda(study: study_lib.Study) -> "Figure | None":
    """Plot % zero groups, and % of parameters in them, against lambda (Fig. 3b); return None if lambda never varies."""
    panels: dict[str, _Of] = {
        "% groups zero": lambda row: _scaled(row.sparsity("group")),
        "% parameters in them": lambda row: _scaled(row.sparsity("parameter")),
    }
    return _over_lambda(study, panels)


def _is_l1(row):
    return row.config["sparsity"]["penalty"] == "l1"


def _zero(row):
    """Return the fraction of groups, or under l1 of weights, that are zero."""
    return row.sparsity("parameter" if _is_l1(row) else "group")


def _zero_label(rows):
    kinds = {"weights" if _is_l1(row) else "groups" for row in rows}
    return f"% {kinds.pop()} zero" if len(kinds) == 1 else "% zero (groups; under l1 weights)"


def pareto(study: study_lib.Study) -> "Figure":
    """Plot each task's metric against % zero groups (l1: weights), a point per row, with standard deviations.

    A line joins the rows that differ in lambda or target only. Dense rows are hollow.
    """
    tasks = study.tasks
    lines: dict[str, list[study_lib.Row]] = {}
    for row in study.rows:
        lines.setdefault(label(study, row, ("sparsity.lambda_", "sparsity.target")), []).append(row)
    figure = plots.new_figure(figsize=(4.2 * len(tasks), 3.8 + 0.1 * len(lines)))
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for i, (name, rows) in enumerate(lines.items()):
            rows = sorted((row for row in rows if task in row.tasks), key=lambda row: _zero(row).mean)
            if rows:
                x, y = [_zero(row) for row in rows], [row.figure(task) for row in rows]
                errors = {f"{a}err": np.nan_to_num([f.std for f in fs]) for a, fs in (("x", x), ("y", y))}
                errors["xerr"] = 100 * errors["xerr"]
                places = [100 * figure.mean for figure in x], [figure.mean for figure in y]
                color = _color(i, len(lines))
                axis.errorbar(*places, **errors, fmt="o-", linewidth=1, color=color, label=name)
                dense = [place for place, row in zip(zip(*places, strict=True), rows, strict=True) if row.is_dense]
                axis.plot(*np.reshape(dense, (-1, 2)).T, "o", markerfacecolor="white", color=color, zorder=3)
        axis.set(xlim=(-3, 103), xlabel=_zero_label(study.rows), ylabel=_metric_label(study, task, task))
    _legend(figure)
    return plots.plain(figure)


def sparsity_over_steps(study: study_lib.Study) -> "Figure | None":
    """Plot % zero groups (l1: weights) at each validation, the mean over seeds (Fig. 3c of the paper).

    Returns:
      None if there is no sparse row with the metrics of its training.
    """
    figure = plots.new_figure(figsize=(7, 4))
    axis = figure.subplots()
    rows = [row for row in study.rows if not row.is_dense]
    rows = [row for row in rows if all((folder / "metrics.jsonl").exists() for folder in row.folders.values())]
    if not rows:
        return None
    for i, row in enumerate(rows):
        name = "sparsity/weight" if _is_l1(row) else "sparsity/group"
        series = [records.read_metrics(folder)["validation"][name] for folder in row.folders.values()]
        length = min(len(steps) for steps, _ in series)
        mean = 100 * np.mean([values[:length] for _, values in series], 0)
        axis.plot(series[0][0][:length], mean, color=_color(i, len(rows)), label=label(study, row))
    axis.set(xlabel="step", ylabel=_zero_label(rows), ylim=(-2, 102))
    _legend(figure)
    return plots.plain(figure)


def groups_per_layer(study: study_lib.Study) -> "Figure | None":
    """Plot % of each layer's groups that are left, a line per sparse row, the mean over seeds (Fig. 3 of the paper).

    Layers that a row's model lacks are blank.

    Returns:
      None if there is no sparse row.
    """
    rows = [row for row in study.rows if not row.is_dense]
    layers = sorted(set().union(*map(_paths, rows)), key=layer_names.network_order)
    if not layers:
        return None
    left = np.array([np.mean([_left(run, layers) for run in row.runs.values()], 0) for row in rows])
    labels = [label(study, row) for row in rows]
    width = 0.24 * len(layers) + 0.06 * max(map(len, labels)) + 1.5
    figure = plots.new_figure(figsize=(max(6, width), 0.28 * len(rows) + 2.2))
    axis = figure.subplots()
    image = axis.imshow(100 * left, aspect="auto", cmap="Blues", vmin=0, vmax=100)
    axis.set_xticks(range(len(layers)), [layer_names.short(path) for path in layers], rotation=90, fontsize=7)
    axis.set_yticks(range(len(rows)), labels, fontsize=7)
    figure.colorbar(image, label="% of groups left")
    return figure


def predictions(study: study_lib.Study, most: int = 2) -> "Figure | None":
    """Plot the predictions of each row's first run on the same test images.

    Images and labels are left out because their license may forbid to publish them; a run's sample grid has them.

    Args:
      study: of any tasks.
      most: largest number of images.

    Returns:
      None if no image is in the samples of all rows, or no task has pixels.
    """
    folders = {i: row.folders[min(row.folders)] for i, row in enumerate(study.rows)}
    found = {i: records.read_samples(of) for i, of in folders.items() if (of / "samples.npz").exists()}
    tasks = [task for task in study.tasks if not task.startswith("attribute:")]
    common = [set(samples["name"].tolist()) for samples in found.values()]
    names = sorted(set.intersection(*common))[:most] if common else []
    if not names or not tasks:
        return None
    columns = [(task, name) for task in tasks for name in names]
    height, width = next(iter(found.values()))["image"].shape[1:3]
    figure = plots.new_figure(figsize=(2.6 + 1.5 * len(columns), (0.1 + 1.5 * height / width) * len(found) + 0.4))
    axes = figure.subplots(len(found), len(columns), squeeze=False)
    for line, (i, samples) in zip(axes, found.items(), strict=True):
        place = samples["name"].tolist().index
        for axis, (task, name) in zip(line, columns, strict=True):
            axis.set(xticks=[], yticks=[])
            if f"prediction/{task}" in samples:
                pair = [samples[f"{kind}/{task}"][place(name)] for kind in ("label", "prediction")]
                axis.imshow(plots.pictures(*pair)[1])
            else:
                axis.axis("off")
        line[0].axis("on")
        name = textwrap.fill(label(study, study.rows[i]), 34)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
    for axis, (task, name) in zip(axes[0], columns, strict=True):
        axis.set_title(f"{task}, image {name}", fontsize=7)
    return figure


def _paths(row: study_lib.Row) -> set[str]:
    return {layer.path for layer in row.any_run.sparsity.layers}


def _left(run: Results, layers: Sequence[str]) -> list[float]:
    by_path = {layer.path: 1 - layer.zero_groups / layer.groups for layer in run.sparsity.layers}
    return [by_path.get(path, np.nan) for path in layers]


def weightings(study: study_lib.Study) -> "Figure | None":
    """Plot Delta_m of each weighting at each sparsity, mean and standard deviation; None without such runs."""
    forms = {
        name: {method: gain for method, row in rows.items() if (gain := study.gain(row))}
        for name, rows in study.weightings().items()
    }
    forms = {name: found for name, found in forms.items() if found}
    if not forms:
        return None
    first = next(iter(forms.values()))
    methods = sorted(first, key=lambda one: first[one].mean)
    figure = plots.new_figure(figsize=(7, 1.2 + 0.3 * len(methods)))
    axis = figure.subplots()
    for i, (name, found) in enumerate(forms.items()):
        shown = [method for method in methods if method in found]
        places = [methods.index(method) - 0.12 * (i - (len(forms) - 1) / 2) for method in shown]
        means, stds = ([getattr(found[method], part) for method in shown] for part in ("mean", "std"))
        axis.errorbar(means, places, xerr=np.nan_to_num(stds), fmt="o", ms=5, color=_color(i, len(forms)), label=name)
    axis.axvline(0, color="#9aa5b1", linewidth=0.8)
    axis.set_yticks(range(len(methods)), methods)
    axis.set_xlabel("Δm over dense single-task runs, % (higher is better)")
    axis.legend(frameon=False)
    return plots.plain(figure)


def latency(study: study_lib.Study) -> "Figure | None":
    """Plot the latency of the backbone against % zero groups, a point for each run that --job=benchmark has timed.

    There is a line for each batch size, device, image size and dense backbone. Left: median latency of the dense and
    the compact backbone. Right: speed-up, the median over rounds in which both were timed.

    Returns:
      None if no run was timed.
    """
    points = _latency_points(study)
    if not points:
        return None
    lines = sorted({(where, batch) for where, batch, _ in points})
    several = len({where for where, _ in lines}) > 1
    figure = plots.new_figure(figsize=(9, 4))
    left, right = figure.subplots(1, 2)
    for (where, batch, model), values in sorted(points.items()):
        zero, milliseconds, speedup = np.array(sorted(values)).T
        color = _color(lines.index((where, batch)), len(lines))
        name = f"batch {batch}, {where}" if several else f"batch {batch}"
        style = {"color": color, "label": f"{model}, {name}", "linestyle": "-" if model == "compact" else ":"}
        left.plot(zero, milliseconds, marker="o" if model == "compact" else ".", **style)
        if model == "compact":
            right.plot(zero, speedup, "o-", color=color, label=name)
    if not several:
        figure.suptitle(lines[0][0], fontsize=9)
    right.axhline(1, color="#9aa5b1", linestyle=":")
    left.set(xlabel="% groups zero", ylabel="ms per image, backbone (median)", ylim=(0, None))
    right.set(xlabel="% groups zero", ylabel="speed-up over dense, same rounds", ylim=(0, None))
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=6 if several else 8)
    return plots.plain(figure)


def _latency_points(study: study_lib.Study) -> dict[tuple[str, int, str], list[tuple[float, float, float]]]:
    """Return (setup, batch size, model) -> (% zero groups, ms per image, speed-up) of each run's backbone."""
    points: dict[tuple[str, int, str], list[tuple[float, float, float]]] = {}
    for row in study.rows:
        for timing in row.timings:
            where = _setup(row, timing)
            for entry in timing.rows:
                if entry.part == "backbone" and entry.model != "sparse":
                    value = (100 * timing.group_sparsity, entry.median_ms / entry.batch, entry.speedup)
                    points.setdefault((where, entry.batch, entry.model), []).append(value)
    return points


def _setup(row: study_lib.Row, timing: Timing) -> str:
    """Return the backbone, image size and device of a timing."""
    model, (height, width) = row.config["model"], timing.size
    is_resnet = model.get("backbone", "resnet") == "resnet"
    backbone = f"ResNet-{model['depth']}, {model['width']} wide" if is_resnet else model["backbone"]
    text = f"{backbone}, {height}x{width}, {timing.device}"
    return f"{text}, up to {', '.join(sorted(set(row.attach)))}" if row.attach else text
