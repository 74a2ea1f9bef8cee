r"""Cost of a training step with each weighting of the tasks, against equal weights.

    python -m benchmarks.weighting [--size 96] [--batch 8] [--depth 18] [--rounds 9] \
        [--record docs/benchmarks/weighting.json]

Each kind of method is timed together with equal weights, one step of each in a round; ratios are medians over the
rounds. Methods by gradients are timed with the gradients of the backbone's parameters and with those of its features.
For the results of training, see the sweep `weighting`.
"""

import argparse
import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np

from benchmarks import ours
from mtl_sparse.report import tables
from mtl_sparse.runtime import environment, text
from mtl_sparse.tasks import weighting


def variants() -> list[tuple[str, str]]:
    """Return (method, gradients of) in the order of the table, "equal" first."""
    by_losses = [name for name in weighting.NAMES if name not in weighting.BY_GRADIENTS and name != "equal"]
    sources = [(name, source) for source in weighting.SOURCES for name in weighting.BY_GRADIENTS]
    return [("equal", "-"), *((name, "-") for name in by_losses), *sources]


def measure(names: list[tuple[str, str]], rounds: int, **shape: Any) -> list[dict[str, Any]]:
    """Return a row for each variant: median milliseconds, and the ratio to the first variant, round by round."""
    steps, eta = {}, text.Eta(len(names))
    for done, (name, source) in enumerate(names):
        loss = {"weighting": name} if source == "-" else {"weighting": name, "gradients_of": source}
        print(f"compiling {name} {source}, {eta.left(done)} left", flush=True)
        steps[name, source] = ours.training_step(loss=loss, **shape)
        steps[name, source]()
    seconds: dict[tuple[str, str], list[float]] = {variant: [] for variant in names}
    for _ in range(rounds):
        for variant, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[variant].append(time.perf_counter() - begin)
    base = np.array(seconds[names[0]])
    rows = []
    for (name, source), values in seconds.items():
        ratio = np.array(values) / base
        rows.append(
            {
                "weighting": name,
                "gradients_of": source,
                "median_ms": 1e3 * float(np.median(values)),
                "ratio": float(np.median(ratio)),
                "low": float(np.quantile(ratio, 0.1)),
                "high": float(np.quantile(ratio, 0.9)),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [("weighting", "gradients of", "ms", "of equal", "10 to 90 %")]
    for row in rows:
        spread = f"{row['low']:.2f} .. {row['high']:.2f}"
        shown = (row["weighting"], row["gradients_of"], f"{row['median_ms']:.0f}", f"{row['ratio']:.2f}", spread)
        lines.append(shown)
    return tables.markdown(lines)


def main() -> None:
    """Time all variants, print the table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--depth", type=int, default=18)
    parser.add_argument("--head_features", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--methods", nargs="*", choices=weighting.NAMES, help="besides equal; all if left out")
    parser.add_argument("--record", type=pathlib.Path)
    options = parser.parse_args()
    shape = {name: getattr(options, name) for name in ("size", "batch", "depth", "head_features")}
    chosen = [pair for pair in variants() if pair[0] == "equal" or not options.methods or pair[0] in options.methods]
    rows = []
    for source in ("-", *weighting.SOURCES):  # not all at once: a process can map only so many compiled programs
        part = [pair for pair in chosen[1:] if pair[1] == source]
        if part:
            found = measure([chosen[0], *part], options.rounds, **shape)
            rows += found[1:] if rows else found
            jax.clear_caches()
    print(table(rows))
    if options.record:
        header = {"date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, "cores": os.cpu_count()}
        record = {**header, "rounds": options.rounds, **shape, "rows": rows}
        options.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    environment.restart_tuned()
    main()
