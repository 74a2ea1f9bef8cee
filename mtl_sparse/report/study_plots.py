"""A study's pictures: metrics and sparsity against lambda, sparsity over the run, layers, Pareto plot, latency."""

import textwrap

import numpy as np
from matplotlib import colormaps

from mtl_sparse.models import layers as layer_names
from mtl_sparse.report import plots, records
from mtl_sparse.report import study as study_lib
from mtl_sparse.report.study_tables import setting, short


def draw(study: study_lib.Study, folder) -> dict[str, object]:
    """Draws the pictures that the study has the runs for into `folder`; returns {title: path}."""
    folder.mkdir(exist_ok=True)
    found = {}
    over_lambda = {"Metrics against lambda": metrics_over_lambda, "Zero groups against lambda": sparsity_over_lambda}
    makers = {"What each change does": ablation} if study.is_ablation else over_lambda
    makers |= {
        "Metrics against sparsity": pareto,
        "Sparsity over the run": sparsity_over_steps,
        "Groups left by layer": groups_per_layer,
        "Latency against sparsity": latency,
        "Predictions": predictions,
    }
    for title, make in makers.items():
        figure = make(study)
        if figure is not None:
            found[title] = plots.save(figure, folder / f"{make.__name__}.png")
    return found


def label(study, row, without=()) -> str:
    """The tasks of a row and its settings that are not in `without`, but for those that it does not use.

    Where many settings differ, those that it changes of the first row.
    """
    names = row.changes if study.is_ablation else row.settings
    names = sorted(name for name in names if name not in ("tasks", *without) and setting(row, name))
    return ", ".join([setting(row, "tasks"), *(f"{short(name)} {setting(row, name)}" for name in names)])


def ablation(study):
    """Each row's metrics and % zero groups beside those of the first row, mean and spread over seeds."""
    rows = study.rows
    labels = [setting(row, "changes") for row in rows]
    if len({row.tasks for row in rows}) > 1:
        labels = [f"{setting(row, 'tasks')}: {text}" for row, text in zip(rows, labels, strict=True)]
    labels = [textwrap.fill(text, 46) for text in labels]
    heights = [1 + text.count("\n") for text in labels]
    places = np.cumsum(heights) - np.array(heights) / 2
    panels = {_zero_label(rows): lambda row: _scaled(_zero(row))}
    for task in study.tasks:
        run = next(next(iter(row.runs.values())) for row in rows if task in row.tasks)
        _, name, higher = study_lib.metric(task, run)
        panels[f"{task.removeprefix('attribute:')} {name} {'↑' if higher else '↓'}"] = lambda row, task=task: (
            row.figure(task) if task in row.tasks else None
        )
    figure = plots.new_figure(figsize=(3.5 + 2.3 * len(panels), 1 + 0.22 * sum(heights)))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, of) in zip(axes, panels.items(), strict=True):
        if of(rows[0]):
            axis.axvline(of(rows[0]).mean, color="0.8", linewidth=1, zorder=0)
        for place, row in zip(places, rows, strict=True):
            if of(row):
                color = "0.55" if row.is_dense else _color(0.3, 2)
                axis.errorbar(of(row).mean, place, xerr=np.nan_to_num(of(row).std), fmt="o", capsize=2, color=color)
        axis.set(xlabel=name)
    axes[0].set(ylim=(sum(heights), 0))
    axes[0].set_yticks(places, labels, fontsize=8)
    return plots.plain(figure)


def _scaled(figure, factor=100):
    return study_lib.Figure(factor * figure.mean, factor * figure.std, figure.n)


def _color(index, count):
    return colormaps["viridis"](0.9 * index / max(count - 1, 1))


def _lambda_lines(study):
    """Rows that differ in lambda alone, as {label: rows by rising lambda}; empty where lambda never varies."""
    lines = {}
    for row in study.rows:
        lines.setdefault(label(study, row, ("sparsity.lambda_",)), []).append(row)
    lines = {name: sorted(rows, key=_lambda) for name, rows in lines.items()}
    return lines if any(len({_lambda(row) for row in rows}) > 1 for rows in lines.values()) else {}


def _lambda(row):
    return row.config["sparsity"]["lambda_"]


def _places(rows, smallest):
    """Lambdas on a logarithmic axis, 0 a decade below the smallest."""
    return _places_of([_lambda(row) for row in rows], smallest)


def _places_of(lambdas, smallest):
    return np.array([value or smallest / 10 for value in lambdas])


def _over_lambda(study, panels):
    """One panel each of {y label: row -> Figure or None}, a line for each set of rows."""
    lines = _lambda_lines(study)
    if not lines:
        return None
    smallest = min(_lambda(row) for rows in lines.values() for row in rows if _lambda(row) > 0)
    figure = plots.new_figure(figsize=(4.2 * len(panels), 3.6 + 0.1 * len(lines)))
    for axis, (name, of) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, (line, rows) in enumerate(lines.items()):
            shown = [(place, of(row)) for place, row in zip(_places(rows, smallest), rows, strict=True) if of(row)]
            if shown:
                x, y = [place for place, _ in shown], [value.mean for _, value in shown]
                error = np.nan_to_num([value.std for _, value in shown])
                axis.errorbar(x, y, error, marker="o", capsize=2, color=_color(i, len(lines)), label=line)
        axis.set(xscale="log", xlabel="lambda", ylabel=name)
        shown = sorted({_lambda(row) for rows in lines.values() for row in rows})
        axis.set_xticks(_places_of(shown, smallest), [f"{value:g}" for value in shown], fontsize=8)
        axis.minorticks_off()
    _legend(figure)
    return plots.plain(figure)


def _legend(figure):
    """One legend below all panels, an entry for each label, as many side by side as their length allows."""
    entries = {}
    for axis in figure.axes:
        entries |= {name: handle for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    columns = max(1, int(figure.get_figwidth() / (0.6 + 0.06 * max(map(len, entries), default=1))))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=7
    )


def metrics_over_lambda(study):
    """Each task's metric against lambda (the paper's Fig. 3a)."""
    panels = {}
    for task in study.tasks:
        run = next(next(iter(row.runs.values())) for row in study.rows if task in row.tasks)
        _, name, higher = study_lib.metric(task, run)
        panels[f"{task} {name} {'↑' if higher else '↓'}"] = lambda row, task=task: (
            row.figure(task) if task in row.tasks else None
        )
    return _over_lambda(study, panels)


def sparsity_over_lambda(study):
    """% zero groups, and % of the parameters in them, against lambda (the paper's Fig. 3b)."""

    def percent(kind):
        def of(row):
            found = row.sparsity(kind)
            return study_lib.Figure(100 * found.mean, 100 * found.std, found.n)

        return of

    return _over_lambda(study, {"% groups zero": percent("group"), "% parameters in them": percent("parameter")})


def _is_l1(row):
    return row.config["sparsity"]["penalty"] == "l1"


def _zero(row):
    """Fraction of the groups, under l1 of the weights, that is zero."""
    return row.sparsity("parameter" if _is_l1(row) else "group")


def _zero_label(rows):
    kinds = {"weights" if _is_l1(row) else "groups" for row in rows}
    return f"% {kinds.pop()} zero" if len(kinds) == 1 else "% zero (groups; under l1 weights)"


def pareto(study):
    """Each task's metric against % zero groups (l1: weights): a point a row, with its spread over seeds both ways.

    A line joins the rows that differ in how strong the penalty is. Dense rows are hollow.
    """
    tasks, lines = study.tasks, {}
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
        run = next(next(iter(row.runs.values())) for row in study.rows if task in row.tasks)
        _, name, higher = study_lib.metric(task, run)
        axis.set(xlim=(-3, 103), xlabel=_zero_label(study.rows), ylabel=f"{task} {name} {'↑' if higher else '↓'}")
    _legend(figure)
    return plots.plain(figure)


def sparsity_over_steps(study):
    """% zero groups (l1: weights) at every validation, the mean over seeds (the paper's Fig. 3c)."""
    figure = plots.new_figure(figsize=(7, 4))
    axis = figure.subplots()
    rows = [row for row in study.rows if not row.is_dense]
    rows = [row for row in rows if all((folder / "metrics.jsonl").exists() for folder in row.folders.values())]
    if not rows:  # none, or only imported ones
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


def groups_per_layer(study):
    """% of each layer's groups that are left, a line a sparse row, the mean over seeds (the paper's Fig. 3).

    Blank where a row's model does not have the layer.
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


def predictions(study, most=2):
    """What the model of each row, of its first seed, says of the same test frames, at most so many.

    Without images and labels, which may not be anyone's to show; a run's own sheet has them.
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
        axis.set_title(f"{task}, frame {name}", fontsize=7)
    return figure


def _paths(row):
    return {entry["path"] for entry in next(iter(row.runs.values()))["sparsity"]["layers"]}


def _left(run, layers):
    by_path = {entry["path"]: 1 - entry["zero_groups"] / entry["groups"] for entry in run["sparsity"]["layers"]}
    return [by_path.get(path, np.nan) for path in layers]


def latency(study):
    """Latency of the backbone against % zero groups, of the runs that --job=benchmark has timed: a point a run.

    A line for each batch, device, image size and dense backbone. Left the medians of dense and compact backbone, right
    the speed-up, which compares both in the same rounds.
    """
    points = {}
    for row in study.rows:
        model = row.config["model"]
        for found in row.timings:
            zero = 100 * found["group_sparsity"]
            height, width = found["size"]
            where = f"ResNet-{model['depth']}, {model['width']} wide, {height}x{width}, {found['device']}"
            if row.attach:
                where += f", as far as {', '.join(sorted(set(row.attach)))}"
            for entry in found["rows"]:
                if entry["part"] == "backbone" and entry["model"] != "sparse":
                    value = (zero, entry["median_ms"] / entry["batch"], entry["speedup"])
                    points.setdefault((where, entry["batch"], entry["model"]), []).append(value)
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
    left.set(xlabel="% groups zero", ylabel="ms an image, backbone (median)", ylim=(0, None))
    right.set(xlabel="% groups zero", ylabel="times faster than dense, same rounds", ylim=(0, None))
    for axis in (left, right):
        axis.legend(frameon=False, fontsize=6 if several else 8)
    return plots.plain(figure)
