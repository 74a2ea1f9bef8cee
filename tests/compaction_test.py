import json
import logging
import shutil

import jax
import numpy as np
import pytest

from configs import run as run_config
from mtl_sparse import compaction, cost, results, train
from mtl_sparse import run as run_lib
from mtl_sparse.errors import UserError
from tests.conftest import tiny


@pytest.fixture(scope="module")
def compacted(sparse_run, tmp_path_factory):
    """(config, folder of a run, its compact run's folder, what was printed)."""
    config, original = sparse_run
    folder = shutil.copytree(original, tmp_path_factory.mktemp("compact") / "run")
    return config, folder, compaction.run_job(config, folder)


def test_the_compact_run_has_the_runs_test_metrics(compacted):
    _, folder, small = compacted
    expected, found = (json.loads((path / "results.json").read_text()) for path in (folder, small))
    assert 0.2 < expected["sparsity"]["group"] < 0.95, "or this test shows nothing"
    for name, value in expected["test"].items():
        assert round(found["test"][name], 4) == pytest.approx(round(value, 4), abs=1.1e-4), name
    rows = json.loads((small / "compact.json").read_text())
    assert sum(row["zero"] for row in rows if row["layer"].startswith("backbone")) == sum(
        layer["zero_groups"] for layer in expected["sparsity"]["layers"]
    )
    assert all(row["parameters_after"] <= row["parameters"] and row["macs_after"] <= row["macs"] for row in rows)
    assert sum(row["macs_after"] for row in rows) < 0.9 * sum(row["macs"] for row in rows)
    assert all(row["why"] for row in rows if row["zero_after"] or not row["groups_after"])
    assert (small / "plots" / "compact.png").stat().st_size > 5_000
    table = compaction.table(rows)
    assert table.splitlines()[-1].startswith("| all") and "stem_conv1" in table


def test_the_compact_run_is_an_ordinary_run(compacted):
    _, _, small = compacted
    before = json.loads((small / "results.json").read_text())["test"]
    config = run_config.get_config(str(small))
    assert results.evaluate_best(config, small)["test"] == before
    again = compaction.run_job(config, small)
    rows = json.loads((again / "compact.json").read_text())
    assert all(row["parameters_after"] == row["parameters"] for row in rows), "there is nothing left to remove"


def test_training_starts_from_the_compact_model(compacted):
    _, _, small = compacted
    config = run_config.get_config(str(small))
    config.train.init_from = str(small)
    run = run_lib.setup(config)
    _, given = run_lib.load_model(small, config)
    state = run.init_state()
    jax.tree.map(np.testing.assert_array_equal, state.variables, given)
    norms = state.opt_state.inner_state.kernel_norms
    assert len(jax.tree.leaves(norms)) > 0 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(norms))


@pytest.mark.slow
def test_training_goes_on_from_the_compact_model(compacted, tmp_path):
    _, _, small = compacted
    config = run_config.get_config(str(small))
    config.train.update(init_from=str(small), epochs=1)
    _, given = run_lib.load_model(small, config)
    found = train.train(config, tmp_path / "tuned")
    assert found["step"] > 0 and all(np.isfinite(value) for value in found["test"].values())
    _, trained = run_lib.load_model(tmp_path / "tuned", config)
    assert cost.parameter_count(trained) == cost.parameter_count(given)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), trained["params"], given["params"])))


def test_a_run_without_zeros_says_so_and_stays(rooms, tmp_path, caplog, capsys):
    config = tiny(rooms)
    config.tasks = ("depth",)
    config.sparsity.lambda_ = 0.0
    config.train.epochs = 1
    config.run.summary_rounds = 1
    config.compact.drop_taps = False
    train.train(config, tmp_path)
    summary = capsys.readouterr().out.splitlines()[-1]
    assert summary.startswith("compact (--job=compact): 0.0 % of groups zero") and "the backbone is" in summary
    with caplog.at_level(logging.WARNING):
        small = compaction.run_job(config, tmp_path)
    assert "no zero groups" in caplog.text
    assert all(row["parameters_after"] == row["parameters"] for row in json.loads((small / "compact.json").read_text()))


def test_bad_input(compacted, tmp_path):
    config, folder, small = compacted
    with pytest.raises(UserError, match="config.json is missing"):
        compaction.run_job(config, tmp_path / "none")
    with pytest.raises(UserError, match="other settings .*model.widths"):
        compaction.run_job(config, small)
    with pytest.raises(UserError, match="config.json does not exist: name a run's folder"):
        run_config.get_config(str(tmp_path / "none"))
    other = config.copy_and_resolve_references()
    other.train.init_from = str(small)
    with pytest.raises(UserError, match="checkpoint .* is of another model"):
        run_lib.setup(other).init_state()
    other.train.init_from = str(tmp_path)
    with pytest.raises(UserError, match="no best checkpoint in"):
        run_lib.setup(other).init_state()
    other.model.widths = "{}"
    with pytest.raises(UserError, match="config.model.widths: not the widths of a model.*--job=compact"):
        run_lib.setup(other)
    assert (folder / "results.json").exists()
