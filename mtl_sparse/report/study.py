"""Several runs as one study: grouped over seeds, with mean and spread, the gain over single-task runs, paired tests."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from scipy import stats

from mtl_sparse.report import published, records
from mtl_sparse.runtime import files
from mtl_sparse.runtime.errors import UserError

# Metric of a task in the paper's tables, its name there, and whether more is better.
PAPER = {
    "segmentation": ("image_iou_stride8", "IoU", True),
    "normals": ("cosine", "CS", True),  # the released code resizes the prediction, not the label
    "depth": ("mae_normalized_stride8", "MAE", False),
    "edge": ("mae_stride8", "MAE", False),
}
_MOST_COLUMNS = 4  # of settings


@dataclasses.dataclass(frozen=True)
class Figure:
    """Mean and sample standard deviation (NaN of one value) over n seeds."""

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        values = np.asarray(values, np.float64)
        return cls(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan"), len(values))


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean of a - b over the n seeds that both have, its 95 % interval and p of the paired t test (NaN below 2)."""

    mean: float
    low: float
    high: float
    p: float
    n: int


@dataclasses.dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone.

    Attributes:
      settings: what tells this row from the others: dotted path -> value.
      tasks: of its runs.
      runs: seed -> contents of its results.json.
      folders: seed -> the run's folder.
      changes: those of `settings` that are others than in the study's first row.
    """

    settings: dict
    tasks: tuple[str, ...]
    runs: dict[int, dict]
    folders: dict[int, pathlib.Path]
    changes: dict = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> dict:
        return next(iter(self.runs.values()))["config"]

    @property
    def is_dense(self) -> bool:
        sparsity = self.config["sparsity"]
        return sparsity["lambda_"] == 0 and sparsity["target"] == 0

    @property
    def attach(self) -> list[str]:
        """Where each task's head reads; empty: all at the end."""
        return self.config["model"].get("attach", [])

    def values(self, task: str) -> dict[int, float]:
        """The task's metric on the test split by seed."""
        return {seed: run["test"][f"{task}/{metric(task, run)[0]}"] for seed, run in self.runs.items()}

    def figure(self, task: str) -> Figure:
        return Figure.of(list(self.values(task).values()))

    def sparsity(self, kind: str) -> Figure:
        """Zero fraction by kind: "group", or "parameter", those in zero groups (under l1, all that are zero)."""
        if kind == "parameter" and self.config["sparsity"]["penalty"] == "l1":
            kind = "weight"
        return Figure.of([run["sparsity"][kind] for run in self.runs.values()])

    def size(self, kind: str) -> Figure | None:
        """Millions of "parameters" or "macs" that compaction leaves of the whole model; None of a run without them."""
        if not all("size" in run for run in self.runs.values()):
            return None
        return Figure.of([run["size"]["compact"][kind] / 1e6 for run in self.runs.values()])

    @property
    def timings(self) -> list[dict]:
        """benchmark.json of those runs that --job=benchmark has timed."""
        paths = [folder / "benchmark.json" for folder in self.folders.values()]
        return [files.read_json(path) for path in paths if path.exists()]

    @property
    def published(self) -> dict | None:
        return published.lookup(self.config)


@dataclasses.dataclass(frozen=True)
class Study:
    """Rows of one data set, and the folders of a sweep that have no results yet."""

    rows: tuple[Row, ...]
    unfinished: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(task for row in self.rows for task in row.tasks))

    @property
    def is_ablation(self) -> bool:
        """Whether so many settings differ that rows are told by what they change of the first one."""
        return len(self.rows[0].settings.keys() - {"tasks"}) > _MOST_COLUMNS

    def gain(self, row: Row) -> Figure | None:
        """Delta_m in percent over the row's seeds: the mean over tasks of the relative gain on the single-task runs.

        Sum_i s_i (M_i - S_i) / S_i over the number of tasks, S_i the mean of the dense single-task runs and s_i = -1
        where less is better (Maninis et al. 2019, arXiv 1904.08918). None for one task, or without such runs.
        """
        if len(row.tasks) < 2:
            return None
        gains = collections.defaultdict(list)
        for task in row.tasks:
            base = self._single(row, task)
            if base is None:
                return None
            sign = 1 if metric(task, next(iter(row.runs.values())))[2] else -1
            for seed, value in row.values(task).items():
                gains[seed].append(sign * (value - base.figure(task).mean) / base.figure(task).mean)
        return Figure.of([100 * float(np.mean(values)) for values in gains.values()])

    def _single(self, row, task):
        rows = [one for one in self.rows if one.tasks == (task,) and one.is_dense]
        free = ("tasks", "model.attach", "loss.weights", "sparsity.")
        return next((one for one in rows if _alike(one, row, free)), None)

    def plain(self, row: Row) -> Row | None:
        """The row whose heads all read the end of the backbone, with the same settings otherwise."""
        rows = [one for one in self.rows if not one.attach and one is not row]
        return next((one for one in rows if _alike(one, row, ("model.attach",))), None)

    def dense(self, row: Row) -> Row | None:
        """The row without a penalty that has the same settings otherwise; none of `sparsity` says anything there."""
        rows = [one for one in self.rows if one.is_dense and one is not row]
        return next((one for one in rows if _alike(one, row, ("sparsity.",))), None)


def _alike(a, b, free):
    """Whether two rows have the same settings, but for those whose names begin with one of `free`."""
    names = [name for name in a.settings | b.settings if not name.startswith(free)]
    return all(a.settings.get(name) == b.settings.get(name) for name in names)


def metric(task: str, run: dict) -> tuple[str, str, bool]:
    """(name in results.json, name in the paper, whether more is better) of the metric that tables show of a task."""
    if task in PAPER:
        return PAPER[task]
    headline = run["headlines"][task]
    name = headline["metric"].removeprefix(f"{task}/")
    return name, name, headline["higher_is_better"]


def compare(row: Row, base: Row, task: str) -> Difference:
    """`row` minus `base` in a task's metric, paired over their common seeds."""
    ours, theirs = row.values(task), base.values(task)
    return _difference([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def compare_gain(row: Row, base: Row) -> Difference:
    """Delta_m of `row` over `base` in percent, paired over their common seeds, in the tasks of both.

    The mean over tasks of s_i (M_i - B_i) / B_i, B_i the same seed's run of `base`, s_i = -1 where less is better.
    """
    gains = collections.defaultdict(list)
    for task in [task for task in row.tasks if task in base.tasks]:
        ours, theirs = row.values(task), base.values(task)
        sign = 1 if metric(task, next(iter(row.runs.values())))[2] else -1
        for seed in sorted(ours.keys() & theirs.keys()):
            gains[seed].append(100 * sign * (ours[seed] - theirs[seed]) / theirs[seed])
    return _difference([np.mean(values) for values in gains.values()])


def _difference(pairs) -> Difference:
    pairs = np.array(pairs)
    if len(pairs) == 0:
        return Difference(*[float("nan")] * 4, 0)
    mean = float(pairs.mean())
    if len(pairs) < 2 or np.ptp(pairs) == 0:
        return Difference(mean, *[float("nan")] * 3, len(pairs))
    half = stats.t.ppf(0.975, len(pairs) - 1) * pairs.std(ddof=1) / np.sqrt(len(pairs))
    return Difference(mean, mean - half, mean + half, float(stats.ttest_1samp(pairs, 0).pvalue), len(pairs))


def read(folders: Sequence[str | pathlib.Path]) -> Study:
    """The study of some runs and sweeps.

    Args:
      folders: of runs, or of sweeps, whose unfinished runs are left out and named.

    Raises:
      UserError: a folder that is neither, or of a run that has not finished; no finished run; several data sets; two
        runs of the same settings and seed.
    """
    found, unfinished = {}, []
    for folder in map(pathlib.Path, folders):
        folder = folder.expanduser()
        if (folder / "sweep.json").exists():
            for name in files.read_json(folder / "sweep.json")["trials"]:
                if records.is_finished(folder / name):
                    found[folder / name] = files.read_json(folder / name / "results.json")
                else:
                    unfinished.append(name)
        elif (folder / "results.json").exists():
            found[folder] = files.read_json(folder / "results.json")
        else:
            kind = "a run that has not finished" if (folder / "config.json").exists() else "neither a run nor a sweep"
            raise UserError(f"{folder} holds {kind}; leave it out, or give its command again")
    if not found:
        raise UserError(f"none of the {len(unfinished)} runs has finished; give the sweep's command again")
    names = sorted({run["config"]["data"]["name"] for run in found.values()})
    if len(names) > 1:
        raise UserError(f"these runs are of several data sets ({', '.join(names)}): make one table of each")
    return Study(_rows(found), tuple(unfinished))


def _rows(found):
    flat = {folder: _settings(run["config"]) for folder, run in found.items()}
    keys = sorted({key for settings in flat.values() for key in settings})
    for key in keys:  # a run from before a setting was made is one where it does nothing, by 0 or False
        nothing = next((of[key] for of in flat.values() if key in of and not of[key]), None)
        for settings in flat.values():
            settings.setdefault(key, nothing)
    example = next((settings for settings in flat.values() if not records.is_dense(settings)), {})
    for settings in flat.values():
        if records.is_dense(settings):  # what does nothing there tells it from no other
            settings |= {name: value for name, value in example.items() if is_idle(name)}
    differing = [key for key in keys if len({json.dumps(settings.get(key)) for settings in flat.values()}) > 1]
    rows = {}
    for folder, run in found.items():
        settings = {key: flat[folder].get(key) for key in differing}
        tasks = tuple(run["config"]["tasks"])
        row = rows.setdefault(json.dumps(settings), Row(settings, tasks, {}, {}))
        if run["seed"] in row.runs:
            raise UserError(f"{folder} and {row.folders[run['seed']]} are the same run twice: leave one out")
        row.runs[run["seed"]], row.folders[run["seed"]] = run, folder
    first, *others = rows.values()
    changed = ({name: value for name, value in row.settings.items() if value != first.settings[name]} for row in others)
    return first, *(dataclasses.replace(row, changes=of) for row, of in zip(others, changed, strict=True))


def is_idle(name: str) -> bool:
    """Whether a setting does nothing in a dense run."""
    return name.startswith("sparsity.") and name not in ("sparsity.lambda_", "sparsity.target")


def _settings(config):
    """The settings that tell one row from another: all that change results, but the seed."""
    return {name: value for name, value in records.settings(config).items() if name != "seed"}
