"""The training run: a pure train step, and the one loop around it."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from clu import parameter_overview

from input_pipeline import loader
from mtl_sparse import checkpoints, compaction, evaluate, logs, optim, processes, results, weighting
from mtl_sparse.errors import Stopped, UserError
from mtl_sparse.report import records
from mtl_sparse.run import AXIS, Run, TrainState, setup
from mtl_sparse.sparsity import stats

_STEPS_AHEAD = 2  # steps that the host may queue before the device has done them


@dataclasses.dataclass
class Progress:
    """What the loop itself remembers from epoch to epoch; part of every checkpoint.

    Attributes:
      best: lowest validation score so far.
      stale_epochs: epochs since then.
      plateau_epochs: epochs since then or since the learning rate was last lowered.
      stopped: whether early stopping has ended the run.
      skipped, skipped_in_a_row: steps that were not finite, see config.run.skip_not_finite.
      pending: (step, scalars) of the steps since the last line of metrics.jsonl.
    """

    best: float = math.inf
    stale_epochs: int = 0
    plateau_epochs: int = 0
    stopped: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0
    pending: list = dataclasses.field(default_factory=list)


def train_step(state: TrainState, batch, seed, *, model, tasks, tx, loss_config, skip_not_finite=False):
    """One step of one device, to be pmapped over `AXIS`.

    Args:
      state: the same on every device.
      batch: this device's share of the global batch, {"image": [B, H, W, 3], label: [B, H, W, ...]}.
      seed: of the dropout, an integer; an argument, so that runs that differ in it share one compiled program.
      loss_config: config.loss.
      skip_not_finite: whether a step whose loss or gradient is not finite changes nothing but the step count.

    Returns:
      (state, {"loss", "grad_norm", "learning_rate", "<task>/loss", ...}): scalars over the global batch. A task without
      a label in the batch has a loss of NaN. "skipped", with skip_not_finite, is 1 where the step was skipped.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def total_loss(params):
        raw, updates = model.apply(
            {"params": params["model"], "batch_stats": state.batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        losses, counts = {}, {}
        for task in tasks:
            loss, valid = task.elementwise(raw[task.name], evaluate.strided_label(batch[task.label]))
            total, counts[task.name] = jax.lax.psum((jnp.sum(loss), jnp.sum(valid)), AXIS)
            losses[task.name] = total / jnp.maximum(counts[task.name], 1)
        weights = tuple(loss_config.weights)
        combined = weighting.combine(loss_config.weighting, params["weighting"], losses, weights, counts)
        return combined, (losses, counts, updates["batch_stats"])

    (loss, (losses, counts, batch_stats)), grads = jax.value_and_grad(total_loss, has_aux=True)(state.params)
    if jax.lax.axis_size(AXIS) > 1:  # of one device it would be a copy
        # The losses are sums over all devices already, so each device's gradient counts the others' losses, too.
        grads = jax.lax.pmean(grads, AXIS)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Momentum would move the loss weight of a task that has no label in this batch.
    old = state.params["weighting"]
    kept = {task: jnp.where(counts[task] > 0, value, old[task]) for task, value in params["weighting"].items()}
    params = {**params, "weighting": kept}
    scalars = {
        "loss": loss,
        # By products: optax.tree.norm squares first, and those squares, which Adam needs, too, would be written out.
        "grad_norm": jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(grads))),
        "learning_rate": optim.learning_rate(opt_state),
        "lambda": optim.lambda_(opt_state),
    }
    scalars |= {f"{task}/loss": jnp.where(counts[task] > 0, value, jnp.nan) for task, value in losses.items()}
    scalars |= {f"{task}/log_variance": value for task, value in params["weighting"].items()}
    new = TrainState(state.step + 1, params, batch_stats, opt_state)
    if skip_not_finite:
        finite = jnp.isfinite(loss) & jnp.isfinite(scalars["grad_norm"])
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state).replace(step=new.step)
        scalars["skipped"] = 1 - finite.astype(jnp.int32)
    return new, scalars


def make_train_step(run: Run):
    """`train_step` of a run, compiled over the devices of all processes; the state's buffers are reused.

    The state and the scalars have no axis of devices: with one, XLA copies the whole state in every step.
    """
    config = run.config
    step = functools.partial(
        train_step,
        model=run.model,
        tasks=run.tasks,
        tx=run.tx,
        loss_config=config.loss,
        skip_not_finite=config.run.skip_not_finite > 0,
    )
    mapped = jax.pmap(step, axis_name=AXIS, in_axes=(None, 0, None), out_axes=None, donate_argnums=0)
    return lambda state, batch: mapped(state, batch, np.uint32(config.seed))


def validation_score(values: dict[str, float], tasks) -> float:
    """What the best checkpoint, early stopping and the plateau go by: the geometric mean of the task losses.

    No task's unit dominates it and learned loss weights do not enter it; of one task it is the loss itself.
    """
    losses = [max(values[f"{task.name}/loss"], 1e-12) for task in tasks]
    return math.exp(sum(map(math.log, losses)) / len(losses))


def train(config, workdir: str | pathlib.Path) -> dict:
    """Trains, evaluates the best checkpoint on the test split, and writes the report.

    Goes on from the latest checkpoint in `workdir` where there is one. Of several processes, which all call it, the
    first one writes; `workdir` need not exist for the others, the data must.

    Args:
      config: as from configs/nyu.py.
      workdir: the run's folder, see README ("A run's folder").

    Returns:
      The contents of results.json.

    Raises:
      UserError: see `setup`; a workdir of another config or data, or that another process is at; a step, or every
        validation, that is not finite.
      Stopped: SIGTERM or Ctrl-C asked for it; the step is saved.
    """
    run = setup(config)
    _check_alike(run)
    workdir = pathlib.Path(workdir).expanduser()
    with contextlib.ExitStack() as held:
        processes.on_first(lambda: held.enter_context(records.held(workdir)))
        processes.on_first(lambda: records.claim(workdir, config, run.data))
        return _train(run, workdir)


def _check_alike(run):
    """Raises UserError where another process of this run has other settings or data than the first."""
    ours = records.settings(json.loads(run.config.to_json())) | {
        "run.skip_not_finite": run.config.run.skip_not_finite,
        "the data": run.data.fingerprint,
    }
    theirs = processes.on_first(lambda: ours)

    def check():
        differing = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
        if json.loads(json.dumps(ours)) != theirs:
            raise UserError(
                f"process {jax.process_index()} has other settings or data than process 0 "
                f"({', '.join(sorted(differing)[:3])}); give all of them the same"
            )

    processes.in_turn(check)


def _train(run, workdir):
    saved = checkpoints.Checkpoints(workdir, owned=True)
    try:
        _fit(run, workdir, saved)
        if saved.step("best") is None:
            raise UserError(
                "validation was never finite, so there is no best checkpoint; keep sparsity.fixed_norm=True, or lower "
                "sparsity.lambda_ or optimizer.learning_rate, in another --workdir"
            )
        found = results.write(run, workdir, saved)
        state, _ = saved.restore("best", run.state_shapes)
        processes.on_first(lambda: print(compaction.summary(run, state.variables)))
        return found
    finally:
        saved.close()


def _fit(run: Run, workdir: pathlib.Path, saved: checkpoints.Checkpoints) -> None:
    """The loop: from the latest checkpoint to the last step or an early stop."""
    config = run.config
    if saved.step("latest") is not None:
        state, restored = saved.restore("latest", run.state_shapes)
        progress = Progress(**restored)
        logging.info("Going on from step %d of %s", int(state.step), workdir)
    else:
        state, progress = processes.from_first(jax.device_get(run.init_state())), Progress()
        processes.on_first(lambda: _log_overview(state, workdir))
    start = int(state.step)
    if start >= run.total_steps or progress.stopped:
        return

    step_fn = make_train_step(run)
    state = loader.replicate(state)
    log = None

    def open_log():
        nonlocal log
        log = logs.MetricLog(workdir, start)

    processes.on_first(open_log)
    report_progress = logs.progress_reporter(run.total_steps, config.run.progress_every_secs)
    batches = loader.prefetch_to_device(run.train_batches(start))
    logging.info(
        "Training %d steps (%d epochs of %d frames) on %d device(s); the first step compiles",
        run.total_steps - start, config.train.epochs, len(run.data.train), jax.device_count(),
    )  # fmt: skip
    if run.settled_step > start:
        logging.info("The best checkpoint will be one from step %d on, when the sparsity is settled", run.settled_step)

    def save(kind, of):
        saved.save(kind, step, jax.device_get(of), dataclasses.asdict(progress))

    pending = progress.pending
    with processes.stop_requests() as asked_to_stop, contextlib.closing(log) if log else contextlib.nullcontext():
        for step in range(start + 1, run.total_steps + 1):
            state, scalars = step_fn(state, next(batches))
            pending.append((step, scalars))
            if len(pending) > _STEPS_AHEAD:  # or the host queues steps without end, and the rate it tells is wrong
                jax.block_until_ready(pending[-1 - _STEPS_AHEAD])
            report_progress(step)
            epoch_ends = step % run.steps_per_epoch == 0
            saves = step % config.run.checkpoint_every_steps == 0
            if epoch_ends or saves or step % config.run.log_every_steps == 0:
                _write_pending(run, log, progress, saved)
            if epoch_ends:
                evaluated = run.evaluated(state)
                values = run.evaluator(evaluated.variables, run.eval_batches("validation"), labelled="validation")
                score = validation_score(values, run.tasks)
                if not math.isfinite(score):
                    logging.warning("Validation is not finite at step %d: it cannot be the best checkpoint", step)
                sparsity = stats.sparsity(state.params["model"], config.sparsity.scope)
                values |= {
                    "score": score,
                    "sparsity/group": sparsity.group,
                    "sparsity/parameter": sparsity.parameter,
                    "sparsity/weight": sparsity.weight,
                }
                if log:
                    log.write(step, "validation", values)
                improved, state = _end_epoch(run, progress, step, score, state)
                lambda_ = float(optim.lambda_(state.opt_state))
                _say_epoch(run, step, values, sparsity, lambda_, improved)
                if improved:
                    save("best", state.replace(batch_stats=evaluated.batch_stats))
            if epoch_ends or saves:
                save("latest", state)
            if progress.stopped:
                logging.info("Stopping early: no better validation score for %d epochs", config.train.early_stop_epochs)
                break
            if asked_to_stop(step) and step < run.total_steps:
                _fetch(pending, saved)
                save("latest", state)
                processes.on_first(saved.wait)  # no other ends before it is written
                raise Stopped(
                    f"stopped at step {step} of {run.total_steps}, as asked; the same command goes on from there"
                )
        saved.wait()


def _fetch(pending, saved):
    """Convert the scalars of `pending` to numbers and check that they are finite, except in skipped steps.

    The loss of a task without a label in the batch is NaN while the combined loss is finite.
    """
    pending[:] = [(step, {name: float(value) for name, value in row.items()}) for step, row in jax.device_get(pending)]
    for step, row in pending:
        wrong = [f"{name}={value}" for name, value in row.items() if not math.isfinite(value)]
        unlabeled = all(name.partition("=")[0].endswith("/loss") for name in wrong)
        if wrong and not unlabeled and not row.get("skipped"):
            raise _not_finite(step, wrong, saved)


def _not_finite(step, wrong, saved):
    latest = saved.step("latest")
    kept = f"the checkpoint of step {latest} is kept" if latest is not None else "none was saved yet"
    return UserError(
        f"training is not finite at step {step} ({', '.join(wrong)}); {kept}; try a lower optimizer.learning_rate or "
        "sparsity.lambda_ in another --workdir, and look at the data of that step; run.skip_not_finite=10 skips up to "
        "10 such steps in a row"
    )


def _write_pending(run, log, progress: Progress, saved):
    """Fetch and check the scalars of the steps since the last call, and log the means of those not skipped.

    A task's loss is the mean over the steps that have a label for it, and is left out where none has.
    """
    if not progress.pending:
        return
    _fetch(progress.pending, saved)
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
    if log:
        log.write(progress.pending[-1][0], "train", values)
    progress.pending.clear()


def _end_epoch(run, progress: Progress, step: int, score: float, state):
    """Early stopping and the plateau schedule; returns whether this checkpoint is the best so far, and the state.

    Before the sparsity is settled no checkpoint is the best, no run stops and the rate stays: while groups are being
    pruned the score may well get worse.
    """
    config = run.config
    taken = step - progress.skipped  # the optimizer's count, by which its phases go
    settled = taken >= run.settled_step or step >= run.total_steps
    improved = settled and score < progress.best
    if improved or not settled:
        progress.best, progress.stale_epochs, progress.plateau_epochs = score if improved else math.inf, 0, 0
    else:
        progress.stale_epochs += 1
        progress.plateau_epochs += 1
    if config.optimizer.schedule == "plateau" and progress.plateau_epochs >= config.optimizer.plateau_epochs:
        progress.plateau_epochs = 0
        opt_state = optim.scale_learning_rate(
            state.opt_state, config.optimizer.plateau_factor, config.optimizer.min_learning_rate
        )
        state = state.replace(opt_state=opt_state)
    progress.stopped = settled and 0 < config.train.early_stop_epochs <= progress.stale_epochs
    return improved, state


def _say_epoch(run, step, values, sparsity, lambda_, improved):
    headlines = ", ".join(
        f"{task.name} {task.headline} {values[f'{task.name}/{task.headline}']:.4f}" for task in run.tasks
    )
    zero = f"{100 * sparsity.group:.1f} % of groups zero"
    if run.config.sparsity.penalty == "l1":
        zero = f"{100 * sparsity.weight:.1f} % of weights, {zero}"
    logging.info(
        "epoch %d/%d, validation: %s; %s, lambda %.2g%s",
        step // run.steps_per_epoch, run.config.train.epochs, headlines, zero, lambda_,
        " (best so far)" if improved else "",
    )  # fmt: skip


def _log_overview(state, workdir):
    """Every parameter into parameters.txt; in the log, one number a part of the model."""
    overview = parameter_overview.get_parameter_overview(state.params["model"], include_stats=False)
    (workdir / "parameters.txt").write_text(overview + "\n")
    parts = {part: parameter_overview.count_parameters(tree) for part, tree in sorted(state.params["model"].items())}
    counts = ", ".join(f"{part} {count:,}" for part, count in parts.items())
    logging.info("Parameters: %s (each one in %s)", counts, workdir / "parameters.txt")
