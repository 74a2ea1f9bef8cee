"""Ways to prune at equal multiply-accumulates: metrics, and the speed of the compact models in one alternation.

    python launch.py --config=configs/sweeps.py:groups:demo --job=sweep --workdir=runs/groups
    python -m benchmarks.groups --sweep=runs/groups [--rounds=15] [--record=docs/benchmarks/groups.json]
    python -m benchmarks.groups --draw=docs/benchmarks/groups.json

Also for the sweeps `baselines` and `pretrained`. Each row is one way to prune, over the seeds that it and the dense
model have finished; single-task runs are left out. Delta m is the mean over the tasks of the relative change of the
main metric against the dense run of the same seed, better being positive. The compact models of the first seed that all
rows have are timed together with its dense one, round by round. A second table compares each row's Delta m, seed by
seed, with that of the best row of those with the most seeds. A record is drawn beside it, as groups.png: Delta m
against the multiply-accumulates that are left, and against the milliseconds of each batch size.
"""

import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from configs import run as run_config
from mtl_sparse.compaction import speed
from mtl_sparse.report import plots, schema, study, tables
from mtl_sparse.report.schema import Results
from mtl_sparse.runtime import environment
from mtl_sparse.training import setup

DENSE, QUARTER = "dense", 0.25
WEIGHTS = {"sqrt_size": "by size", "macs": "by MACs", "none": "weighted alike"}


def form(results: Results) -> str:
    """Return the name of a run's row."""
    sparsity = schema.migrate("config", results.config)["sparsity"]
    how = sparsity.get("prune")
    if sparsity["lambda_"] == 0 and not how:
        return DENSE
    if how and how not in schema.IMPORTANCES:
        return f"{sparsity['groups']} groups, zeros of a pruned run from the start"
    if not any(sparsity.get(name) for name in ("target", "target_macs", "target_params")):
        return f"lambda {sparsity['lambda_']:g}"
    way = f"pruned at once by {how}" if how else WEIGHTS[sparsity["group_weights"]]
    if not how:
        way = f"ℓ0, {way}" if sparsity.get("penalty") == "group_l0" else way
        metric = sparsity.get("metric", "adaptive")
        way += f", {metric} metric" if metric != "adaptive" else ""
        held = f", {sparsity['norm']} norm" if sparsity.get("norm", "initial") != "initial" else ""
        way += held if sparsity.get("fixed_norm", True) else ", no fixed norm"
        way += ", debiased" if sparsity.get("debias_at") else ""
    macs = sparsity.get("target_macs")
    wanted = f", {100 * macs:g} % of the MACs" if macs and macs != QUARTER else ""
    return f"{sparsity['groups']} groups, {way}{wanted}"


def finished(sweep: pathlib.Path) -> dict[str, dict[int, pathlib.Path]]:
    """Return form -> seed -> folder of the finished runs, for the seeds that the dense model has, too."""
    read = {path.parent: Results.read(path) for path in sorted(sweep.glob("*/results.json"))}
    runs = {folder: results for folder, results in read.items() if len(results.headlines) > 1}
    if dead := [str(folder) for folder, results in runs.items() if results.size is None]:
        print(f"not shown, because every output of the model is constant: {', '.join(dead)}")
        runs = {folder: results for folder, results in runs.items() if results.size is not None}
    widths = {folder: results.config["model"].get("width", 0) for folder, results in runs.items()}
    found: dict[str, dict[int, pathlib.Path]] = {}
    for folder, results in runs.items():
        narrow = f", width {widths[folder]}" if widths[folder] < max(widths.values()) else ""
        ways = found.setdefault(form(results) + narrow, {})
        if results.seed in ways:
            raise SystemExit(
                f"expected one run of {form(results)} with seed {results.seed}, got {ways[results.seed]} and {folder}; "
                "move one of them out of the folder"
            )
        ways[results.seed] = folder
    dense = found.get(DENSE, {})
    shown = {name: {seed: its[seed] for seed in sorted(its.keys() & dense.keys())} for name, its in found.items()}
    if not dense or not all(shown.values()):
        lacking = sorted(name for name, its in shown.items() if not its)
        raise SystemExit(
            f"expected finished runs of a sweep in {sweep}, each with a dense one of its seed, which is missing for "
            f"{', '.join(lacking) or 'all'}; train it first"
        )
    if left_out := {
        name: sorted(its.keys() - dense.keys()) for name, its in found.items() if its.keys() - dense.keys()
    }:
        print(f"not shown, because the dense model lacks these seeds: {left_out}")
    return shown


def delta_m(results: Results, dense: Results) -> float:
    """Return the mean over the tasks of the relative change against the dense run, in percent; better is positive."""
    changes = []
    for headline in results.headlines.values():
        ours, theirs = results.test[headline.metric], dense.test[headline.metric]
        changes.append((1 if headline.higher_is_better else -1) * (ours - theirs) / (abs(theirs) or np.nan))
    return 100 * float(np.mean(changes))


def summary(folders: dict[str, dict[int, pathlib.Path]]) -> list[dict[str, Any]]:
    """Return for each form its metrics, what is zero and what compaction leaves: lists over the seeds."""
    runs = {
        name: {seed: Results.read(path / "results.json") for seed, path in its.items()} for name, its in folders.items()
    }
    rows = []
    for name, by_seed in runs.items():
        its = list(by_seed.values())
        sizes = [one.size for one in its]
        rows.append(
            {
                "form": name,
                "seeds": [one.seed for one in its],
                "metrics": {h.metric: [one.test[h.metric] for one in its] for h in its[0].headlines.values()},
                "delta_m": [delta_m(one, runs[DENSE][seed]) for seed, one in by_seed.items()],
                "zero_groups": [one.sparsity.group for one in its],
                "macs_left": [size.compact.macs / size.trained.macs for size in sizes],
                "parameters_left": [size.compact.parameters / size.trained.parameters for size in sizes],
            }
        )
    return rows


def timed_seed(folders: dict[str, dict[int, pathlib.Path]]) -> int:
    """Return the first seed that all rows have."""
    seeds = set.intersection(*(set(its) for its in folders.values()))
    if not seeds:
        raise SystemExit("expected a seed that all rows have, to time their models; train it first, or use --rounds=0")
    return min(seeds)


def timings(folders: dict[str, dict[int, pathlib.Path]], batches: list[int], rounds: int) -> dict[str, dict[str, Any]]:
    """Return form -> {"batch B": {"speedup", "median_ms"}} of the whole compact models of `timed_seed`."""
    seed = timed_seed(folders)
    models, size = {}, None
    for name, its in sorted(folders.items(), key=lambda item: item[0] != DENSE):
        folder = its[seed]
        config = run_config.get_config(str(folder))
        model, variables = setup.load_model(folder, config)
        size = tuple(config.data.size)
        models[name] = (model, variables) if name == DENSE else setup.compact(config, model, variables)
    found: dict[str, dict[str, Any]] = {name: {} for name in models}
    for batch in batches:
        for row in speed.compare(models, size, batch, rounds, parts=("model",)):
            found[row["model"]][f"batch {batch}"] = {"speedup": row["speedup"], "median_ms": row["median_ms"]}
    return found


def table(rows: list[dict[str, Any]], times: dict[str, dict[str, Any]], seed: int = 0) -> str:
    """Return the record as a Markdown table; `seed` is that of the models which were timed."""
    metrics = list(rows[0]["metrics"])
    batches = list(next(iter(times.values())))
    lines = [
        (
            "",
            "seeds",
            *metrics,
            "Δm % (95 % interval)",
            "MACs left",
            "parameters left",
            *(f"speed-up, {b} (of MAC ratio)" for b in batches),
        )
    ]
    for row in sorted(rows, key=lambda row: row["form"] != DENSE):
        speedups = [times[row["form"]][batch]["speedup"] for batch in batches]
        ratio = 1 / row["macs_left"][row["seeds"].index(seed)] if batches else 1
        is_dense = row["form"] == DENSE
        lines.append(
            (
                row["form"],
                str(len(row["seeds"])),
                *(_over_seeds(row["metrics"][name], 4) for name in metrics),
                "" if is_dense else with_interval(row["delta_m"]),
                "" if is_dense else f"{_over_seeds([100 * x for x in row['macs_left']], 1)} %",
                "" if is_dense else f"{_over_seeds([100 * x for x in row['parameters_left']], 1)} %",
                *("1" if is_dense else f"{value:.2f} ({value / ratio:.2f})" for value in speedups),
            )
        )
    return tables.markdown(lines)


def behind_best(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: Delta m of the best row minus that of each other row, paired over their common seeds.

    The best row is one of those that have the most seeds.
    """
    pruned = [row for row in rows if row["form"] != DENSE and np.isfinite(np.mean(row["delta_m"]))]
    if not pruned:
        return ""
    most = max(len(row["seeds"]) for row in pruned)
    best = max((row for row in pruned if len(row["seeds"]) == most), key=lambda row: np.mean(row["delta_m"]))
    gains = dict(zip(best["seeds"], best["delta_m"], strict=True))
    lines = [(f"points of Δm behind: {best['form']}", "seeds", "mean (95 % interval)")]
    for row in sorted(pruned, key=lambda row: -np.mean(row["delta_m"])):
        pairs = [gains[seed] - own for seed, own in zip(row["seeds"], row["delta_m"], strict=True) if seed in gains]
        if row is not best and pairs:
            lines.append((row["form"], str(len(pairs)), with_interval(pairs)))
    return tables.markdown(lines)


def draw(record: pathlib.Path) -> pathlib.Path:
    """Plot Delta m of each row against the MACs left and, where models were timed, against milliseconds.

    Bars are 95 % intervals over the seeds, for rows that have several. The milliseconds are those of one seed.

    Args:
      record: a file that `main` wrote.

    Returns:
      The path of the plot: that of the record, with the suffix png.
    """
    found = json.loads(record.read_text())
    rows, times = sorted(found["rows"], key=lambda row: row["form"] != DENSE), found["times"]
    panels = {"% of the dense model's MACs left": lambda row: 100 * float(np.mean(row["macs_left"]))}
    for batch in next(iter(times.values()), {}):
        label = "ms per image" if batch == "batch 1" else f"ms per batch of {batch.removeprefix('batch ')}"
        panels[label] = lambda row, batch=batch: times[row["form"]][batch]["median_ms"]
    figure = plots.new_figure(figsize=(4.2 * len(panels), 4.2 + 0.2 * len(rows)))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (label, cost) in zip(axes, panels.items(), strict=True):
        for i, row in enumerate(rows):
            style = {"color": plots.COLORS[i % len(plots.COLORS)], "fmt": "os^D"[i // len(plots.COLORS) % 4]}
            of = study.difference(row["delta_m"])
            error = [[of.mean - of.low], [of.high - of.mean]] if np.isfinite(of.low) and row["form"] != DENSE else None
            name = f"{row['form']} ({len(row['seeds'])} seeds)" if len(row["seeds"]) > 1 else f"{row['form']} (1 seed)"
            axis.errorbar([cost(row)], [of.mean], yerr=error, capsize=3, label=name, **style)
        axis.axhline(0, color="#9aa5b1", linewidth=0.8, zorder=0)
        axis.set(xlabel=label, xlim=(0, None))
    axes[0].set_ylabel("Δm over the dense model, % (higher is better)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", frameon=False, fontsize=8)
    return plots.save(plots.plain(figure), record.with_suffix(".png"))


def _over_seeds(values: list[float], digits: int) -> str:
    """Return the mean, and the standard deviation where there are several values."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def with_interval(values: list[float]) -> str:
    """Return the mean and its 95 % interval, if it has one."""
    found = study.difference(values)
    interval = f" ({found.low:+.1f} to {found.high:+.1f})" if np.isfinite(found.low) else ""
    return f"{found.mean:+.1f}{interval}"


def main(sweep: str, batches: list[int], rounds: int, record: str) -> None:
    """Print the table, and write the numbers to a file if one is named."""
    folders = finished(pathlib.Path(sweep))
    rows = summary(folders)
    times = timings(folders, batches, rounds) if rounds else {name: {} for name in folders}
    seed = timed_seed(folders) if rounds else 0
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}; {rounds} rounds\n{table(rows, times, seed)}")
    if len(rows) > 2:
        print(f"\n{behind_best(rows)}")
    if record:
        numbers = {"date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, "rounds": rounds, "timed_seed": seed}
        pathlib.Path(record).write_text(json.dumps(numbers | {"rows": rows, "times": times}, indent=1) + "\n")
        print(f"plot: {draw(pathlib.Path(record))}")


if __name__ == "__main__":  # here, because flags of other benchmarks have the same names
    environment.restart_tuned()
    _SWEEP = flags.DEFINE_string("sweep", "runs/groups", "Folder of the sweep.")
    _BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Images in a call, each timed.")
    _ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed calls of each model; 0: from results.json alone.")
    _RECORD = flags.DEFINE_string("record", "", "A JSON file to write.")
    _DRAW = flags.DEFINE_string("draw", "", "A record to draw, instead of reading runs.")
    app.run(
        lambda _: (
            print(draw(pathlib.Path(_DRAW.value)))
            if _DRAW.value
            else main(_SWEEP.value, [int(x) for x in _BATCHES.value], _ROUNDS.value, _RECORD.value)
        )
    )
