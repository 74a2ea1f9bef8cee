"""The report of a study: tables in three formats, plots, and one HTML page that holds all of them."""

import base64
import html
import pathlib
from collections.abc import Sequence

from absl import logging

from mtl_sparse.report import study as study_lib
from mtl_sparse.report import study_plots, study_tables

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2em auto; max-width: 75em }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums } img { max-width: 100% }
td, th { padding: .25em .8em; text-align: left; border-bottom: 1px solid #ddd } tr.published td { color: #777 }"""

_TITLES = {
    "protocol": "Ours beside published figures, whose protocols differ: A and B are not comparable (docs/protocols.md)",
    "against_dense": "Sparse minus dense, paired over seeds",
    "against_first": "Rows minus the first one, paired over seeds",
    "against_plain": "Heads at their tasks' layers minus all at the end, paired over seeds",
    "weightings": "Weightings of the tasks: mean gain over dense single-task runs, at each sparsity",
    "speed": "Speed-up of the compact models over dense ones",
}


def write(folders: Sequence[str | pathlib.Path], out: str | pathlib.Path) -> pathlib.Path:
    """Write the report of some runs and sweeps: index.html, summary.*, other tables and plots/.

    Args:
      folders: of runs and sweeps.
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
    tables = {
        "summary": study_tables.summary(study),
        "protocol": study_tables.protocol(study),
        "against_dense": study_tables.against_dense(study),
        "against_first": study_tables.against_first(study),
        "against_plain": study_tables.against_plain(study),
        "weightings": study_tables.weightings(study),
        "speed": study_tables.speed(study),
    }
    tables = {name: rows for name, rows in tables.items() if len(rows) > 1}
    formats = {"md": study_tables.to_markdown, "csv": study_tables.to_csv, "tex": study_tables.to_latex}
    for name, rows in tables.items():
        for suffix, write_as in formats.items():
            (out / f"{name}.{suffix}").write_text(write_as(rows) + ("\n" if suffix == "md" else ""))
    figures = study_plots.draw(study, out / "plots")
    page = out / "index.html"
    page.write_text(_html(study, tables, figures))
    print("\n\n".join(map(study_tables.to_markdown, tables.values())))
    print(f"\ntables and plots, and a page with all of them: {page}")
    return page


def _html(study, tables, figures):
    config = study.rows[0].config
    count = sum(len(row.runs) for row in study.rows)
    left_out = f", {len(study.unfinished)} unfinished and left out" if study.unfinished else ""
    embedded = config["data"]["embedded"]["frames"]
    data = f"{config['data']['name']}{f', {embedded} embedded images' if embedded else ''}"
    parts = [
        f"<p>{count} runs{left_out}; data: {html.escape(data)}. Mean ± standard deviation over seeds, test split.</p>"
    ]
    parts.append(_table(tables["summary"]))
    parts.append(f"<p>{_note(study)} Compact: size of the model after exact compaction.</p>")
    for name, title in _TITLES.items():
        if name in tables:
            parts += [f"<h2>{title}</h2>", _table(tables[name])]
    for title, path in figures.items():
        image = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f'<h2>{html.escape(title)}</h2><img alt="{html.escape(title)}" src="data:image/png;base64,{image}">'
        )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>mtl-sparse: {count} runs</title>'
        f"<style>{_STYLE}</style><h1>{count} runs</h1>{''.join(parts)}</html>\n"
    )


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


def _table(rows):
    def line(cells, tag):
        kind = ' class="published"' if cells[0].startswith("published") else ""
        return f"<tr{kind}>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{line(rows[0], 'th')}{''.join(line(cells, 'td') for cells in rows[1:])}</table>"
