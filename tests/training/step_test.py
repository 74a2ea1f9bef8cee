"""One training step, and what the training loop does at the end of an epoch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from input_pipeline import loader
from mtl_sparse.training import checkpoints, loop, optimizer
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib
from mtl_sparse.training import step as step_lib
from tests.conftest import raises, tiny


def test_the_seed_is_an_argument_of_the_compiled_step(rooms, monkeypatch):
    """Runs with different seeds share one program of the compile cache."""
    made = []

    def pmap(function, **options):
        made.append((function.func, set(function.keywords), options["in_axes"]))
        return lambda *arguments: made.append(arguments)

    config = tiny(rooms)
    config.seed = 7
    run = setup_lib.setup(config)
    monkeypatch.setattr(jax, "pmap", pmap)
    step_lib.make_train_step(run)("state", "batch")
    assert made == [
        (
            step_lib.train_step,
            {"model", "tasks", "tx", "loss_config", "skip_not_finite", "steps_per_epoch"},
            (None, 0, None),
        ),
        ("state", "batch", 7),
    ]


def test_without_penalty_a_step_is_adams(rooms):
    """The whole step of one task with lambda 0 equals a step written with plain optax."""
    config = tiny(rooms)
    config.tasks = ("depth",)
    config.loss.weighting = "equal"
    config.sparsity.lambda_ = 0.0
    config.model.dropout = 0.0
    config.optimizer.schedule = "constant"
    run = setup_lib.setup(config)
    state = state_lib.initial(run)
    batch = next(run.batches.train(0))

    def loss(params):
        model = run.model.clone(axis_name=None)
        variables = {"params": params, "batch_stats": state.batch_stats}
        raw, _ = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
        label = batch["depth"][:, 4::8, 4::8]
        valid = label > 0
        return jnp.sum(jnp.where(valid, (jax.nn.sigmoid(raw["depth"][..., 0]) - label) ** 2, 0)) / valid.sum()

    adam = optax.adam(config.optimizer.learning_rate)
    params = state.params["model"]
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    updates, _ = adam.update(grads, adam.init(params), params)
    want = optax.apply_updates(params, updates)
    new, scalars = step_lib.make_train_step(run)(loader.replicate(state), loader.shard(batch))
    assert float(scalars["depth/loss"]) == pytest.approx(float(value), rel=1e-5)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), new.params["model"], want)
    # Adam's first step is +- the learning rate: rounding of a gradient near zero can flip it, so compare most weights.
    close = jax.tree.map(lambda a, b: jnp.abs(a - b) < 1e-5, new.params["model"], want)
    fraction = np.mean(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(close)]))
    assert fraction > 0.999, moved


def end_epochs(config, scores, skipped=0):
    """Return what the loop does at the ends of epochs with these scores: [(best, learning rate, stopped)]."""
    run = setup_lib.setup(config)
    state = state_lib.initial(run)
    progress, seen = loop.Progress(skipped=skipped), []
    for epoch, score in enumerate(scores, 1):
        best, state = loop._end_epoch(run, progress, epoch * run.steps_per_epoch, score, state)
        seen.append((best, pytest.approx(float(optimizer.learning_rate(state.opt_state))), progress.stopped))
    return seen


def test_early_stop_and_plateau(rooms):
    config = tiny(rooms)
    config.optimizer.update(schedule="plateau", plateau_epochs=2, plateau_factor=0.1, min_learning_rate=1e-4)
    config.train.update(early_stop_epochs=5, epochs=10)
    assert end_epochs(config, (1.0, 0.5, 0.6, 0.6, 0.7, 0.5, 0.5)) == [
        (True, 2e-3, False),
        (True, 2e-3, False),
        (False, 2e-3, False),
        (False, 2e-4, False),
        (False, 2e-4, False),
        (False, 1e-4, False),
        (False, 1e-4, True),
    ]


def test_the_learning_rate_stays_until_the_sparsity_is_settled(rooms):
    """Pruning makes the score worse for a while. Of 10 epochs, the penalty starts after the sixth."""
    config = tiny(rooms)
    config.optimizer.update(schedule="plateau", plateau_epochs=2, plateau_factor=0.1, min_learning_rate=1e-9)
    config.train.epochs = 10
    config.sparsity.start_step = 12
    rates = [rate for _, rate, _ in end_epochs(config, range(1, 11))]
    assert rates == [2e-3] * 8 + [2e-4, 2e-4], "the seventh is the first with a penalized step"


def test_nothing_is_best_and_nothing_stops_before_the_sparsity_is_settled(rooms):
    """10 epochs of 2 steps: lambda is frozen after step 12, the pattern after step 16."""
    config = tiny(rooms)
    config.train.update(early_stop_epochs=2, epochs=10)
    config.sparsity.update(target=0.5, target_freeze=0.6)
    scores = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.5, 0.6, 0.6)
    best = [i for i, (best, _, _) in enumerate(end_epochs(config, scores), 1) if best]
    assert best == [6, 8], "epoch 6 is the first that counts"
    assert [stopped for *_, stopped in end_epochs(config, scores)] == [False] * 9 + [True]
    assert [i for i, (best, _, _) in enumerate(end_epochs(config, scores, skipped=2), 1) if best] == [7, 8], "two late"
    config.sparsity.debias_at = 0.7
    assert [i for i, (best, _, _) in enumerate(end_epochs(config, scores), 1) if best] == [8], (
        "the debiasing phase has had a step"
    )


def test_the_last_checkpoint_may_be_the_best_however_many_steps_were_skipped(rooms):
    """8 steps, of which two are skipped; the sparsity is settled after 7 that are taken."""
    config = tiny(rooms)
    config.train.epochs = 4
    config.sparsity.update(target=0.5, target_freeze=0.5, debias_at=0.8)
    assert [best for best, _, _ in end_epochs(config, (0.1, 0.2, 0.3, 0.4), skipped=2)] == [False] * 3 + [True]


def test_a_step_that_is_skipped_later_does_not_make_a_worse_checkpoint_the_best(rooms):
    config = tiny(rooms)
    config.train.epochs = 4
    config.sparsity.update(target=0.5, target_freeze=0.5)
    run = setup_lib.setup(config)
    state, progress = state_lib.initial(run), loop.Progress()
    assert loop._end_epoch(run, progress, run.settled_step, 0.3, state)[0]
    progress.skipped = 1
    assert not loop._end_epoch(run, progress, run.settled_step + run.steps_per_epoch, 0.9, state)[0]


def test_the_score_is_the_geometric_mean_of_the_losses(rooms):
    tasks = setup_lib.setup(tiny(rooms)).tasks
    values = {"segmentation/loss": 4.0, "depth/loss": 0.5, "normals/loss": 0.5}
    assert loop.validation_score(values, tasks) == pytest.approx(1.0)


@pytest.mark.slow
def test_a_task_without_labels_keeps_its_loss_weight_and_has_no_loss(rooms):
    """Adam's momentum from the steps before would change its log variance; those of other tasks do change."""
    config = tiny(rooms)
    config.tasks = ("depth", "normals")
    run = setup_lib.setup(config)
    step, state = step_lib.make_train_step(run), loader.replicate(state_lib.initial(run))
    batch = next(run.batches.train(0))
    rows = []
    for labels in (batch["depth"], batch["depth"], np.zeros_like(batch["depth"])):
        before = jax.device_get(state.params["weighting"])
        state, scalars = step(state, loader.shard({**batch, "depth": labels}))
        after = jax.device_get(state.params["weighting"])
        rows.append((before["depth"] != after["depth"], before["normals"] != after["normals"], scalars))
    assert [row[:2] for row in rows] == [(True, True), (True, True), (False, True)]
    assert np.isnan(rows[-1][2]["depth/loss"]) and np.isfinite(rows[-1][2]["loss"])


class Written:
    """A metric log that keeps its rows in memory."""

    def __init__(self):
        self.rows = []

    def write(self, step, split, values):
        self.rows.append((step, split, values))


@pytest.mark.parametrize(
    ("losses", "logged"), [((0.25, np.nan, 0.75), {"depth/loss": 0.5}), ((np.nan, np.nan, np.nan), {})]
)
def test_a_task_is_logged_by_the_steps_that_have_its_label(config, losses, logged):
    run = setup_lib.setup(config)
    progress = loop.Progress(pending=[(i, {"loss": 1.0, "depth/loss": loss}) for i, loss in enumerate(losses, 1)])
    log = Written()
    loop._write_pending(run, log, progress, saved=None)
    assert log.rows == [(3, "train", {"loss": 1.0} | logged)]


@pytest.mark.parametrize("row", [{"loss": np.nan, "depth/loss": np.nan}, {"loss": 1.0, "grad_norm": np.inf}])
def test_a_step_that_is_not_finite_still_ends_the_run(row, tmp_path):
    saved = checkpoints.Checkpoints(tmp_path)
    with raises("STEP_NOT_FINITE", naming="step 7"):
        loop._fetch([(7, row)], saved)
    saved.close()
