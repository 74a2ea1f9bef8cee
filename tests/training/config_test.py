"""Settings and tasks that cannot work, each named in one sentence."""

import dataclasses

import numpy as np
import pytest

from input_pipeline import loader
from mtl_sparse import tasks
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.training import evaluation
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib

BAD_CONFIGS = {
    "unknown task": (lambda c: c.update(tasks=("depth", "albedo")), "'albedo'.*segmentation, depth, normals, edge"),
    "no task": (lambda c: c.update(tasks=()), "config.tasks is empty"),
    "task twice": (lambda c: c.update(tasks=("depth", "depth")), "'depth' stands twice"),
    "negative lambda": (lambda c: c.sparsity.update(lambda_=-1e-4), "sparsity: lambda_ must be.*-0.0001"),
    "unknown metric": (lambda c: c.sparsity.update(metric="sgd"), "sparsity: unknown metric 'sgd'.*adaptive, plain"),
    "unknown scope": (lambda c: c.sparsity.update(scope="neck"), "sparsity: unknown scope 'neck'.*backbone, all"),
    "unknown penalty": (lambda c: c.sparsity.update(penalty="l2"), "penalty 'l2'.*group_lasso, group_mcp, l1"),
    "target": (
        lambda c: c.sparsity.update(target=1.0),
        "sparsity.target=1.0: expected a fraction, at least 0 and below 1",
    ),
    "negative target": (lambda c: c.sparsity.update(target=-0.1), "sparsity.target=-0.1"),
    "target from nothing": (lambda c: c.sparsity.update(target=0.5, lambda_=0.0), "lambda_ above 0.*for a dense run"),
    "never frozen": (lambda c: c.sparsity.update(target=0.5, target_freeze=1.0), "target_freeze=1.0.*below 1"),
    "late ramp": (lambda c: c.sparsity.update(target=0.5, target_ramp=0.9), "ramp=0.9, freeze=0.75"),
    "gamma": (
        lambda c: c.sparsity.update(penalty="group_mcp", metric="plain", gamma=1e-3),
        "gamma=0.001 is too small for the plain metric: it must exceed the learning rate 0.002",
    ),
    "debias": (lambda c: c.sparsity.update(debias_at=1.5), "debias_at=1.5.*below 1"),
    "debias before the target": (
        lambda c: c.sparsity.update(target=0.5, debias_at=0.5),
        "debias_at=0.5 lies before sparsity.target_freeze",
    ),
    "debias before the start": (
        lambda c: c.sparsity.update(start_step=3, debias_at=0.5),
        "debias_at=0.5 lies before sparsity.start_step",
    ),
    "start after the end": (lambda c: c.sparsity.update(start_step=99), "start_step=99: the run has only 4 steps"),
    "start fraction": (lambda c: c.sparsity.update(start_at=1.0), "sparsity.start_at=1.0: expected a fraction"),
    "start in two ways": (lambda c: c.sparsity.update(start_at=0.5, start_step=3), "start_at=0.5 and .*start_step=3"),
    "many classes": (lambda c: c.data.update(num_classes=256), "num_classes=256: expected at most 255"),
    "odd size": (lambda c: c.data.update(size=(30, 48)), r"data.size=\(30, 48\).*multiples of the output stride 8"),
    "depth": (lambda c: c.model.update(depth=34), "model.depth=34.*18, 50, 101"),
    "dtype": (lambda c: c.model.update(dtype="float16"), "'float16'.*float32, bfloat16"),
    "depth target": (lambda c: c.data.update(depth_target="feet"), "'feet'.*'normalized' or 'metres'"),
    "batch of one": (lambda c: c.train.update(batch_size=1), "train.batch_size=1: it must be at least 2"),
    "schedule": (lambda c: c.optimizer.update(schedule="step"), "'step'.*constant, cosine, plateau"),
    "rate": (lambda c: c.optimizer.update(learning_rate=-1.0), "optimizer.learning_rate=-1.0"),
    "dropout": (lambda c: c.model.update(dropout=1.0), "model.dropout=1.0"),
    "too few classes": (lambda c: c.data.update(num_classes=13), "num_classes=13.*40 classes"),
    "no height": (lambda c: c.data.embedded.update(frames=12, height=0), "data.embedded.height=0"),
    "few frames": (lambda c: c.data.embedded.update(frames=5), "data.embedded.frames=5: it must be 0, or at least 12"),
    "zoom out": (lambda c: c.data.update(max_scale=0.5), "data.max_scale=0.5.*at least 1"),
    "no samples": (lambda c: c.run.update(sample_frames=0), "run.sample_frames=0"),
    "multiple": (lambda c: c.compact.update(multiple=0), "compact.multiple=0: it must be at least 1"),
    "rates": (lambda c: c.optimizer.update(min_learning_rate=1.0), "min_learning_rate=1.0 is above"),
    "weighting": (lambda c: c.loss.update(weighting="pcgrad"), "'pcgrad'.*uncertainty, equal, fixed"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_settings_are_named(config, case):
    change, message = BAD_CONFIGS[case]
    change(config)
    with pytest.raises(UserError, match=message):
        setup_lib.setup(config)


ROWS = {
    "another name": ({"name": "depth"}, r"TASKS\['mine'\] makes a task of the name 'depth'"),
    "unknown head": ({"head": "clasifier"}, "'mine' has the unknown head 'clasifier'; one of deeplab, classifier"),
}


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows_of_a_task_of_ones_own_are_named(config, case, monkeypatch):
    changes, message = ROWS[case]
    row = tasks.resolve(config)[0]
    make = lambda config: dataclasses.replace(row, **{"name": "mine"} | changes)  # noqa: E731
    monkeypatch.setattr(tasks, "TASKS", tasks.TASKS | {"mine": make})
    config.tasks = ("mine",)
    with pytest.raises(UserError, match=message):
        tasks.resolve(config)


def test_a_loss_that_broadcasts_and_a_headline_that_is_no_metric_are_named(config):
    """raw [B, h, w, 1] against a label [B, h, w] of equal sides would be [B, h, w, h]: a run on nonsense."""
    config.tasks = ("depth",)
    run = setup_lib.setup(config)
    label = np.ones((4, 4, 4), np.float32)
    careless = dataclasses.replace(run.tasks[0], loss=lambda raw, label: (abs(raw - label), label > 0))
    with pytest.raises(UserError, match=r"task 'depth' has the shape \(4, 4, 4, 4\) and its mask \(4, 4, 4\), of raw"):
        careless.elementwise(np.ones((4, 4, 4, 1), np.float32), label)
    with pytest.raises(UserError, match="one number a label"):
        careless.elementwise(np.ones((4, 4, 4, 1), np.float32), label[..., None, None])
    evaluator = evaluation.Evaluator(
        dataclasses.replace(run, tasks=[dataclasses.replace(run.tasks[0], headline="mae")])
    ).evaluate
    with pytest.raises(UserError, match="task 'depth': its headline 'mae' is none of mae_normalized"):
        evaluator(loader.replicate(state_lib.initial(run).variables), run.batches.evaluation("test"))
