"""Weightings and single tasks that stop, in a whole training step and at the end of an epoch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from input_pipeline import loader
from mtl_sparse.jobs import train
from mtl_sparse.report import records
from mtl_sparse.tasks import weighting
from mtl_sparse.training import checkpoints, evaluation, loop
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib
from mtl_sparse.training import step as step_lib
from tests import own_backbone
from tests.conftest import raises, tiny


@pytest.fixture(scope="module", autouse=True)
def registered():
    with own_backbone.registered():
        yield


@pytest.fixture
def config(config):
    config.model.backbone = "own"
    return config


def compiled(config, tasks=None, devices=1, count=1, **changes):
    """Return (state before, state after, scalars) of `count` steps on one batch, split over `devices`.

    vmap has the axis of pmap, and less optimization compiles faster.
    """
    run = setup_lib.setup(config)
    step = functools.partial(
        step_lib.train_step,
        model=run.model.clone(axis_name=setup_lib.AXIS, **changes),
        tasks=tasks or run.tasks,
        tx=run.tx,
        loss_config=config.loss,
        skip_not_finite=config.run.skip_not_finite > 0,
        steps_per_epoch=run.steps_per_epoch,
    )
    mapped = jax.vmap(lambda state, batch: step(state, batch, 0), in_axes=(None, 0), axis_name=setup_lib.AXIS)
    mapped = jax.jit(mapped, compiler_options={"xla_backend_optimization_level": 0})
    state = before = jax.device_get(state_lib.initial(run))
    batch = next(run.batches.train(0))
    parts = {name: np.reshape(value, (devices, -1, *value.shape[1:])) for name, value in batch.items()}
    for _ in range(count):
        state, scalars = jax.tree.map(lambda x: np.asarray(x[0]), mapped(state, parts))
    return before, state, {name: float(value) for name, value in scalars.items()}


def assert_close(a, b, atol):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol, rtol=0), a, b)


def as_gradient_descent(rooms):
    """Return a config whose step shows the gradient: Adam's first step would show its sign alone."""
    config = tiny(rooms)
    config.model.backbone = "own"
    config.sparsity.lambda_ = 0.0
    config.optimizer.update(eps=1.0, schedule="constant", learning_rate=1.0)
    return config


@pytest.fixture
def plain(rooms):
    return as_gradient_descent(rooms)


WEIGHTS = (2.0, 0.5, -1.0)


@pytest.fixture(scope="module")
def by_losses(rooms):
    """Return the ends of a step of all losses together: with `WEIGHTS`, and equal."""
    config = as_gradient_descent(rooms)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(weighting, "check", lambda *_: None)  # fixed weights may not be negative
        config.loss.update(weighting="fixed", weights=WEIGHTS)
        fixed = compiled(config)
    config.loss.update(weighting="equal", weights=())
    return fixed, compiled(config)


@pytest.mark.parametrize("source", weighting.SOURCES)
def test_the_backbone_follows_the_weighted_gradients_and_each_head_its_own(plain, source, by_losses, monkeypatch):
    """With dropout and BatchNorm: the split into backbone and heads changes nothing but rounding.

    The tasks may have another order than the heads.
    """
    (before, fixed, _), (_, equal, scalars) = by_losses
    plain.loss.update(weighting="imtl_g", gradients_of=source)
    monkeypatch.setattr(weighting, "gradient_weights", lambda *_, **__: jnp.array(WEIGHTS[::-1]))
    _, found, weighted = compiled(plain, setup_lib.setup(plain).tasks[::-1])
    for name, value in found.params["model"].items():
        want = (fixed if name == "backbone" else equal).params["model"][name]
        moves = jax.tree.map(lambda a, b: np.abs(a - b).max(), want, before.params["model"][name])
        largest = max(jax.tree.leaves(moves))
        assert largest > 1e-4, name
        assert_close(value, want, 2e-3 * largest)
    assert_close(found.batch_stats, equal.batch_stats, 1e-5)
    assert weighted["loss"] == pytest.approx(scalars["loss"], rel=1e-5)
    assert [weighted[f"{task}/weight"] for task in plain.tasks] == list(WEIGHTS)


@pytest.mark.parametrize("source", [pytest.param("params", marks=pytest.mark.slow), "features"])
def test_the_gradients_do_not_depend_on_the_number_of_devices(plain, source, monkeypatch):
    """Neither their inner products, nor their sum: a batch of eight on one device, and on two."""
    plain.loss.update(weighting="mgda", gradients_of=source)

    def gradient_weights(name, gramian, **_):  # any function of the whole Gramian
        del name
        return jnp.sum(gramian, 1) / jnp.sum(jnp.diag(gramian)) + jnp.arange(len(gramian))

    monkeypatch.setattr(weighting, "gradient_weights", gradient_weights)
    (_, one, scalars), (_, two, others) = (compiled(plain, devices=count, dropout=0.0) for count in (1, 2))
    assert others == pytest.approx(scalars, rel=2e-3)
    assert_close(two.params, one.params, 1e-4)


@pytest.mark.slow
def test_heads_at_different_layers_have_gradients_of_their_own(plain):
    """The cotangents of features of different shapes are kept apart."""
    plain.model.update(backbone="resnet", attach=("layer4_0", "layer1_0", "layer3_0"))
    plain.loss.weighting = "nash"
    before, after, scalars = compiled(plain)
    assert all(scalars[f"{task}/weight"] > 0 for task in plain.tasks)
    assert np.isfinite(scalars["grad_norm"])
    moved = lambda name: np.abs(  # noqa: E731
        after.params["model"]["backbone"][name]["conv1"]["kernel"]
        - before.params["model"]["backbone"][name]["conv1"]["kernel"]
    ).max()
    assert moved("layer4_0") > 0 and moved("layer1_0") > 0


@pytest.mark.slow
def test_with_one_task_a_gradient_weighting_is_equal(config):
    config.tasks, config.model.backbone = ("depth",), "resnet"  # whose steps are equal bit for bit
    config.loss.weighting = "equal"
    _, want, _ = compiled(config)
    config.loss.weighting = "gradnorm"
    _, found, scalars = compiled(config)
    assert_close(found.params, want.params, 0)
    assert scalars["depth/weight"] == 1 and found.weighting == {}


def test_one_task_is_reported_as_equal(config, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    config.tasks = ("depth",)
    config.loss.weighting = "mgda"
    loop._log_start(setup_lib.setup(config), 0)
    assert any("loss.weighting=mgda" in line and "equal" in line for line in lines), lines


@pytest.mark.slow
def test_a_state_of_the_weighting_moves_and_is_restored(config, tmp_path):
    config.loss.weighting = "famo"
    _, after, _ = compiled(config, count=2)
    logits = after.weighting["logits"]
    assert all(value != 0 for value in logits.values()) and len(set(map(float, logits.values()))) == 3
    saved = checkpoints.Checkpoints(tmp_path)
    saved.save("latest", 2, after, {})
    saved.wait()
    restored, _ = saved.restore("latest", state_lib.shapes(setup_lib.setup(config)))
    saved.close()
    jax.tree.map(np.testing.assert_array_equal, restored, after)


@pytest.mark.slow
def test_a_run_with_a_weighting_that_learns_ends_the_same_when_cut(config, tmp_path):
    """FAMO in a whole run: its logits are in the checkpoint, and a run cut in two ends as the uncut one."""
    config.loss.weighting = "famo"
    config.run.num_workers = 0
    train.train(config, tmp_path / "whole")
    config.run.checkpoint_every_steps = 1
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "make_train_step", killed_after(4, loop.make_train_step))
        with pytest.raises(KeyboardInterrupt):
            train.train(config, tmp_path / "cut")
    train.train(config, tmp_path / "cut")
    leaves = [final(folder, config) for folder in (tmp_path / "whole", tmp_path / "cut")]
    jax.tree.map(np.testing.assert_array_equal, *leaves)
    assert any(value != 0 for value in leaves[0].weighting["logits"].values())


def final(folder, config):
    saved = checkpoints.Checkpoints(folder)
    try:
        return saved.restore("latest", state_lib.shapes(setup_lib.setup(config)))[0]
    finally:
        saved.close()


@pytest.mark.slow
def test_an_epoch_ends_for_the_weighting_with_a_step_that_is_skipped(config, monkeypatch):
    """The second of two steps is not finite: DWA's means of the epoch are those of the first one."""
    config.loss.weighting = "dwa"
    config.run.skip_not_finite = 1
    original = step_lib._Step.losses

    def broken(self, raw):
        losses, counts = original(self, raw)
        return jnp.where(self.state.step == 1, jnp.nan, losses), counts

    monkeypatch.setattr(step_lib._Step, "losses", broken)
    _, after, scalars = compiled(config, count=2)
    assert scalars["skipped"] == 1 and after.step == 2
    assert np.isfinite(list(after.weighting["last"].values())).all()
    assert not any([*after.weighting["count"].values(), *after.weighting["sum"].values()])


def test_a_loss_of_zero_is_named(tmp_path):
    saved = checkpoints.Checkpoints(tmp_path)
    row = {"loss": 0.0, "grad_norm": float("nan"), "depth/loss": 0.0, "normals/loss": 1.0}
    with raises("LOSS_NOT_POSITIVE", naming="'gls' needs losses above 0, got 0 for depth at step 7"):
        loop._fetch([(7, dict(row))], saved, "gls")
    with raises("STEP_NOT_FINITE", naming="step 7"):
        loop._fetch([(7, dict(row))], saved, "equal")
    saved.close()


@pytest.mark.slow
def test_a_loss_of_zero_is_not_finite_where_the_method_needs_more(config, monkeypatch):
    """So that the loop sees it."""
    config.loss.weighting = "gls"
    original = step_lib._Step.losses

    def zero(self, raw):
        losses, counts = original(self, raw)
        return losses.at[1].multiply(0.0), counts

    monkeypatch.setattr(step_lib._Step, "losses", zero)
    scalars = compiled(config)[2]
    assert scalars[f"{config.tasks[1]}/loss"] == 0
    assert not np.isfinite([scalars["loss"], scalars["grad_norm"]]).all()


@pytest.mark.parametrize("name", ["uncertainty", "mgda"])
@pytest.mark.slow
def test_a_task_that_has_stopped_keeps_its_head_and_its_loss_weight(config, name):
    """Its loss is not reported, and the others' gradients are those without it."""
    config.loss.weighting = name
    config.optimizer.weight_decay = 0.1
    run = setup_lib.setup(config)
    left = [task for task in run.tasks if task.name != "depth"]
    before, after, scalars = compiled(config, left)
    jax.tree.map(
        np.testing.assert_array_equal, after.params["model"]["head_depth"], before.params["model"]["head_depth"]
    )
    jax.tree.map(np.testing.assert_array_equal, after.batch_stats["head_depth"], before.batch_stats["head_depth"])
    for part in ("head_normals", "head_segmentation", "backbone"):
        for a, b in ((after.params["model"], before.params["model"]), (after.batch_stats, before.batch_stats)):
            changed = [(x != y).any() for x, y in zip(*map(jax.tree.leaves, (a[part], b[part])), strict=True)]
            assert any(changed), part
    assert "depth/loss" not in scalars and "normals/loss" in scalars
    if name == "uncertainty":
        assert after.params["weighting"]["depth"] == 1 != after.params["weighting"]["normals"]


def stops(config, rows):
    """Return ({task: step of its stop}, whether all did) after each epoch with these validation losses."""
    run = setup_lib.setup(config)
    state, progress, seen = state_lib.initial(run), loop.Progress(), []
    for epoch, row in enumerate(rows, 1):
        values = {f"{task}/loss": loss for task, loss in zip(config.tasks, row, strict=True)}
        loop._end_epoch(run, progress, epoch * run.steps_per_epoch, 1.0, state)
        loop._stop_tasks(run, progress, epoch * run.steps_per_epoch, values, state, state)
        seen.append((dict(progress.task_stopped), progress.stopped))
    return seen


def test_each_task_has_its_own_patience(config):
    """Two steps an epoch; patience 2."""
    config.tasks = ("segmentation", "depth")
    config.train.update(early_stop="tasks", early_stop_epochs=2, epochs=20)
    rows = [(3, 5), (2, 6), (2, 4), (2.5, 4.5), (1, 4.2), (1, 1), (1, 1)]
    seen = stops(config, rows)
    assert [found for found, _ in seen] == [{}] * 3 + [{"segmentation": 8}, *[{"segmentation": 8, "depth": 10}] * 3]
    assert [stopped for _, stopped in seen] == [False] * 4 + [True] * 3
    config.train.early_stop_epochs = 0
    assert stops(config, rows)[-1] == ({}, False), "0 never stops"


def test_no_task_stops_before_the_sparsity_is_settled(config):
    config.tasks = ("segmentation", "depth")
    config.train.update(early_stop="tasks", early_stop_epochs=1, epochs=10)
    config.sparsity.update(target=0.5, target_freeze=0.6)  # epoch 6 is the first that counts
    seen = stops(config, [(1, 1)] * 5 + [(3, 1), (2, 2), (2, 1)])
    assert [found for found, _ in seen] == [{}] * 6 + [{"depth": 14}, {"depth": 14, "segmentation": 16}]


def test_a_frozen_head_keeps_the_statistics_it_was_evaluated_with(config):
    """With train.bn_frames, which measures them anew for each evaluation."""
    config.train.update(bn_frames=8, early_stop="tasks", early_stop_epochs=1)
    run = setup_lib.setup(config)
    state, evaluator = loader.replicate(state_lib.initial(run)), evaluation.Evaluator(run)
    evaluated = evaluator.with_statistics(state)
    progress = loop.Progress(task_best={"depth": 0.0, "normals": 9.0, "segmentation": 9.0})
    values = {f"{task}/loss": 1.0 for task in config.tasks}
    stopped = loop._stop_tasks(run, progress, run.total_steps, values, state, evaluated)
    assert list(progress.task_stopped) == ["depth"]
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(stopped.batch_stats["head_depth"], evaluated.batch_stats["head_depth"])
    same(stopped.batch_stats["head_normals"], state.batch_stats["head_normals"])
    other = stopped.replace(params=jax.tree.map(lambda x: x * 1.1, stopped.params))
    again = evaluator.with_statistics(other, frozen=tuple(progress.task_stopped))
    same(again.batch_stats["head_depth"], evaluated.batch_stats["head_depth"])
    with pytest.raises(AssertionError):
        same(again.batch_stats["head_normals"], evaluated.batch_stats["head_normals"])


@pytest.mark.slow
def test_a_run_whose_tasks_stop_one_by_one_ends_the_same_when_it_is_killed_in_between(config, tmp_path, monkeypatch):
    """Depth stops after epoch 2, segmentation after 4, normals after 5; killed in epoch 4 and resumed."""
    config.train.update(early_stop="tasks", early_stop_epochs=1, epochs=9, bn_frames=8)
    config.run.update(num_workers=0, checkpoint_every_steps=1)
    better_until = {"depth": 1, "segmentation": 3, "normals": 4}
    original = loop._stop_tasks

    def scheduled(run, progress, step, values, *states):
        epoch = step // run.steps_per_epoch
        values = values | {f"{task}/loss": 9.0 - min(epoch, last) for task, last in better_until.items()}
        return original(run, progress, step, values, *states)

    monkeypatch.setattr(loop, "_stop_tasks", scheduled)
    train.train(config, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(loop, "make_train_step", killed_after(7, loop.make_train_step))
        with pytest.raises(KeyboardInterrupt):
            train.train(config, tmp_path / "cut")
    train.train(config, tmp_path / "cut")
    whole, cut = (final(tmp_path / name, config) for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
    spe = setup_lib.setup(config).steps_per_epoch
    assert int(whole.step) == 5 * spe, "the run ends when all tasks have stopped"
    for name in ("metrics.jsonl", "results.json"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "cut" / name).read_text()
    rows = records.read_metrics(tmp_path / "whole")
    firsts = {task: int(rows["validation"][f"{task}/stopped"][0][0]) for task in config.tasks}
    assert firsts == {"depth": 2 * spe, "segmentation": 4 * spe, "normals": 5 * spe}
    assert rows["train"]["depth/loss"][0].max() == 2 * spe, "no loss is logged after the stop"
    assert rows["train"]["normals/loss"][0].max() == 5 * spe


def killed_after(count, make):
    """Return `make_train_step` whose steps end the process at call `count`, over all steps that it makes."""
    calls = []

    def made(*arguments):
        step = make(*arguments)

        def counted(*values):
            calls.append(0)
            if len(calls) == count:
                raise KeyboardInterrupt
            return step(*values)

        return counted

    return made
