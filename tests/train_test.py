"""Runs of the whole job at the smallest size, alone, killed, and on several devices."""

import collections
import functools
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import run as run_config
from input_pipeline import loader
from mtl_sparse import checkpoints, evaluate, optim, train
from mtl_sparse import results as results_lib
from mtl_sparse import run as run_lib
from mtl_sparse.errors import UserError
from tests.conftest import tiny


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(rooms, tmp_path_factory):
    """A finished run of 4 steps and its results."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train.train(tiny(rooms), workdir)


def test_a_run_leaves_what_its_folder_promises(finished):
    workdir, results = finished
    assert json.loads((workdir / "results.json").read_text()) == results
    assert json.loads((workdir / "config.json").read_text()) == results["config"]
    assert {path.name for path in (workdir / "plots").iterdir()} == {
        "curves.png", "sparsity.png", "groups_per_layer.png", "samples.png"
    }  # fmt: skip
    assert list(workdir.glob("events.out.tfevents.*"))
    rows = lines(workdir)
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if row["split"] == "validation"] == [2, 4]
    assert set(results["sparsity"]) == {
        "group", "parameter", "weight", "lambda", "target", "penalty", "dead_layers", "dead_blocks", "layers"
    }  # fmt: skip
    assert len(results["sparsity"]["layers"]) == 15
    assert results["test"].keys() - results["constant"].keys() == {"segmentation/loss", "depth/loss", "normals/loss"}
    assert results["frames"] == {"train": 18, "validation": 2, "test": 9}
    assert results["seed"] == 0 and results["versions"]["jax"] == jax.__version__


def test_uncertainty_weights_are_trained(finished):
    rows = [row for row in lines(finished[0]) if row["split"] == "train"]
    values = [[row[f"{task}/log_variance"] for task in ("segmentation", "depth", "normals")] for row in rows]
    assert (np.abs(np.diff(values, axis=0)) > 0).all()


def test_the_penalty_reaches_the_backbone_of_a_run(config, tmp_path, monkeypatch):
    """A strong lambda prunes within four steps; the report's count is that of the saved parameters.

    The step and the evaluation are each traced, and so compiled, once.
    """
    traced = collections.Counter()
    for module, name in ((train, "train_step"), (evaluate, "eval_sums")):

        def counting(original, name, *args, **kwargs):
            traced[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, functools.partial(counting, getattr(module, name), name))
    config.sparsity.update(lambda_=1.0, warmup_steps=0)
    reported = train.train(config, tmp_path)["sparsity"]
    assert traced == {"train_step": 1, "eval_sums": 1}
    assert 0.02 < reported["group"] < 1
    saved = checkpoints.Checkpoints(tmp_path)
    state, _ = saved.restore("best", run_lib.setup(config).state_shapes)
    saved.close()
    groups = zero = 0
    for kernel in jax.tree.leaves(state.params["model"]["backbone"]):
        if kernel.ndim == 4:
            groups += kernel.shape[2]
            zero += int((np.asarray(kernel) == 0).all((0, 1, 3)).sum())
    assert reported["group"] == pytest.approx(zero / groups)
    heads = jax.tree.leaves({name: tree for name, tree in state.params["model"].items() if name != "backbone"})
    assert not any((np.asarray(leaf) == 0).all((0, 1, 3)).any() for leaf in heads if leaf.ndim == 4)


def test_starting_a_finished_run_again_trains_nothing_and_reports_the_same(finished, rooms):
    workdir, results = finished
    before = (workdir / "metrics.jsonl").read_text()
    assert train.train(tiny(rooms), workdir) == results
    assert (workdir / "metrics.jsonl").read_text() == before


def test_other_settings_in_the_same_folder_are_refused(finished, rooms):
    config = tiny(rooms)
    config.run.log_every_steps = 7
    config.optimizer.learning_rate = 0.5
    for job in (train.train, results_lib.evaluate_best):
        with pytest.raises(UserError, match=r"other settings \(optimizer.learning_rate=0.002 there, 0.5 now\)"):
            job(config, finished[0])


def test_other_data_in_the_same_folder_are_refused(finished, own_rooms):
    np.save(own_rooms / "depth" / "00003.npy", np.ones((32, 48), np.float32))
    with pytest.raises(UserError, match="other data"):
        results_lib.evaluate_best(tiny(own_rooms), finished[0])


def test_stopped_between_its_two_saves_a_run_goes_on_the_same(finished, rooms, tmp_path, monkeypatch):
    """The best checkpoint of step 2 is written, the latest is still that of step 1."""
    save = checkpoints.Checkpoints.save

    def stop(self, kind, step, *rest):
        if (kind, step) == ("latest", 2):
            raise KeyboardInterrupt
        save(self, kind, step, *rest)

    monkeypatch.setattr(checkpoints.Checkpoints, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(tiny(rooms), tmp_path)
    saved = checkpoints.Checkpoints(tmp_path)
    assert (saved.step("latest"), saved.step("best")) == (1, 2)
    saved.close()
    monkeypatch.setattr(checkpoints.Checkpoints, "save", save)
    assert train.train(tiny(rooms), tmp_path) == finished[1]
    assert lines(tmp_path) == lines(finished[0])


def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one(finished, rooms, tmp_path):
    """kill -9 in the middle, then the same command: same metrics, same parameters, no line twice."""
    script = f"""
from mtl_sparse import train
from tests.conftest import tiny
train.train(tiny({str(rooms)!r}), {str(tmp_path)!r})
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = tmp_path / "metrics.jsonl"
    deadline = time.time() + 240
    while time.time() < deadline and child.poll() is None:
        if path.exists() and path.read_text().count("\n") >= 2 and (tmp_path / "checkpoints/latest/1").exists():
            break
        time.sleep(0.02)
    assert child.poll() is None, "it should still be running"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    stopped_at = checkpoints.Checkpoints(tmp_path).step("latest")
    assert 1 <= stopped_at < 4
    results = train.train(tiny(rooms), tmp_path)
    assert results == finished[1]
    assert lines(tmp_path) == lines(finished[0])


@pytest.mark.slow
def test_a_run_with_a_target_and_a_last_phase_goes_on_the_same(rooms, tmp_path, monkeypatch):
    """The controller is part of the checkpoint: stopped at any step, lambda goes on as it would have."""
    config = tiny(rooms)
    config.tasks = ("depth",)
    config.train.epochs = 4
    config.sparsity.update(target=0.5, target_ramp=0.3, lambda_=1e-3, warmup_steps=2, debias_at=0.75)
    config.sparsity.target_freeze = 0.7
    whole = train.train(config, tmp_path / "whole")
    make_train_step = train.make_train_step

    def stop_at_four(run):
        step_fn, taken = make_train_step(run), []

        def step(*arguments):
            if len(taken) == 4:
                raise KeyboardInterrupt
            taken.append(1)
            return step_fn(*arguments)

        return step

    monkeypatch.setattr(train, "make_train_step", stop_at_four)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path / "stopped")
    monkeypatch.setattr(train, "make_train_step", make_train_step)
    assert train.train(config, tmp_path / "stopped") == whole
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    lambdas = [row["lambda"] for row in lines(tmp_path / "whole") if row["split"] == "train"]
    assert lambdas[0] == 0 and len(set(lambdas[1:6])) > 3, "warm-up, then the controller moves it"
    assert lambdas[6:] == [0, 0], "no penalty in the last phase"
    assert whole["sparsity"]["target"] == 0.5


def test_a_stretch_that_was_lost_is_not_logged_twice(finished, rooms, tmp_path):
    from mtl_sparse import logs

    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "split": "train", "loss": 1}\n{"step": 2, "split": "train", "loss": 2}\n{"step": 3, "spl'
    )
    log = logs.MetricLog(tmp_path, start_step=1)
    log.write(2, "train", {"loss": 5})
    log.close()
    assert [(row["step"], row["loss"]) for row in lines(tmp_path)] == [(1, 1), (2, 5)]


def five_losses(rooms):
    """Losses of five steps at global batch 8 on this process's devices, dropout and BatchNorm included.

    With the paper's learning rate and lambda, which its warm-up keeps small in these steps: at the demo's, Adam and
    the adaptive metric turn roundings of near-zero gradients into differences of a percent.
    """
    config = tiny(rooms)
    config.tasks = ("depth",)
    config.model.width = 8
    config.optimizer.learning_rate = 1e-4
    config.sparsity.lambda_ = 1e-5
    run = run_lib.setup(config)
    state, step_fn = loader.replicate(run.init_state()), train.make_train_step(run)
    batches, losses = run.train_batches(0), []
    for _ in range(5):
        state, scalars = step_fn(state, loader.shard(next(batches)))
        losses.append({name: float(value) for name, value in scalars.items() if name.endswith("loss")})
    return losses


def test_four_devices_give_the_losses_and_the_evaluation_of_one(finished, rooms):
    script = f"""
import json, jax
from mtl_sparse import results
from tests.conftest import tiny
from tests.train_test import five_losses
assert jax.local_device_count() == 4
test = results.evaluate_best(tiny({str(rooms)!r}), {str(finished[0])!r})["test"]
print(json.dumps([five_losses({str(rooms)!r}), test]))
"""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    four, test = json.loads(done.stdout.splitlines()[-1])
    assert jax.local_device_count() == 1
    one = five_losses(rooms)
    for a, b in zip(one, four, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
    for name, value in finished[1]["test"].items():
        assert test[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_the_seed_is_an_argument_of_the_compiled_step(rooms, monkeypatch):
    """Runs that differ in it share one program of the compile cache."""
    made = []

    def pmap(function, **settings):
        made.append((function.func, set(function.keywords), settings["in_axes"]))
        return lambda *arguments: made.append(arguments)

    config = tiny(rooms)
    config.seed = 7
    run = run_lib.setup(config)
    monkeypatch.setattr(jax, "pmap", pmap)
    train.make_train_step(run)("state", "batch")
    assert made == [
        (train.train_step, {"model", "tasks", "tx", "loss_config", "skip_not_finite"}, (None, 0, None)),
        ("state", "batch", 7),
    ]


def test_without_penalty_a_step_is_adams(rooms):
    """The whole step with lambda 0 against a step written out with plain optax, single task."""
    import optax

    config = tiny(rooms)
    config.tasks = ("depth",)
    config.loss.weighting = "equal"
    config.sparsity.lambda_ = 0.0
    config.model.dropout = 0.0
    config.optimizer.schedule = "constant"
    run = run_lib.setup(config)
    state = run.init_state()
    batch = next(run.train_batches(0))

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
    new, scalars = train.make_train_step(run)(loader.replicate(state), loader.shard(batch))
    assert float(scalars["depth/loss"]) == pytest.approx(float(value), rel=1e-5)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), new.params["model"], want)
    # Adam's first step is +- the rate: a rounding of a gradient near zero can turn it, so compare most weights.
    close = jax.tree.map(lambda a, b: jnp.abs(a - b) < 1e-5, new.params["model"], want)
    share = np.mean(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(close)]))
    assert share > 0.999, moved


def test_a_run_whose_validation_is_never_finite_says_so(rooms, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "validation_score", lambda *_: float("nan"))
    with pytest.raises(UserError, match="validation was never finite.*fixed_norm"):
        train.train(tiny(rooms), tmp_path)


def test_a_step_that_is_not_finite_stops_with_the_step_named(rooms, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lib.Run, "train_batches", broken_at_third(run_lib.Run.train_batches))
    with pytest.raises(UserError, match=r"not finite at step 3 \(.*grad_norm=nan.*checkpoint of step 2 is kept"):
        train.train(tiny(rooms), tmp_path)
    saved = checkpoints.Checkpoints(tmp_path)
    assert saved.step("latest") == 2
    saved.close()
    assert max(row["step"] for row in lines(tmp_path)) == 2


def broken_at_third(batches):
    def broken(self, start_step):
        for step, batch in enumerate(batches(self, start_step), start_step + 1):
            yield {**batch, "depth": batch["depth"] * np.float32(np.nan)} if step == 3 else batch

    return broken


def end_epochs(config, scores):
    """What the loop does at the ends of epochs with these scores: [(best, learning rate, stopped)]."""
    run = run_lib.setup(config)
    state = run.init_state()
    progress, seen = train.Progress(), []
    for epoch, score in enumerate(scores, 1):
        best, state = train._end_epoch(run, progress, epoch * run.steps_per_epoch, score, state)
        seen.append((best, pytest.approx(float(optim.learning_rate(state.opt_state))), progress.stopped))
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


def test_the_rate_stays_until_the_sparsity_is_settled(rooms):
    """Pruning makes the score worse for a while; 10 epochs, the penalty starts after the sixth."""
    config = tiny(rooms)
    config.optimizer.update(schedule="plateau", plateau_epochs=2, plateau_factor=0.1, min_learning_rate=1e-9)
    config.train.epochs = 10
    config.sparsity.start_step = 12
    rates = [rate for _, rate, _ in end_epochs(config, range(1, 11))]
    assert rates == [2e-3] * 7 + [2e-4, 2e-4, 2e-5]


def test_nothing_is_best_and_nothing_stops_before_the_sparsity_is_settled(rooms):
    """10 epochs of 2 steps: lambda is frozen after step 12, the pattern after step 16."""
    config = tiny(rooms)
    config.train.update(early_stop_epochs=2, epochs=10)
    config.sparsity.update(target=0.5, target_freeze=0.6)
    scores = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.5, 0.6, 0.6)
    best = [i for i, (best, _, _) in enumerate(end_epochs(config, scores), 1) if best]
    assert best == [6, 8], "epoch 6 is the first that counts"
    assert [stopped for *_, stopped in end_epochs(config, scores)] == [False] * 9 + [True]
    config.sparsity.debias_at = 0.8
    assert [i for i, (best, _, _) in enumerate(end_epochs(config, scores), 1) if best] == [8]


def test_the_score_is_the_geometric_mean_of_the_losses(rooms):
    tasks = run_lib.setup(tiny(rooms)).tasks
    values = {"segmentation/loss": 4.0, "depth/loss": 0.5, "normals/loss": 0.5}
    assert train.validation_score(values, tasks) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {
                "tasks": ("depth",),
                "data.depth_target": "metres",
                "loss.weighting": "fixed",
                "loss.weights": (2.0,),
                "sparsity.metric": "plain",
            },
            marks=pytest.mark.slow,
        ),
        {
            "tasks": ("edge",),
            "model.dtype": "bfloat16",
            "data.flip": True,
            "data.max_scale": 1.5,
            "loss.weighting": "equal",
            "model.attach": ("layer3_0/conv1",),
        },
    ],
    ids=["depth in metres, plain prox", "bfloat16 with augmentation, equal weights, a head further in front"],
)
def test_variants_run_to_their_report(config, tmp_path, settings):
    config.update_from_flattened_dict(settings)
    config.train.epochs = 1
    config.model.dropout = 0.0
    results = train.train(config, tmp_path)
    assert list(results["headlines"]) == list(settings["tasks"])
    assert all(np.isfinite(value) for value in results["test"].values())
    if "depth" in settings["tasks"]:
        assert {"depth/mae", "depth/mae_normalized"} <= results["test"].keys()
    saved = checkpoints.Checkpoints(tmp_path)
    state, _ = saved.restore("latest", run_lib.setup(config).state_shapes)
    saved.close()
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.batch_stats))} == {"float32"}
    if "model.attach" in settings:
        backbone = state.params["model"]["backbone"]
        assert set(backbone["layer3_0"]) == {"conv1", "bn1"} and "layer4_0" not in backbone
        own = run_config.get_config(str(tmp_path))
        model, variables = run_lib.load_model(tmp_path, own)
        assert model.points() == ("layer3_0/conv1",)
        small, _ = run_lib.compact(own, model, variables)
        assert small.widths.attach == ("layer3_0/conv1",)
        own.model.update(widths=small.widths.to_json(), attach=("layer2_0",))
        with pytest.raises(UserError, match="neither .* nor model.attach can be another than when it was made"):
            run_lib.load_model(tmp_path, own)
