"""`--job=benchmark`: latency, throughput and memory of a run's model: dense, with its zeros, and compact."""

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from mtl_sparse.compaction import speed
from mtl_sparse.report import plots, records, run_page, tables
from mtl_sparse.report.schema import Timing, TimingRow
from mtl_sparse.runtime import environment, progress
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.training import groups
from mtl_sparse.training import setup as setup_lib


def is_done(config, workdir: pathlib.Path) -> bool:
    """Return whether a run was timed with the config's options on this device."""
    path = workdir / "benchmark.json"
    if not path.exists():
        return False
    found = Timing.read(path)
    done = found.device, found.rounds, {row.batch for row in found.rows}, found.compact
    return done == (device(), config.benchmark.rounds, set(config.benchmark.batch_sizes), _compact_options(config))


def _compact_options(config) -> dict[str, Any]:
    return json.loads(config.compact.to_json())


def device() -> str:
    """Return the device, the version of JAX, and whether huge pages are on: all change the timings of a CPU."""
    huge = jax.default_backend() == "cpu" and environment.HUGE_PAGES in os.environ.get("GLIBC_TUNABLES", "")
    return f"{jax.devices()[0].device_kind}, JAX {jax.__version__}{', huge pages' if huge else ''}"


def batch_sizes(config) -> tuple[int, ...]:
    """Return the batch sizes to time.

    Raises:
      UserError: OPTION_OUT_OF_RANGE for benchmark.batch_sizes or benchmark.rounds.
    """
    sizes, rounds = tuple(config.benchmark.batch_sizes), config.benchmark.rounds
    if not sizes or min(sizes) < 1 or rounds < 1:
        raise UserError(
            "OPTION_OUT_OF_RANGE",
            f"expected numbers of at least 1, got benchmark.batch_sizes={sizes}, benchmark.rounds={rounds}",
        )
    return sizes


def run_job(config, workdir: str | pathlib.Path) -> list[dict]:
    """Time the dense, sparse and compact model of a run; write benchmark.json and plots/latency.png.

    Returns:
      The rows of benchmark.json.

    Raises:
      UserError: OPTION_OUT_OF_RANGE for benchmark.batch_sizes or benchmark.rounds, or as `setup.load_model`.
    """
    settings, batches = config.benchmark, batch_sizes(config)
    workdir = pathlib.Path(workdir).expanduser()
    model, variables = setup_lib.load_model(workdir, config)
    size = tuple(config.data.size)
    dense = model.clone(widths=None)
    fresh = jax.jit(dense.init, compiler_options={"xla_backend_optimization_level": 0})
    models = {
        "dense": (dense, jax.device_get(fresh(jax.random.key(0), jnp.zeros((1, *size, 3))))),
        "sparse": (model, variables),
        "compact": setup_lib.compact(config, model, variables),
    }
    rows: list[TimingRow] = []
    for batch in batches:
        logging.info("Timing batch %d at %dx%d: %d rounds of each model", batch, *size, settings.rounds)
        with progress.phase(f"timing batch {batch}"):
            rows += map(TimingRow.from_json, speed.compare(models, size, batch, settings.rounds))
    timing = Timing(
        device=device(),
        size=size,
        rounds=settings.rounds,
        compact=_compact_options(config),
        group_sparsity=groups.count(config, variables["params"]).group,
        rows=tuple(rows),
    )
    timing.write(workdir / "benchmark.json")
    print(tables.speed_table(rows))
    (workdir / "plots").mkdir(exist_ok=True)
    print(plots.save(plots.latency(timing), workdir / "plots" / "latency.png"))
    if records.is_finished(workdir):
        run_page.try_write(workdir)
    return [row.to_json() for row in rows]
