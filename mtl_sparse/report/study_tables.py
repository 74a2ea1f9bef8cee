"""Tables of a study: in the paper's form, and rows relative to a base, as Markdown, CSV and LaTeX."""

import csv
import io
import math
from collections.abc import Mapping

from mtl_sparse.report import protocols, study_names
from mtl_sparse.report import study as study_lib
from mtl_sparse.report.study_names import setting, settings_names, short
from mtl_sparse.report.tables import markdown

Rows = list[tuple[str, ...]]  # the first one is the head
SIZES = ("compact M parameters", "compact M MACs")


def _keys(study: study_lib.Study, named: bool) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the head and the cells of each row that tell the rows apart: its name, or its options."""
    if named:
        return ("row",), [(name,) for name in study_names.names(study)]
    options = settings_names(study)
    return tuple(map(short, options)), [tuple(setting(row, name) for name in options) for row in study.rows]


def summary(study: study_lib.Study, *, named: bool = False) -> Rows:
    """Return metrics, sparsity, size of the compact model, Delta_m and number of seeds of each row.

    Rows that the paper has are followed by the paper's figures.

    Args:
      study: any study.
      named: whether rows begin with a name, see `study_names.names`, or with the options that tell them apart.
    """
    keys, cells_of = _keys(study, named)
    head = [*keys]
    columns = _columns(study)
    head += [name for name, *_ in columns]
    gains = {"Δm %": False} | ({"Δm by metric %": True} if study.has_several_metrics else {})
    head += ["% groups zero", "% parameters", *SIZES, *gains, "seeds"]
    lines: Rows = [tuple(head)]
    for row, key in zip(study.rows, cells_of, strict=True):
        cells = [*key, *_metric_cells(row, columns)]
        cells += [mean_and_std(row.sparsity(kind), 100, 2) for kind in ("group", "parameter")]
        figures = [(row.size("parameters"), 2), (row.size("macs"), 1)]
        figures += [(study.gain(row, by_metric=by_metric), 2) for by_metric in gains.values()]
        for figure, digits in figures:
            cells.append(mean_and_std(figure, 1, digits) if figure else "")
        lines.append((*cells, str(len(row.runs))))
        if row.published:
            theirs = row.published.tasks
            cells = ["published", *[""] * (len(keys) - 1)]
            cells += ["{:.4f} ± {:.4f}".format(*theirs[task]) if task in theirs else "" for task in study.tasks]
            cells += [f"{100 * value:.2f}" for value in (row.published.group, row.published.parameter)]
            lines.append((*cells, *[""] * len(SIZES), "", "5"))
    return lines


def protocol(study: study_lib.Study, *, named: bool = False) -> Rows:
    """Return our rows on a data set of `protocols` with all its tasks, followed by the published figures.

    Gains are in percent, higher is better: Δm over single tasks, with the same weight for each metric or each task, and
    the gain over the dense row with equal loss weights. For any other data set, only the head is returned.
    """
    known = protocols.METRICS.get(study.name, {})
    columns = _columns(study)
    head = (
        "protocol",
        "row",
        *(name for name, *_ in columns),
        "Δm by metric %",
        "Δm %",
        "% over equal weights",
        "source",
    )
    lines: Rows = [head]
    rows = [row for row in study.rows if known and row.tasks and set(row.tasks) == set(known)]
    for row in rows:
        base = study.equal(row)
        gains = [study.gain(row, by_metric=True), study.gain(row)]
        cells = [mean_and_std(gain, 1, 2) if gain else "" for gain in gains]
        cells.append(f"{study_lib.compare_gain(row, base).mean:+.2f}" if base else "")
        names = [name for name in settings_names(study) if name != "tasks"]
        text = ", ".join(f"{short(name)} {setting(row, name)}" for name in names if setting(row, name)) or "ours"
        text = study_names.name(study, row) if named else text
        lines.append(
            (
                "ours",
                text,
                *_metric_cells(row, columns),
                *cells,
                f"{len(row.runs)} seed{'s' if len(row.runs) > 1 else ''}",
            )
        )
    for one in protocols.PUBLISHED.get(study.name, ()) if rows else ():
        values = dict(zip(_flat(known), one.values, strict=True)) if one.values else {}
        cells = [f"{values[task, key]:.4f}" if values else "" for _, task, key in columns]
        cells += [f"{gain:+.2f}" if gain is not None else "" for gain in (one.gain, None, one.over_equal)]
        lines.append((f"published, {one.protocol}", one.method, *cells, one.source))
    return lines


def _flat(known):
    """Return (task, key) of each metric of a protocol, in its order."""
    return [(task, metric.key) for task, metrics in known.items() for metric in metrics]


def _columns(study):
    """Return (head, task, key of the metric) of each metric that tables show."""
    return [
        (f"{task.removeprefix('attribute:')} {name} {'↑' if higher else '↓'}", task, key)
        for task in study.tasks
        for key, name, higher in study.metrics(task)
    ]


def _metric_cells(row, columns):
    return [mean_and_std(row.figure(task, key)) if task in row.tasks else "" for _, task, key in columns]


def parts(study: study_lib.Study, *, named: bool = False) -> Rows:
    """Return the percentage of parameters and MACs that compaction removes from the backbone and from each head.

    Rows of which it removes nothing, and rows without the sizes of the parts, are left out.
    """
    keys, cells_of = _keys(study, named)
    all_rows = {i: row.removed() for i, row in enumerate(study.rows)}
    removed = {i: found for i, found in all_rows.items() if any(figure.mean for figure in found.values())}
    names = list(dict.fromkeys(part for found in removed.values() for part, _ in found))
    columns = [(part, kind) for kind in ("parameters", "macs") for part in names]
    lines = [(*keys, *[f"{part} % {'MACs' if kind == 'macs' else kind}" for part, kind in columns], "seeds")]
    for i, found in removed.items():
        cells = [mean_and_std(found[column], 1, 1) if column in found else "" for column in columns]
        lines.append((*cells_of[i], *cells, str(len(study.rows[i].runs))))
    return lines


def against_dense(study: study_lib.Study, *, named: bool = False) -> Rows:
    """Return the differences of each sparse row from the dense row with the same options, paired over seeds."""
    rows = {i: study.dense(row) for i, row in enumerate(study.rows) if not row.is_dense}
    return _against(study, rows, ("sparse", "dense"), named)


def against_plain(study: study_lib.Study, *, named: bool = False) -> Rows:
    """Return the differences of each row with attachment points from the row with all heads at the end."""
    rows = {i: study.plain(row) for i, row in enumerate(study.rows) if row.attach}
    return _against(study, rows, ("LOMT", "plain"), named)


def against_first(study: study_lib.Study, *, named: bool = False) -> Rows:
    """Return, for an ablation, the differences of each row from the first one in the tasks of both.

    Leaves out the rows that `against_dense` compares with the first one.
    """
    first, *others = study.rows
    bases = {i: first for i, row in enumerate(others, 1) if study.is_ablation and study.dense(row) is not first}
    return _against(study, bases, ("row", "first"), named)


def weightings(study: study_lib.Study) -> Rows:
    """Return Delta_m of each weighting and its rank, at each sparsity; the best of the first sparsity comes first.

    The last line has Spearman's rank correlation of each sparsity with the first. Without gains over single-task runs,
    or for fewer than three weightings, only the head is returned.
    """
    gains = {
        name: {method: gain for method, row in rows.items() if (gain := study.gain(row))}
        for name, rows in study.weightings().items()
    }
    gains = {name: found for name, found in gains.items() if found}
    if not gains:
        return [("weighting",)]
    first = next(iter(gains.values()))
    lines: Rows = [("weighting", *(head for name in gains for head in (f"Δm %, {name}", "rank")))]
    ranks = {
        name: {method: i for i, method in enumerate(sorted(found, key=lambda one: -found[one].mean), 1)}
        for name, found in gains.items()
    }
    for method in sorted(first, key=lambda one: -first[one].mean):
        cells = [
            (mean_and_std(found[method], 1, 2), str(ranks[name][method])) if method in found else ("", "")
            for name, found in gains.items()
        ]
        lines.append((method, *(cell for pair in cells for cell in pair)))
    correlations = [study_lib.rank_correlation(first, found) for found in gains.values()]
    lines.append(("rank correlation", *(cell for value in correlations for cell in (f"{value:.2f}", ""))))
    return lines


def speed(study: study_lib.Study, *, named: bool = False) -> Rows:
    """Return the speed-up of the compact models over dense ones, in the runs that --job=benchmark has timed.

    Each line is a row at one batch size: the MACs of the dense backbone divided by those of the compact one, and the
    speed-up of backbone and model.
    """
    keys, cells_of = _keys(study, named)
    lines = [(*keys, "batch", "backbone MAC ratio", "backbone speed-up", "model speed-up", "runs")]
    for row, key in zip(study.rows, cells_of, strict=True):
        entries = [entry for timing in row.timings for entry in timing.rows]
        for batch in sorted({entry.batch for entry in entries}):
            of = {
                (part, model): [e for e in entries if (e.part, e.model, e.batch) == (part, model, batch)]
                for part in ("backbone", "model")
                for model in ("dense", "compact")
            }
            pairs = zip(of["backbone", "dense"], of["backbone", "compact"], strict=True)
            figures = [study_lib.Figure.of([dense.macs / max(compact.macs, 1) for dense, compact in pairs])]
            figures += [study_lib.Figure.of([e.speedup for e in of[part, "compact"]]) for part in ("backbone", "model")]
            lines.append((*key, str(batch), *[mean_and_std(figure, 1, 2) for figure in figures], str(figures[0].n)))
    return lines


def _against(
    study: study_lib.Study, bases: Mapping[int, study_lib.Row | None], sides: tuple[str, str], named: bool
) -> Rows:
    """Return a line for each metric of each row, and one for Delta_m if there are several tasks.

    Args:
      study: the study that has the rows.
      bases: index in `study.rows` -> the row to compare it with, or None.
      sides: names in the table of the rows and of the bases; one of them is "better" at p < 0.05.
      named: as `summary`.
    """
    (keys, cells_of), (ours, theirs) = _keys(study, named), sides
    lines = [(*keys, "metric", f"{ours} - {theirs}", "95 % interval", "p", "seeds", "better")]
    for i, base in bases.items():
        row = study.rows[i]
        if base is None:
            continue
        found = []
        for task in [task for task in row.tasks if task in base.tasks]:
            for key, name, higher in study_lib.metrics(task, row.any_run):
                difference = study_lib.compare(row, base, task, key)
                found.append((f"{task.removeprefix('attribute:')} {name}", higher, difference, 4))
        if len({*row.tasks} & {*base.tasks}) > 1:
            found.append(("Δm %", True, study_lib.compare_gain(row, base), 2))
        for name, higher, difference, digits in found:
            known = math.isfinite(difference.p)
            winner = ours if (difference.mean > 0) == higher else theirs
            lines.append(
                (
                    *cells_of[i],
                    name,
                    f"{difference.mean:+.{digits}f}",
                    f"{difference.low:+.{digits}f} to {difference.high:+.{digits}f}" if known else "",
                    f"{difference.p:.3f}" if known else "",
                    str(difference.n),
                    (winner if difference.p < 0.05 else "neither") if known else "",
                )
            )
    return lines


def mean_and_std(figure: study_lib.Figure, scale: float = 1.0, digits: int = 4) -> str:
    """Return "mean ± standard deviation", or the value alone for one seed."""
    mean = f"{scale * figure.mean:.{digits}f}"
    return f"{mean} ± {scale * figure.std:.{digits}f}" if figure.n > 1 else mean


def to_csv(rows: Rows) -> str:
    """Return comma-separated values; mean and standard deviation share a cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def to_latex(rows: Rows) -> str:
    """Return a LaTeX tabular for the package booktabs."""
    escapes = {"%": r"\%", "_": r"\_", "±": r"$\pm$", "Δm": r"$\Delta_m$", "↑": r"$\uparrow$", "↓": r"$\downarrow$"}

    def line(cells):
        text = " & ".join(cells)
        for plain, latex in escapes.items():
            text = text.replace(plain, latex)
        return text + r" \\"

    columns = "l" * len(rows[0])
    body = [line(cells) for cells in rows]
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", body[0], r"\midrule", *body[1:], r"\bottomrule",
                      r"\end{tabular}"]) + "\n"  # fmt: skip


def to_markdown(rows: Rows) -> str:
    """Return a Markdown table."""
    return markdown(rows)
