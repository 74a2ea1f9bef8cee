"""Several runs as one study: grouped over seeds, with mean and standard deviation, gains, and paired tests."""

import dataclasses
import json
import pathlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from mtl_sparse.report import protocols, published, records
from mtl_sparse.report.schema import Results, Sweep, Timing
from mtl_sparse.runtime.errors import UserError

# Metric of a task in the paper's tables, its name there, and whether higher is better.
PAPER = {
    "segmentation": ("image_iou_stride8", "IoU", True),
    "normals": ("cosine", "CS", True),  # the reference implementation resizes the prediction, not the label
    "depth": ("mae_normalized_stride8", "MAE", False),
    "edge": ("mae_stride8", "MAE", False),
}
_TASK_LOSSES = ("loss.label_smoothing", "loss.pos_weight", "loss.threshold")  # options that are not of the weighting
_MOST_COLUMNS = 4  # of options


@dataclasses.dataclass(frozen=True)
class Figure:
    """Mean and sample standard deviation (NaN for one value) over n seeds."""

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """Return the figure of some values."""
        array = np.asarray(values, np.float64)
        return cls(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else float("nan"), len(array))


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean of a - b over the n seeds of both, its 95 % interval and p of the paired t test (NaN below 2 seeds)."""

    mean: float
    low: float
    high: float
    p: float
    n: int


@dataclasses.dataclass(frozen=True)
class Row:
    """Runs that differ in their seed only.

    Attributes:
      settings: options that distinguish this row from the others: dotted path -> value.
      tasks: tasks of its runs.
      runs: seed -> results.
      folders: seed -> the run's folder.
      changes: those of `settings` that differ from the study's first row.
    """

    settings: dict[str, Any]
    tasks: tuple[str, ...]
    runs: dict[int, Results]
    folders: dict[int, pathlib.Path]
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def any_run(self) -> Results:
        """The results of its first run."""
        return next(iter(self.runs.values()))

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of its first run; the others differ in their seed, and in options without an effect."""
        return self.any_run.config

    @property
    def is_dense(self) -> bool:
        """Whether its runs have no penalty and no pruning."""
        sparsity = self.config["sparsity"]
        return sparsity["lambda_"] == 0 and sparsity["target"] == 0 and not sparsity.get("prune")

    @property
    def is_equal(self) -> bool:
        """Whether the losses of its tasks are added as they are."""
        return self.config["loss"]["weighting"] == "equal"

    @property
    def attach(self) -> list[str]:
        """Attachment point of each task's head; empty if all heads are at the end."""
        return self.config["model"].get("attach", [])

    def values(self, task: str, key: str = "") -> dict[int, float]:
        """Return a metric of the task on the test split by seed; "" is the first of `metrics`."""
        return {seed: run.test[f"{task}/{key or metric(task, run)[0]}"] for seed, run in self.runs.items()}

    def figure(self, task: str, key: str = "") -> Figure:
        """Return a metric of the task on the test split over seeds; for `key`, see `values`."""
        return Figure.of(list(self.values(task, key).values()))

    def sparsity(self, kind: str) -> Figure:
        """Return the zero fraction over seeds.

        Args:
          kind: "group", or "parameter" for the parameters in zero groups; under l1, all parameters that are zero.
        """
        if kind == "parameter" and self.config["sparsity"]["penalty"] == "l1":
            kind = "weight"
        found = [getattr(run.sparsity, kind) for run in self.runs.values()]
        return Figure.of([float("nan") if value is None else value for value in found])

    def size(self, kind: str) -> Figure | None:
        """Return millions of "parameters" or "macs" of the whole compact model; None if a run has no sizes."""
        compact = [run.size.compact for run in self.runs.values() if run.size is not None]
        if len(compact) < len(self.runs):
            return None
        return Figure.of([getattr(size, kind) / 1e6 for size in compact])

    def removed(self) -> dict[tuple[str, str], Figure]:
        """Return the percentage that compaction removes, by (part, "parameters" or "macs"); {} if a run lacks it.

        The parts are "backbone" and the heads, such as "head_depth", and "model" is the whole.
        """
        found: dict[tuple[str, str], list[float]] = {}
        for run in self.runs.values():
            if run.size is None or run.size.trained.parts is None or run.size.compact.parts is None:
                return {}
            after = {"model": run.size.compact, **run.size.compact.parts}
            for part, before in {**run.size.trained.parts, "model": run.size.trained}.items():
                for kind in ("parameters", "macs"):
                    left = getattr(after[part], kind) if part in after else 0
                    if getattr(before, kind):
                        found.setdefault((part, kind), []).append(100 - 100 * left / getattr(before, kind))
        return {name: Figure.of(values) for name, values in found.items()}

    @property
    def timings(self) -> list[Timing]:
        """The timings of those runs that --job=benchmark has timed."""
        paths = [folder / "benchmark.json" for folder in self.folders.values()]
        return [Timing.read(path) for path in paths if path.exists()]

    @property
    def published(self) -> published.Published | None:
        """The row of the paper's tables with the same options."""
        return published.lookup(self.config)


@dataclasses.dataclass(frozen=True)
class Study:
    """Rows of one data set, and the trials of sweeps that have no results yet."""

    rows: tuple[Row, ...]
    unfinished: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of all rows."""
        return tuple(dict.fromkeys(task for row in self.rows for task in row.tasks))

    @property
    def is_ablation(self) -> bool:
        """Whether so many options differ that rows are named by their changes relative to the first row."""
        return len(self.rows[0].settings.keys() - {"tasks"}) > _MOST_COLUMNS

    @property
    def name(self) -> str:
        """The name of the data set."""
        return self.rows[0].config["data"]["name"]

    @property
    def has_several_metrics(self) -> bool:
        """Whether tables show more than one metric of a task."""
        return any(len(self.metrics(task)) > 1 for task in self.tasks)

    def metric(self, task: str) -> tuple[str, str, bool]:
        """Return the metric that plots show of a task, see `metric`."""
        return self.metrics(task)[0]

    def metrics(self, task: str) -> tuple[tuple[str, str, bool], ...]:
        """Return the metrics that tables show of a task, see `metrics`."""
        return metrics(task, next(row.any_run for row in self.rows if task in row.tasks))

    def gain(self, row: Row, *, by_metric: bool = False) -> Figure | None:
        """Return Delta_m in percent over the row's seeds: the mean relative gain over the single-task runs.

        It is the mean over tasks of the mean over a task's metrics of s (M - S) / |S|, where S is the mean of the dense
        single-task runs and s = -1 if lower is better (Maninis et al. 2019, arXiv 1904.08918, with one metric a task;
        LibMTL with all).

        Args:
          row: the row.
          by_metric: whether each metric has the same weight, not each task, as in MTAN's line of papers (Nash-MTL,
            CAGrad).

        Returns:
          None for one task, or without such runs.
        """
        bases = {task: self._single(row, task) for task in row.tasks}
        if len(row.tasks) < 2 or any(base is None for base in bases.values()):
            return None

        def single(task: str, key: str, seed: int) -> float:
            del seed
            return bases[task].figure(task, key).mean

        return Figure.of(list(_gains(row, row.tasks, row.runs, single, by_metric).values()))

    def equal(self, row: Row) -> Row | None:
        """Return the dense row with equal loss weights and otherwise the same options; None for that row itself."""
        rows = [one for one in self.rows if one.is_dense and one.is_equal]
        found = next((one for one in rows if _alike(one, row, ("loss.", "sparsity."), _TASK_LOSSES)), None)
        return None if found is row else found

    def weightings(self) -> dict[str, dict[str, Row]]:
        """Return {sparsity: {weighting: row}} for the rows with all tasks; {} for fewer than three weightings.

        A sparsity is named "dense" or by its options, such as "target 0.7".
        """
        found: dict[str, dict[str, Row]] = {}
        for row in self.rows:
            options = {name: value for name, value in row.settings.items() if name.startswith("sparsity.")}
            set_to = [f"{name.rpartition('.')[2].rstrip('_')} {value}" for name, value in options.items() if value]
            name = "dense" if row.is_dense else ", ".join(reversed(set_to))
            if len(row.tasks) > 1 and set(row.tasks) == set(self.tasks):
                found.setdefault(name, {}).setdefault(row.config["loss"]["weighting"], row)
        return found if max(map(len, found.values()), default=0) > 2 else {}

    def _single(self, row, task):
        """Return the dense row of a task alone: with the row's weighting, or else with the task's loss as it is."""
        rows = [one for one in self.rows if one.tasks == (task,) and one.is_dense]
        free = ("tasks", "model.attach", "loss.weights", "sparsity.")
        same = next((one for one in rows if _alike(one, row, free)), None)
        plain = (one for one in rows if one.is_equal and _alike(one, row, (*free, "loss."), _TASK_LOSSES))
        return same or next(plain, None)

    def plain(self, row: Row) -> Row | None:
        """Return the row with the same options, but all heads at the end of the backbone."""
        rows = [one for one in self.rows if not one.attach and one is not row]
        return next((one for one in rows if _alike(one, row, ("model.attach",))), None)

    def dense(self, row: Row) -> Row | None:
        """Return the row with the same options, but without a penalty; other options of `sparsity` may differ."""
        rows = [one for one in self.rows if one.is_dense and one is not row]
        return next((one for one in rows if _alike(one, row, ("sparsity.",))), None)


def _alike(a, b, free, kept=()):
    """Return whether two rows have the same options, except those whose names begin with `free` and are not `kept`."""
    names = [name for name in a.settings | b.settings if name in kept or not name.startswith(free)]
    return all(a.settings.get(name) == b.settings.get(name) for name in names)


def _gains(row, tasks, seeds, base, by_metric=False):
    """Return {seed: percent of gain}; `base` is a function (task, key of a metric, seed) -> value to compare with.

    The gain is relative to the magnitude of that value. It is NaN for a value of 0, such as the IoU of a model that
    failed.
    """
    found = {}
    for seed in seeds:
        run, parts = row.runs[seed], []
        for task in tasks:
            pairs = [(run.test[f"{task}/{key}"], base(task, key, seed), up) for key, _, up in metrics(task, run)]
            parts.append(
                [100 * (1 if up else -1) * (value - other) / (abs(other) or np.nan) for value, other, up in pairs]
            )
        means = [value for part in parts for value in part] if by_metric else [np.mean(part) for part in parts]
        found[seed] = float(np.mean(means))
    return found


def metrics(task: str, run: Results) -> tuple[tuple[str, str, bool], ...]:
    """Return the metrics that tables show of a task: (name in results.json, name in tables, higher is better).

    They are those of the data set's protocol if the run has them, otherwise the paper's or the task's headline.
    """
    named = protocols.METRICS.get(run.config["data"]["name"], {}).get(task, ())
    if named and all(f"{task}/{metric.key}" in run.test for metric in named):
        return named
    if task in PAPER:
        return (PAPER[task],)
    headline = run.headlines[task]
    name = headline.metric.removeprefix(f"{task}/")
    return ((name, name, headline.higher_is_better),)


def metric(task: str, run: Results) -> tuple[str, str, bool]:
    """Return the first of `metrics`."""
    return metrics(task, run)[0]


def compare(row: Row, base: Row, task: str, key: str = "") -> Difference:
    """Return `row` minus `base` in a task's metric, paired over their common seeds; for `key`, see `Row.values`."""
    ours, theirs = row.values(task, key), base.values(task, key)
    return difference([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def compare_gain(row: Row, base: Row) -> Difference:
    """Return Delta_m of `row` over `base` in percent, paired over their common seeds, in the tasks of both.

    Like `Study.gain`, but with the same seed's run of `base` in place of the single-task runs.
    """
    return difference(gains_over(row, base))


def gains_over(row: Row, base: Row) -> list[float]:
    """Return the values of which `compare_gain` is the mean: one for each common seed."""
    tasks = [task for task in row.tasks if task in base.tasks]
    seeds = sorted(row.runs.keys() & base.runs.keys())

    def other(task: str, key: str, seed: int) -> float:
        return base.runs[seed].test[f"{task}/{key}"]

    return list(_gains(row, tasks, seeds, other).values())


def rank_correlation(a: Mapping[str, Figure], b: Mapping[str, Figure]) -> float:
    """Return Spearman's correlation of the means of the names that both have; NaN for fewer than three."""
    names = [name for name in a if name in b]
    if len(names) < 3:
        return float("nan")
    return float(stats.spearmanr([a[name].mean for name in names], [b[name].mean for name in names]).statistic)


def difference(values: Sequence[float]) -> Difference:
    """Return the mean of paired differences, its 95 % interval and p of the t test."""
    pairs = np.array(values)
    nan = float("nan")
    if len(pairs) == 0:
        return Difference(nan, nan, nan, nan, 0)
    mean = float(pairs.mean())
    if len(pairs) < 2 or np.ptp(pairs) == 0:
        return Difference(mean, nan, nan, nan, len(pairs))
    half = stats.t.ppf(0.975, len(pairs) - 1) * pairs.std(ddof=1) / np.sqrt(len(pairs))
    return Difference(mean, mean - half, mean + half, float(stats.ttest_1samp(pairs, 0).pvalue), len(pairs))


def read(folders: Sequence[str | pathlib.Path]) -> Study:
    """Return the study of some runs and sweeps.

    Args:
      folders: folders of runs, or of sweeps, whose unfinished runs are left out and listed in `Study.unfinished`.

    Raises:
      UserError: FOLDER_NOT_A_RUN for a folder that is neither; RUN_NOT_FINISHED for an unfinished run, or if no run
        has finished; STUDY_SEVERAL_DATA_SETS; STUDY_RUN_TWICE for two runs with the same options and seed.
    """
    found: dict[pathlib.Path, Results] = {}
    unfinished = []
    for folder in (pathlib.Path(folder).expanduser() for folder in folders):
        if (folder / "sweep.json").exists():
            for name in Sweep.read(folder / "sweep.json").trials:
                if records.is_finished(folder / name):
                    found[folder / name] = Results.read(folder / name / "results.json")
                else:
                    unfinished.append(name)
        elif records.is_finished(folder):
            found[folder] = Results.read(folder / "results.json")
        elif (folder / "config.json").exists():
            raise UserError(
                "RUN_NOT_FINISHED", f"the run in {folder} has not finished; leave it out, or run its command again"
            )
        else:
            raise UserError(
                "FOLDER_NOT_A_RUN",
                f"expected the folder of a run or a sweep, got {folder}, without a results.json or sweep.json; "
                "leave it out",
            )
    if not found:
        raise UserError(
            "RUN_NOT_FINISHED", f"none of the {len(unfinished)} runs has finished; run the sweep's command again"
        )
    names = sorted({run.config["data"]["name"] for run in found.values()})
    if len(names) > 1:
        raise UserError(
            "STUDY_SEVERAL_DATA_SETS",
            f"expected runs on one data set, got {', '.join(names)}; make a report for each data set",
        )
    return Study(_rows(found), tuple(unfinished))


def _rows(found: Mapping[pathlib.Path, Results]) -> tuple[Row, ...]:
    options = _of_any_source({folder: _distinguishing(run.config) for folder, run in found.items()}, found)
    keys = sorted({key for one in options.values() for key in one})
    for key in keys:  # in a run made before an option existed, the option has no effect: as with 0 or False
        nothing = next((one[key] for one in options.values() if key in one and not one[key]), None)
        for one in options.values():
            one.setdefault(key, nothing)
    example: dict[str, Any] = next((one for one in options.values() if not records.is_dense(one)), {})
    for one in options.values():
        if records.is_dense(one):  # options without an effect do not distinguish it from others
            one |= {name: value for name, value in example.items() if is_idle(name)}
    differing = [key for key in keys if len({json.dumps(one.get(key)) for one in options.values()}) > 1]
    rows: dict[str, Row] = {}
    for folder, run in found.items():
        settings = {key: options[folder].get(key) for key in differing}
        row = rows.setdefault(json.dumps(settings), Row(settings, tuple(run.config["tasks"]), {}, {}))
        if run.seed in row.runs:
            raise UserError(
                "STUDY_RUN_TWICE",
                f"{folder} and {row.folders[run.seed]} have the same options and seed; leave one of them out",
            )
        row.runs[run.seed], row.folders[run.seed] = run, folder
    first, *others = rows.values()
    changed = ({name: value for name, value in row.settings.items() if value != first.settings[name]} for row in others)
    return first, *(dataclasses.replace(row, changes=of) for row, of in zip(others, changed, strict=True))


def is_idle(name: str) -> bool:
    """Return whether an option has no effect in a dense run."""
    return name.startswith("sparsity.") and name not in ("sparsity.lambda_", "sparsity.target", "sparsity.prune")


def _distinguishing(config):
    """Return the options that distinguish one row from another: all that change results, except the seed."""
    return {name: value for name, value in records.settings(config).items() if name != "seed"}


def _of_any_source(options: Mapping[pathlib.Path, dict[str, Any]], found: Mapping[pathlib.Path, Results]):
    """Return the options, with one name for the sources of zeros that differ in their seed: `.../seed=*`.

    So runs that reuse the zeros of `.../seed=0` and `.../seed=1` belong to one row, unless two of them have the same
    seed.
    """
    pooled = {
        folder: one | {"sparsity.prune": re.sub(r"(?<=seed=)\d+", "*", prune)}
        for folder, one in options.items()
        if (prune := one.get("sparsity.prune"))
    }
    names = {folder: json.dumps(one, sort_keys=True) for folder, one in pooled.items()}
    counts = Counter((name, found[folder].seed) for folder, name in names.items())
    twice = {name for (name, _), count in counts.items() if count > 1}
    return {**options, **{folder: one for folder, one in pooled.items() if names[folder] not in twice}}
