import jax.numpy as jnp
import numpy as np
import pytest

from mtl_sparse.runtime.errors import UserError
from mtl_sparse.training import checkpoints


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


def test_a_checkpoint_of_another_model_names_what_differs(saved):
    saved.save("best", 1, state(1), {})
    saved.wait()
    other = state(0, channels=4)
    other["params"]["new"] = jnp.zeros(1)
    with pytest.raises(
        UserError, match=r"another model.*params/a/b: \(2, 3\) there, \(2, 4\) here; params/new: absent"
    ):
        saved.restore("best", other)


def test_a_checkpoint_that_reads_well_but_is_not_what_was_saved_is_damaged(saved, tmp_path):
    for step in (3, 5):
        saved.save("latest", step, state(step), {"best": 0.5})
    saved.wait()
    (path,) = (tmp_path / "checkpoints" / "latest" / "5" / "progress").glob("metadata")
    path.write_text(path.read_text().replace("0.5", "0.4"))
    restored, progress = saved.restore("latest", state(0))
    assert restored["list"] == [3] and progress == {"best": 0.5}


def test_no_checkpoint_is_said(saved):
    with pytest.raises(UserError, match="no best checkpoint"):
        saved.restore("best", state(0))
