"""Checkpoints: round trips, what is wrong with one is named, and those of older versions are read."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import demo
from mtl_sparse.sparsity.groups import path_name
from mtl_sparse.training import checkpoints, optimizer
from tests.conftest import raises


def state(value, channels=3):
    return {"params": {"a/b": np.full((2, channels), value, np.float32), "empty": {}}, "list": [np.int32(value)]}


@pytest.fixture
def saved(tmp_path):
    saved = checkpoints.Checkpoints(tmp_path)
    yield saved
    saved.close()


def test_round_trip_and_the_newest_wins(saved, tmp_path):
    assert saved.step("latest") is None
    for step in (3, 5, 9):
        saved.save("latest", step, state(step), {"best": 0.5 * step})
    saved.save("best", 5, state(5), {"best": 2.5})
    saved.wait()
    assert (saved.step("latest"), saved.step("best")) == (9, 5)
    again = checkpoints.Checkpoints(tmp_path)
    restored, progress = again.restore("latest", state(0))
    again.close()
    np.testing.assert_array_equal(restored["params"]["a/b"], np.full((2, 3), 9))
    assert restored["list"] == [9] and restored["params"]["empty"] == {} and progress == {"best": 4.5}
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "latest").iterdir() if path.name.isdigit()) == [
        "5",
        "9",
    ]


@pytest.mark.parametrize("difference", ["params/a/b: (2, 3) there, (2, 4)", "params/new: absent there, (1,)"])
def test_a_checkpoint_of_another_model_names_what_differs(saved, tmp_path, difference):
    saved.save("best", 1, state(1), {})
    saved.wait()
    other = state(0, channels=4)
    other["params"]["new"] = jnp.zeros(1)
    with raises("CHECKPOINT_DIFFERS", naming=difference) as caught:
        saved.restore("best", other)
    assert str(tmp_path / "checkpoints" / "best" / "1") in str(caught.value)


def test_a_checkpoint_that_reads_well_but_is_not_what_was_saved_is_damaged(saved, tmp_path):
    for step in (3, 5):
        saved.save("latest", step, state(step), {"best": 0.5})
    saved.wait()
    (path,) = (tmp_path / "checkpoints" / "latest" / "5" / "progress").glob("metadata")
    path.write_text(path.read_text().replace("0.5", "0.4"))
    restored, progress = saved.restore("latest", state(0))
    assert restored["list"] == [3] and progress == {"best": 0.5}


def test_a_missing_checkpoint_is_named(saved, tmp_path):
    for kind in checkpoints.KINDS:
        with raises("CHECKPOINT_MISSING", naming=f"{kind} checkpoint in {tmp_path / 'checkpoints'}"):
            saved.restore(kind, state(0))
    with raises("CHECKPOINT_MISSING", naming=str(tmp_path)):
        checkpoints.read_variables(tmp_path, {})


def test_arrays_of_size_0_survive(saved):
    """Orbax cannot store them; a run without held norms has one in its optimizer's state."""
    empty = {"norms": np.zeros([0], np.float32), **state(1)}
    saved.save("latest", 1, empty, {})
    saved.wait()
    restored, _ = saved.restore("latest", empty)
    assert restored["norms"].shape == (0,) and restored["norms"].dtype == np.float32
    np.testing.assert_array_equal(restored["params"]["a/b"], empty["params"]["a/b"])
    for norms, difference in ((np.zeros([2]), "norms: absent there, (2,)"), (np.zeros([]), "norms: absent there, ()")):
        with raises("CHECKPOINT_DIFFERS", naming=difference):
            saved.restore("latest", {**empty, "norms": norms})
    saved.save("latest", 2, {**empty, "norms": np.ones([2], np.float32)}, {})
    saved.wait()
    with raises("CHECKPOINT_DIFFERS", naming="norms: (2,) there, (0,)"):
        saved.restore("latest", empty)


# Two convolutions without a bias, whose paths sort otherwise as strings than as keys of a tree.
BACKBONE = {"conv": {"kernel": jnp.full((3, 3, 2, 4), 0.5)}, "conv-b": {"kernel": jnp.full((3, 3, 4, 2), 2.0)}}
PARAMS = {
    "model": {"backbone": {**BACKBONE, "bn": {"scale": jnp.ones(2)}}, "head_depth": {"kernel": jnp.ones((1, 1, 2, 1))}},
    "weighting": {"depth": jnp.zeros([])},
}


def today(penalty):
    """Return a training state with today's optimizer after one step."""
    config = demo.get_config()
    config.sparsity.update(penalty)
    tx = optimizer.build(config, 100)
    opt_state = tx.init(PARAMS)
    _, opt_state = tx.update(jax.tree.map(lambda leaf: 0.01 * leaf + 0.1, PARAMS), opt_state, PARAMS)
    return jax.device_get({"step": np.int32(1), "params": PARAMS, "opt_state": opt_state})


def before(current):
    """Return the same training state as an earlier version saved it."""
    opt_state, inner = current["opt_state"], current["opt_state"].inner_state
    kernels = [f"model/backbone/{name}/kernel" for name in ("conv", "conv-b")]
    names = types.SimpleNamespace(**opt_state._asdict())
    names.inner_state = {
        "count": inner.count,
        "adam": inner.inner,
        "kernel_norms": dict(zip(kernels, inner.norms, strict=False)),
        "lambda_": inner.lambda_,
        "peak_rate": inner.peak_learning_rate,
        "control": inner.control,
    }
    return {**current, "opt_state": vars(names)}


@pytest.mark.parametrize(
    ("penalty", "norms"),
    [
        ({"target": 0.0, "lambda_": 1e-3}, 2),
        ({"target": 0.5, "lambda_": 1e-3}, 2),
        ({"target": 0.0, "lambda_": 0.0}, 0),
        ({"target": 0.0, "lambda_": 1e-3, "fixed_norm": False}, 0),
    ],
    ids=["lambda", "target", "dense", "no norm held"],
)
def test_an_optimizer_state_of_an_earlier_version_is_read_as_todays(saved, penalty, norms):
    current = today(penalty)
    assert current["opt_state"].inner_state.norms.shape == (norms,)
    if norms:
        first, second = current["opt_state"].inner_state.norms
        assert first != second, "their order matters"
    saved.save("latest", 1, before(current), {"best": 0.5})
    saved.wait()
    names = {name.removeprefix("opt_state/inner_state/") for name in stored_names(saved)}
    assert {"adam/0/mu/model/backbone/conv/kernel", "adam/0/count", "peak_rate"} <= names
    assert ("kernel_norms/model/backbone/conv-b/kernel" in names) == bool(norms)
    restored, progress = saved.restore("latest", current)
    assert progress == {"best": 0.5}
    assert jax.tree.structure(restored) == jax.tree.structure(current)
    jax.tree.map(np.testing.assert_array_equal, restored, current)


def stored_names(saved):
    """Return the paths of the arrays in the newest checkpoint, as they are on the disk."""
    manager = saved._manager("latest")
    tree = manager.item_metadata(manager.latest_step())["state"].tree
    return {path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_a_state_of_today_is_read_as_it_is(saved):
    for step, penalty in enumerate(({"target": 0.5, "lambda_": 1e-3}, {"target": 0.0, "lambda_": 0.0}), 1):
        current = today(penalty)
        saved.save("latest", step, current, {})
        saved.wait()
        restored, _ = saved.restore("latest", current)
        assert jax.tree.structure(restored) == jax.tree.structure(current)
        jax.tree.map(np.testing.assert_array_equal, restored, current)
