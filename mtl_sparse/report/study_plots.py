"""Plots of a study: metrics and sparsity against lambda, sparsity over the run, layers, Pareto plot, latency."""

import math
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib import colormaps

from mtl_sparse.models import layers as layer_names
from mtl_sparse.report import plots, records, svg
from mtl_sparse.report import study as study_lib
from mtl_sparse.report.schema import Results, Timing
from mtl_sparse.report.study_names import form, names
from mtl_sparse.report.study_names import name as name_of
from mtl_sparse.report.study_tables import mean_and_std

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Make = Callable[[study_lib.Study], "Figure | None"]
_Of = Callable[[study_lib.Row], study_lib.Figure | None]


class Plot(NamedTuple):
    """A plot of a study.

    Attributes:
      title: title of its section.
      name: name of its file, without the suffix.
      figure: the drawn figure.
      note: how to read it.
      split: whether its panels can be stacked on a narrow page.
    """

    title: str
    name: str
    figure: "Figure"
    note: str
    split: bool


_WHOLE = ("model", "compact")
_LEGEND_LINE = 0.18  # inches


def figures(study: study_lib.Study) -> list[Plot]:
    """Return the plots that the runs of a study allow, the most telling first."""
    left_out = [metrics_over_lambda, sparsity_over_lambda] if study.is_ablation else [ablation]
    found = []
    for title, make, note, split in _PLOTS:
        figure = make(study) if make not in left_out else None
        if figure is not None:
            found.append(Plot(title, make.__name__, figure, note, split))
    return found


def draw(study: study_lib.Study, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Draw the plots of a study into a folder; return their paths by title."""
    return save(figures(study), folder)


def save(drawn: Sequence[Plot], folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Save plots as PNG; return their paths by title."""
    folder.mkdir(exist_ok=True)
    return {plot.title: plots.save(plot.figure, folder / f"{plot.name}.png") for plot in drawn}


def ablation(study: study_lib.Study) -> "Figure":
    """Plot each row's metrics and % zero groups beside those of the first row: mean and standard deviation."""
    rows = study.rows
    labels = [textwrap.fill(text, 46) for text in names(study)]
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
        for place, text, row, value in zip(places, names(study), rows, values, strict=True):
            if value:
                color = "#8c8c8c" if row.is_dense else plots.COLORS[0]
                bars = axis.errorbar(value.mean, place, xerr=np.nan_to_num(value.std), fmt="o", capsize=2, color=color)
                svg.describe(bars.lines[0], [f"{text}: {name} {_text(value)}"])
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


def _leave_out(axis, which: str, values: Sequence[tuple[str, study_lib.Figure]]) -> None:
    """End an axis, "x" or "y", before few values that are far from all others, and write these values above it."""
    means = np.array([value.mean for _, value in values])
    low, high = np.quantile(means, (0.25, 0.75))
    far = 4 * (high - low)
    inside = (means >= low - far) & (means <= high + far)
    if inside.all() or not inside.mean() > 0.9 or np.ptp(means) <= 2.5 * np.ptp(means[inside]):
        return
    stds = np.nan_to_num([value.std for _, value in values])
    low, high = (means - stds)[inside].min(), (means + stds)[inside].max()
    axis.set(**{f"{which}lim": (low - 0.1 * (high - low), high + 0.1 * (high - low))})
    beyond = [f"{name}: {value.mean:.4g}" for (name, value), near in zip(values, inside, strict=True) if not near]
    note = f"beyond the axis: {'; '.join(beyond[:3])}{'; ...' if len(beyond) > 3 else ''}"
    axis.set_title(textwrap.fill(note, 52), fontsize=8, loc="left")


def _scaled(figure, factor=100):
    return study_lib.Figure(factor * figure.mean, factor * figure.std, figure.n)


def _color(index, count):
    if count <= len(plots.COLORS):
        return plots.COLORS[index]
    return colormaps["viridis"](0.9 * index / max(count - 1, 1))


def _text(figure, digits=4, unit=""):
    """Return "mean ± standard deviation (seeds)", for the hover text of a point."""
    return f"{mean_and_std(figure, 1, digits)}{unit} ({figure.n} seed{'s' if figure.n > 1 else ''})"


def _lines(study: study_lib.Study, without: Sequence[str]) -> dict[str, list[study_lib.Row]]:
    """Return label -> rows that differ in these options only; a dense row belongs to the sparse rows like it."""
    lines: dict[str, list[study_lib.Row]] = {}
    for row in study.rows:
        lines.setdefault(name_of(study, row, without), []).append(row)
    return {name if not all(row.is_dense for row in rows) else name_of(study, rows[0]): rows
            for name, rows in lines.items()}  # fmt: skip


def _lambda_lines(study):
    """Return label -> rows that differ in lambda only, by rising lambda; {} if lambda never varies."""
    lines = {name: sorted(rows, key=_lambda) for name, rows in _lines(study, ("sparsity.lambda_",)).items()}
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
    figure = plots.new_figure(figsize=(4.2 * len(panels), 3.5))
    for axis, (name, of) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, (line, rows) in enumerate(lines.items()):
            values = [(place, of(row)) for place, row in zip(_places(rows, smallest), rows, strict=True)]
            shown = [(place, value) for place, value in values if value]
            if shown:
                x, y = [place for place, _ in shown], [value.mean for _, value in shown]
                error = np.nan_to_num([value.std for _, value in shown])
                bars = axis.errorbar(x, y, error, marker="o", capsize=2, color=_color(i, len(lines)), label=line)
                texts = [f"{line}, λ {_lambda(row):g}: {name} {_text(of(row))}" for row in rows if of(row)]
                svg.describe(bars.lines[0], texts)
        axis.set(xscale="log", xlabel="lambda", ylabel=name)
        lambdas = sorted({_lambda(row) for rows in lines.values() for row in rows})
        axis.set_xticks(_places_of(lambdas, smallest), [f"{value:g}" for value in lambdas], fontsize=8)
        axis.minorticks_off()
    _legend(figure)
    return plots.plain(figure)


def _legend(figure):
    """Add one legend below all panels, as many entries side by side as their length allows; make room for it."""
    entries: dict[str, Any] = {}
    for axis in figure.axes:
        entries |= {name: handle for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    columns = max(1, int(figure.get_figwidth() / (0.6 + 0.075 * max(map(len, entries), default=1))))
    figure.set_figheight(figure.get_figheight() + _LEGEND_LINE * math.ceil(len(entries) / columns))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
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
    lines = _lines(study, ("sparsity.lambda_", "sparsity.target"))
    figure = plots.new_figure(figsize=(4.2 * len(tasks), 3.7))
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for i, (name, rows) in enumerate(lines.items()):
            rows = sorted((row for row in rows if task in row.tasks), key=lambda row: _zero(row).mean)
            if rows:
                x, y = [_zero(row) for row in rows], [row.figure(task) for row in rows]
                errors = {f"{a}err": np.nan_to_num([f.std for f in fs]) for a, fs in (("x", x), ("y", y))}
                errors["xerr"] = 100 * errors["xerr"]
                places = [100 * figure.mean for figure in x], [figure.mean for figure in y]
                color = _color(i, len(lines))
                bars = axis.errorbar(*places, **errors, fmt="o-", linewidth=1, color=color, label=name)
                texts = [_metric_text(study, row, task) for row in rows]
                svg.describe(bars.lines[0], texts)
                dense = [place for place, row in zip(zip(*places, strict=True), rows, strict=True) if row.is_dense]
                axis.plot(*np.reshape(dense, (-1, 2)).T, "o", markerfacecolor="white", color=color, zorder=3)
        axis.set(xlim=(-3, 103), xlabel=_zero_label(study.rows), ylabel=_metric_label(study, task, task))
        _leave_out(axis, "y", [(name_of(study, row), row.figure(task)) for row in study.rows if task in row.tasks])
    _legend(figure)
    return plots.plain(figure)


def _metric_text(study, row, task):
    """Return the hover text of a row's point in a plot of a metric against sparsity."""
    zero = f"{100 * _zero(row).mean:.1f} % zero"
    return f"{name_of(study, row)}: {_metric_label(study, task, task)} {_text(row.figure(task))}, {zero}"


def sparsity_over_steps(study: study_lib.Study) -> "Figure | None":
    """Plot % zero groups (l1: weights) at each validation, the mean over seeds (Fig. 3c of the paper).

    Returns:
      None if there is no sparse row with the metrics of its training.
    """
    rows = [row for row in study.rows if not row.is_dense]
    rows = [row for row in rows if all((folder / "metrics.jsonl").exists() for folder in row.folders.values())]
    found = []
    for row in rows:
        name = "sparsity/weight" if _is_l1(row) else "sparsity/group"
        validations = [records.read_metrics(folder)["validation"] for folder in row.folders.values()]
        if all(name in validation for validation in validations):  # the first runs did not count zero weights
            found.append((row, [validation[name] for validation in validations]))
    if not found:
        return None
    figure = plots.new_figure(figsize=(5.6, 3.3))
    axis = figure.subplots()
    for i, (row, series) in enumerate(found):
        length = min(len(steps) for steps, _ in series)
        mean = 100 * np.mean([values[:length] for _, values in series], 0)
        axis.plot(series[0][0][:length], mean, color=_color(i, len(found)), label=name_of(study, row))
    axis.set(xlabel="step", ylabel=_zero_label([row for row, _ in found]), ylim=(-2, 102))
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
    labels = [name_of(study, row) for row in rows]
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

    Images and labels are left out because their license may forbid publishing them; a run's sample grid has them.

    Args:
      study: a study of any tasks.
      most: largest number of images.

    Returns:
      None if no image is in the samples of all rows, or no task has pixels.
    """
    found, columns = predicted(study, most)
    if not columns:
        return None
    height, width = next(iter(found.values()))["image"].shape[1:3]
    figure = plots.new_figure(figsize=(2.6 + 1.5 * len(columns), (0.1 + 1.5 * height / width) * len(found) + 0.4))
    axes = figure.subplots(len(found), len(columns), squeeze=False)
    for line, (i, samples) in zip(axes, found.items(), strict=True):
        place = samples["name"].tolist().index
        for axis, (task, name) in zip(line, columns, strict=True):
            axis.set(xticks=[], yticks=[])
            pixels = prediction(samples, task, place(name))
            if pixels is None:
                axis.axis("off")
            else:
                axis.imshow(pixels)
        line[0].axis("on")
        name = textwrap.fill(name_of(study, study.rows[i]), 34)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
    for axis, (task, name) in zip(axes[0], columns, strict=True):
        axis.set_title(f"{task}, image {name}", fontsize=7)
    return figure


def predicted(study: study_lib.Study, most: int = 2) -> tuple[dict[int, dict[str, np.ndarray]], list[tuple[str, str]]]:
    """Return ({index of a row: samples of its first run}, [(task, name of an image), ...]) for `predictions`.

    There are no columns if no image is in the samples of all rows, or no task has pixels.
    """
    folders = {i: row.folders[min(row.folders)] for i, row in enumerate(study.rows)}
    found = {i: records.read_samples(of) for i, of in folders.items() if (of / "samples.npz").exists()}
    tasks = [task for task in study.tasks if not task.startswith("attribute:")]
    common = [set(samples["name"].tolist()) for samples in found.values()]
    shown = sorted(set.intersection(*common))[:most] if common else []
    return found, [(task, name) for task in tasks for name in shown]


def prediction(samples: Mapping[str, np.ndarray], task: str, index: int) -> np.ndarray | None:
    """Return a prediction in the samples of a run as an RGB image, None for a task that the run does not have."""
    if f"prediction/{task}" not in samples:
        return None
    return plots.pictures(samples[f"label/{task}"][index], samples[f"prediction/{task}"][index])[1]


def _paths(row: study_lib.Row) -> set[str]:
    return {layer.path for layer in row.any_run.sparsity.layers}


def _left(run: Results, layers: Sequence[str]) -> list[float]:
    by_path = {layer.path: 1 - layer.zero_groups / layer.groups for layer in run.sparsity.layers}
    return [by_path.get(path, np.nan) for path in layers]


def weightings(study: study_lib.Study) -> "Figure | None":
    """Plot Delta_m of each weighting at each sparsity, mean and standard deviation; None without such runs."""
    forms = {
        form(next(iter(rows.values()))): {method: gain for method, row in rows.items() if (gain := study.gain(row))}
        for rows in study.weightings().values()
    }
    forms = {name: found for name, found in forms.items() if found}
    if not forms:
        return None
    first = next(iter(forms.values()))
    methods = sorted(first, key=lambda one: first[one].mean)
    figure = plots.new_figure(figsize=(5.6, 1.2 + 0.3 * len(methods)))
    axis = figure.subplots()
    for i, (name, found) in enumerate(forms.items()):
        shown = [method for method in methods if method in found]
        places = [methods.index(method) - 0.12 * (i - (len(forms) - 1) / 2) for method in shown]
        means, stds = ([getattr(found[method], part) for method in shown] for part in ("mean", "std"))
        color = _color(i, len(forms))
        bars = axis.errorbar(means, places, xerr=np.nan_to_num(stds), fmt="o", ms=5, color=color, label=name)
        svg.describe(bars.lines[0], [f"{method}, {name}: Δm {_text(found[method], 2, ' %')}" for method in shown])
    axis.axvline(0, color="#9aa5b1", linewidth=0.8)
    axis.set_yticks(range(len(methods)), methods)
    axis.set_xlabel("Δm over dense single-task runs, % (higher is better)")
    _leave_out(axis, "x", [(f"{m}, {name}", found[m]) for name, found in forms.items() for m in found])
    _legend(figure)
    return plots.plain(figure)


def gains(study: study_lib.Study) -> "Figure | None":
    """Plot Delta_m of each sparse row over the dense row with the same options, with its 95 % interval over seeds.

    Returns:
      None if fewer than two seeds of any row are in both.
    """
    found = []
    for text, row in zip(names(study), study.rows, strict=True):
        base = study.dense(row)
        if not row.is_dense and base is not None:
            found.append((text, study_lib.compare_gain(row, base)))
    found = [(text, gain) for text, gain in found if np.isfinite(gain.low)]
    if not found:
        return None
    figure = plots.new_figure(figsize=(5.6, 1.2 + 0.3 * len(found)))
    axis = figure.subplots()
    for place, (text, gain) in enumerate(reversed(found)):
        error = [[gain.mean - gain.low], [gain.high - gain.mean]]
        bars = axis.errorbar([gain.mean], [place], xerr=error, fmt="o", capsize=3, color=plots.COLORS[0])
        interval = f"95 % interval {gain.low:+.2f} to {gain.high:+.2f}, {gain.n} seeds"
        svg.describe(bars.lines[0], [f"{text}: Δm {gain.mean:+.2f} % ({interval})"])
    axis.axvline(0, color="#9aa5b1", linewidth=0.8)
    most = 3 * max(*(abs(gain.mean) for _, gain in found), 1)  # an interval of two seeds would hide the others
    low = max(-most, min(0, *(gain.low for _, gain in found)))
    high = min(most, max(0, *(gain.high for _, gain in found)))
    axis.set(xlim=(low - 0.04 * (high - low), high + 0.04 * (high - low)), ylim=(-0.6, len(found) - 0.4))
    axis.set_yticks(range(len(found)), [textwrap.fill(text, 32) for text, _ in reversed(found)], fontsize=8)
    axis.set_xlabel("Δm over the dense row, % (higher is better)")
    return plots.plain(figure)


def tradeoff(study: study_lib.Study) -> "Figure | None":
    """Plot Delta_m against the MACs, and the milliseconds if they were timed, of the compact models.

    Delta_m is over single-task runs if there are any, and otherwise over the dense row. A dashed line joins the rows
    that no other row beats in both. Only rows with all tasks are shown.

    Returns:
      None for fewer than two such rows.
    """
    rows = [row for row in study.rows if set(row.tasks) == set(study.tasks)]
    over, gain = _gain_of(study)
    panels: dict[str, _Of] = {"million MACs per image, compact": lambda row: row.size("macs")}
    panels["ms per image, compact (median)"] = _milliseconds
    points = {name: [(row, x, y) for row in rows if (x := of(row)) and (y := gain(row))] for name, of in panels.items()}
    points = {name: found for name, found in points.items() if len(found) > 1}
    if not points:
        return None
    figure = plots.new_figure(figsize=(5.4 * len(points), 4.4))
    for axis, (name, found) in zip(figure.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True):
        _plot_tradeoff(study, axis, found, "million MACs" if "MACs" in name else "ms")
        axis.set(xlabel=name, ylabel=f"Δm over {over}, %")
    _legend(figure)
    return plots.plain(figure)


def _plot_tradeoff(study, axis, found, unit):
    """Plot (row, cost, gain) of rows, a color for each form of sparsity, and label those that no other row beats."""
    forms = list(dict.fromkeys(map(form, study.rows)))
    for i, one in enumerate(forms):
        members = [(row, x, y) for row, x, y in found if form(row) == one]
        if not members:
            continue
        xs, ys = [x.mean for _, x, _ in members], [y.mean for _, _, y in members]
        errors = {"xerr": [x.std for _, x, _ in members], "yerr": [y.std for _, _, y in members]}
        errors = {name: np.nan_to_num(values) for name, values in errors.items()}
        color = _color(i, len(forms))
        bars = axis.errorbar(xs, ys, **errors, fmt="o", ms=5, elinewidth=0.7, color=color, label=one)
        texts = [f"{name_of(study, row)}: Δm {_text(y, 2, ' %')}, {x.mean:.4g} {unit}" for row, x, y in members]
        svg.describe(bars.lines[0], texts)
    front: list[tuple[study_lib.Row, float, float]] = []
    best = -np.inf
    for row, x, y in sorted(found, key=lambda one: (one[1].mean, -one[2].mean)):
        if y.mean > best:
            front, best = [*front, (row, x.mean, y.mean)], y.mean
    xs, ys = [x for _, x, _ in front], [y for *_, y in front]
    (line,) = axis.plot(xs, ys, "--", color="#9aa5b1", label="Pareto front", zorder=0)
    svg.describe(line, [])  # its points are those of the rows
    axis.margins(x=0.15)
    _leave_out(axis, "y", [(name_of(study, row), y) for row, _, y in found])
    near = [0.06 * np.ptp(limits) for limits in (axis.get_xlim(), axis.get_ylim())]
    labeled: list[tuple[float, float]] = []
    for row, x, y in reversed(front):  # of several rows in one place, the best one
        if not any(abs(x - a) < near[0] and abs(y - b) < near[1] for a, b in labeled):
            axis.annotate(name_of(study, row), (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
            labeled.append((x, y))


def _gain_of(study) -> tuple[str, _Of]:
    """Return (what Delta_m is over, function row -> Delta_m)."""
    if any(study.gain(row) for row in study.rows):
        return "dense single-task runs", study.gain

    def over_dense(row):
        base = row if row.is_dense else study.dense(row)
        return study_lib.Figure.of(found) if base and (found := study_lib.gains_over(row, base)) else None

    return "the dense row", over_dense


def _milliseconds(row: study_lib.Row) -> study_lib.Figure | None:
    """Return the median latency per image of a row's compact model at the smallest batch size that was timed."""
    found = [entry for timing in row.timings for entry in timing.rows if (entry.part, entry.model) == _WHOLE]
    smallest = min((entry.batch for entry in found), default=0)
    times = [entry.median_ms / entry.batch for entry in found if entry.batch == smallest]
    return study_lib.Figure.of(times) if times else None


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


_STD = "Bars: standard deviation over seeds."
# (title, function, note, whether panels can be stacked), in the order of the page.
_PLOTS: tuple[tuple[str, _Make, str, bool], ...] = (
    ("Gain over dense", gains, "Mean over seeds and its 95 % interval; intervals may go beyond the plot.", False),
    ("Gain against cost", tradeoff, f"Up and to the left is better. {_STD}", True),
    ("Weightings of the tasks", weightings, _STD, True),
    ("Metrics of each row", ablation, f"The line is the first row; dense rows are gray. {_STD}", False),
    ("Metrics against sparsity", pareto, f"Dense rows are hollow. {_STD}", True),
    ("Metrics against lambda", metrics_over_lambda, _STD, True),
    ("Zero groups against lambda", sparsity_over_lambda, _STD, True),
    ("Latency against sparsity", latency, "A point for each timed run.", True),
    ("Sparsity over the run", sparsity_over_steps, "Mean over seeds, at each validation.", True),
    ("Groups left by layer", groups_per_layer, "Mean over seeds.", False),
    ("Predictions", predictions, "The first run of each row on the same test images.", False),
)
