"""Latency, throughput and memory of a run's model: dense, with its zeros, and compact."""

import dataclasses
import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mtl_sparse import cost, environment
from mtl_sparse import run as run_lib
from mtl_sparse.errors import UserError
from mtl_sparse.models import multitask, resnet
from mtl_sparse.report import plots, records, tables
from mtl_sparse.sparsity import stats


def timed(functions: dict, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each round of each function () -> arrays, in alternation, after one call to warm up."""
    for function in functions.values():
        jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


@dataclasses.dataclass(frozen=True)
class Part:
    """Something to time: a whole model or its backbone alone, with its variables."""

    model: object
    variables: dict

    @classmethod
    def backbone(cls, model: multitask.MultiTaskModel, variables) -> "Part":
        layers = model.layers()
        points = tuple(dict.fromkeys(model.points()))  # each map once, whoever reads it
        alone = resnet.ResNet(
            model.depth, model.width, model.stem, model.dtype, layers=(layers.stem, layers.blocks), points=points
        )
        return cls(alone, {name: tree["backbone"] for name, tree in variables.items() if "backbone" in tree})

    def compiled(self, images):
        """(function () -> outputs, bytes that its compiled program needs: arguments, outputs and temporaries)."""
        variables = jax.device_put(self.variables)
        program = jax.jit(self.model.apply).lower(variables, images).compile()
        memory = program.memory_analysis()
        sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
        return lambda: program(variables, images), sum(getattr(memory, name) for name in sizes)


def compare(models: dict, size, batch: int, rounds: int, parts=("backbone", "model")) -> list[dict]:
    """Times parts of each (model, variables), all of a part in one alternation.

    Args:
      models: name -> (model, variables); the first is what the others are compared with.
      size: (height, width) of the images.
      batch: images in a call.
      parts: "backbone", "model" or both.

    Returns:
      A dictionary for each part and model: "part", "model", "batch", "parameters", "macs" (an image),
      "median_ms", "p90_ms", "speedup" (median over the rounds of the first one's time over its own),
      "images_per_second", "gmacs_per_second", "memory_mib".
    """
    images = jnp.asarray(np.random.default_rng(0).normal(size=(batch, *size, 3)), jnp.float32)
    rows = []
    for part in parts:
        make = Part.backbone if part == "backbone" else Part
        timed_parts = {name: make(*model) for name, model in models.items()}
        compiled = {name: one.compiled(images) for name, one in timed_parts.items()}
        seconds = timed({name: function for name, (function, _) in compiled.items()}, rounds)
        first = next(iter(seconds.values()))
        for name, one in timed_parts.items():
            macs = sum(layer.macs for layer in cost.layers(one.model, size).values())
            median = float(np.median(seconds[name]))
            rows.append(
                {
                    "part": part,
                    "model": name,
                    "batch": batch,
                    "parameters": cost.parameter_count(one.variables),
                    "macs": macs,
                    "median_ms": 1e3 * median,
                    "p90_ms": 1e3 * float(np.quantile(seconds[name], 0.9)),
                    "speedup": float(np.median(first / seconds[name])),
                    "images_per_second": batch / median,
                    "gmacs_per_second": batch * macs / median / 1e9,
                    "memory_mib": compiled[name][1] / 2**20,
                }
            )
    return rows


def table(rows: list[dict]) -> str:
    """`compare`'s rows as a Markdown table; speed-up and MAC ratio are against the first model of the same part."""
    head = ("part", "batch", "model", "median ms", "p90 ms", "speed-up", "images/s", "MACs", "MAC ratio", "GMAC/s")
    lines = [(*head, "parameters", "memory MiB")]
    first = {}
    for row in rows:
        dense = first.setdefault((row["part"], row["batch"]), row)
        lines.append(
            (
                row["part"],
                str(row["batch"]),
                row["model"],
                f"{row['median_ms']:.2f}",
                f"{row['p90_ms']:.2f}",
                f"{row['speedup']:.2f}x",
                f"{row['images_per_second']:.1f}",
                f"{row['macs'] / 1e6:,.1f} M",
                f"{dense['macs'] / max(row['macs'], 1):.2f}x",
                f"{row['gmacs_per_second']:.1f}",
                f"{row['parameters']:,}",
                f"{row['memory_mib']:.1f}",
            )
        )
    return tables.markdown(lines)


def is_done(config, workdir: pathlib.Path) -> bool:
    """Whether a run was timed with the config's settings on this device."""
    path = workdir / "benchmark.json"
    found = records.read_json(path) if path.exists() else {}
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
    model, variables = run_lib.load_model(workdir, config)
    size = tuple(config.data.size)
    dense = model.clone(widths=None)
    fresh = jax.jit(dense.init, compiler_options={"xla_backend_optimization_level": 0})
    small = run_lib.compact(config, model, variables)
    models = {
        "dense": (dense, jax.device_get(fresh(jax.random.key(0), jnp.zeros((1, *size, 3))))),
        "sparse": (model, variables),
        "compact": small,
    }
    rows = []
    for batch in batches:
        logging.info("Timing batch %d at %dx%d: %d rounds of each model", batch, *size, settings.rounds)
        rows += compare(models, size, batch, settings.rounds)
    found = {
        "device": device(),
        "size": size,
        "rounds": settings.rounds,
        "compact": json.loads(config.compact.to_json()),
        "group_sparsity": stats.sparsity(variables["params"], config.sparsity.scope).group,
        "rows": rows,
    }
    records.write_json(workdir / "benchmark.json", found)
    print(table(rows))
    (workdir / "plots").mkdir(exist_ok=True)
    print(plots.save(plots.latency(found), workdir / "plots" / "latency.png"))
    return rows
