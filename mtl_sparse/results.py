"""The end of a run: its best checkpoint on the test split, results.json, pictures and the table."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from importlib import metadata

import jax
import numpy as np
from absl import logging

from input_pipeline import loader, transforms
from mtl_sparse import checkpoints, cost, evaluate, optim, processes
from mtl_sparse import run as run_lib
from mtl_sparse.errors import UserError
from mtl_sparse.report import plots, records, tables
from mtl_sparse.sparsity import stats

_VERSIONED = ("mtl-sparse", "jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")


def evaluate_best(config, workdir: str | pathlib.Path) -> dict:
    """Evaluates the best checkpoint of a run on the test split and writes its report again.

    Raises:
      UserError: a run that has not ended, which results would make count as finished; see `records.check`.
    """
    run = run_lib.setup(config)
    workdir = pathlib.Path(workdir).expanduser()
    with contextlib.ExitStack() as held:
        processes.on_first(lambda: records.check(workdir, config, run.data))
        processes.on_first(lambda: held.enter_context(records.held(workdir)))
        saved = held.enter_context(contextlib.closing(checkpoints.Checkpoints(workdir)))
        if saved.step("latest") is not None and not processes.on_first((workdir / "results.json").exists):
            processes.on_first(lambda: _check_ended(run, workdir, saved))
        return write(run, workdir, saved)


def _check_ended(run, workdir, saved):
    _, progress, folder = saved.read("latest")
    if int(folder.name) < run.total_steps and not progress.get("stopped"):
        raise UserError(
            f"the run in {workdir} is at step {folder.name} of {run.total_steps}: give its command again, which goes "
            "on with it and evaluates it at the end (metrics.jsonl has its validation so far)"
        )


def write(run: run_lib.Run, workdir: pathlib.Path, saved: checkpoints.Checkpoints) -> dict:
    """Evaluates the best checkpoint and the constant predictor; writes results.json and plots, prints the table."""
    state, _ = saved.restore("best", run.state_shapes)
    logging.info("Evaluating the best checkpoint (step %d) on %d test frames", int(state.step), len(run.data.test))
    test = run.evaluator(loader.replicate(state.variables), run.eval_batches("test"))
    constants = evaluate.constant_predictions(run.tasks, run.eval_batches("train"))
    constant = evaluate.evaluate_constant(run.tasks, constants, run.eval_batches("test"))
    return processes.on_first(lambda: _write(run, workdir, state, test, constant))


def _write(run, workdir, state, test, constant):
    config = run.config
    sparsity = stats.sparsity(state.params["model"], config.sparsity.scope)
    size = tuple(config.data.size)
    compact = run_lib.compact(config, run.model, state.variables)
    results = {
        "test": test,
        "constant": constant,
        "headlines": {
            task.name: {"metric": f"{task.name}/{task.headline}", "higher_is_better": task.higher_is_better}
            for task in run.tasks
        },
        "sparsity": {
            "group": sparsity.group,
            "parameter": sparsity.parameter,
            "weight": sparsity.weight,
            "lambda": optim.settled_lambda(config, state.opt_state),
            "target": config.sparsity.target,
            "penalty": config.sparsity.penalty,
            "dead_layers": list(sparsity.dead_layers),
            "dead_blocks": list(sparsity.dead_blocks),
            "layers": [dataclasses.asdict(layer) for layer in sparsity.layers],
        },
        "size": {
            "trained": cost.total(run.model, state.variables, size),
            "compact": cost.total(*compact, size),
        },
        "step": int(state.step),
        "seed": config.seed,
        "frames": {split: len(names) for split, names in run.data.names.items()},
        "config": json.loads(config.to_json()),
        "versions": {name: _version(name) for name in _VERSIONED},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    _save_samples(run, workdir, state.variables)
    records.write_json(workdir / "results.json", results)  # the last but for what can be drawn again: it means finished
    plots.draw(workdir)
    print(tables.run_table(results))
    print(f"\nresults, metrics and plots are in {workdir}")
    return results


def _save_samples(run, workdir, variables):
    """Test frames spread over the split, with labels and predictions, for the sheet of pictures."""
    frames = run.data.test
    count = min(run.config.run.sample_frames, len(frames))
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    transform = run.eval_transform()
    examples = [transform(frames[int(index)]) for index in chosen]
    batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
    predict = jax.jit(functools.partial(evaluate.predict, run.model, run.tasks))
    records.write_samples(
        workdir,
        images=transforms.unnormalize_image(batch["image"], run.config.data.unit_range),
        names=[run.data.names["test"][index] for index in chosen],
        labels={task.name: batch[task.label] for task in run.tasks},
        predictions=jax.device_get(predict(variables, batch["image"])),
        classes=run.data.classes,
        threshold=run.config.loss.threshold,
    )


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
