"""The training loop: from the latest checkpoint to the last step or an early stop."""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from absl import logging
from clu import parameter_overview

from input_pipeline import loader
from mtl_sparse.report import run_page
from mtl_sparse.runtime import compile_cache, processes
from mtl_sparse.runtime import progress as phases
from mtl_sparse.runtime.errors import Stopped, UserError
from mtl_sparse.sparsity.stats import Sparsity
from mtl_sparse.tasks import Task, weighting
from mtl_sparse.training import groups, metric_log, optimizer, pruning, results, state
from mtl_sparse.training.checkpoints import Checkpoints
from mtl_sparse.training.evaluation import Evaluator
from mtl_sparse.training.setup import Run
from mtl_sparse.training.state import TrainState
from mtl_sparse.training.step import make_train_step

_STEPS_AHEAD = 2  # steps that the host may queue before the device has done them


@dataclasses.dataclass
class Progress:
    """What the loop remembers from epoch to epoch; part of every checkpoint.

    Attributes:
      best: lowest validation score so far.
      stale_epochs: epochs since then.
      plateau_epochs: epochs since then or since the learning rate was last lowered.
      stopped: whether early stopping has ended the run.
      skipped: steps that were not finite, see config.run.skip_not_finite.
      skipped_in_a_row: those since the last finite step.
      task_best: lowest validation loss of each task so far; with train.early_stop "tasks".
      task_stale: epochs since then.
      task_stopped: task -> step after which it was no longer trained.
      pending: (step, scalars) of the steps since the last line of metrics.jsonl.
    """

    best: float = math.inf
    stale_epochs: int = 0
    plateau_epochs: int = 0
    stopped: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0
    task_best: dict[str, float] = dataclasses.field(default_factory=dict)
    task_stale: dict[str, int] = dataclasses.field(default_factory=dict)
    task_stopped: dict[str, int] = dataclasses.field(default_factory=dict)
    pending: list = dataclasses.field(default_factory=list)

    def trained(self, tasks: Sequence[Task]) -> list[Task]:
        """Return the tasks that have not stopped."""
        return [task for task in tasks if task.name not in self.task_stopped]


def validation_score(values: Mapping[str, float], tasks: Sequence[Task]) -> float:
    """Return the score of a validation, lower is better: the geometric mean of the task losses.

    The best checkpoint, early stopping and the plateau schedule use it. No task's unit dominates it, and learned loss
    weights do not enter it. For one task it is the loss itself.
    """
    losses = [max(values[f"{task.name}/loss"], 1e-12) for task in tasks]
    return math.exp(sum(map(math.log, losses)) / len(losses))


def fit(run: Run, evaluator: Evaluator, workdir: pathlib.Path, saved: Checkpoints) -> None:
    """Train from the latest checkpoint, if there is one, to the last step or an early stop.

    Raises:
      UserError: a step is not finite.
      Stopped: after SIGTERM or Ctrl-C; the step is saved.
    """
    current, progress = _first_state(run, workdir, saved)
    start = int(current.step)
    if start >= run.total_steps or progress.stopped:
        return
    step_fn = _make_step(run, progress)
    pruned_first = run.prune_step == start == 0
    current = pruning.prune(run, current) if pruned_first else loader.replicate(current)
    with contextlib.ExitStack() as stack:
        report = stack.enter_context(metric_log.reporting(run, workdir, start))
        page = stack.enter_context(run_page.Live(workdir, results.headlines(run.tasks), run.total_steps))
        batches = loader.prefetch_to_device(run.batches.train(start))
        _log_start(run, start)
        asked_to_stop = stack.enter_context(processes.stop_requests())
        for step in range(start + 1, run.total_steps + 1):
            current, scalars = step_fn(current, next(batches))
            _wait_for_earlier(progress, step, scalars)
            report.step(step)
            epoch_ends = step % run.steps_per_epoch == 0
            saves = step % run.config.run.checkpoint_every_steps == 0
            if epoch_ends or saves or step % run.config.run.log_every_steps == 0:
                _write_pending(run, report, progress, saved)
            if step == run.prune_step:
                current = pruning.prune(run, current)
            if epoch_ends:
                before = len(progress.task_stopped)
                current, sparsity = _validate(run, evaluator, report, progress, saved, step, current)
                record = results.sparsity(run.config, sparsity, current.opt_state)  # in all processes
                processes.on_first(functools.partial(page.update, step, record))
                if len(progress.task_stopped) > before and not progress.stopped:
                    step_fn = _make_step(run, progress)
            if epoch_ends or saves:
                _save(saved, "latest", step, current, progress)
            if progress.stopped:
                what = "score" if run.config.train.early_stop == "run" else "loss of any task"
                logging.info(
                    "Stopping early: no better validation %s for %d epochs", what, run.config.train.early_stop_epochs
                )
                break
            if asked_to_stop(step) and step < run.total_steps:
                _stop(run, saved, step, current, progress)
        saved.wait()


def _make_step(run, progress):
    """Return the step of the tasks that have not stopped."""
    step = make_train_step(run, progress.trained(run.tasks)) if progress.task_stopped else make_train_step(run)
    return compile_cache.announced(step, "training step")


def _first_state(run, workdir, saved):
    """Return (state, progress): of the latest checkpoint, or those before the first step."""
    if saved.step("latest") is not None:
        with phases.phase("restoring the checkpoint"):
            restored, progress = saved.restore("latest", state.shapes(run))
        logging.info("Resuming from step %d of %s", int(restored.step), workdir)
        return restored, Progress(**progress)
    with phases.phase("making the initial weights"):
        first = processes.from_first(jax.device_get(state.initial(run)))
    processes.on_first(lambda: _log_overview(first, workdir))
    return first, Progress()


def _log_start(run, start):
    logging.info(
        "Training %d steps (%d epochs of %d images) on %d device(s); the first step compiles",
        run.total_steps - start, run.config.train.epochs, len(run.data.train), jax.device_count(),
    )  # fmt: skip
    name = run.config.loss.weighting
    if name in weighting.BY_GRADIENTS and len(run.tasks) == 1:
        logging.info("With one task there are no gradients to weigh: loss.weighting=%s is the same as equal", name)
    if run.settled_step > max(start, 1):  # every checkpoint is from step 1 on
        logging.info("The best checkpoint will be one from step %d on, when the sparsity is settled", run.settled_step)


def _wait_for_earlier(progress, step, scalars):
    """Note a step's scalars, and wait for the device where the host has queued too many steps."""
    progress.pending.append((step, scalars))
    if len(progress.pending) > _STEPS_AHEAD:  # otherwise the queue grows, and the logged rate is wrong
        jax.block_until_ready(progress.pending[-1 - _STEPS_AHEAD])


def _save(saved, kind, step, current, progress):
    saved.save(kind, step, jax.device_get(current), dataclasses.asdict(progress))


def _stop(run, saved, step, current, progress):
    _fetch(progress.pending, saved, run.config.loss.weighting)
    _save(saved, "latest", step, current, progress)
    processes.on_first(saved.wait)  # no process ends before the checkpoint is written
    raise Stopped(f"stopped at step {step} of {run.total_steps}, as asked; run the same command to resume")


def _validate(run, evaluator, report, progress, saved, step, current) -> tuple[TrainState, Sparsity]:
    """End an epoch: evaluate on the validation split, log, and save the best checkpoint.

    Returns:
      (the state, its sparsity).
    """
    evaluated = evaluator.with_statistics(current, frozen=tuple(progress.task_stopped))
    values = evaluator(evaluated.variables, "validation", require_labels=True)
    score = validation_score(values, run.tasks)
    if not math.isfinite(score):
        logging.warning("Validation is not finite at step %d: it cannot be the best checkpoint", step)
    sparsity = groups.count(run.config, current.params["model"])
    values |= {
        "score": score,
        "sparsity/group": sparsity.group,
        "sparsity/parameter": sparsity.parameter,
        "sparsity/weight": sparsity.weight,
        **{f"sparsity/{name}": value for name, value in groups.left(run.config, current.params).items()},
    }
    if run.config.train.early_stop == "tasks":
        current = _stop_tasks(run, progress, step, values, current, evaluated)
    values |= {f"{name}/stopped": 1.0 for name in progress.task_stopped}
    report.write(step, "validation", values)
    improved, current = _end_epoch(run, progress, step, score, current)
    _log_epoch(run, step, values, float(optimizer.lambda_(current.opt_state)), improved)
    if improved:
        _save(saved, "best", step, current.replace(batch_stats=evaluated.batch_stats), progress)
    return current, sparsity


def _stop_tasks(run, progress: Progress, step: int, values, current, evaluated) -> TrainState:
    """Stop the tasks whose validation loss has not improved for their patience, as in the paper; end the run with them.

    The head of a task that has stopped keeps its parameters, and the statistics of BatchNorm that it was last evaluated
    with. The best checkpoint is still chosen by the score of all tasks.
    """
    patience = run.config.train.early_stop_epochs
    for task in progress.trained(run.tasks):
        name, loss = task.name, values[f"{task.name}/loss"]
        if not _settled(run, progress, step) or loss < progress.task_best.get(name, math.inf):
            progress.task_best[name] = loss if _settled(run, progress, step) else math.inf
            progress.task_stale[name] = 0
            continue
        progress.task_stale[name] = progress.task_stale.get(name, 0) + 1
        if progress.task_stale[name] >= patience > 0:
            progress.task_stopped[name] = step
            head = {key: value for key, value in evaluated.batch_stats.items() if key == f"head_{name}"}
            current = current.replace(batch_stats={**current.batch_stats, **head})
            left = ", ".join(task.name for task in progress.trained(run.tasks)) or "none"
            logging.info(
                "Task %s stops at step %d: no better validation loss for %d epochs; still trained: %s",
                name, step, patience, left,
            )  # fmt: skip
    progress.stopped = len(progress.task_stopped) == len(run.tasks)
    return current


def _fetch(pending, saved, weighting_name=""):
    """Convert the scalars of `pending` to numbers and check that they are finite, except in skipped steps.

    The loss of a task without a label in the batch is NaN while the combined loss is finite.
    """
    pending[:] = [(step, {name: float(value) for name, value in row.items()}) for step, row in jax.device_get(pending)]
    for step, row in pending:
        wrong = [f"{name}={value}" for name, value in row.items() if not math.isfinite(value)]
        unlabeled = all(name.partition("=")[0].endswith("/loss") for name in wrong)
        if wrong and not unlabeled and not row.get("skipped"):
            zero = [name.removesuffix("/loss") for name, value in row.items() if name.endswith("/loss") and value == 0]
            if weighting_name in weighting.NEED_POSITIVE and zero:
                raise UserError(
                    "LOSS_NOT_POSITIVE",
                    f"loss.weighting={weighting_name!r} needs losses above 0, got 0 for {', '.join(zero)} at step "
                    f"{step}; use another weighting, such as 'equal', or remove the task",
                )
            raise _not_finite(step, wrong, saved)


def _not_finite(step, wrong, saved):
    latest = saved.step("latest")
    kept = f"the checkpoint of step {latest} is kept" if latest is not None else "no checkpoint was saved yet"
    return UserError(
        "STEP_NOT_FINITE",
        f"training is not finite at step {step} ({', '.join(wrong)}); {kept}; try a lower optimizer.learning_rate or "
        "sparsity.lambda_ in another --workdir, and check the data of that step; run.skip_not_finite=10 skips up to "
        "10 such steps in a row",
    )


def _write_pending(run, report, progress: Progress, saved):
    """Fetch and check the scalars of the steps since the last call, and log the means of those not skipped.

    A task's loss is the mean over the steps that have a label for it, and is omitted if none has.
    """
    if not progress.pending:
        return
    _fetch(progress.pending, saved, run.config.loss.weighting)
    rows = []
    for step, row in progress.pending:
        if row.pop("skipped", 0):
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            logging.warning("Step %d was not finite and is skipped, %d so far", step, progress.skipped)
            if progress.skipped_in_a_row > run.config.run.skip_not_finite:
                raise _not_finite(step, [f"{progress.skipped_in_a_row} steps in a row"], saved)
        else:
            progress.skipped_in_a_row = 0
            rows.append(row)
    finite = {name: [row[name] for row in rows if math.isfinite(row[name])] for name in (rows[0] if rows else ())}
    values = {name: float(np.mean(found)) for name, found in finite.items() if found}
    if run.config.run.skip_not_finite:
        values["skipped"] = progress.skipped
    report.write(progress.pending[-1][0], "train", values)
    progress.pending.clear()


def _end_epoch(run, progress: Progress, step: int, score: float, current):
    """Apply early stopping and the plateau schedule.

    Before the sparsity is settled no checkpoint is the best, no run stops and the learning rate stays: while groups
    are being pruned the score may well get worse.

    Returns:
      (whether this checkpoint is the best so far, the state).
    """
    config, settled = run.config, _settled(run, progress, step)
    improved = settled and score < progress.best
    if improved or not settled:
        progress.best, progress.stale_epochs, progress.plateau_epochs = score if improved else math.inf, 0, 0
    else:
        progress.stale_epochs += 1
        progress.plateau_epochs += 1
    if config.optimizer.schedule == "plateau" and progress.plateau_epochs >= config.optimizer.plateau_epochs:
        progress.plateau_epochs = 0
        opt_state = optimizer.scale_learning_rate(
            current.opt_state, config.optimizer.plateau_factor, config.optimizer.min_learning_rate
        )
        current = current.replace(opt_state=opt_state)
    if config.train.early_stop == "run":
        progress.stopped = settled and 0 < config.train.early_stop_epochs <= progress.stale_epochs
    return improved, current


def _settled(run, progress, step):
    """Return whether the sparsity is as the options ask, so that a checkpoint may be the best one."""
    taken = step - progress.skipped  # the optimizer's count, which its phases follow
    return taken >= run.settled_step or step >= run.total_steps


def _log_epoch(run, step, values, lambda_, improved):
    logging.info(
        "epoch %d/%d, validation: %s; %s, lambda %.2g%s",
        step // run.steps_per_epoch, run.config.train.epochs, metric_log.headlines(run, values),
        metric_log.zero_groups(run, values), lambda_, " (best so far)" if improved else "",
    )  # fmt: skip


def _log_overview(first, workdir):
    """Write every parameter to parameters.txt, and log the count of each part of the model."""
    overview = parameter_overview.get_parameter_overview(first.params["model"], include_stats=False)
    (workdir / "parameters.txt").write_text(overview + "\n")
    parts = {part: parameter_overview.count_parameters(tree) for part, tree in sorted(first.params["model"].items())}
    counts = ", ".join(f"{part} {count:,}" for part, count in parts.items())
    logging.info("Parameters: %s (listed in %s)", counts, workdir / "parameters.txt")
