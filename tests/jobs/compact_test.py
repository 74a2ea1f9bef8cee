import contextlib
import json
import logging
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from configs import run as run_config
from mtl_sparse.compaction import exactness, explain
from mtl_sparse.jobs import compact as compact_job
from mtl_sparse.jobs import evaluate, export, train
from mtl_sparse.models import costs, multitask, widths
from mtl_sparse.report import run_page, schema, tables
from mtl_sparse.sparsity import compact
from mtl_sparse.training import checkpoints, results
from mtl_sparse.training import config as config_lib
from mtl_sparse.training import folder as folder_lib
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib
from tests.compaction import multitask_test
from tests.conftest import raises, tiny

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "compact_models.md").read_text()


@pytest.fixture(scope="module")
def compacted(sparse_run, tmp_path_factory):
    """Return (config, folder of a run, its compact run's folder)."""
    config, original = sparse_run
    folder = shutil.copytree(original, tmp_path_factory.mktemp("compact") / "run")
    return config, folder, compact_job.run_job(config, folder)


def test_the_compact_run_has_the_runs_test_metrics(compacted):
    _, folder, small = compacted
    expected, found = (json.loads((path / "results.json").read_text()) for path in (folder, small))
    assert 0.2 < expected["sparsity"]["group"] < 0.95, "or this test shows nothing"
    for name, value in expected["test"].items():
        assert round(found["test"][name], 4) == pytest.approx(round(value, 4), abs=1.1e-4), name
    rows = json.loads((small / "compact.json").read_text())
    assert [schema.CompactLayer.from_json(row).to_json() for row in rows] == rows
    trained, compact = expected["size"]["trained"], expected["size"]["compact"]
    assert found["size"] == {"trained": compact, "compact": compact}, "results have the size of the compact model"
    assert compact["parameters"] < trained["parameters"]
    assert compact["macs"] == sum(row["macs_after"] for row in rows) and trained["macs"] == sum(r["macs"] for r in rows)
    assert sum(row["zero"] for row in rows if row["layer"].startswith("backbone")) == sum(
        layer["zero_groups"] for layer in expected["sparsity"]["layers"]
    )
    assert all(row["parameters_after"] <= row["parameters"] and row["macs_after"] <= row["macs"] for row in rows)
    assert sum(row["macs_after"] for row in rows) < 0.9 * sum(row["macs"] for row in rows)
    why = {row["layer"]: row["why"] for row in rows}
    assert why["head_depth/aspp3"] == "taps 1x1 of 3x3"
    assert any("gathers" in text for text in why.values()) and any("zero stay: " in text for text in why.values())
    assert (small / "plots" / "compact.png").stat().st_size > 5_000
    assert "<h3>MACs of each layer</h3>" in run_page.path(small.parent).read_text()
    table = tables.compact_table(rows)
    assert table.splitlines()[-1].startswith("| all") and "stem_conv1" in table


@pytest.mark.slow
def test_the_compact_run_is_an_ordinary_run(compacted):
    _, _, small = compacted
    before = json.loads((small / "results.json").read_text())["test"]
    config = run_config.get_config(str(small))
    assert evaluate.run_job(config, small)["test"] == before
    again = compact_job.run_job(config, small)
    assert run_config.get_config(str(again)).model.widths == config.model.widths, "there is nothing left to remove"
    steps = (small / "metrics.jsonl").read_text()
    train.train(config, small)
    assert (small / "metrics.jsonl").read_text() == steps, "training has ended: only the report is written again"


@pytest.fixture(scope="module")
def reduced(sparse_run, tmp_path_factory):
    """Return (config, folder of a run, folder of its compact run of one of its two tasks)."""
    config, original = sparse_run
    config = config.copy_and_resolve_references()
    config.compact.tasks = "depth"
    folder = shutil.copytree(original, tmp_path_factory.mktemp("reduced") / "run")
    return config, folder, compact_job.run_job(config, folder)


def test_a_compact_run_of_fewer_tasks_has_their_test_metrics(reduced, compacted):
    _, folder, small = reduced
    expected, found = (schema.Results.read(path / "results.json") for path in (folder, small))
    assert set(found.test) == {name for name in expected.test if name.startswith("depth/")} and len(found.test) > 2
    for name, value in found.test.items():
        assert value == pytest.approx(expected.test[name], abs=1e-4), name
    assert set(found.headlines) == {"depth"}
    assert found.size.trained.parameters < expected.size.compact.parameters
    why = {row["layer"]: row["why"] for row in json.loads((small / "compact.json").read_text())}
    dropped = {layer for layer, text in why.items() if text == "removed: its task was dropped"}
    assert dropped == {layer for layer in why if layer.startswith("head_segmentation/")} and len(dropped) > 5
    assert why["backbone/layer4_0/conv2"].startswith("removed: "), "only the other head read it"
    every = {row["layer"]: row["why"] for row in json.loads((compacted[2] / "compact.json").read_text())}
    assert not any("dropped" in text for text in every.values())


@pytest.mark.slow
def test_a_compact_run_of_fewer_tasks_is_an_ordinary_run(reduced):
    original, folder, small = reduced
    config = run_config.get_config(str(small))
    assert (config.tasks, config.model.attach, config.compact.tasks) == (("depth",), ("layer1_0",), "")
    before = schema.Results.read(small / "results.json").test
    assert evaluate.run_job(config, small)["test"] == before
    assert schema.Results.from_json(train.train(config, small)).test == before, "it has ended: only the report is anew"
    model, variables = setup_lib.load_model(small, config)
    whole, whole_variables = setup_lib.load_model(folder, original)
    images = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype(np.float32)
    actual, expected = model.apply(variables, images), whole.apply(whole_variables, images)
    assert set(actual) == {"depth"} and exactness.largest_difference(actual, expected) < 1e-5
    config.model.init_from = str(small)
    state = state_lib.initial(setup_lib.setup(config))
    jax.tree.map(np.testing.assert_array_equal, state.variables, variables)
    with contextlib.closing(checkpoints.Checkpoints(small)) as saved:
        leaves, *_ = saved.read("best")
    assert {name for name in leaves if name.startswith("params/weighting")} == {"params/weighting/depth"}


@pytest.mark.slow
def test_the_report_of_a_run_has_all_its_tasks(reduced):
    config, folder, small = reduced
    expected = schema.Results.read(folder / "results.json")
    assert {name.partition("/")[0] for name in expected.test} == {"segmentation", "depth"}
    found = schema.Results.from_json(evaluate.run_job(config, folder))  # config has compact.tasks
    assert found.size == expected.size and found.test == expected.test
    assert found.size.compact.parameters > schema.Results.read(small / "results.json").size.compact.parameters


def test_export_has_the_tasks_of_the_option(reduced):
    config, folder, _ = reduced
    path = export.run_job(config, folder)
    assert json.loads((folder / "export" / f"{path.name}.json").read_text())["outputs"] == {"depth": 1}
    config = config.copy_and_resolve_references()
    config.compact.tasks = "normals"
    with raises("TASK_UNKNOWN", naming="compact.tasks"):
        export.run_job(config, folder)


def test_options_that_depend_on_the_tasks_are_those_of_the_tasks_kept(config):
    small = multitask.MultiTaskModel(multitask_test.HEADS[1:], attach=("layer2_1", "layer3_0"))
    small = small.clone(widths=small.layers())
    config.tasks = multitask_test.NAMES
    config.model.attach = ("layer4_1", *small.attach)
    config.loss.update(weighting="fixed", weights=(1.0, 2.0, 3.0))
    config.compact.tasks = "attribute:Male, depth"
    kept = config_lib.compact_tasks(config)
    assert kept == ("depth", "attribute:Male"), "in the order of config.tasks"
    cut = compact_job._config(config, kept, small)
    assert (cut.tasks, cut.loss.weights, cut.compact.tasks) == (kept, (2.0, 3.0), "")
    assert cut.model.attach == small.attach and widths.Widths.from_json(cut.model.widths) == small.widths
    config_lib.check(cut)
    config.loss.update(weighting="equal", weights=(1.0,))
    assert compact_job._config(config, kept, small).loss.weights == (1.0,)


@pytest.mark.parametrize(
    ("tasks", "code", "name"),
    [
        ("depht", "TASK_UNKNOWN", "nearest: depth"),
        ("depth,normals", "TASK_UNKNOWN", "'normals'"),
        ("depth,depth", "TASK_REPEATED", "'depth'"),
        (" ,", "OPTION_MISSING", "compact.tasks"),
    ],
)
def test_tasks_that_the_run_does_not_have_are_refused(reduced, tasks, code, name):
    config, folder, small = reduced
    config, before = config.copy_and_resolve_references(), (small / "results.json").stat().st_mtime_ns
    config.compact.tasks = tasks
    with raises(code, naming=name):
        compact_job.run_job(config, folder)
    assert (small / "results.json").stat().st_mtime_ns == before


def test_the_documented_way_to_load_it(compacted, tmp_path, monkeypatch):
    _, folder, small = compacted
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "compact").symlink_to(small)
    monkeypatch.chdir(tmp_path)
    space = {"images": np.zeros((1, 32, 48, 3), np.float32)}
    exec(script, space)
    original, variables = setup_lib.load_model(folder, run_config.get_config(str(folder)))
    assert exactness.largest_difference(original.apply(variables, space["images"]), space["outputs"]) < 1e-5


def test_training_starts_from_the_compact_model(compacted):
    _, _, small = compacted
    config = run_config.get_config(str(small))
    config.model.init_from = str(small)
    run = setup_lib.setup(config)
    _, given = setup_lib.load_model(small, config)
    state = state_lib.initial(run)
    jax.tree.map(np.testing.assert_array_equal, state.variables, given)
    norms = state.opt_state.inner_state.norms
    assert norms.size > 0 and np.isfinite(norms).all() and (norms > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["compacted", "reduced"])
def test_training_continues_from_the_compact_model(kind, request, tmp_path):
    _, _, small = request.getfixturevalue(kind)
    config = run_config.get_config(str(small))
    config.train.epochs = 1
    config.model.init_from = str(small)
    _, given = setup_lib.load_model(small, config)
    found = train.train(config, tmp_path / "tuned")
    assert found["step"] > 0 and all(np.isfinite(value) for value in found["test"].values())
    _, trained = setup_lib.load_model(tmp_path / "tuned", config)
    assert costs.parameter_count(trained) == costs.parameter_count(given)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), trained["params"], given["params"])))


@pytest.mark.slow
def test_a_run_without_zeros_is_reported_and_keeps_its_size(rooms, tmp_path, caplog, capsys):
    config = tiny(rooms)
    config.tasks = ("depth",)
    config.sparsity.lambda_ = 0.0
    config.train.epochs = 1
    config.run.summary_rounds = 1
    config.compact.drop_taps = False
    train.train(config, tmp_path)
    summary = capsys.readouterr().out.splitlines()[-1]
    assert summary.startswith("compact (--job=compact): 0.0 % of groups zero") and "times the dense speed" in summary
    with caplog.at_level(logging.WARNING):
        small = compact_job.run_job(config, tmp_path)
    assert "no zero groups" in caplog.text
    assert all(row["parameters_after"] == row["parameters"] for row in json.loads((small / "compact.json").read_text()))


def test_bad_input(compacted, tmp_path):
    config, _, small = compacted
    with raises("FILE_MISSING", naming=str(tmp_path / "none" / "config.json")):
        compact_job.run_job(config, tmp_path / "none")
    with raises("RUN_DIFFERS", naming="model.widths="):
        compact_job.run_job(config, small)
    with raises("FILE_MISSING", naming=str(tmp_path / "none" / "config.json")):
        run_config.get_config(str(tmp_path / "none"))
    other = config.copy_and_resolve_references()
    other.model.init_from = str(small)
    with raises("CHECKPOINT_DIFFERS", naming=str(small)):
        state_lib.initial(setup_lib.setup(other))
    other.model.init_from = str(tmp_path)
    with raises("CHECKPOINT_MISSING", naming=str(tmp_path)):
        state_lib.initial(setup_lib.setup(other))
    other.model.init_from, other.tasks, other.model.attach = "", ("depth",), ()
    other.model.widths = run_config.get_config(str(small)).model.widths
    with raises("OPTION_CONFLICT", naming="2 tasks and 4 blocks"):
        setup_lib.setup(other)
    other.model.widths = "{}"
    with raises("MODEL_WIDTHS_INVALID", naming="config.model.widths"):
        setup_lib.setup(other)


def test_a_compaction_that_fails_keeps_the_last_one(compacted, monkeypatch):
    config, folder, small = compacted
    before = (small / "results.json").read_text()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "write", fail)
    with pytest.raises(OSError):
        compact_job.run_job(config, folder)
    assert (small / "results.json").read_text() == before
    assert not (folder / "compact.old").exists()


def test_two_compactions_at_once_are_refused(compacted):
    config, folder, small = compacted
    with folder_lib.held(folder), raises("FOLDER_IN_USE", naming=str(folder)):
        compact_job.run_job(config, folder)
    assert (small / "results.json").exists()


def test_a_kill_while_the_replaced_compaction_is_deleted_keeps_the_new_one(tmp_path, monkeypatch):
    folder = tmp_path / "compact"

    def write(text, delete):
        monkeypatch.setattr(shutil, "rmtree", delete)
        with compact_job._replacing(folder):
            folder.mkdir()
            (folder / "file").write_text(text)
            if text == "third":
                raise OSError(28, "No space left on device")

    def killed(path, ignore_errors):
        if pathlib.Path(path).exists():
            (pathlib.Path(path) / "file").unlink(missing_ok=True)
            raise KeyboardInterrupt

    remove = shutil.rmtree
    write("first", remove)
    with pytest.raises(KeyboardInterrupt):
        write("second", killed)
    with pytest.raises(OSError):
        write("third", remove)
    assert (folder / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["compact"]


def explained(model, variables, **options):
    small, small_variables = compact.compact(model, variables, **options)
    return {row["layer"]: row for row in explain.explain(model, variables, small, small_variables, (32, 48))}


@pytest.mark.slow
def test_the_table_gives_the_reason():
    dead = ["layer3_2/conv2", "layer4_1/conv1"]
    model, variables = multitask_test.with_zeros(50, 1, 0.3, dead=dead)
    rows = explained(model, variables, multiple=4)
    assert rows["backbone/layer3_2/conv2"]["why"] == "removed: all inputs zero"
    assert rows["backbone/layer3_2/conv3"]["why"] == "removed: its output is constant or not read"
    assert rows["backbone/layer4_1/conv2"]["why"] == "reads a constant: the layers before it are dead"
    model, variables = multitask_test.with_zeros(18, 1, 0.0)
    kernel = variables["params"]["backbone"]["stem_conv1"]["kernel"].copy()
    kernel[:, :, 1] = 0
    variables["params"]["backbone"]["stem_conv1"]["kernel"] = kernel
    assert "1 zero stay: a gather would cost more" in explained(model, variables)["backbone/stem_conv1"]["why"]


def test_a_head_with_a_dense_layer_is_explained(monkeypatch):
    monkeypatch.setitem(multitask.HEADS, "mean", multitask_test.MeanHead)
    model, variables = multitask_test.with_a_mean_head()
    rows = explained(model, variables)
    assert rows["head_mine/Dense_0"]["parameters_after"] == rows["head_mine/Dense_0"]["parameters"] > 0
    model, variables = multitask_test.with_zeros(18, 0, 1.0, "all")
    assert not any(row["groups_after"] for row in explained(model, variables).values())
