"""`--job=latency`: which target in multiply-accumulates gives which speed on this machine, before any training.

Times compact models of a config's network with random weights and random zero groups. A weight's value does not change
the time of a product, so an untrained network is as good as a trained one.
"""

import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mtl_sparse import tasks as tasks_lib
from mtl_sparse.compaction import rewritten, speed
from mtl_sparse.jobs import benchmark
from mtl_sparse.report import plots, tables
from mtl_sparse.report.schema import DENSE, EVEN, UNEVEN, Latency, PatternTiming
from mtl_sparse.runtime import progress
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.training import config as config_lib
from mtl_sparse.training import pruning
from mtl_sparse.training import setup as setup_lib

_MACS = {EVEN: (0.75, 0.5, 0.35, 0.25, 0.15), UNEVEN: (0.5, 0.35, 0.25)}  # left, of the models that are timed
_TIMES = (0.75, 0.5, 1 / 3, 0.25)  # parts of the dense model's time to give a target for
_Models = dict[str, tuple[Any, Mapping[str, Any]]]


def run_job(config, workdir: str | pathlib.Path) -> Latency:
    """Time compact models, and print the targets in MACs for some parts of the dense model's time.

    Writes latency.json and plots/latency_by_macs.png.

    Args:
      config: a run's config; its groups, scope, limits, compact.multiple and compact.drop_taps are used, its targets
        and compact.tasks are not.
      workdir: the run's folder, which need not exist.

    Raises:
      UserError: OPTION_OUT_OF_RANGE for benchmark.batch_sizes or benchmark.rounds, OPTION_CONFLICT for a network of
        which too little can be zeroed, or as `config.check`.
    """
    batches = benchmark.batch_sizes(config)
    config_lib.check(config)
    workdir = pathlib.Path(workdir).expanduser()
    (workdir / "plots").mkdir(parents=True, exist_ok=True)
    models, left = _models(config)
    rows = [row for batch in batches for row in _time(config, models, left, batch)]
    found = Latency(
        device=benchmark.device(),
        size=tuple(config.data.size),
        rounds=config.benchmark.rounds,
        groups=config.sparsity.groups,
        rows=tuple(rows),
    )
    found.write(workdir / "latency.json")
    print(f"{text(found)}\n{plots.save(plots.latency_by_macs(found), workdir / 'plots' / 'latency_by_macs.png')}")
    return found


def text(found: Latency) -> str:
    """Return the tables that a user reads: times of the models, and the targets."""
    batches = found.batches
    lines = [("zero groups", "MACs left", *(x for b in batches for x in (f"batch {b}: ms", "of dense")))]
    by_model = itertools.groupby(
        sorted(found.rows, key=lambda row: (-row.macs_left, row.pattern)), lambda row: (row.pattern, row.macs_left)
    )
    for (pattern, macs_left), rows in by_model:
        cells = [cell for row in rows for cell in (f"{row.median_ms:.2f}", f"{100 * row.time_left:.0f} %")]
        lines.append((pattern, f"{100 * macs_left:.1f} %", *cells))
    head = ("time of the dense model", *(f"sparsity.target_macs, batch {batch}" for batch in batches))
    targets = [head]
    for time in _TIMES:
        targets.append((f"{100 * time:.0f} %", *(_target(found, batch, time) for batch in batches)))
    size = "x".join(map(str, found.size))
    return (
        f"{found.device}, images {size}, {found.groups} groups, {found.rounds} rounds\n\n{tables.markdown(lines)}\n\n"
        f"{tables.markdown(targets)}\n\n"
        f"The targets are interpolated between the dense and the even models. {_accuracy(found)}"
    )


def _accuracy(found: Latency) -> str:
    errors = {batch: found.errors(batch) for batch in found.batches}
    if not all(errors.values()):
        return "There is no uneven model to check them on."
    worst = " and ".join(f"{100 * max(map(abs, values)):.0f} % at batch {batch}" for batch, values in errors.items())
    return (
        "For the uneven models, in which each layer has its own fraction of zero groups, the predicted times are off "
        f"by at most {worst}."
    )


def _target(found: Latency, batch: int, time: float) -> str:
    """Return the target for a part of the dense model's time, within the range that was timed."""
    macs, least = found.macs_left(batch, time), found.curve(batch)[0][0]
    return f"below {least:.2f}" if np.isnan(macs) else f"{macs:.2f}"


def _models(config) -> tuple[_Models, dict[str, float]]:
    """Return the dense model and compact ones with random zeros, and the part of the MACs that each has left."""
    model = rewritten.build(config.model, tasks_lib.resolve(config))
    size = tuple(config.data.size)
    init = jax.jit(model.init, compiler_options={"xla_backend_optimization_level": 0})
    variables = jax.device_get(init(jax.random.key(config.seed), jnp.zeros((1, *size, 3))))
    models: _Models = {DENSE: (model, variables)}
    left = {DENSE: 1.0}
    wanted = [(pattern, macs) for pattern, parts in _MACS.items() for macs in parts]
    for pattern, macs in progress.track(wanted, "compacting models with random zeros"):
        params, reached = _zeroed(config, variables["params"], macs, pattern, len(models))
        if abs(reached - macs) < 0.1:  # otherwise what is not penalized, or a limit, leaves more
            name = f"{pattern} {macs}"
            models[name] = setup_lib.compact(config, model, {**variables, "params": params}, tasks=config.tasks)
            left[name] = reached
    if sum(name.startswith(EVEN) for name in models) < 2:
        raise UserError(
            "OPTION_CONFLICT",
            "expected a network of which half of the MACs can be removed, got "
            f"sparsity.scope={config.sparsity.scope!r}, exclude={tuple(config.sparsity.exclude)}, "
            f"max_removed={config.sparsity.max_removed} and at_least={config.sparsity.at_least}, which leave more; "
            "penalize more layers",
        )
    return models, left


def _zeroed(config, params: Any, macs: float, pattern: str, seed: int) -> tuple[Any, float]:
    """Return parameters with random zero groups, and the part of the MACs that compaction leaves of them."""
    wanted = config.copy_and_resolve_references()
    wanted.sparsity.update(target=0.0, target_params=0.0, target_macs=macs)
    tree = {"model": params}
    sets, rng = pruning.penalized(wanted, tree), np.random.default_rng(seed)
    # Ranks in (0, 1]: a threshold on them zeroes the same fraction of each set; on a power of them, another.
    powers = [1.0 if pattern == EVEN else 4.0 ** rng.uniform(-1, 1) for _ in sets]
    scores = [(1 + rng.permutation(one.count)) / one.count for one in sets]
    scores = [score**power for score, power in zip(scores, powers, strict=True)]
    tree, _, reached = pruning.zero_lowest(wanted, sets, scores, tree)
    return jax.device_get(tree["model"]), 1 - reached


def _time(config, models: _Models, left: Mapping[str, float], batch: int) -> list[PatternTiming]:
    """Time the models at one batch size, in alternation."""
    size, rounds = tuple(config.data.size), config.benchmark.rounds
    logging.info("Timing %d models at batch %d, %dx%d: %d rounds", len(models), batch, *size, rounds)
    with progress.phase(f"timing batch {batch}"):
        timed = speed.compare(models, size, batch, rounds, parts=("model",))
    return [
        PatternTiming(
            pattern=row["model"].partition(" ")[0],
            batch=batch,
            macs_left=left[row["model"]],
            median_ms=row["median_ms"],
            time_left=1 / row["speedup"],
        )
        for row in timed
    ]
