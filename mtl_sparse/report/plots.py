"""Plots of one run, drawn from its records: curves, sparsity, groups per layer, a grid of test images."""

import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_sparse.models import layers as layer_names
from mtl_sparse.report import records
from mtl_sparse.report.schema import SIZE_TARGETS, UNEVEN, Choices, CompactLayer, Latency, Results, Timing, TimingRow
from mtl_sparse.runtime.labels import VOID

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEXT_LINES = 8  # attributes in a column of text beside a test image
_DENSE, _LEFT = "#d5dbe3", "#20639b"
COLORS = ("#20639b", "#e67e22", "#5d8a3a", "#8e44ad", "#b03a2e", "#16858a", "#8a6d1d", "#c2578f")  # of lines


def draw(workdir: str | pathlib.Path) -> list[pathlib.Path]:
    """Draw every plot of a run into its folder `plots`.

    Returns:
      The paths of the plots.

    Raises:
      UserError: the folder lacks the records of a finished run.
    """
    workdir = pathlib.Path(workdir).expanduser()
    results = Results.read(workdir / "results.json")
    samples = records.read_samples(workdir)
    folder = workdir / "plots"
    folder.mkdir(exist_ok=True)
    drawn = []
    if (workdir / "metrics.jsonl").exists() or results.step:  # an imported run was not trained here
        metrics = records.read_metrics(workdir)
        drawn = [
            save(curves(metrics, results), folder / "curves.png"),
            save(sparsity_over_steps(metrics, results), folder / "sparsity.png"),
        ]
    return [
        *drawn,
        save(groups_per_layer(results), folder / "groups_per_layer.png"),
        save(sample_grid(samples), folder / "samples.png"),
    ]


def new_figure(*args, **kwargs) -> "Figure":
    """Return a matplotlib figure without pyplot's global state and display."""
    from matplotlib.figure import Figure

    return Figure(*args, layout="constrained", **kwargs)


def save(figure: "Figure", path: pathlib.Path) -> pathlib.Path:
    """Save a figure; return the path."""
    figure.savefig(path, dpi=110)
    return path


def curves(metrics: Mapping[str, records.Series], results: Results) -> "Figure":
    """Plot each task's training and validation loss, and below its main validation metric, in a column per task.

    Args:
      metrics: split -> metric -> (steps, values), see `records.read_metrics`.
      results: the run's results; while it trains, without test metrics and with step 0.
    """
    tasks = results.headlines
    figure = new_figure(figsize=(4.2 * len(tasks), 6))
    axes = figure.subplots(2, len(tasks), squeeze=False, sharex=True)
    for column, (task, headline) in enumerate(tasks.items()):
        above, below = axes[:, column]
        for split, color in (("train", "#9aa5b1"), ("validation", _LEFT)):
            steps, values = metrics.get(split, {}).get(f"{task}/loss", ([], []))
            above.plot(steps, values, color=color, label=split, marker="." if len(steps) < 3 else None)
        if f"{task}/stopped" in metrics.get("validation", {}):
            stopped = metrics["validation"][f"{task}/stopped"][0][0]
            above.axvline(stopped, color="#8e44ad", linestyle="--", label=f"head frozen from step {stopped:.0f}")
        above.set_title(task)
        above.set_ylabel("loss")
        above.legend(frameon=False)
        name = headline.metric
        steps, values = metrics.get("validation", {}).get(name, ([], []))
        below.plot(steps, values, color=_LEFT, marker="." if len(steps) < 3 else None, label="validation")
        if name in results.test:
            below.axhline(results.constant[name], color="#b03a2e", linestyle=":", label="constant baseline (test)")
            below.plot(results.step, results.test[name], "o", color="#e67e22", label="test, best checkpoint")
        below.set_ylabel(name.split("/")[1] + (" ↑" if headline.higher_is_better else " ↓"))
        below.set_xlabel("step")
        below.legend(frameon=False, fontsize=8)
    return plain(figure)


def sparsity_over_steps(metrics: Mapping[str, records.Series], results: Results) -> "Figure":
    """Plot the zero groups, the parameters in them and, for l1, the zero weights at each validation; below, lambda.

    For a target of MACs or parameters, also plot what compaction would remove of them.

    Args:
      metrics: split -> metric -> (steps, values), see `records.read_metrics`.
      results: the run's results; with step 0 while it trains.
    """
    figure = new_figure(figsize=(6, 4.8))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    shown = [("sparsity/group", "groups", _LEFT), ("sparsity/parameter", "parameters in them", "#7fb3d5")]
    if results.sparsity.penalty == "l1":
        shown.insert(0, ("sparsity/weight", "weights", "#2c3e50"))
    shown = [one for one in shown if one[0] in metrics["validation"]]  # the first runs did not count zero weights
    for name, label, color in shown:
        steps, values = metrics["validation"][name]
        above.plot(steps, 100 * values, color=color, label=label, marker="." if len(steps) < 3 else None)
    target, about = results.sparsity.target, shown[0][1]
    for option, name, what in SIZE_TARGETS:
        if results.config.get("sparsity", {}).get(option, 0) > 0:
            steps, values = metrics["validation"][f"sparsity/{name}_left"]
            above.plot(steps, 100 * (1 - values), color="#2c3e50", label=f"{what} removed")
            target, about = 1 - results.config["sparsity"][option], f"{what} removed"
    if target:
        above.axhline(100 * target, color="#b03a2e", linestyle=":", label=f"target for {about}")
    steps, lambda_ = metrics["train"]["lambda"]
    below.plot(steps, lambda_, color=_LEFT, label="lambda")
    if (lambda_ > 0).any():
        below.set_yscale("log")
    for axis in (above, below):
        if results.step:
            axis.axvline(results.step, color="#e67e22", linestyle=":", label="best checkpoint")
    above.set(ylabel="% zero", ylim=(-2, 102), title="Exactly zero")
    below.set(xlabel="step", ylabel="lambda")
    above.legend(frameon=False)
    return plain(figure)


def groups_per_layer(results: Results) -> "Figure":
    """Plot the groups of each conv layer and how many of them are left (Fig. 3 of the paper).

    Coupled groups are shown by the first layer that reads them.
    """
    layers = [*(results.sparsity.coupled or results.sparsity.layers)]
    paths = [getattr(layer, "path", None) or f"{layer.name}/kernel" for layer in layers]
    order = sorted(range(len(layers)), key=lambda i: layer_names.network_order(paths[i]))
    layers, names = [layers[i] for i in order], [layer_names.short(paths[i]) for i in order]
    total = np.array([layer.groups for layer in layers])
    left = total - np.array([layer.zero_groups for layer in layers])
    figure = new_figure(figsize=(max(6, 0.24 * len(layers) + 1.5), 4))
    axis = figure.subplots()
    place = np.arange(len(layers))
    axis.bar(
        place,
        total,
        color=_DENSE,
        label="groups (coupled channels)" if results.sparsity.coupled else "groups (input channels)",
    )
    axis.bar(place, left, color=_LEFT, label="left after training")
    axis.set_xticks(place, names, rotation=90, fontsize=7)
    axis.set(ylabel="groups", xlim=(-0.8, len(layers) - 0.2))
    axis.set_title(f"{100 * results.sparsity.group:.1f} % of {total.sum()} groups are zero")
    axis.legend(frameon=False)
    return plain(figure)


def compact_layers(rows: Iterable[CompactLayer | Mapping[str, Any]]) -> "Figure":
    """Plot the MACs of each conv layer before and after compaction.

    Args:
      rows: rows of compact.json, or as `compaction.explain.explain` returns them.
    """
    layers = [CompactLayer.from_json(row) if isinstance(row, Mapping) else row for row in rows]
    layers.sort(key=lambda row: layer_names.network_order(row.layer))
    figure = new_figure(figsize=(max(6, 0.24 * len(layers) + 1.5), 4))
    axis = figure.subplots()
    place = np.arange(len(layers))
    before = np.array([row.macs for row in layers]) / 1e6
    after = np.array([row.macs_after for row in layers]) / 1e6
    axis.bar(place, before, color=_DENSE, label="dense")
    axis.bar(place, after, color=_LEFT, label="compact")
    axis.set_xticks(place, [layer_names.short(row.layer) for row in layers], rotation=90, fontsize=7)
    axis.set(ylabel="million MACs per image", xlim=(-0.8, len(layers) - 0.2))
    axis.set_title(f"{before.sum() / max(after.sum(), 1e-9):.1f} times fewer MACs")
    axis.legend(frameon=False)
    return plain(figure)


def costs(results: Results, layers: Sequence[CompactLayer] = (), timing: Timing | None = None) -> "Figure | None":
    """Plot the parameters, the MACs and the milliseconds of the dense and the compact model, in a panel each.

    Args:
      results: the run's results; its sizes are shown where there are no layers.
      layers: layers of compact.json, to show the parts of the model: the backbone, and each head.
      timing: contents of benchmark.json; its smallest batch size is shown.

    Returns:
      None if there are neither sizes nor timings.
    """
    panels = _sizes(results, layers)
    if timing is not None and timing.rows:
        batch = min(row.batch for row in timing.rows)
        of = {(row.part, row.model): row.median_ms / batch for row in timing.rows if row.batch == batch}
        pairs = {part: np.array([of[part, model] for model in ("dense", "compact")]) for part in ("backbone", "model")
                 if (part, "dense") in of}  # fmt: skip
        if len(pairs) == 2:
            pairs["model"] = pairs["model"] - pairs["backbone"]
        names = {"model": "heads" if len(pairs) == 2 else "model"}
        panels[f"ms per image, batch {batch}"] = {names.get(part, part): pair for part, pair in pairs.items()}
    if not panels:
        return None
    figure = new_figure(figsize=(3.4 * len(panels), 4))
    parts = list(dict.fromkeys(part for found in panels.values() for part in found))
    for axis, (name, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        bottom = np.zeros(2)
        for part, pair in found.items():
            axis.bar((0, 1), pair, 0.6, bottom, color=COLORS[parts.index(part) % len(COLORS)], label=part)
            bottom = bottom + pair
        axis.set_xticks((0, 1), ("dense", "compact"))
        axis.set_title(f"{name}: {bottom[0] / max(bottom[1], 1e-12):.1f} times less", fontsize=10)
        axis.set(ylabel=name)
        axis.legend(frameon=False, fontsize=8)
    return plain(figure)


def _sizes(results, layers) -> dict[str, dict[str, np.ndarray]]:
    """Return panel -> part of the model -> (dense, compact), in millions."""
    kinds = {"parameters": "million parameters", "macs": "million MACs per image"}
    size, panels = results.size, dict[str, dict[str, np.ndarray]]()
    for kind, label in kinds.items():
        parts: dict[str, np.ndarray] = {}
        for row in layers:
            part = row.layer.partition("/")[0].replace("_", " ")
            pair = np.array([getattr(row, kind), getattr(row, f"{kind}_after")]) / 1e6
            parts[part] = parts.get(part, np.zeros(2)) + pair
        if not layers and size is not None:
            parts = {"model": np.array([getattr(size.trained, kind), getattr(size.compact, kind)]) / 1e6}
        if parts:
            panels[f"{label} in convolutions" if layers and kind == "parameters" else label] = parts
    return panels


def latency(timing: Timing | Mapping[str, Any]) -> "Figure":
    """Plot the median latency per image against MACs, in a panel each for the backbone and the whole model.

    Args:
      timing: a `Timing`, or contents of benchmark.json, of which "size", "rounds" and "compact" may be missing.
    """
    if isinstance(timing, Mapping):
        timing = Timing.from_json(timing)
    figure = new_figure(figsize=(9, 4))
    parts = list(dict.fromkeys(row.part for row in timing.rows))
    for axis, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        _plot_latency(axis, [row for row in timing.rows if row.part == part])
        axis.set(title=part, xlabel="million MACs per image", ylabel="ms per image (median, to 90 %)")
    figure.suptitle(f"{timing.device}, {100 * timing.group_sparsity:.0f} % of groups zero", fontsize=10)
    return plain(figure)


def _plot_latency(axis, entries: Sequence[TimingRow]):
    """Plot the timings of one part of the model."""
    batches = sorted({row.batch for row in entries})
    for batch, color in zip(batches, itertools.cycle(COLORS), strict=False):
        rows = [row for row in entries if row.batch == batch]
        macs = np.array([row.macs / 1e6 for row in rows])
        median = np.array([row.median_ms / batch for row in rows])
        upper = np.array([row.p90_ms / batch for row in rows]) - median
        axis.errorbar(macs, median, [np.zeros(len(rows)), upper], fmt="o", color=color, label=f"batch {batch}")
        proportional = "in proportion to MACs" if batch == batches[-1] else None
        axis.plot([0, macs[0]], [0, median[0]], ":", color=color, linewidth=1, label=proportional)
        for row, x, y in zip(rows, macs, median, strict=True):
            # One label per column; the sparse model lies on the dense one: zeros alone save nothing.
            if batch == batches[0] and row.model != "sparse":
                axis.annotate(row.model, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axis.set_xlim(0, 1.25 * max(row.macs for row in entries) / 1e6)
    axis.set_ylim(0)
    axis.legend(frameon=False)


def latency_by_macs(found: Latency) -> "Figure":
    """Plot the part of the dense model's time that compact models take against the MACs that they have left."""
    figure = new_figure(figsize=(6.5, 4.5))
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], ":", color="#7f8c99", linewidth=1, label="in proportion to MACs")
    for batch, color in zip(found.batches, itertools.cycle(COLORS), strict=False):
        axis.plot(*found.curve(batch), color=color, linewidth=1)
        for uneven in (False, True):
            rows = [row for row in found.rows if row.batch == batch and (row.pattern == UNEVEN) == uneven]
            x, y = [row.macs_left for row in rows], [row.time_left for row in rows]
            face, label = ("none", f"batch {batch}, uneven") if uneven else (color, f"batch {batch}, even")
            axis.scatter(x, y, 28, facecolors=face, edgecolors=color, label=label, zorder=3)
    axis.set(xlabel="MACs left", ylabel="time of the dense model", xlim=(0, 1.05), ylim=(0, None))
    for of_axis in (axis.xaxis, axis.yaxis):
        of_axis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axis.set_title(f"{found.device}, {'x'.join(map(str, found.size))}, {found.groups} groups", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    return plain(figure)


def attachments(choices: Choices) -> "Figure":
    """Plot what is left of each layer in each task's single-task runs, and where LOMT attaches the task's head."""
    from matplotlib.patches import Rectangle

    tasks = choices.tasks
    layers = list(next(iter(tasks.values())).active)
    left = np.array([[np.mean(task.active[layer]) for layer in layers] for task in tasks.values()])
    figure = new_figure(figsize=(max(6, 0.24 * len(layers) + 3), 0.4 * len(tasks) + 2.4))
    axis = figure.subplots()
    image = axis.imshow(100 * left, aspect="auto", cmap="Blues", vmin=0, vmax=100)
    for row, task in enumerate(tasks.values()):
        for column, layer in enumerate(layers):
            if layer not in task.kept:
                axis.plot(column, row, "x", color="#9aa5b1", markersize=4)
        place = layers.index(task.layer)
        axis.add_patch(Rectangle((place - 0.5, row - 0.46), 1, 0.92, fill=False, edgecolor="#e67e22", linewidth=2.5))
    axis.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axis.set_yticks(range(len(tasks)), [f"{name} → {task.point}" for name, task in tasks.items()], fontsize=8)
    axis.set_title("Outlined: the deepest layer that a task keeps; crosses: layers that it does not keep", fontsize=9)
    figure.colorbar(image, label="% of groups left")
    return figure


def sample_grid(samples: Mapping[str, np.ndarray]) -> "Figure":
    """Plot a row for each test image: its label and prediction of each pixel task, and the predicted attributes.

    Args:
      samples: see `records.read_samples`.
    """
    every = [key.removeprefix("label/") for key in samples if key.startswith("label/")]
    tasks = [task for task in every if samples[f"label/{task}"].ndim > 1]
    attributes = [task for task in every if task.startswith("attribute:")]
    images = samples["image"]
    count, height, width = images.shape[:3]
    columns = 1 + 2 * len(tasks) + bool(attributes)
    widths = [1] * (1 + 2 * len(tasks)) + [-(-len(attributes) // _TEXT_LINES)] * bool(attributes)
    figure = new_figure(figsize=(2 * sum(widths), 2 * count * height / width + 0.8))
    axes = figure.subplots(count, columns, squeeze=False, width_ratios=widths)
    shown: set[int] = set()
    for row in range(count):
        axes[row, 0].imshow(images[row])
        axes[row, 0].set_ylabel(str(samples["name"][row]), fontsize=7)
        if attributes:
            _write_attributes(axes[row, -1], samples, attributes, row)
        for i, task in enumerate(tasks):
            label, prediction = samples[f"label/{task}"][row], samples[f"prediction/{task}"][row]
            pair = pictures(label, prediction)
            for axis, shown_image in zip(axes[row, 1 + 2 * i : 3 + 2 * i], pair, strict=True):
                axis.imshow(shown_image)
            if np.issubdtype(label.dtype, np.integer):
                shown |= {int(index) for index in np.union1d(label, prediction)}
    titles = ["image"] + [f"{task}: {kind}" for task in tasks for kind in ("label", "prediction")]
    titles += ["attributes (red: wrong)"] * bool(attributes)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    if shown:
        _class_legend(figure, sorted(shown - {VOID}), samples.get("classes", ()))
    return figure


def _class_legend(figure, classes, names):
    from matplotlib.patches import Patch

    names = dict(enumerate(names))
    handles = [Patch(color=class_colors()[index], label=names.get(index, f"class {index}")) for index in classes]
    figure.legend(handles=handles, loc="outside lower center", ncols=9, fontsize=7, frameon=False)


def _write_attributes(axis, samples, attributes, row):
    """Write the predicted probability of each attribute of an image: green if it is right, red if it is wrong."""
    axis.axis("off")
    threshold = float(samples["threshold"])
    columns = -(-len(attributes) // _TEXT_LINES)
    for i, task in enumerate(attributes):
        column, line = divmod(i, _TEXT_LINES)
        label, probability = samples[f"label/{task}"][row], float(samples[f"prediction/{task}"][row])
        text = f"{task.removeprefix('attribute:').replace('_', ' ')}: {100 * probability:.0f} %"
        color = "black" if label == VOID else "#2e7d32" if (probability >= threshold) == (label == 1) else "#b03a2e"
        place = (0.02 + column) / columns, 0.88 - line / (_TEXT_LINES + 1.5)
        axis.text(*place, text, color=color, fontsize=8, transform=axis.transAxes)


def class_colors() -> np.ndarray:
    """Return an RGB color in [0, 1] for each class, [VOID, 3]; consecutive classes differ in hue."""
    from matplotlib.colors import hsv_to_rgb

    index = np.arange(VOID)
    hsv = np.stack([index * 0.618034 % 1, 0.45 + 0.25 * (index % 3) / 1, 0.95 - 0.25 * (index // 3 % 2)], -1)
    return hsv_to_rgb(np.clip(hsv, 0, 1))


def pictures(label: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a label and its prediction as RGB images in [0, 1].

    Args:
      label: classes int [H, W], vectors [H, W, 3] or positive scalars [H, W]; missing values are black.
      prediction: an array of the same shape.
    """
    if np.issubdtype(label.dtype, np.integer):
        return _class_images(label, prediction)
    return (_vector_images if label.ndim == 3 else _scalar_images)(label, prediction)


def _class_images(label, prediction):
    colors = class_colors()
    void = label == VOID
    shown = colors[np.where(void, 0, label)]
    shown[void] = 0  # void is black
    return shown, colors[prediction]


def _vector_images(label, prediction):
    missing = np.sum(label * label, -1) == 0
    shown = (label + 1) / 2
    shown[missing] = 0
    return shown, np.clip((prediction + 1) / 2, 0, 1)


def _scalar_images(label, prediction):
    """Color both in the range of the label."""
    from matplotlib import colormaps

    valid = label > 0
    low = label[valid].min() if valid.any() else 0.0
    high = max(label.max(), low + 1e-6)
    colors = colormaps["viridis"]
    shown, predicted = (colors(np.clip((x - low) / (high - low), 0, 1))[..., :3] for x in (label, prediction))
    return shown, predicted


def plain(figure: "Figure") -> "Figure":
    """Remove the top and right frame of each axis; return the figure."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure
