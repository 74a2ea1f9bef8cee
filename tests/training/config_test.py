"""Options and tasks that cannot work: each error has its code and names them."""

import dataclasses
import math

import numpy as np
import pytest

from input_pipeline import loader
from mtl_sparse import tasks
from mtl_sparse.training import evaluation
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib
from tests.conftest import raises

BAD_CONFIGS = {
    "unknown task": (lambda c: c.update(tasks=("depth", "albedo")), "TASK_UNKNOWN", "'albedo'"),
    "no task": (lambda c: c.update(tasks=()), "OPTION_MISSING", "config.tasks"),
    "task twice": (lambda c: c.update(tasks=("depth", "depth")), "TASK_REPEATED", "'depth'"),
    "negative lambda": (
        lambda c: c.sparsity.update(lambda_=-1e-4),
        "OPTION_SPARSITY",
        "lambda_",
        "-0.0001",
    ),
    "unknown metric": (lambda c: c.sparsity.update(metric="sgd"), "OPTION_SPARSITY", "'sgd'"),
    "unknown scope": (lambda c: c.sparsity.update(scope="neck"), "OPTION_SPARSITY", "'neck'"),
    "unknown penalty": (lambda c: c.sparsity.update(penalty="l2"), "OPTION_SPARSITY", "penalty 'l2'"),
    "target": (lambda c: c.sparsity.update(target=1.0), "OPTION_OUT_OF_RANGE", "sparsity.target=1.0"),
    "negative target": (lambda c: c.sparsity.update(target=-0.1), "OPTION_OUT_OF_RANGE", "sparsity.target=-0.1"),
    "target from nothing": (
        lambda c: c.sparsity.update(target=0.5, lambda_=0.0),
        "OPTION_CONFLICT",
        "sparsity.target=0.5",
        "sparsity.lambda_",
    ),
    "never frozen": (
        lambda c: c.sparsity.update(target=0.5, target_freeze=1.0),
        "OPTION_OUT_OF_RANGE",
        "sparsity.target_freeze=1.0",
    ),
    "late ramp": (
        lambda c: c.sparsity.update(target=0.5, target_ramp=0.9),
        "OPTION_SPARSITY",
        "ramp=0.9",
        "freeze=0.75",
    ),
    "gamma": (
        lambda c: c.sparsity.update(penalty="group_mcp", metric="plain", gamma=1e-3),
        "OPTION_SPARSITY",
        "gamma=0.001",
    ),
    "metric of groups": (
        lambda c: c.sparsity.update(penalty="group_mcp", metric="group"),
        "OPTION_SPARSITY",
        "needs the group lasso",
    ),
    "fisher metric": (
        lambda c: c.sparsity.update(metric="fisher"),
        "OPTION_SPARSITY",
        "needs penalty 'group_l0'",
    ),
    "uncorrected metric of groups": (
        lambda c: c.sparsity.update(metric="group", bias_correction=False),
        "OPTION_SPARSITY",
        "bias_correction=True",
    ),
    "debias": (lambda c: c.sparsity.update(debias_at=1.5), "OPTION_OUT_OF_RANGE", "sparsity.debias_at=1.5"),
    "debias before the target": (
        lambda c: c.sparsity.update(target=0.5, debias_at=0.5),
        "OPTION_CONFLICT",
        "sparsity.debias_at=0.5",
        "sparsity.target_freeze",
    ),
    "debias before the start": (
        lambda c: c.sparsity.update(start_step=3, debias_at=0.5),
        "OPTION_CONFLICT",
        "sparsity.debias_at=0.5",
        "sparsity.start_step",
    ),
    "start after the end": (lambda c: c.sparsity.update(start_step=99), "RUN_TOO_SHORT", "sparsity.start_step=99"),
    "start fraction": (lambda c: c.sparsity.update(start_at=1.0), "OPTION_OUT_OF_RANGE", "sparsity.start_at=1.0"),
    "start in two ways": (
        lambda c: c.sparsity.update(start_at=0.5, start_step=3),
        "OPTION_CONFLICT",
        "sparsity.start_at=0.5",
        "sparsity.start_step=3",
    ),
    "many classes": (lambda c: c.data.update(num_classes=256), "OPTION_OUT_OF_RANGE", "data.num_classes=256"),
    "odd size": (lambda c: c.data.update(size=(30, 48)), "OPTION_OUT_OF_RANGE", "data.size=(30, 48)"),
    "depth": (lambda c: c.model.update(depth=34), "OPTION_UNKNOWN_VALUE", "model.depth=34"),
    "dtype": (lambda c: c.model.update(dtype="float16"), "OPTION_UNKNOWN_VALUE", "model.dtype=float16"),
    "depth target": (lambda c: c.data.update(depth_target="feet"), "OPTION_UNKNOWN_VALUE", "data.depth_target='feet'"),
    "batch of one": (lambda c: c.train.update(batch_size=1), "OPTION_OUT_OF_RANGE", "train.batch_size=1"),
    "large batch": (lambda c: c.train.update(batch_size=20), "DATA_TOO_FEW_IMAGES", "train.batch_size=20"),
    "schedule": (
        lambda c: c.optimizer.update(schedule="linear"),
        "OPTION_UNKNOWN_VALUE",
        "optimizer.schedule='linear'",
    ),
    "learning rate": (
        lambda c: c.optimizer.update(learning_rate=-1.0, min_learning_rate=-2.0),
        "OPTION_OUT_OF_RANGE",
        "optimizer.min_learning_rate=-2.0",
    ),
    "dropout": (lambda c: c.model.update(dropout=1.0), "OPTION_OUT_OF_RANGE", "model.dropout=1.0"),
    "not finite": (lambda c: c.optimizer.update(eps=math.nan), "OPTION_NOT_FINITE", "optimizer.eps=nan"),
    "huge integer": (lambda c: c.update(seed=2**31), "OPTION_OUT_OF_RANGE", "seed=2147483648"),
    "attach without names": (lambda c: c.model.update(attach=(1,)), "OPTION_TYPE", "model.attach=(1,)"),
    "three widths": (
        lambda c: c.model.update(classifier_features=(4, 4, 4)),
        "OPTION_OUT_OF_RANGE",
        "model.classifier_features=(4, 4, 4)",
    ),
    "batch of nothing": (
        lambda c: c.benchmark.update(batch_sizes=(0,)),
        "OPTION_OUT_OF_RANGE",
        "benchmark.batch_sizes=(0,)",
    ),
    "too few classes": (lambda c: c.data.update(num_classes=13), "OPTION_CONFLICT", "data.num_classes=13"),
    "no height": (
        lambda c: c.data.embedded.update(frames=12, height=0),
        "OPTION_OUT_OF_RANGE",
        "data.embedded.height=0",
    ),
    "few frames": (lambda c: c.data.embedded.update(frames=5), "OPTION_OUT_OF_RANGE", "data.embedded.frames=5"),
    "scale below 1": (lambda c: c.data.update(scales=(1.0, 0.5)), "OPTION_OUT_OF_RANGE", "data.scales=(1.0, 0.5)"),
    "scale without pixels": (
        lambda c: c.data.update(scales=(64, 64)),
        "OPTION_OUT_OF_RANGE",
        "data.scales=(64, 64)",
    ),
    "zoom without pixels": (lambda c: c.data.update(max_scale=1e30), "OPTION_OUT_OF_RANGE", "data.max_scale=1e+30"),
    "word as a scale": (lambda c: c.data.update(scales=("big",)), "OPTION_OUT_OF_RANGE", "data.scales=('big',)"),
    "two zooms": (lambda c: c.data.update(scales=(1.5,), max_scale=1.5), "OPTION_CONFLICT", "data.max_scale=1.5"),
    "zoom out": (lambda c: c.data.update(max_scale=0.5), "OPTION_OUT_OF_RANGE", "data.max_scale=0.5"),
    "gradient of l1": (
        lambda c: c.sparsity.update(penalty="l1", penalty_in_gradient=True),
        "OPTION_SPARSITY",
        "penalty_in_gradient",
    ),
    "no samples": (lambda c: c.run.update(sample_frames=0), "OPTION_OUT_OF_RANGE", "run.sample_frames=0"),
    "multiple": (lambda c: c.compact.update(multiple=0), "OPTION_OUT_OF_RANGE", "compact.multiple=0"),
    "learning rates": (
        lambda c: c.optimizer.update(min_learning_rate=1.0),
        "OPTION_CONFLICT",
        "optimizer.min_learning_rate=1.0",
        "optimizer.learning_rate=0.002",
    ),
    "learning rate of 0": (
        lambda c: c.optimizer.update(learning_rate=0.0, min_learning_rate=0.0),
        "OPTION_OUT_OF_RANGE",
        "optimizer.learning_rate=0.0",
    ),
    "temperature of 0": (
        lambda c: c.loss.options.update(dwa_temperature=0.0),
        "OPTION_OUT_OF_RANGE",
        "loss.options.dwa_temperature=0.0: expected above 0",
    ),
    "weighting": (lambda c: c.loss.update(weighting="pcgard"), "OPTION_UNKNOWN_VALUE", "loss.weighting", "'pcgard'"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_options_are_named(config, case):
    change, code, name, *names = BAD_CONFIGS[case]
    change(config)
    with raises(code, naming=name) as caught:
        setup_lib.setup(config)
    assert all(name in str(caught.value) for name in names), caught.value


SPECS = {
    "another name": ({"name": "depth"}, "TASKS['mine']"),
    "unknown head": ({"head": "clasifier"}, "'clasifier'"),
}


@pytest.mark.parametrize("case", SPECS)
def test_bad_specs_of_a_custom_task_are_named(config, case, monkeypatch):
    changes, naming = SPECS[case]
    spec = tasks.resolve(config)[0]
    monkeypatch.setitem(tasks.TASKS, "mine", lambda config: dataclasses.replace(spec, **{"name": "mine"} | changes))
    config.tasks = ("mine",)
    with raises("TASK_SPEC_INVALID", naming=naming):
        tasks.resolve(config)


def test_a_loss_that_broadcasts_and_a_headline_that_is_no_metric_are_named(config):
    """raw [B, h, w, 1] against a label [B, h, w] of equal sides would be [B, h, w, h], and the run meaningless."""
    config.tasks = ("depth",)
    run = setup_lib.setup(config)
    label = np.ones((4, 4, 4), np.float32)
    careless = dataclasses.replace(run.tasks[0], loss=lambda raw, label: (abs(raw - label), label > 0))
    with raises("TASK_LOSS_SHAPE", naming="'depth'") as caught:
        careless.elementwise(np.ones((4, 4, 4, 1), np.float32), label)
    assert "(4, 4, 4, 4)" in str(caught.value)
    with raises("TASK_LOSS_SHAPE", naming="(4, 4, 4, 1, 1)"):
        careless.elementwise(np.ones((4, 4, 4, 1), np.float32), label[..., None, None])
    evaluator = evaluation.Evaluator(
        dataclasses.replace(run, tasks=[dataclasses.replace(run.tasks[0], headline="mae")])
    ).evaluate
    with raises("TASK_SPEC_INVALID", naming="'mae'"):
        evaluator(loader.replicate(state_lib.initial(run).variables), run.batches.evaluation("test"))
