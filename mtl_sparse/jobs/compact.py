"""`--job=compact`: the compact model of a run as a separate run, and the table that explains it."""

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mtl_sparse.compaction import explain, rewritten
from mtl_sparse.report import plots, run_page, tables
from mtl_sparse.report.schema import CompactLayer, Results
from mtl_sparse.runtime import files, progress
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.tasks import weighting
from mtl_sparse.training import checkpoints, evaluation, results
from mtl_sparse.training import config as config_lib
from mtl_sparse.training import folder as folder_lib
from mtl_sparse.training import setup as setup_lib

_TOLERANCE = 1e-4  # largest difference of outputs, over the largest output


def run_job(config, workdir: str | pathlib.Path) -> pathlib.Path:
    """Write the compact model of a run as a separate run, in `<workdir>/compact`.

    Its tasks are those of config.compact.tasks; the heads of the others are removed, with everything that only they
    read. Evaluates it on the test split, and explains what was removed in a table, compact.json and plots/compact.png.

    Returns:
      The compact run's folder.

    Raises:
      UserError: the run is not finished or has other options, compact.tasks names a task that the run does not have,
        its backbone has no layer with a non-zero group, or the outputs differ.
    """
    run = setup_lib.setup(config)
    workdir = pathlib.Path(workdir).expanduser()
    folder_lib.check(workdir, config, run.data)
    with folder_lib.held(workdir):
        return _compact(run, workdir)


def _compact(run, workdir):
    expected = Results.read(workdir / "results.json").test
    with contextlib.closing(checkpoints.Checkpoints(workdir)) as saved:
        best = dataclasses.replace(results.Best.load(run, saved), tasks=config_lib.compact_tasks(run.config))
    with progress.phase("compacting the model, and comparing the outputs"):
        rows, error = best.explain(), best.difference()
    layers = [CompactLayer.from_json(row) for row in rows]
    if not any(layer.zero for layer in layers) and best.tasks == tuple(run.config.tasks):
        logging.warning("This run has no zero groups: its compact model has the same channels")
    if not any(layer.groups_after for layer in layers if layer.layer.startswith("backbone/")):
        raise UserError(
            "BACKBONE_DEAD",
            f"the backbone of {workdir} has no layer with a non-zero group: compaction would remove all of it",
        )
    if not error < _TOLERANCE:
        raise UserError(
            "COMPACTION_NOT_EXACT",
            f"expected the compact model of {workdir} to have the same outputs, got a difference of {error:.1e} of the "
            "largest; nothing was written",
        )
    folder = workdir / "compact"
    with _replacing(folder):
        found = _write_run(best, workdir, folder).test
        files.write_json(folder / "compact.json", [layer.to_json() for layer in layers])
        plots.save(plots.compact_layers(layers), folder / "plots" / "compact.png")
    run_page.try_write(workdir)
    print("\n" + tables.compact_table(layers))
    change = np.nanmax([abs(found[name] - value) for name, value in expected.items() if name in found])
    sentence = explain.compare_sentence(rows, best.state.variables, best.compact[1])
    print(f"\n{sentence}; outputs equal to {error:.0e} of the largest, test metrics to {change:.0e}")
    print(f"the compact model is a separate run: --config=configs/run.py:{folder} --job=evaluate")
    return folder


def _write_run(best, workdir, folder):
    """Write the compact model into `folder` as a finished run; return its results."""
    model, variables = best.compact
    config = _config(best.run.config, best.tasks, model)
    small = setup_lib.setup(config)
    folder_lib.claim(folder, config, small.data)
    learned = best.state.params["weighting"]
    params = {
        "model": variables["params"],
        "weighting": {task: learned[task] for task in best.tasks if task in learned},
    }
    opt_state = jax.device_get(small.tx.init(jax.tree.map(jnp.asarray, params)))
    inner = opt_state.inner_state._replace(control=best.state.opt_state.inner_state.control)
    state = best.state.replace(
        params=params,
        batch_stats=variables["batch_stats"],
        opt_state=opt_state._replace(inner_state=inner),
        weighting=weighting.of_tasks(config.loss.weighting, best.state.weighting, best.tasks, best.run.config.tasks),
    )
    with contextlib.closing(checkpoints.Checkpoints(folder)) as saved:
        for kind in checkpoints.KINDS:  # a run that has ended: --job=train evaluates it, and trains nothing
            saved.save(kind, int(state.step), state, {**best.progress, "stopped": True})
        saved.wait()
        if (workdir / "metrics.jsonl").exists():  # an imported run has none
            shutil.copy(workdir / "metrics.jsonl", folder / "metrics.jsonl")
        found = results.write(small, evaluation.Evaluator(small), folder, results.Best.load(small, saved))
    return Results.from_json(found)


def _config(config, tasks, model):
    """Return the config of the compact run, with the options that depend on the tasks cut to `tasks`."""
    small = config.copy_and_resolve_references()
    if len(config.loss.weights) == len(config.tasks):  # weights that are not used may be of another number of tasks
        pairs = zip(config.tasks, config.loss.weights, strict=True)
        small.loss.weights = tuple(weight for task, weight in pairs if task in tasks)
    small.tasks, small.compact.tasks = tuple(tasks), ""
    small.model.attach, small.model.widths = model.attach, rewritten.encoded(model)
    return small


@contextlib.contextmanager
def _replacing(folder: pathlib.Path) -> Iterator[None]:
    """Write `folder` from scratch in the block; what it held is kept until the block ends, and restored if it fails."""
    old, removed = (folder.with_name(folder.name + end) for end in (".old", ".removed"))
    shutil.rmtree(removed, ignore_errors=True)
    if old.exists():  # an earlier call was killed in the block
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.rename(old)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if old.exists():
            old.rename(folder)
        raise
    if old.exists():
        old.rename(removed)  # a call killed while it deletes must not look like one killed in the block
        shutil.rmtree(removed, ignore_errors=True)
