"""The report of a study: tables in three formats, plots, and one HTML page that holds all of them."""

import os
import pathlib
from collections.abc import Sequence

from absl import logging

from mtl_sparse.report import run_page, study_names, study_plots, study_tables, svg, web
from mtl_sparse.report import study as study_lib
from mtl_sparse.runtime import files

_TITLES = {
    "summary": "All rows",
    "protocol": "Beside published figures",
    "against_dense": "Sparse minus dense",
    "against_first": "Rows minus the first one",
    "against_plain": "Heads at their tasks' layers minus all at the end",
    "weightings": "Weightings",
    "parts": "What compaction removes of each part",
    "speed": "Speed-up",
}
_NOTES = {
    "protocol": "Their protocols differ: A and B are not comparable (docs/protocols.md).",
    "against_dense": "Paired over seeds, with the 95 % interval and p of the t test; better: at p < 0.05.",
    "against_first": "Paired over seeds, with the 95 % interval and p of the t test; better: at p < 0.05.",
    "against_plain": "Paired over seeds, with the 95 % interval and p of the t test; better: at p < 0.05.",
    "weightings": "Mean gain over dense single-task runs, and rank, at each sparsity.",
    "parts": "Percent of parameters and MACs of the backbone, of each head, and of the whole model.",
    "speed": "Of the compact models over dense ones, in the runs that --job=benchmark has timed.",
}
_TABLES = {name: getattr(study_tables, name) for name in _TITLES}
_WIDE = 6  # inches from which a plot takes the whole width of the page
_IMAGE_WIDTH, _SHORT = 128, 8  # pixels; rows of images that are shown at once


def write(folders: Sequence[str | pathlib.Path], out: str | pathlib.Path) -> pathlib.Path:
    """Write the report of some runs and sweeps: index.html, summary.*, other tables and plots/.

    Args:
      folders: folders of runs and sweeps.
      out: folder of the report.

    Returns:
      The path of index.html, which is readable offline.

    Raises:
      UserError: as `study.read`.
    """
    study = study_lib.read(folders)
    out = pathlib.Path(out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    if study.unfinished:
        logging.warning(
            "%d runs have not finished and are left out, such as %s", len(study.unfinished), study.unfinished[:3]
        )
    tables = {name: rows for name, make in _TABLES.items() if len(rows := make(study)) > 1}
    formats = {"md": study_tables.to_markdown, "csv": study_tables.to_csv, "tex": study_tables.to_latex}
    for name, rows in tables.items():
        for suffix, write_as in formats.items():
            files.write_text(out / f"{name}.{suffix}", write_as(rows) + ("\n" if suffix == "md" else ""))
    drawn = study_plots.figures(study)
    study_plots.save(drawn, out / "plots")
    page = out / "index.html"
    files.write_text(page, _html(study, list(tables), drawn, out))
    print("\n\n".join(map(study_tables.to_markdown, tables.values())))
    print(f"\ntables and plots, and a page with all of them: {page}")
    return page


def _html(study: study_lib.Study, tables: Sequence[str], drawn: Sequence[study_plots.Plot], out: pathlib.Path) -> str:
    count = sum(len(row.runs) for row in study.rows)
    sections = [
        web.Section("plots", "Plots", f'<div class="plots">{"".join(map(_plot, drawn))}</div>'),
        web.Section("predictions", "Predictions", _predictions(study)),
    ]
    for name in tables:
        note = _NOTES.get(name) or f"{_note(study)} Compact: size of the model after exact compaction."
        body = web.paragraph(note, "note") + web.table(_with_named_rows(study, name))
        sections.append(web.Section(name, _TITLES[name], body))
    sections.append(web.Section("rows", "What the rows are", _rows(study, out)))
    return web.document(f"{count} runs on {_data(study)}", _lead(study), sections)


def _with_named_rows(study, name):
    return _TABLES[name](study) if name == "weightings" else _TABLES[name](study, named=True)


def _data(study):
    config = study.rows[0].config
    embedded = config["data"]["embedded"]["frames"]
    height, width = config["data"]["size"]
    of = f"{embedded} embedded images, " if embedded else ""
    return f"{config['data']['name']} ({of}{height}x{width})"


def _lead(study):
    seeds = sorted({len(row.runs) for row in study.rows})
    counts = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    left_out = f" {len(study.unfinished)} runs have not finished and are left out." if study.unfinished else ""
    tasks = ", ".join(task.removeprefix("attribute:") for task in study.tasks)
    return web.paragraph(
        f"{len(study.rows)} rows; tasks: {tasks}. Rows are runs that differ in their seed only, {counts} "
        f"seed{'s' if counts != '1' else ''} each; values are means ± standard deviations over seeds on the test split."
        + left_out
    ) + web.paragraph("Point at a plot to see its values; click a column's head to sort by it.", "note")


def _plot(one: study_plots.Plot) -> str:
    if one.name == "predictions":
        return ""
    wide = len(one.figure.axes) > 1 or one.figure.get_figwidth() > _WIDE
    drawn = svg.inline(one.figure, one.name, one.title, split=one.split)
    return web.plot(drawn, one.title, one.note, wide=wide)


def _predictions(study):
    """Return the predictions of each row's first run as a grid of images."""
    found, columns = study_plots.predicted(study)
    if not columns:
        return ""
    lines = []
    names = study_names.names(study)
    for i, samples in found.items():
        place, cells = samples["name"].tolist().index, [web.text(names[i])]
        for task, name in columns:
            pixels = study_plots.prediction(samples, task, place(name))
            cells.append("" if pixels is None else web.image(pixels, f"{task} of {name}", _IMAGE_WIDTH))
        lines.append(cells)
    grid = web.sample_table(["", *(f"{task}, image {name}" for task, name in columns)], lines)
    summary = "The first run of each row on the same test images"
    return f"<details{' open' if len(lines) <= _SHORT else ''}><summary>{summary}</summary>{grid}</details>"


def _rows(study, out):
    """Return the table of what each row's name stands for: its options and its runs."""
    options = sorted(study.rows[0].settings.keys() - {"tasks"})
    lines = [("row", "tasks", "options", "seeds")]
    for name, row in zip(study_names.names(study), study.rows, strict=True):
        texts = [f"{one}={study_names.setting(row, one)}" for one in options if study_names.setting(row, one)]
        seeds = ", ".join(map(str, sorted(row.runs)))
        lines.append((name, study_names.show(row.tasks), ", ".join(texts), seeds))
    pages = [
        web.link(os.path.relpath(path, out), f"{name}, seed {seed}")
        for name, row in zip(study_names.names(study), study.rows, strict=True)
        for seed, folder in sorted(row.folders.items())
        if (path := run_page.path(folder)).exists()
    ]
    links = f'<p class="note">Pages of the runs: {" · ".join(pages)}</p>' if pages else ""
    return f"<details><summary>Options of each row, and the runs</summary>{web.table(lines)}{links}</details>"


def _note(study):
    """Return how Delta_m and the metrics of this study are to be read."""
    if study.has_several_metrics:
        return (
            "Δm: mean over tasks of the mean over their metrics of the relative gain over dense single-task runs; by "
            "metric, the mean over all metrics. Metrics are at the resolution of the labels."
        )
    return (
        "Δm: mean over tasks of the relative gain over dense single-task runs. Metrics are at the resolution of the "
        "prediction, normals at that of the input, as in the paper."
    )
