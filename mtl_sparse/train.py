"""The training run: a pure train step, and the one loop around it."""

import dataclasses
import functools
import json
import math
import pathlib
from importlib import metadata
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import jax_utils

from input_pipeline import datasets, loader
from input_pipeline.transforms import Transform
from mtl_sparse import checkpoints, evaluate, logs, optim, weighting
from mtl_sparse import tasks as tasks_lib
from mtl_sparse.errors import UserError
from mtl_sparse.models import multitask
from mtl_sparse.models.resnet import OUTPUT_STRIDE
from mtl_sparse.report import plots, records, tables
from mtl_sparse.sparsity import stats

AXIS = "devices"
_VERSIONED = ("mtl-sparse", "jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes.

    Attributes:
      step: int32 [], steps taken.
      params: {"model": the model's parameters, "weighting": learned loss weights}.
      batch_stats: BatchNorm's running statistics.
      opt_state: of `optim.build`.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self):
        """What `model.apply` takes."""
        return {"params": self.params["model"], "batch_stats": self.batch_stats}


@dataclasses.dataclass
class Progress:
    """What the loop itself remembers from epoch to epoch; part of every checkpoint.

    Attributes:
      best: lowest validation score so far.
      stale_epochs: epochs since then.
      plateau_epochs: epochs since then or since the learning rate was last lowered.
      stopped: whether early stopping has ended the run.
    """

    best: float = math.inf
    stale_epochs: int = 0
    plateau_epochs: int = 0
    stopped: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """What a config stands for: its tasks, data, model and optimizer."""

    config: Any
    tasks: tuple[tasks_lib.Task, ...]
    data: datasets.Data
    model: multitask.MultiTaskModel
    tx: Any
    steps_per_epoch: int
    total_steps: int

    def train_transform(self) -> Transform:
        data = self.config.data
        return Transform(tuple(data.size), data.depth_target, data.flip, data.max_scale)

    def eval_transform(self) -> Transform:
        return Transform(tuple(self.config.data.size), self.config.data.depth_target)

    def train_batches(self, start_step: int):
        """Host batches from the one of step `start_step` on, without end."""
        return loader.train_batches(
            self.data.train,
            self.train_transform(),
            batch_size=self.config.train.batch_size,
            seed=self.config.seed,
            start_step=start_step,
            num_workers=self.config.run.num_workers,
        )

    def eval_batches(self, split: str):
        """Host batches of a split, once, padded to what the devices share equally."""
        devices = jax.local_device_count()
        return loader.eval_batches(
            getattr(self.data, split),
            self.eval_transform(),
            batch_size=-(-self.config.train.eval_batch_size // devices) * devices,
            num_workers=self.config.run.num_workers,
        )

    def init_state(self) -> TrainState:
        """The state before the first step, a function of the seed alone."""
        height, width = self.config.data.size

        @jax.jit
        def init(key):
            variables = self.model.init(key, jnp.zeros((1, height, width, 3)))
            params = {
                "model": variables["params"],
                "weighting": weighting.init(self.config.loss.weighting, [task.name for task in self.tasks]),
            }
            step = jnp.zeros([], jnp.int32)
            return TrainState(step, params, variables["batch_stats"], self.tx.init(params))

        return init(jax.random.key(self.config.seed))


def check_config(config) -> None:
    """Raises UserError for settings that cannot work; what only the data can tell is checked with the data."""
    for name, value in (
        ("train.batch_size", config.train.batch_size),
        ("train.eval_batch_size", config.train.eval_batch_size),
        ("train.epochs", config.train.epochs),
        ("run.log_every_steps", config.run.log_every_steps),
        ("run.checkpoint_every_steps", config.run.checkpoint_every_steps),
        ("model.width", config.model.width),
        ("model.head_features", config.model.head_features),
        ("data.num_classes", config.data.num_classes),
    ):
        if value < 1:
            raise UserError(f"{name}={value}: it must be at least 1")
    size = tuple(config.data.size)
    if len(size) != 2 or any(side < OUTPUT_STRIDE or side % OUTPUT_STRIDE for side in size):
        raise UserError(f"data.size={size}: (height, width), both multiples of the output stride {OUTPUT_STRIDE}")
    if config.data.depth_target not in ("normalized", "metres"):
        raise UserError(f"unknown data.depth_target={config.data.depth_target!r}; it is 'normalized' or 'metres'")
    if not 0 <= config.model.dropout < 1:
        raise UserError(f"model.dropout={config.model.dropout}: it must be in [0, 1)")
    devices = jax.local_device_count()
    if config.train.batch_size % devices:
        raise UserError(f"train.batch_size={config.train.batch_size} does not divide by {devices} devices")
    optim.check(config)
    weighting.check(config.loss.weighting, config.loss.weights, config.tasks)


def setup(config) -> Run:
    """Checks a config and opens all that it names.

    Raises:
      UserError: a setting or data that cannot work, named.
    """
    check_config(config)
    tasks = tasks_lib.resolve(config)
    model = multitask.build(config.model, tasks, axis_name=AXIS)
    data = datasets.load(config.data)
    steps_per_epoch = max(1, len(data.train) // config.train.batch_size)
    total_steps = config.train.epochs * steps_per_epoch
    return Run(config, tasks, data, model, optim.build(config, total_steps), steps_per_epoch, total_steps)


def train_step(state: TrainState, batch, *, model, tasks, tx, loss_config, seed: int):
    """One step of one device, to be pmapped over `AXIS`.

    Args:
      state: replicated.
      batch: this device's share of the global batch, {"image": [B, H, W, 3], label: [B, H, W, ...]}.
      loss_config: config.loss.
      seed: of the dropout.

    Returns:
      (state, {"loss", "grad_norm", "learning_rate", "<task>/loss", ...}): scalars over the global batch.
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
        losses = {}
        for task in tasks:
            loss, valid = task.loss(raw[task.name], evaluate.strided_label(batch[task.label]))
            total, count = jax.lax.psum((jnp.sum(loss), jnp.sum(valid)), AXIS)
            losses[task.name] = total / jnp.maximum(count, 1)
        combined = weighting.combine(loss_config.weighting, params["weighting"], losses, loss_config.weights)
        return combined, (losses, updates["batch_stats"])

    (loss, (losses, batch_stats)), grads = jax.value_and_grad(total_loss, has_aux=True)(state.params)
    # The losses are sums over all devices already, so each device's gradient counts the others' losses, too.
    grads = jax.lax.pmean(grads, AXIS)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    scalars = {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": optim.learning_rate(opt_state),
    }
    scalars |= {f"{task}/loss": value for task, value in losses.items()}
    scalars |= {f"{task}/log_variance": value for task, value in params["weighting"].items()}
    return TrainState(state.step + 1, params, batch_stats, opt_state), scalars


def make_train_step(run: Run):
    """`train_step` of a run, compiled over the local devices; the state's buffers are reused."""
    config = run.config
    step = functools.partial(
        train_step, model=run.model, tasks=run.tasks, tx=run.tx, loss_config=config.loss, seed=config.seed
    )
    return jax.pmap(step, axis_name=AXIS, donate_argnums=0)


def validation_score(values: dict[str, float], tasks) -> float:
    """What the best checkpoint, early stopping and the plateau go by: the geometric mean of the task losses.

    No task's unit dominates it and learned loss weights do not enter it; of one task it is the loss itself.
    """
    losses = [max(values[f"{task.name}/loss"], 1e-12) for task in tasks]
    return math.exp(sum(map(math.log, losses)) / len(losses))


def train(config, workdir: str | pathlib.Path) -> dict:
    """Trains, evaluates the best checkpoint on the test split, and writes the report.

    Goes on from the latest checkpoint in `workdir` where there is one.

    Args:
      config: as from configs/nyu.py.
      workdir: the run's folder, see README ("A run's folder").

    Returns:
      The contents of results.json.

    Raises:
      UserError: see `setup`; a workdir of another config; a loss that is not finite.
    """
    run = setup(config)
    workdir = pathlib.Path(workdir).expanduser()
    records.claim(workdir, config)
    saved = checkpoints.Checkpoints(workdir)
    try:
        _fit(run, workdir, saved)
        return _report(run, workdir, saved)
    finally:
        saved.close()


def _fit(run: Run, workdir: pathlib.Path, saved: checkpoints.Checkpoints) -> None:
    """The loop: from the latest checkpoint to the last step or an early stop."""
    config = run.config
    state, progress = jax.device_get(run.init_state()), Progress()
    if saved.step("latest") is not None:
        state, restored = saved.restore("latest", state)
        progress = Progress(**restored)
        logging.info("Going on from step %d of %s", int(state.step), workdir)
    else:
        _log_overview(state, workdir)
    start = int(state.step)
    if start >= run.total_steps or progress.stopped:
        return

    step_fn = make_train_step(run)
    evaluator = evaluate.make_evaluator(run.model, run.tasks)
    state = jax_utils.replicate(state)
    log = logs.MetricLog(workdir, start)
    report_progress = logs.progress_reporter(run.total_steps, config.run.progress_every_secs)
    batches = loader.prefetch_to_device(run.train_batches(start))
    pending = []
    logging.info(
        "Training %d steps (%d epochs of %d frames) on %d device(s); the first step compiles",
        run.total_steps - start, config.train.epochs, len(run.data.train), jax.local_device_count(),
    )  # fmt: skip
    try:
        for step in range(start + 1, run.total_steps + 1):
            state, scalars = step_fn(state, next(batches))
            pending.append((step, scalars))
            report_progress(step)
            epoch_ends = step % run.steps_per_epoch == 0
            saves = step % config.run.checkpoint_every_steps == 0
            if epoch_ends or saves or step % config.run.log_every_steps == 0:
                _write_pending(log, pending, saved)
            if epoch_ends:
                values = evaluator(state.variables, run.eval_batches("validation"))
                score = validation_score(values, run.tasks)
                sparsity = stats.sparsity(jax_utils.unreplicate(state.params["model"]), config.sparsity.scope)
                values |= {
                    "score": score,
                    "sparsity/group": sparsity.group,
                    "sparsity/parameter": sparsity.parameter,
                }
                log.write(step, "validation", values)
                improved, state = _end_epoch(config, progress, score, state)
                _say_epoch(run, step, values, sparsity, improved)
                if improved:
                    saved.save("best", step, _host(state), dataclasses.asdict(progress))
            if epoch_ends or saves:
                saved.save("latest", step, _host(state), dataclasses.asdict(progress))
            if progress.stopped:
                logging.info("Stopping early: no better validation score for %d epochs", config.train.early_stop_epochs)
                break
    finally:
        log.close()
        saved.wait()


def _host(state):
    """One copy of a replicated state, on the host."""
    return jax.device_get(jax_utils.unreplicate(state))


def _write_pending(log, pending, saved):
    """Fetches the scalars of the steps since the last call, checks each, and logs their mean."""
    if not pending:
        return
    steps = [step for step, _ in pending]
    rows = [jax_utils.unreplicate(row) for row in jax.device_get([scalars for _, scalars in pending])]
    pending.clear()
    for step, row in zip(steps, rows, strict=True):
        wrong = [f"{name}={value}" for name, value in row.items() if not np.isfinite(value)]
        if wrong:
            latest = saved.step("latest")
            kept = f"the checkpoint of step {latest} is kept" if latest is not None else "none was saved yet"
            raise UserError(
                f"training is not finite at step {step} ({', '.join(wrong)}); {kept}; try a lower "
                "optimizer.learning_rate or sparsity.lambda_, and look at the data of that step"
            )
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    log.write(steps[-1], "train", means)


def _end_epoch(config, progress: Progress, score: float, state):
    """Early stopping and the plateau schedule; returns whether this epoch is the best so far, and the state."""
    improved = score < progress.best
    if improved:
        progress.best, progress.stale_epochs, progress.plateau_epochs = score, 0, 0
    else:
        progress.stale_epochs += 1
        progress.plateau_epochs += 1
    if config.optimizer.schedule == "plateau" and progress.plateau_epochs >= config.optimizer.plateau_epochs:
        progress.plateau_epochs = 0
        opt_state = optim.scale_learning_rate(
            state.opt_state, config.optimizer.plateau_factor, config.optimizer.min_learning_rate
        )
        state = state.replace(opt_state=opt_state)
    progress.stopped = 0 < config.train.early_stop_epochs <= progress.stale_epochs
    return improved, state


def _say_epoch(run, step, values, sparsity, improved):
    headlines = ", ".join(
        f"{task.name} {task.headline} {values[f'{task.name}/{task.headline}']:.4f}" for task in run.tasks
    )
    logging.info(
        "epoch %d/%d, validation: %s; %.1f %% of groups zero%s",
        step // run.steps_per_epoch, run.config.train.epochs, headlines, 100 * sparsity.group,
        " (best so far)" if improved else "",
    )  # fmt: skip


def _log_overview(state, workdir):
    """Every parameter into parameters.txt; in the log, one number a part of the model."""
    from clu import parameter_overview

    overview = parameter_overview.get_parameter_overview(state.params["model"], include_stats=False)
    (workdir / "parameters.txt").write_text(overview + "\n")
    parts = {part: parameter_overview.count_parameters(tree) for part, tree in sorted(state.params["model"].items())}
    counts = ", ".join(f"{part} {count:,}" for part, count in parts.items())
    logging.info("Parameters: %s (each one in %s)", counts, workdir / "parameters.txt")


def evaluate_best(config, workdir: str | pathlib.Path) -> dict:
    """Evaluates the best checkpoint of a run on the test split and writes its report again."""
    run = setup(config)
    workdir = pathlib.Path(workdir).expanduser()
    saved = checkpoints.Checkpoints(workdir)
    try:
        return _report(run, workdir, saved)
    finally:
        saved.close()


def _report(run: Run, workdir: pathlib.Path, saved: checkpoints.Checkpoints) -> dict:
    """Test metrics of the best checkpoint, the constant predictor's beside them; results.json, plots, table."""
    config = run.config
    like = jax.eval_shape(run.init_state)
    state, _ = saved.restore("best", like)
    logging.info("Evaluating the best checkpoint (step %d) on %d test frames", int(state.step), len(run.data.test))
    evaluator = evaluate.make_evaluator(run.model, run.tasks)
    test = evaluator(jax_utils.replicate(state.variables), run.eval_batches("test"))
    constants = evaluate.constant_predictions(run.tasks, run.eval_batches("train"))
    constant = evaluate.evaluate_constant(run.tasks, constants, run.eval_batches("test"))
    sparsity = stats.sparsity(state.params["model"], config.sparsity.scope)
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
            "layers": [dataclasses.asdict(layer) for layer in sparsity.layers],
        },
        "step": int(state.step),
        "seed": config.seed,
        "frames": {split: len(names) for split, names in run.data.names.items()},
        "config": json.loads(config.to_json()),
        "versions": {name: _version(name) for name in _VERSIONED},
        "device": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}",
    }
    records.write_json(workdir / "results.json", results)
    records.write_json(workdir / "splits.json", run.data.names)
    _save_samples(run, workdir, state.variables)
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
        images=batch["image"],
        names=[run.data.names["test"][index] for index in chosen],
        labels={task.name: batch[task.label] for task in run.tasks},
        predictions=jax.device_get(predict(variables, batch["image"])),
    )


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
