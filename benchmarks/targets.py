"""Targets against what was reached: zero groups, multiply-accumulates and parameters, on three backbones.

    python launch.py --config=configs/sweeps.py:targets:demo --job=sweep --workdir=runs/targets
    python -m benchmarks.targets --sweep=runs/targets [--record=docs/benchmarks/targets.json]
    python -m benchmarks.targets --least

With `--least`: what is left where each penalized kernel keeps a single group, at the size of configs/nyu.py.

"Reached" is what the best checkpoint has: the fraction of groups that are zero, or of the multiply-accumulates or the
parameters of the trained model that its compact model has.
"""

import json
import pathlib
import time
from typing import Any

import jax
from absl import app, flags

from configs import sweeps
from mtl_sparse.jobs import sweep as sweep_lib
from mtl_sparse.report import tables
from mtl_sparse.report.schema import SIZE_TARGETS, Results
from mtl_sparse.training import groups


def row(results: Results) -> dict[str, Any]:
    """Return a run's network, groups, kind of target, target, and what was reached, as fractions."""
    model, sparsity = results.config["model"], results.config["sparsity"]
    network = f"ResNet-{model['depth']}" if model["backbone"] == "resnet" else model["backbone"]
    found = {"network": network, "groups": sparsity["groups"]}
    for option, size, text in SIZE_TARGETS:
        if sparsity.get(option):
            left = getattr(results.size.compact, size) / getattr(results.size.trained, size)
            return found | {"target": f"{text} left", "wanted": sparsity[option], "reached": left}
    return found | {"target": "zero groups", "wanted": sparsity["target"], "reached": results.sparsity.group}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [("network", "groups", "target", "wanted", "reached", "points off")]
    for one in rows:
        percent = [100 * one["wanted"], 100 * one["reached"]]
        texts = (f"{percent[0]:.0f} %", f"{percent[1]:.1f} %", f"{percent[1] - percent[0]:+.1f}")
        lines.append((one["network"], one["groups"], one["target"], *texts))
    return tables.markdown(lines)


def least() -> str:
    """Return the least that the same networks leave without zeroing whole kernels, as a Markdown table."""
    lines = [("network", "groups", "MACs left", "parameters left")]
    for trial in sweep_lib.make_trials(sweeps.get_config("targets"), sweeps.trials("targets")):
        model, sparsity = trial.config.model, trial.config.sparsity
        if sparsity.target:  # one trial for each network and kind of groups
            left = groups.least(trial.config)
            network = f"ResNet-{model.depth}" if model.backbone == "resnet" else model.backbone
            lines.append((network, sparsity.groups, *(f"{100 * left[key]:.1f} %" for key in ("macs", "parameters"))))
    return tables.markdown(lines)


def main(sweep: str, record: str) -> None:
    """Print the table, and write the numbers to a file if one is named."""
    paths = sorted(pathlib.Path(sweep).glob("*/results.json"))
    if not paths:
        raise SystemExit(f"expected finished runs of the sweep `targets` in {sweep}; train it first")
    found = {path.parent: Results.read(path) for path in paths}
    if dead := [str(folder) for folder, results in found.items() if results.size is None]:
        print(f"not shown, because every output of the model is constant: {', '.join(dead)}")
    runs = [results for results in found.values() if results.size is not None]
    rows = sorted(map(row, runs), key=lambda one: (one["network"], one["target"], one["groups"]))
    print(table(rows))
    if record:
        numbers = {"date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, "rows": rows}
        pathlib.Path(record).write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":  # here, because flags of other benchmarks have the same names
    _SWEEP = flags.DEFINE_string("sweep", "runs/targets", "Folder of the sweep.")
    _RECORD = flags.DEFINE_string("record", "", "A JSON file to write.")
    _LEAST = flags.DEFINE_bool("least", False, "Print the smallest reachable targets, without reading runs.")
    app.run(lambda _: print(least()) if _LEAST.value else main(_SWEEP.value, _RECORD.value))
