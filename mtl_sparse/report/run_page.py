"""The page of one run, `report/index.html` in its folder: it grows while the run trains."""

import dataclasses
import json
import pathlib
import runpy
import shlex
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from mtl_sparse.report import plots, records, svg, tables, web
from mtl_sparse.report.schema import SIZE_TARGETS, CompactLayer, Headline, Results, RunSparsity, Timing
from mtl_sparse.runtime import files, installed
from mtl_sparse.runtime.labels import VOID

_DEFAULTS = installed.ROOT / "configs" / "nyu.py"
_RELOAD_SECS = 30  # of the page of a run that trains
_SHARE = 0.02  # of the time between two pages that drawing one may take
_MOST_TASKS = 9  # in the training curves; plots/curves.png has all
_IMAGE_WIDTH = 192
_WIDE = 8  # inches from which a plot takes the whole width of the page
_NOT_SETTINGS = ("run.", "benchmark.", "export.", "lomt.")  # options that do not change the model


def path(workdir: pathlib.Path) -> pathlib.Path:
    """Return the path of a run's page."""
    return workdir / "report" / "index.html"


class Live:
    """Writer of the page of a run that trains.

    A page is written only if writing the last one took at most 2 % of the time since then. After a failure, which is
    logged, no more pages are written. As a context manager: if the block raises, the last page says that the run has
    not finished.
    """

    def __init__(self, workdir: pathlib.Path, headlines: Mapping[str, Headline], total_steps: int) -> None:
        """Store what the records of a run that is still training do not have.

        Args:
          workdir: the run's folder, with its config.json.
          headlines: task -> its main metric.
          total_steps: number of steps of the run.
        """
        self._workdir, self._headlines, self._total = workdir, dict(headlines), total_steps
        self._took, self._ended, self._failed = 0.0, time.monotonic(), False
        self._shown: RunSparsity | None = None  # in the last page

    def __enter__(self) -> "Live":
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write the page of a run that has stopped or failed."""
        if kind and self._shown:
            try_write(self._workdir, self._headlines, self._shown)

    def update(self, step: int, sparsity: RunSparsity) -> bool:
        """Write the page after a validation, unless that takes too long; return whether it was written."""
        start = time.monotonic()
        if self._failed or self._took > _SHARE * (start - self._ended):
            return False
        text = f"step {step} of {self._total} when this page was written; it reloads automatically"
        written = try_write(self._workdir, self._headlines, sparsity, text)
        self._failed = not written
        self._shown = sparsity if written else None
        self._ended = time.monotonic()
        self._took = self._ended - start
        return written


def try_write(workdir: pathlib.Path, *args: Any) -> bool:
    """Write the page as `write` does; log an error instead of raising it. Return whether it was written."""
    try:
        write(workdir, *args)
    except Exception as error:  # a page is never a reason to end a run
        logging.warning("The run's page could not be written (%s: %s)", type(error).__name__, error)
        return False
    return True


def write(
    workdir: str | pathlib.Path,
    headlines: Mapping[str, Headline] | None = None,
    sparsity: RunSparsity | None = None,
    progress: str = "",
) -> pathlib.Path:
    """Write the page of a run from its records.

    Args:
      workdir: the run's folder.
      headlines: task -> its main metric, for a run that has not finished.
      sparsity: sparsity of such a run, if it is known.
      progress: text on the progress of a run that is still training; "" otherwise.

    Returns:
      The path of the page, which is readable offline.

    Raises:
      UserError: the folder lacks the records of a run.
    """
    workdir = pathlib.Path(workdir).expanduser()
    if headlines is None or (records.is_finished(workdir) and not progress):
        results = Results.read(workdir / "results.json")
    else:
        results = _so_far(files.read_json(workdir / "config.json"), headlines, sparsity)
    trained = (workdir / "metrics.jsonl").exists()
    metrics = records.read_metrics(workdir) if trained else {}
    layers, timing = _measured(workdir) if _is_finished(results) else ([], None)
    sections = [
        web.Section("results", "Results", _results(results, metrics)),
        web.Section("training", "Training", _training(results, metrics)),
        web.Section("samples", "Sample predictions", _samples(workdir) if _is_finished(results) else ""),
        web.Section("costs", "Where parameters and milliseconds went", _costs(results, layers, timing)),
        web.Section("settings", "Settings", _settings(results.config)),
        web.Section("continue", "How to continue", _commands(workdir, results, progress)),
    ]
    lead = _lead(results, progress) + web.cards(_cards(results, timing))
    heading, out = f"Run {workdir.resolve().name}", path(workdir)
    out.parent.mkdir(exist_ok=True)
    files.write_text(out, web.document(heading, lead, sections, refresh=_RELOAD_SECS if progress else 0))
    return out


def _so_far(config: dict[str, Any], headlines: Mapping[str, Headline], sparsity: RunSparsity | None) -> Results:
    """Return what is known of a run that has not finished: no test metrics, and step 0."""
    unknown = {"group": float("nan"), "parameter": float("nan"), "layers": []}
    found = Results.from_json(  # of version 0, whose sparsity follows from the options, also from those of earlier runs
        {
            **{name: {} for name in ("test", "constant", "headlines", "frames", "versions")},
            "sparsity": unknown,
            "config": config,
            "step": 0,
            "seed": config["seed"],
            "device": "",
        }
    )
    return dataclasses.replace(found, headlines=dict(headlines), sparsity=sparsity or found.sparsity)


def _is_finished(results: Results) -> bool:
    """Return whether a run has test metrics; the step of an imported run is 0, as that of an unfinished one."""
    return bool(results.test)


def _measured(workdir: pathlib.Path) -> tuple[list[CompactLayer], Timing | None]:
    """Return what --job=compact and --job=benchmark have written, as far as they were run."""
    compact, timed = workdir / "compact" / "compact.json", workdir / "benchmark.json"
    layers = [CompactLayer.from_json(row) for row in files.read_json(compact)] if compact.exists() else []
    return layers, Timing.read(timed) if timed.exists() else None


def _lead(results: Results, progress: str) -> str:
    data, embedded = results.config["data"], results.config["data"]["embedded"]["frames"]
    height, width = data["size"]
    of = f", {embedded} embedded images" if embedded else ""
    tasks = ", ".join(task.removeprefix("attribute:") for task in results.headlines)
    status = "Not finished."
    if _is_finished(results):
        status = f"Finished; best validation at step {results.step}." if results.step else "Imported, not trained here."
    if progress:
        status = f"Training: {progress}."
    device = f" Trained on {results.device}." if results.device else ""
    about = f"{tasks} on {data['name']}{of}, {height}x{width}, seed {results.seed}.{device}"
    return web.paragraph(f"{status} {about}") + web.paragraph("Point at a plot to see its values.", "note")


def _cards(results: Results, timing: Timing | None) -> list[tuple[str, str, str]]:
    """Return the key figures of a run."""
    sparsity, found = results.sparsity, []
    for task, headline in results.headlines.items():
        if headline.metric in results.test:
            name = f"{task.removeprefix('attribute:')} {headline.metric.split('/')[1]} {_arrow(headline)}".replace(
                "_", " "
            )
            baseline = f"constant baseline {results.constant[headline.metric]:.4f}"
            found.append((name, f"{results.test[headline.metric]:.4f}", baseline))
    if np.isfinite(sparsity.group):
        of_groups = sparsity.penalty != "l1"
        target = f"target {100 * sparsity.target:.1f} %" if sparsity.target else ""
        found.append(("groups zero", f"{100 * sparsity.group:.1f} %", target if of_groups else ""))
        if not of_groups and sparsity.weight is not None:
            found.append(("weights zero", f"{100 * sparsity.weight:.1f} %", target))
    if results.size is not None:
        for option, key, what in reversed(SIZE_TARGETS):
            before, after = getattr(results.size.trained, key), getattr(results.size.compact, key)
            asked = results.config["sparsity"].get(option, 0)
            goal = f", target {100 * asked:.1f} %" if asked else ""
            value, note = f"{100 * after / before:.1f} %", f"{after / 1e6:.2f} M of {before / 1e6:.2f} M{goal}"
            found.append((f"{what} left", value, note))
    if timing is not None:
        smallest = min((row.batch for row in timing.rows), default=0)
        rows = [row for row in timing.rows if row.model == "compact" and row.batch == smallest]
        note = f"batch {smallest}, {timing.device}"
        found += [(f"{row.part} speed-up", f"{row.speedup:.1f}x", note) for row in rows]
    return found


def _arrow(headline: Headline) -> str:
    return "↑" if headline.higher_is_better else "↓"


def _results(results: Results, metrics: Mapping[str, records.Series]) -> str:
    """Return the table of each task's main metric, and that of all metrics."""
    chosen = "validation of the best checkpoint" if _is_finished(results) else "best validation"
    lines: list[tuple[str, ...]] = [("task", "metric", "test", "constant baseline", chosen, "last validation")]
    for task, headline in results.headlines.items():
        name, empty = headline.metric, (np.array([]), np.array([]))
        steps, values = metrics.get("validation", {}).get(name, empty)
        rising = np.sort(values[np.isfinite(values)])
        best = rising[-1:] if headline.higher_is_better else rising[:1]
        if _is_finished(results):  # the metric may have been better before the sparsity was settled, or at another step
            best = values[steps == results.step]
        cells = [f"{found[name]:.4f}" if name in found else "" for found in (results.test, results.constant)]
        cells += [f"{found[0]:.4f}" if len(found) else "" for found in (best, values[-1:])]
        lines.append((task, f"{name.split('/')[1]} {_arrow(headline)}", *cells))
    if not _is_finished(results):
        return web.table([(*line[:2], *line[4:]) for line in lines])
    every = web.table(tables.metric_rows(results))
    sentence = web.paragraph(f"{tables.run_sentence(results)}.", "note")
    return f"{web.table(lines)}{sentence}<details><summary>All test metrics</summary>{every}</details>"


def _training(results: Results, metrics: Mapping[str, records.Series]) -> str:
    """Return the plots of the training: curves, sparsity, groups per layer."""
    parts, validation = [], metrics.get("validation", {})
    if metrics and validation:
        shown = dict(list(results.headlines.items())[:_MOST_TASKS])
        more = (
            "" if len(shown) == len(results.headlines) else f" The first {len(shown)} tasks; plots/curves.png has all."
        )
        limited = dataclasses.replace(results, headlines=shown)
        drawn = svg.inline(plots.curves(metrics, limited), "curves", "Losses and metrics over the steps", split=True)
        parts.append(
            web.plot(drawn, "Losses and metrics", f"Below each loss, the task's main metric.{more}", wide=True)
        )
        if "sparsity/group" in validation and "lambda" in metrics.get("train", {}):
            drawn = svg.inline(plots.sparsity_over_steps(metrics, results), "sparsity", "Sparsity and lambda by step")
            parts.append(web.plot(drawn, "Sparsity over the run", "Above: what is exactly zero; below: lambda."))
    if results.sparsity.layers:
        figure = plots.groups_per_layer(results)
        drawn = svg.inline(figure, "groups", "Groups of each layer, and how many are left")
        note = "What is not blue is zero, and removed by --job=compact."
        parts.append(web.plot(drawn, "Groups per layer", note, wide=figure.get_figwidth() > _WIDE))
    return f'<div class="plots">{"".join(parts)}</div>' if parts else ""


def _samples(workdir: pathlib.Path) -> str:
    """Return test images beside the labels and predictions of each task."""
    if not (workdir / "samples.npz").exists():
        return ""
    samples = records.read_samples(workdir)
    tasks = [key.removeprefix("label/") for key in samples if key.startswith("label/")]
    pixels = [task for task in tasks if samples[f"label/{task}"].ndim > 1]
    attributes = [task for task in tasks if task.startswith("attribute:")]
    head = ["", "image", *(f"{task}: {kind}" for task in pixels for kind in ("label", "prediction"))]
    lines, classes = [], set()
    for i, name in enumerate(samples["name"].tolist()):
        line = [web.text(name), web.image(samples["image"][i], f"image {name}", _IMAGE_WIDTH)]
        for task in pixels:
            label, prediction = samples[f"label/{task}"][i], samples[f"prediction/{task}"][i]
            pair = zip(("label", "prediction"), plots.pictures(label, prediction), strict=True)
            line += [web.image(shown, f"{task}: {kind} of {name}", _IMAGE_WIDTH) for kind, shown in pair]
            if np.issubdtype(label.dtype, np.integer):
                classes |= {int(index) for index in np.union1d(label, prediction)}
        lines.append([*line, _attributes(samples, attributes, i)] if attributes else line)
    names = dict(enumerate(samples.get("classes", ())))
    colors = plots.class_colors()
    entries = [(colors[index], names.get(index, f"class {index}")) for index in sorted(classes - {VOID})]
    grid = web.sample_table([*head, *["attributes (✗: wrong)"] * bool(attributes)], lines)
    return grid + (web.legend(entries) if entries else "")


def _attributes(samples, attributes, i):
    """Return the predicted probability of each attribute of an image as HTML, marked where it is wrong."""
    found = []
    for task in attributes:
        label, probability = samples[f"label/{task}"][i], float(samples[f"prediction/{task}"][i])
        wrong = label != VOID and (probability >= float(samples["threshold"])) != (label == 1)
        name = task.removeprefix("attribute:").replace("_", " ")
        found.append(web.text(f"{'✗ ' if wrong else ''}{name}: {100 * probability:.0f} %"))
    return "<br>".join(found)


def _costs(results: Results, layers: list[CompactLayer], timing: Timing | None) -> str:
    """Return plots and tables of what compaction removed, and of the time that the models take."""
    parts, details = [], ""
    figure = plots.costs(results, layers, timing)
    if figure is not None:
        drawn = svg.inline(figure, "sizes", "Parameters, operations and time, dense and compact", split=True)
        parts.append(web.plot(drawn, "Dense and compact", wide=True))
    if layers:
        figure = plots.compact_layers(layers)
        drawn = svg.inline(figure, "layers", "Operations of each layer, dense and compact")
        parts.append(web.plot(drawn, "MACs of each layer", wide=figure.get_figwidth() > _WIDE))
        rows = web.table(tables.compact_rows(layers))
        details += f"<details><summary>What was removed from each layer</summary>{rows}</details>"
    if timing is not None:
        drawn = svg.inline(plots.latency(timing), "latency", "Latency against operations", split=True)
        parts.append(web.plot(drawn, "Latency", "Median over the rounds, and the 90th percentile.", wide=True))
        rows = web.table(tables.speed_rows(timing.rows))
        details += f"<details><summary>All timings</summary>{rows}</details>"
    return f'<div class="plots">{"".join(parts)}</div>{details}' if parts else ""


def _settings(config: Mapping[str, Any]) -> str:
    """Return the table of the options that differ from the defaults."""
    # By its path: the script that trains may have another package named `configs`.
    default = records.flat(json.loads(runpy.run_path(str(_DEFAULTS))["get_config"]().to_json()))
    ours = records.flat(config)
    names = [name for name in ours | default if ours.get(name, "") != default.get(name, "")]
    lines: list[tuple[str, ...]] = [("option", "value", "default")]
    for name in sorted(names, key=lambda one: (one.startswith(_NOT_SETTINGS), one)):
        lines.append((name, *(_value(found.get(name, "")) for found in (ours, default))))
    if len(lines) == 1:
        return web.paragraph("All options have the defaults of configs/nyu.py.")
    note = f"The {len(lines) - 1} options that differ from configs/nyu.py; config.json has all."
    return web.paragraph(note, "note") + web.table(lines)


def _value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)
    return f"{text[:200]}..." if len(text) > 200 else text


def _commands(workdir: pathlib.Path, results: Results, progress: str) -> str:
    """Return the commands that continue from the run, to be run where launch.py is."""
    run = f"python launch.py {shlex.quote(f'--config=configs/run.py:{workdir}')}"
    resume = ("Resume training from the last checkpoint, after an interruption.", run)
    if not _is_finished(results):
        note = "" if progress else web.paragraph("This run has not finished.")
        return note + web.commands([resume])
    entries = [
        ("Remove the zero channels: the smaller model is a run in the folder compact.", f"{run} --job=compact"),
        ("Time the model dense, with its zeros, and compact.", f"{run} --job=benchmark"),
        ("Write the model as a file that runs without this package.", f"{run} --job=export"),
        ("Evaluate the best checkpoint again.", f"{run} --job=evaluate"),
        ("Resume a run that was interrupted; one that has finished is evaluated again.", run),
    ]
    if results.config["model"].get("widths"):  # it is compact
        entries = entries[1:]
    return web.commands(entries)
