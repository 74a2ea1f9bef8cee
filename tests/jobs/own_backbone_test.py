"""All jobs on a run whose backbone is a registered Flax module with a depthwise convolution."""

import json

import numpy as np
import pytest

from configs import run as run_config
from mtl_sparse.jobs import benchmark, compact, evaluate, export, lomt, train
from mtl_sparse.models import backbones
from mtl_sparse.report import study
from mtl_sparse.report.schema import Results
from mtl_sparse.training import folder as folder_lib
from mtl_sparse.training import setup as setup_lib
from tests.conftest import raises, tiny
from tests.own_backbone import ROWS

TASKS = ("segmentation", "depth")


@pytest.fixture(scope="module", autouse=True)
def registered():
    patch = pytest.MonkeyPatch()
    patch.setitem(backbones.BACKBONES, "own", ROWS["own"])
    yield
    patch.undo()


@pytest.fixture(scope="module")
def run(rooms, tmp_path_factory):
    """Return (config, folder) of a run that ends with half of its groups zero."""
    config = tiny(rooms)
    config.tasks, config.model.backbone = TASKS, "own"
    config.sparsity.update(lambda_=0.1, target=0.5, warmup_steps=0, target_ramp=0.1, target_freeze=0.9)
    config.benchmark.update(batch_sizes=(1,), rounds=1)
    config.train.epochs = 6
    folder = tmp_path_factory.mktemp("runs") / "own"
    train.train(config, folder)
    return config, folder


@pytest.mark.slow
def test_every_job_works_on_it(run, capsys):
    config, folder = run
    results = Results.read(folder / "results.json")
    layers = {layer.path: layer for layer in results.sparsity.layers}
    assert layers["backbone/depthwise/kernel"].groups == 12 and layers["backbone/pointwise/kernel"].groups == 12
    assert 0.2 < results.sparsity.group < 1
    small = compact.run_job(config, folder)
    printed = capsys.readouterr().out
    assert "backbone/depthwise" in printed
    rows = {row["layer"]: row for row in json.loads((small / "compact.json").read_text())}
    assert rows["backbone/depthwise"]["groups"] == 12 > rows["backbone/depthwise"]["groups_after"]
    again = run_config.get_config(str(small))
    evaluated = evaluate.run_job(again, small)["test"]
    assert all(np.isclose(evaluated[name], value, atol=1e-5, equal_nan=True) for name, value in results.test.items())
    compacted = Results.read(small / "results.json")
    assert compacted.size.trained.parameters == results.size.compact.parameters < results.size.trained.parameters
    assert export.run_job(again, small).exists()
    assert {row["model"] for row in benchmark.run_job(again, small)} == {"dense", "sparse", "compact"}
    assert {row["part"] for row in benchmark.run_job(config, folder)} == {"model"}
    folder_lib.check(small, again, setup_lib.setup(again).data)
    assert study.read([folder]).rows[0].config["model"]["backbone"] == "own"
    again.model.init_from, again.seed = str(small), 1
    with raises("MODEL_COMPACT", naming="model.backbone=own"):
        train.train(again, small.with_name("further"))


def test_a_run_of_one_task_of_it(run, capsys):
    config, folder = run
    one = config.copy_and_resolve_references()
    one.compact.tasks = "depth"
    small = compact.run_job(one, folder)
    assert set(Results.read(small / "results.json").headlines) == {"depth"}


def test_lomt_attaches_heads_to_its_points():
    points = ROWS["own"].points
    assert lomt.point_of("stem", points) == "stem"
    assert lomt.point_of("pointwise", points) == "separable", "the last, where no point has the layer's name"
    narrow = ROWS["narrow"].points
    assert lomt.point_of("block2_1/depthwise", narrow) == "block2_1/depthwise"
    assert lomt.point_of("block2_1/project", narrow, raw=True) == "block2_1"
    runs = [{"block2_1/depthwise": 0.5, "block2_1/project": 0.005, "stem": 1.0, "block2_1/expand": 0.4}]
    layer, point, kept = lomt.choose(runs, narrow, 0.01, 1.0)
    assert (layer, point) == ("block2_1/depthwise",) * 2 and kept == ("stem", "block2_1/expand", "block2_1/depthwise")
