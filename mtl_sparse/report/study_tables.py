"""A study's tables: in the paper's form, and dense against sparse, as Markdown, CSV and LaTeX."""

import csv
import io
import math

from mtl_sparse.report import study as study_lib
from mtl_sparse.report.tables import markdown

Rows = list[tuple[str, ...]]  # the first is the head


def summary(study: study_lib.Study) -> Rows:
    """Settings, metrics, zero groups, parameters in them, Delta_m and seeds of each row; below, the paper's figures."""
    names = settings_names(study)
    any_run = {task: next(iter(row.runs.values())) for row in study.rows for task in row.tasks}
    head = [short(name) for name in names]
    for task in study.tasks:
        _, name, higher = study_lib.metric(task, any_run[task])
        head.append(f"{task.removeprefix('attribute:')} {name} {'↑' if higher else '↓'}")
    head += ["% groups zero", "% parameters", "Δm %", "seeds"]
    lines = [tuple(head)]
    for row in study.rows:
        cells = [setting(row, name) for name in names]
        cells += [spread(row.figure(task)) if task in row.tasks else "" for task in study.tasks]
        cells += [spread(row.sparsity(kind), 100, 2) for kind in ("group", "parameter")]
        gain = study.gain(row)
        lines.append((*cells, spread(gain, 1, 2) if gain else "", str(len(row.runs))))
        if row.published:
            theirs = row.published["tasks"]
            cells = ["published", *[""] * (len(names) - 1)]
            cells += ["{:.4f} ± {:.4f}".format(*theirs[task]) if task in theirs else "" for task in study.tasks]
            cells += [f"{100 * row.published[kind]:.2f}" for kind in ("group", "parameter")]
            lines.append((*cells, "", "5"))
    return lines


def against_dense(study: study_lib.Study) -> Rows:
    """Each sparse row minus the dense one with the same settings otherwise, metric by metric, paired over seeds."""
    names = settings_names(study)
    lines = [(*map(short, names), "metric", "sparse - dense", "95 % interval", "p", "seeds", "better")]
    for row in study.rows:
        base = study.dense(row)
        if row.is_dense or base is None:
            continue
        for task in row.tasks:
            found = study_lib.compare(row, base, task)
            _, name, higher = study_lib.metric(task, next(iter(row.runs.values())))
            known = math.isfinite(found.p)
            lines.append(
                (
                    *(setting(row, key) for key in names),
                    f"{task.removeprefix('attribute:')} {name}",
                    f"{found.mean:+.4f}",
                    f"{found.low:+.4f} to {found.high:+.4f}" if known else "",
                    f"{found.p:.3f}" if known else "",
                    str(found.n),
                    "sparse" if (found.mean > 0) == higher and found.mean else "dense" if found.mean else "equal",
                )
            )
    return lines


def settings_names(study) -> list[str]:
    """The tasks and the settings that differ between rows."""
    return ["tasks", *sorted(study.rows[0].settings.keys() - {"tasks"})]


def setting(row, name: str) -> str:
    """A setting of a row as a table shows it."""
    return show(row.tasks if name == "tasks" else row.settings[name])


def short(name: str) -> str:
    return name.rpartition(".")[2].rstrip("_")


def show(value) -> str:
    if isinstance(value, list | tuple):
        return " + ".join(str(part).removeprefix("attribute:") for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def spread(figure: study_lib.Figure, scale: float = 1.0, digits: int = 4) -> str:
    """Text "mean ± std", or the value alone of one seed."""
    mean = f"{scale * figure.mean:.{digits}f}"
    return f"{mean} ± {scale * figure.std:.{digits}f}" if figure.n > 1 else mean


def to_csv(rows: Rows) -> str:
    """Comma-separated; mean and standard deviation stay one cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def to_latex(rows: Rows) -> str:
    """A booktabs tabular."""
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
    return markdown(rows)
