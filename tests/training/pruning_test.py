"""Pruning at once by importance, against importance computed by hand, and in whole runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from input_pipeline import loader
from mtl_sparse.jobs import train
from mtl_sparse.models import multitask
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.sparsity import stats
from mtl_sparse.training import checkpoints, groups, optimizer, pruning
from mtl_sparse.training import config as config_lib
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib
from mtl_sparse.training import step as step_lib
from tests.conftest import raises, tiny


@pytest.fixture
def pruned(rooms):
    config = tiny(rooms)
    config.sparsity.update(prune="norm", target=0.5, prune_at=0.5)
    config.train.epochs = 4
    return config


def groups_of(params):
    """Return {layer: norms of its groups} of the backbone's kernels, in NumPy."""
    flat = jax.tree_util.tree_flatten_with_path(params["model"]["backbone"])[0]
    return {
        jax.tree_util.keystr(path): np.linalg.norm(
            np.moveaxis(np.asarray(leaf), -2, 0).reshape(leaf.shape[-2], -1), axis=1
        )
        for path, leaf in flat
        if leaf.ndim == 4
    }


def test_the_groups_of_the_smallest_norm_are_zeroed_until_the_target_is_reached(pruned):
    """Norms relative to the mean of the layer; the strongest group of a layer that all paths pass stays."""
    pruned.sparsity.keep_connected = False
    run = setup_lib.setup(pruned)
    before = state_lib.initial(run)
    after = jax.device_get(pruning.prune(run, before))
    relative, zero = [], []
    for name, norms in groups_of(before.params).items():
        rest = np.delete(np.arange(len(norms)), np.argmax(norms))  # at least one group stays
        relative += list((norms / norms.mean())[rest])
        zero += list((groups_of(after.params)[name] == 0)[rest])
    relative, zero = np.array(relative), np.array(zero)
    assert relative[zero].max() < relative[~zero].min()
    found = stats.sparsity(after.params["model"])
    total = sum(layer.groups for layer in found.layers)
    assert 0.5 <= found.group < 0.5 + 1 / total + 1e-9, "the fewest groups that reach it"
    np.testing.assert_array_equal(after.params["model"]["head_depth"]["out"]["kernel"],
                                  before.params["model"]["head_depth"]["out"]["kernel"])  # fmt: skip


def test_taylor_importance_is_the_square_of_the_change_of_the_loss(pruned):
    """By the derivative of the loss of each batch to a scale of one group."""
    pruned.sparsity.prune = "taylor"
    pruned.loss.weighting = "equal"
    pruned.model.dropout = 0.0
    run = setup_lib.setup(pruned)
    state = state_lib.initial(run)
    gradients = pruning._gradients(run, loader.replicate(state))
    assert len(gradients) == run.steps_per_epoch < pruning._BATCHES
    sets = pruning.penalized(pruned, jax.device_get(state.params))
    scores = dict(zip((one.name for one in sets), pruning._scores(sets, state.params, gradients), strict=True))
    name = next(name for name in scores if "layer2_0/conv1" in name)
    batches = run.batches.train(0)
    rows = [next(batches) for _ in gradients]

    def loss(scale, channel, batch):
        backbone = state.params["model"]["backbone"]
        kernel = backbone["layer2_0"]["conv1"]["kernel"].at[:, :, channel].multiply(scale)
        layer = {**backbone["layer2_0"], "conv1": {"kernel": kernel}}
        params = {**state.params["model"], "backbone": {**backbone, "layer2_0": layer}}
        step = step_lib._Step(
            run.model.clone(axis_name=None), run.tasks, pruned.loss, state, batch, jax.random.key(0), 1
        )
        raw, _ = step.apply(params)
        return sum(
            jnp.sum(value) / jnp.sum(valid)
            for value, valid in (
                task.elementwise(raw[task.name], batch[task.label][:, 4::8, 4::8]) for task in run.tasks
            )
        )

    slope = jax.jit(jax.grad(loss))
    found = [np.mean([float(slope(1.0, channel, batch)) ** 2 for batch in rows]) for channel in range(4)]
    np.testing.assert_allclose(scores[name], found, rtol=1e-3)


@pytest.mark.parametrize("name", ["target_macs", "target_params"])
def test_targets_of_what_compaction_leaves_are_reached(pruned, name):
    pruned.sparsity.update(target=0.0, groups="coupled", **{name: 0.4})
    run = setup_lib.setup(pruned)
    after = jax.device_get(pruning.prune(run, state_lib.initial(run)))
    left = groups.left(pruned, after.params)[f"{groups.TARGETS[name]}_left"]
    assert 0.3 < left <= 0.4


def test_limits_hold(pruned):
    pruned.sparsity.update(at_least=3, exclude=("backbone/layer1_0/.*",))
    run = setup_lib.setup(pruned)
    after = jax.device_get(pruning.prune(run, state_lib.initial(run)))
    layers = stats.sparsity(after.params["model"]).layers
    assert all(layer.groups - layer.zero_groups >= min(3, layer.groups) for layer in layers)
    assert not any(layer.zero_groups for layer in layers if "layer1_0" in layer.path)
    assert sum(layer.zero_groups for layer in layers) > 5


def test_a_run_is_dense_until_it_is_pruned_and_keeps_its_zeros(pruned, tmp_path, undrawn):
    """Two of four epochs. Pruned groups stay zero while the rest trains, and the best checkpoint is a pruned one.

    Another run with the zeros of the first has them before its first step.
    """
    pruned.run.num_workers = 0
    train.train(pruned, tmp_path)
    run = setup_lib.setup(pruned)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row["sparsity/group"]) for row in rows if row["split"] == "validation"]
    per_epoch = run.steps_per_epoch
    assert [step for step, _ in found] == [per_epoch * epoch for epoch in (1, 2, 3, 4)]
    assert found[0][1] == 0 and 0.5 <= found[1][1] < 0.55 and found[1][1] == found[2][1] == found[3][1]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["step"] > 2 * per_epoch and results["sparsity"]["group"] == found[1][1]
    assert results["sparsity"]["lambda"] == 0

    first = checkpoints.read_variables(tmp_path, multitask.shapes(run.model))["params"]
    pruned.sparsity.update(prune=str(tmp_path), target=0.0)
    pruned.update(seed=5)
    pruned.train.epochs = 1
    train.train(pruned, tmp_path / "again")
    assert setup_lib.setup(pruned).settled_step == 1
    again = checkpoints.read_variables(tmp_path / "again", multitask.shapes(run.model))["params"]
    for name, norms in groups_of({"model": again}).items():
        np.testing.assert_array_equal(norms == 0, groups_of({"model": first})[name] == 0, err_msg=name)
    assert json.loads((tmp_path / "again" / "results.json").read_text())["sparsity"]["group"] == found[1][1]


def test_the_zeros_of_another_run_are_there_before_the_first_step(pruned, monkeypatch):
    """The other weights are those of the new run; a source without a zero group is refused."""
    pruned.sparsity.update(prune=".", target=0.0)
    run = setup_lib.setup(pruned)
    before = jax.device_get(state_lib.initial(run))
    other = jax.tree.map(np.ones_like, before.variables)
    monkeypatch.setattr(pruning.checkpoints, "read_variables", lambda folder, shapes: other)
    with raises("OPTION_CONFLICT", naming="no group is zero"):
        pruning.prune(run, before)
    other["params"]["backbone"]["layer2_0"]["conv1"]["kernel"][:, :, 1:3] = 0
    after = jax.device_get(pruning.prune(run, before))
    expected = before.params["model"]["backbone"]["layer2_0"]["conv1"]["kernel"].copy()
    expected[:, :, 1:3] = 0
    np.testing.assert_array_equal(after.params["model"]["backbone"]["layer2_0"]["conv1"]["kernel"], expected)
    zeros = [int((norms == 0).sum()) for norms in groups_of(after.params).values()]
    assert sum(zeros) == 2 and run.prune_step == 0


@pytest.mark.parametrize(
    ("options", "code", "naming"),
    [
        ({"prune": "magnitude"}, "OPTION_UNKNOWN_VALUE", "'magnitude'"),
        ({"prune": "norm", "target": 0.0}, "OPTION_CONFLICT", "needs a target"),
        ({"prune": "norm", "penalty": "l1"}, "OPTION_CONFLICT", "group_lasso"),
        ({"prune": ".", "target": 0.0, "target_macs": 0.5}, "OPTION_CONFLICT", "sparsity.target_macs=0"),
    ],
)
def test_options_that_cannot_work_are_named(pruned, options, code, naming):
    pruned.sparsity.update(options)
    with raises(code, naming=naming):
        config_lib.check(pruned)


def test_a_source_with_another_penalty_works_and_may_be_gone_after_the_start(pruned):
    pruned.sparsity.update(prune="runs/gone", target=0.0, penalty="group_l0", metric="fisher", fixed_norm=False)
    config_lib.check(pruned)
    run = setup_lib.setup(pruned)
    with raises("CHECKPOINT_MISSING", naming="runs/gone"):
        pruning.prune(run, state_lib.initial(run))


def test_a_wrong_source_leaves_the_folder_free_for_the_corrected_command(pruned, tmp_path, monkeypatch):
    pruned.sparsity.update(prune=str(tmp_path / "gone"), target=0.0)
    with raises("CHECKPOINT_MISSING", naming=f"sparsity.prune='{tmp_path / 'gone'}'"):
        train.train(pruned, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    (tmp_path / "run" / "checkpoints" / "latest" / "3").mkdir(parents=True)  # of a run that has started
    monkeypatch.setattr(train.pruning, "check_source", lambda run: pytest.fail("a source that may be gone is read"))

    def claim(*args):
        raise UserError("CLAIMED", "after the checks")

    monkeypatch.setattr(train.folder, "claim", claim)
    with raises("CLAIMED", naming="after"):
        train.train(pruned, tmp_path / "run")


def test_a_source_with_other_groups_is_warned_of(pruned, tmp_path, monkeypatch, caplog):
    pruned.sparsity.update(prune=str(tmp_path), target=0.0)
    run = setup_lib.setup(pruned)
    variables = jax.device_get(state_lib.initial(run)).variables
    kernel = np.array(variables["params"]["backbone"]["layer2_0"]["conv1"]["kernel"])
    kernel[:, :, 1:3] = 0
    variables["params"]["backbone"]["layer2_0"]["conv1"]["kernel"] = kernel
    monkeypatch.setattr(pruning.checkpoints, "read_variables", lambda folder, shapes: variables)
    source = {"sparsity": {"groups": "input", "scope": pruned.sparsity.scope}}
    for kind, warned in (("input", False), ("coupled", True)):
        source["sparsity"]["groups"] = kind
        (tmp_path / "config.json").write_text(json.dumps(source))
        pruning.check_source(run)
        assert [kind in message for message in caplog.messages] == [True] * warned
    monkeypatch.setattr(pruning, "_nonzero", lambda run: [])
    del source["sparsity"]["groups"]  # a run that is older than the option: of input groups
    (tmp_path / "config.json").write_text(json.dumps(source))
    run.config.sparsity.groups = "coupled"
    pruning.check_source(run)
    assert "sparsity.groups=input" in caplog.messages[-1]
    (tmp_path / "config.json").write_text("{")
    with raises("FILE_DAMAGED", naming="config.json"):
        pruning.check_source(run)


def test_a_pruning_without_an_epoch_after_it_is_refused(pruned):
    pruned.sparsity.prune_at = 0.95
    with raises("RUN_TOO_SHORT", naming="prune_at=0.95"):
        setup_lib.setup(pruned)
    pruned.sparsity.prune_at = 0.5
    assert optimizer.prune_step(pruned, 8) == 4 and optimizer.settled_step(pruned, 8) == 5
