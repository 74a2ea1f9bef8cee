import importlib
import json
import pathlib

import jax
import pytest

from mtl_sparse import tasks
from mtl_sparse.models import multitask
from mtl_sparse.training import config as config_lib
from mtl_sparse.training import optimizer
from tests.conftest import raises

FILES = (pathlib.Path(__file__).parents[2] / "configs").glob("[a-z]*.py")
CONFIGS = sorted({path.stem for path in FILES} - {"run", "sweeps"})  # they need an argument


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid_and_initialises(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config_lib.check(config)
    rows = tasks.resolve(config)
    model = multitask.build(config.model, rows)
    images = jax.ShapeDtypeStruct((1, *config.data.size, 3), "float32")
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    outputs = jax.eval_shape(model.apply, variables, images)
    assert sorted(outputs) == sorted(config.tasks)
    state = jax.eval_shape(optimizer.build(config, 10**4).init, {"model": variables["params"], "weighting": {}})
    assert optimizer.learning_rate(state).shape == ()
    with pytest.raises(AttributeError, match="lamda"):
        config.sparsity.lamda = 1.0


def test_nyu_has_the_papers_options():
    config = importlib.import_module("configs.nyu").get_config()
    assert config.tasks == ("segmentation", "depth", "normals")
    assert (config.data.size, config.train.batch_size, config.train.epochs) == ((256, 256), 16, 1000)
    assert (config.optimizer.learning_rate, config.optimizer.b1, config.optimizer.b2) == (1e-4, 0.9, 0.999)
    assert (config.optimizer.schedule, config.optimizer.plateau_epochs, config.optimizer.plateau_factor) == (
        "plateau",
        5,
        0.1,
    )
    assert (config.train.early_stop_epochs, config.optimizer.min_learning_rate) == (25, 1e-7)
    assert (config.model.depth, config.model.width, config.model.head_features) == (50, 64, 256)
    assert not config.data.flip and config.data.max_scale == 1.0
    assert config.loss.label_smoothing == 0.1 and config.loss.weighting == "uncertainty"


def test_celebamask_hq_has_the_papers_options_and_every_task_set_of_table_2():
    from configs import celebamask_hq

    config = celebamask_hq.get_config()
    assert (config.train.batch_size, config.train.early_stop_epochs, config.sparsity.lambda_) == (32, 10, 1e-5)
    assert (config.data.size, config.data.num_classes) == ((256, 256), 3)
    assert (config.model.classifier_features, config.model.classifier_dropout) == ((64, 32), (0.6, 0.4))
    sets = {frozenset(celebamask_hq.get_config(name).tasks) for name in celebamask_hq.TABLE2}
    seg, male, smile = "segmentation", "attribute:Male", "attribute:Smiling"
    assert sets == {frozenset(names) for names in
                    ([seg], [male], [smile], [seg, male], [male, smile], [seg, male, smile])}  # fmt: skip
    with raises("OPTION_UNKNOWN_VALUE", naming="'seg+smile'") as caught:
        celebamask_hq.get_config("seg+smile")
    assert all(name in str(caught.value) for name in celebamask_hq.TABLE2)


def test_the_protocols_of_mtans_data_have_libmtls_options():
    nyu = importlib.import_module("configs.nyuv2_13").get_config()
    cityscapes = importlib.import_module("configs.cityscapes").get_config()
    for config in (nyu, cityscapes):
        options = config.optimizer
        assert (options.learning_rate, options.l2, options.weight_decay) == (1e-4, 1e-5, 0.0)
        assert (config.model.depth, config.model.width, config.model.stem) == (50, 64, "7x7")
        assert (config.loss.weighting, config.loss.label_smoothing) == ("equal", 0.0)
        assert (config.train.epochs, config.train.early_stop_epochs) == (200, 0)
        assert (config.data.split, config.data.unit_range) == ("", True)
        assert not config.data.flip and not config.data.scales and config.data.max_scale == 1.0
    assert (nyu.data.name, nyu.data.size, nyu.data.num_classes) == ("nyuv2_13", (288, 384), 13)
    assert (nyu.train.batch_size, nyu.data.depth_target) == (8, "metres")
    assert (cityscapes.data.name, cityscapes.data.size, cityscapes.data.num_classes) == ("cityscapes_7", (128, 256), 7)
    assert (cityscapes.train.batch_size, cityscapes.data.depth_target) == (64, "disparity")
    assert nyu.tasks == ("segmentation", "depth", "normals") and cityscapes.tasks == ("segmentation", "depth")


def test_a_run_of_another_version_is_named(tmp_path):
    from configs import run

    config = importlib.import_module("configs.nyu").get_config()
    (tmp_path / "config.json").write_text(config.to_json())
    assert run.get_config(str(tmp_path)).to_json() == config.to_json()
    without_use = {"seed": 3, "train": {"init_from": "", "epochs": 7}, "model": {"gone": []}}
    (tmp_path / "config.json").write_text(json.dumps(without_use))
    kept = run.get_config(str(tmp_path))
    assert (kept.seed, kept.train.epochs) == (3, 7) and "init_from" not in kept.train
    used = {"train": {"init_from": "runs/first"}}
    for changed in ({"data": {"rooms": {"frames": 3}}}, {"loss": {"weights": {"depth": 1.0}}}, used):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        name = next(iter(next(iter(changed.values()))))
        with raises("OPTION_UNKNOWN", naming=f"'{name}'"):
            run.get_config(str(tmp_path))


def test_a_folder_without_a_run_is_named(tmp_path):
    from configs import run

    with raises("FILE_MISSING", naming=str(tmp_path / "config.json")):
        run.get_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"seed": ')
    with raises("FILE_DAMAGED", naming=str(tmp_path / "config.json")):
        run.get_config(str(tmp_path))


def test_an_unknown_sweep_is_named():
    from configs import sweeps

    with raises("SWEEP_UNKNOWN", naming="'table9'"):
        sweeps.get_config("table9")
