"""Time of a training step by image size, batch size, number of tasks, depth, and number of virtual devices.

    python -m benchmarks.scaling [--rounds 3]

Each row changes one option of the base: ResNet-50, three tasks, 128x128, batch 4. The devices are virtual devices of
one CPU, so their rows show the overhead of splitting a batch, not a speed-up.
"""

import argparse
import os

import numpy as np
from absl import logging

from benchmarks import ours, peers
from mtl_sparse.report.tables import markdown

BASE = {"size": 128, "batch": 4}
ROWS = {
    "base": {},
    "64x64": {"size": 64},
    "256x256": {"size": 256},
    "batch 1": {"batch": 1},
    "batch 8": {"batch": 8},
    "one task": {"names": ours.TASKS[:1]},
    "two tasks": {"names": ours.TASKS[:2]},
    "ResNet-18": {"depth": 18},
    "ResNet-101": {"depth": 101},
    "2 devices": {"devices": 2},
    "4 devices": {"devices": 4},
}


def on_devices(*, devices: int = 1, **settings):
    """Return `ours.training_step` on virtual CPU devices; call it before JAX is initialized.

    Args:
      devices: number of virtual devices.
      **settings: arguments of `ours.training_step`.
    """
    if devices > 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return ours.training_step(**settings)


def table(rounds: int, rows=ROWS, **base) -> str:
    """Time each row in alternation with the base.

    Args:
      rounds: timed calls of each step.
      rows: name -> options that differ from the base.
      **base: options that replace those of `BASE`.

    Returns:
      A Markdown table.
    """
    base = {**BASE, **base}
    lines = [("", "ms", "of the base", "10 to 90 %", "GMAC/s")]
    for name, change in rows.items():
        settings = {**base, **change}
        make = "benchmarks.scaling", "on_devices"
        pair = {"base": (*make, base), name: (*make, settings)}
        seconds = peers.alternate(pair, rounds)
        ratio, median = seconds[name] / seconds["base"], float(np.median(seconds[name]))
        low, high = np.quantile(ratio, [0.1, 0.9])
        model = {key: value for key, value in settings.items() if key not in ("batch", "devices")}
        work = 3 * settings["batch"] * ours.macs(**model) / 1e9
        lines.append((name, f"{1e3 * median:.0f}", f"{np.median(ratio):.2f}", f"{low:.2f} .. {high:.2f}",
                      f"{work / median:.0f}"))  # fmt: skip
        logging.info("%s: %s ms, %s of the base", *lines[-1][:3])
    return markdown(lines)


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each step")
    print(table(parser.parse_args().rounds))
