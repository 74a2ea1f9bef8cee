"""The end of a run: its best checkpoint on the test split, results.json, plots and the table."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from absl import logging

from input_pipeline import loader, transforms
from mtl_sparse.compaction import exactness, explain, speed
from mtl_sparse.compaction.rewritten import Model
from mtl_sparse.models import costs
from mtl_sparse.report import plots, records, run_page, schema, tables
from mtl_sparse.runtime import processes, progress
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.sparsity.stats import Sparsity
from mtl_sparse.tasks import Task
from mtl_sparse.training import checkpoints, evaluation, groups, optimizer
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib

_VERSIONED = ("mtl-sparse", "jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")


@dataclasses.dataclass(frozen=True)
class Best:
    """The best checkpoint of a run, and its compact model.

    Attributes:
      run: that the checkpoint is of.
      state: restored from the checkpoint.
      progress: JSON values saved with it, see `loop.Progress`.
      tasks: tasks whose heads the compact model has; None is all of the run.
    """

    run: setup_lib.Run
    state: state_lib.TrainState
    progress: dict[str, Any]
    tasks: tuple[str, ...] | None = None

    @classmethod
    def load(cls, run: setup_lib.Run, saved: checkpoints.Checkpoints) -> "Best":
        """Restore the best checkpoint.

        Raises:
          UserError: there is none, it is damaged, or it is of another model.
        """
        return cls(run, *saved.restore("best", state_lib.shapes(run)))

    @functools.cached_property
    def compact(self) -> tuple[Model, dict[str, Any]]:
        """The model and its variables without the zero channels."""
        tasks = self.run.config.tasks if self.tasks is None else self.tasks
        return setup_lib.compact(self.run.config, self.run.model, self.state.variables, tasks=tasks)

    @functools.cached_property
    def is_dead(self) -> bool:
        """Whether its zeros make every output constant, so that there is no compact model.

        A ResNet has a compact model even then.
        """
        try:
            return self.compact is None
        except UserError as error:
            if error.code != "FUNCTION_DEAD":
                raise
            return True

    def explain(self) -> list[dict]:
        """Return what compaction removes from each layer, see `explain.explain`."""
        return explain.explain(self.run.model, self.state.variables, *self.compact, self._size)

    def difference(self) -> float:
        """Return the largest difference between the two models' outputs, see `exactness.difference`.

        The compact model comes first, because it may have fewer tasks: those of the first model are compared.
        """
        return exactness.difference(*self.compact, self.run.model, self.state.variables, self._size)

    def summary(self) -> str:
        """Return one sentence on what compaction saves; times both models at batch 1 in run.summary_rounds rounds."""
        config, variables = self.run.config, self.state.variables
        zero = f"{100 * groups.count(config, variables['params']).group:.1f} % of groups zero"
        if self.is_dead:
            return f"{zero}; every output is constant, so no compact model was built; use a smaller target or lambda"
        text = (
            f"compact (--job=compact): {zero}; {explain.compare_sentence(self.explain(), variables, self.compact[1])}"
        )
        if config.run.summary_rounds == 0:
            return text
        models = {"dense": (self.run.model, variables), "compact": self.compact}
        with progress.phase("timing the dense and the compact model"):
            timed = speed.compare(models, self._size, 1, config.run.summary_rounds)
        ratio = {row["part"]: row["speedup"] for row in timed if row["model"] == "compact"}
        of_backbone = f"the backbone runs at {ratio['backbone']:.1f} times, " if "backbone" in ratio else ""
        return (
            f"{text}; on this machine, at batch 1, {of_backbone}the whole model runs at {ratio['model']:.1f} times the "
            f"dense speed; outputs equal to {self.difference():.0e} of the largest"
        )

    @property
    def _size(self):
        return tuple(self.run.config.data.size)


def write(run: setup_lib.Run, evaluator: evaluation.Evaluator, workdir: pathlib.Path, best: Best) -> dict[str, Any]:
    """Evaluate the best checkpoint and the constant baseline; write results.json and plots, print the table.

    Returns:
      The contents of results.json, see `schema.Results`.
    """
    logging.info("Evaluating the best checkpoint (step %d) on %d test images", int(best.state.step), len(run.data.test))
    test = evaluator(loader.replicate(best.state.variables), "test")
    with progress.phase("evaluating the constant baseline"):
        constants = evaluation.constant_predictions(run.tasks, run.batches.evaluation("train"))
        constant = evaluation.evaluate_constant(run.tasks, constants, run.batches.evaluation("test"))
    return processes.on_first(lambda: _write(run, workdir, best, test, constant))


def _write(run, workdir, best, test, constant):
    with progress.phase("compacting the model"):
        found = _results(run, best, test, constant)
    with progress.phase("drawing the plots"):
        _save_samples(run, workdir, best.state.variables)
        # Before the plots only, which can be drawn again: a folder with results.json holds a finished run.
        found.write(workdir / "results.json")
        plots.draw(workdir)
        run_page.try_write(workdir)
    print(tables.run_table(found))
    return found.to_json()


def _results(run: setup_lib.Run, best: Best, test, constant) -> schema.Results:
    config, state = run.config, best.state
    stopped = best.progress.get("task_stopped", {})
    size = tuple(config.data.size)
    return schema.Results(
        test=test,
        constant=constant,
        headlines=headlines(run.tasks),
        sparsity=sparsity(config, groups.count(config, state.params["model"]), state.opt_state),
        size=None
        if best.is_dead
        else schema.Size(
            trained=_model_size(run.model, state.variables, size),
            compact=_model_size(*best.compact, size),
        ),
        step=int(state.step),
        seed=config.seed,
        frames={split: len(names) for split, names in (run.data.names or {}).items()},
        config=json.loads(config.to_json()),
        versions={name: _version(name) for name in _VERSIONED},
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        stopped={task.name: stopped[task.name] for task in run.tasks if task.name in stopped} or None,
    )


def _model_size(model, variables, size):
    parts = {name: schema.PartSize(**part) for name, part in costs.by_part(model, variables, size).items()}
    return schema.ModelSize(**costs.total(model, variables, size), parts=parts)


def headlines(tasks: Sequence[Task]) -> dict[str, schema.Headline]:
    """Return the main metric of each task."""
    return {task.name: schema.Headline(f"{task.name}/{task.headline}", task.higher_is_better) for task in tasks}


def sparsity(config, found: Sparsity, opt_state) -> schema.RunSparsity:
    """Return the record of a run's sparsity.

    Args:
      config: the run's config.
      found: what `groups.count` returned.
      opt_state: the optimizer's state, which has lambda.
    """
    return schema.RunSparsity(
        group=found.group,
        parameter=found.parameter,
        weight=found.weight,
        lambda_=optimizer.settled_lambda(config, opt_state),
        target=config.sparsity.target,
        penalty=config.sparsity.penalty,
        dead_layers=tuple(found.dead_layers),
        dead_blocks=tuple(found.dead_blocks),
        layers=tuple(schema.LayerSparsity(**dataclasses.asdict(layer)) for layer in found.layers),
        coupled=tuple(schema.CoupledSparsity(**dataclasses.asdict(one)) for one in found.coupled) or None,
    )


def _save_samples(run, workdir, variables):
    """Write test images spread over the split, with labels and predictions, for the grid of samples."""
    source = run.data.test
    count = min(run.config.run.sample_frames, len(source))
    chosen = np.linspace(0, len(source) - 1, count).round().astype(int)
    transform = run.batches.transform()
    examples = [transform(source[int(index)]) for index in chosen]
    batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
    predict = jax.jit(functools.partial(evaluation.predict, run.model, run.tasks))
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
