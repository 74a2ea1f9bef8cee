"""Evaluation: metrics of whole splits, independent of the batches, and the constant baseline."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from input_pipeline import loader
from mtl_sparse.tasks import labels
from mtl_sparse.training import evaluation
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib
from tests.conftest import raises, tiny


@pytest.fixture(scope="module")
def run(rooms):
    config = tiny(rooms)
    config.tasks = ("segmentation", "depth", "normals", "edge")
    return setup_lib.setup(config)


def batches(run, split, batch_size):
    transform = run.batches.transform()
    return loader.eval_batches(getattr(run.data, split), transform, batch_size=batch_size)


def test_results_do_not_depend_on_the_batch_size(run):
    variables = loader.replicate(state_lib.initial(run).variables)
    evaluator = evaluation.Evaluator(run).evaluate
    devices = jax.device_count()
    whole = evaluator(variables, batches(run, "train", 18 * devices))
    for batch_size in (devices, 7 * devices, 32 * devices):
        got = evaluator(variables, batches(run, "train", batch_size))
        assert got.keys() == whole.keys()
        for name, value in got.items():
            assert value == pytest.approx(whole[name], rel=1e-5), (batch_size, name)


def test_perfect_predictions_have_perfect_metrics(run):
    examples = [run.batches.transform()(sample) for sample in run.data.test]
    perfect = {
        "segmentation/miou": 1,
        "segmentation/image_iou": 1,
        "depth/mae_normalized": 0,
        "depth/delta1_normalized": 1,
    }
    perfect |= {"normals/cosine": 1, "normals/within_11.25": 1, "edge/mae": 0}
    for task in run.tasks:
        label = np.stack([example[task.label] for example in examples])
        prediction, _ = task.target(label)
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64).sum(0), jax.vmap(task.sums)(prediction, label))
        for name, value in task.values(sums).items():
            if f"{task.name}/{name}" in perfect:
                assert value == pytest.approx(perfect.pop(f"{task.name}/{name}"), abs=1e-6)
    assert not perfect


def test_depth_in_metres_is_normalized_as_the_normalized_task_is(run):
    """Also at the resolution of the raw prediction, which seldom has the pixel with the image's maximum."""
    config = run.config.copy_and_resolve_references()
    config.data.depth_target = "metres"
    metres = setup_lib.setup(config)
    found = []
    for one in (run, metres):
        (task,) = [task for task in one.tasks if task.name == "depth"]
        task = dataclasses.replace(task, activation=lambda raw: raw)
        label = np.stack([one.batches.transform()(sample)["depth"] for sample in one.data.test])
        largest = label.max((1, 2), keepdims=True) if one is metres else 1
        raw = labels.strided(np.full_like(label, 0.3) * largest)[..., None]  # of each image's maximum
        model = types.SimpleNamespace(apply=lambda *_, train, raw=raw: {"depth": raw})
        sums = evaluation.eval_sums(None, {"image": None, "depth": label}, model=model, tasks=[task])["depth"][
            "strided"
        ]
        found.append(task.values(jax.tree.map(lambda x: np.asarray(x, np.float64).sum(0), sums))["mae_normalized"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_predictions_that_are_not_finite_have_no_metrics(run):
    """NaN would count as class 0, and as a right angle between normals."""
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), state_lib.initial(run).variables)
    values = evaluation.Evaluator(run).evaluate(loader.replicate(broken), batches(run, "test", 4))
    assert len(values) > 20 and np.isnan(list(values.values())).all()


def test_a_task_without_a_label_is_named_if_labels_are_required(run):
    void = ({**batch, "segmentation": np.full_like(batch["segmentation"], 255)} for batch in batches(run, "test", 4))
    with raises("DATA_LABEL_MISSING", naming="'segmentation' in the validation split"):
        evaluation.Evaluator(run).evaluate(
            loader.replicate(state_lib.initial(run).variables), void, labelled="validation"
        )


def test_the_constant_baselines_metrics_follow_from_the_labels(run):
    constants = evaluation.constant_predictions(run.tasks, batches(run, "train", 7))
    values = evaluation.evaluate_constant(run.tasks, constants, batches(run, "test", 4))
    transform = run.batches.transform()
    train = [transform(sample) for sample in run.data.train]
    test = [transform(sample) for sample in run.data.test]
    strided = lambda key: np.stack([example[key] for example in train])[:, 4::8, 4::8]  # noqa: E731

    depth = strided("depth")
    np.testing.assert_allclose(constants["depth"], depth[depth > 0].mean(), rtol=1e-5)
    test_depth = np.stack([example["depth"] for example in test])
    error = np.abs(test_depth - constants["depth"])[test_depth > 0].mean()
    assert values["depth/mae_normalized"] == pytest.approx(error, rel=1e-4)

    majority = np.bincount(strided("segmentation").ravel()).argmax()
    assert constants["segmentation"].argmax() == majority
    classes = np.stack([example["segmentation"] for example in test])
    assert values["segmentation/pixel_accuracy"] == pytest.approx((classes == majority).mean(), rel=1e-5)

    mean = strided("normals").reshape(-1, 3).mean(0)
    np.testing.assert_allclose(constants["normals"], mean, atol=1e-5)
    cosine = np.stack([example["normals"] for example in test]) @ (mean / np.linalg.norm(mean))
    assert values["normals/cosine"] == pytest.approx(cosine.mean(), rel=1e-4)


def test_upsampling_is_aligned_with_the_strided_labels():
    """Labels that are linear in the position survive stride 8 and bilinear resizing, except in the border cells."""
    rows = np.broadcast_to(np.arange(32.0)[None, :, None], (1, 32, 48))
    raw = labels.strided(rows)[..., None]
    back = np.asarray(evaluation.upsample(raw, rows))[..., 0]
    np.testing.assert_allclose(back[:, 4:-4], rows[:, 4:-4] + 0.5, atol=1e-4)


def test_predictions_are_in_the_labels_units(run):
    images = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype(np.float32)
    predict = jax.jit(lambda variables: evaluation.predict(run.model, run.tasks, variables, images))
    predictions = predict(state_lib.initial(run).variables)
    np.testing.assert_allclose(predictions["segmentation"].sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(predictions["normals"], axis=-1), 1, rtol=1e-3)
    assert ((predictions["depth"] > 0) & (predictions["depth"] < 1)).all()
    assert predictions["segmentation"].shape == (2, 32, 48, 40)
