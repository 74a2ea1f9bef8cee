"""A training step with and without the options that this package chooses for a CPU, three tasks.

    python -m benchmarks.options [--size 128] [--batch 4] [--backbone resnet] [--record FILE]

Every row is timed in alternation with the choices of launch.py, each in its own process. A ratio above 1 means that the
row is slower.
"""

import argparse
import datetime
import json
import pathlib

import numpy as np

from benchmarks import peers
from mtl_sparse.report.tables import markdown
from mtl_sparse.runtime import environment

CHOSEN = "as chosen"
KEPT = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.arena_max=1"
ROWS = {  # name: (environment variables, settings of the step)
    "4 KiB pages": ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, {}),
    "huge pages, kept after each call": ({"GLIBC_TUNABLES": f"{environment.HUGE_PAGES}:{KEPT}"}, {}),
    "convolutions by YNNPACK": (
        {"XLA_FLAGS": f"{environment.LIBRARY}=+LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"},
        {},
    ),
    "XLA's convolutions, no taps and no products": ({}, {"plain": True}),
}


def measure(rounds: int, rows=tuple(ROWS), **settings) -> dict:
    """Return a record: the seconds of each round of the chosen options and of some `rows`, and the settings."""
    rows = {CHOSEN: ({}, {}), **{name: ROWS[name] for name in rows}}
    pairs = {name: ("benchmarks.ours", "training_step", settings | more) for name, (_, more) in rows.items()}
    seconds = peers.alternate(pairs, rounds, variables={name: variables for name, (variables, _) in rows.items()})
    return {
        "date": f"{datetime.date.today()}",
        "settings": settings,
        "seconds": {name: list(map(float, values)) for name, values in seconds.items()},
    }


def table(record: dict) -> str:
    """Return a record as a Markdown table."""
    chosen = np.array(record["seconds"][CHOSEN])
    lines = [("", "ms", "ratio to the chosen", "10 to 90 %")]
    for name, values in record["seconds"].items():
        ratio = np.array(values) / chosen
        low, high = np.quantile(ratio, [0.1, 0.9])
        lines.append((name, f"{1e3 * np.median(values):.0f}", f"{np.median(ratio):.2f}", f"{low:.2f} .. {high:.2f}"))
    return markdown(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=4, help="images in a step")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each row")
    parser.add_argument("--backbone", default="resnet", help="model.backbone")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), help="rows to time")
    parser.add_argument("--record", type=pathlib.Path, help="JSON file for the record")
    arguments = parser.parse_args()
    shape = {"size": arguments.size, "batch": arguments.batch, "backbone": arguments.backbone}
    found = measure(arguments.rounds, arguments.rows, **shape)
    if arguments.record:
        arguments.record.write_text(json.dumps(found) + "\n")
    print(table(found))
