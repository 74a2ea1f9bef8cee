"""Latency, throughput and memory of a run's model: dense, with its zeros, and compact."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
from absl import logging

from mtl_sparse.compaction import speed
from mtl_sparse.report import plots, tables
from mtl_sparse.runtime import environment, files
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.sparsity import stats
from mtl_sparse.training import setup as setup_lib


def is_done(config, workdir: pathlib.Path) -> bool:
    """Whether a run was timed with the config's settings on this device."""
    path = workdir / "benchmark.json"
    found = files.read_json(path) if path.exists() else {}
    done = found.get("device"), found.get("rounds"), {row["batch"] for row in found.get("rows", ())}
    asked = device(), config.benchmark.rounds, set(config.benchmark.batch_sizes)
    return done == asked and found.get("compact") == json.loads(config.compact.to_json())


def device() -> str:
    """What is timed on, and with which pages of memory: they change a CPU's figures (docs/benchmarks.md)."""
    huge = jax.default_backend() == "cpu" and environment.HUGE_PAGES in os.environ.get("GLIBC_TUNABLES", "")
    return f"{jax.devices()[0].device_kind}, JAX {jax.__version__}{', huge pages' if huge else ''}"


def run_job(config, workdir: str | pathlib.Path) -> list[dict]:
    """`--job=benchmark`: dense, sparse and compact model of a run; writes benchmark.json and plots/latency.png."""
    settings = config.benchmark
    batches = tuple(settings.batch_sizes)
    if not batches or min(batches) < 1 or settings.rounds < 1:
        raise UserError(f"benchmark.batch_sizes={batches}, benchmark.rounds={settings.rounds}: each must be at least 1")
    workdir = pathlib.Path(workdir).expanduser()
    model, variables = setup_lib.load_model(workdir, config)
    size = tuple(config.data.size)
    dense = model.clone(widths=None)
    fresh = jax.jit(dense.init, compiler_options={"xla_backend_optimization_level": 0})
    small = setup_lib.compact(config, model, variables)
    models = {
        "dense": (dense, jax.device_get(fresh(jax.random.key(0), jnp.zeros((1, *size, 3))))),
        "sparse": (model, variables),
        "compact": small,
    }
    rows = []
    for batch in batches:
        logging.info("Timing batch %d at %dx%d: %d rounds of each model", batch, *size, settings.rounds)
        rows += speed.compare(models, size, batch, settings.rounds)
    found = {
        "device": device(),
        "size": size,
        "rounds": settings.rounds,
        "compact": json.loads(config.compact.to_json()),
        "group_sparsity": stats.sparsity(variables["params"], config.sparsity.scope).group,
        "rows": rows,
    }
    files.write_json(workdir / "benchmark.json", found)
    print(tables.speed_table(rows))
    (workdir / "plots").mkdir(exist_ok=True)
    print(plots.save(plots.latency(found), workdir / "plots" / "latency.png"))
    return rows
