"""Metrics, by hand and against other implementations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mtl_sparse.runtime.labels import VOID
from mtl_sparse.tasks import metrics


def total(sums):
    return jax.tree.map(lambda x: np.asarray(x, np.float64).sum(0), sums)


def test_segmentation_by_hand():
    label = jnp.array([[[0, 0], [1, VOID]], [[1, 1], [1, 1]]])
    predicted = jnp.array([[[0, 1], [1, 2]], [[1, 1], [0, 2]]])
    sums = total(jax.vmap(metrics.segmentation_sums)(jax.nn.one_hot(predicted, 4), label))
    np.testing.assert_array_equal(sums["confusion"], [[1, 1, 0, 0], [1, 3, 1, 0], [0] * 4, [0] * 4])
    values = metrics.segmentation_values(sums)
    # class 0: 1 / 3, class 1: 3 / 6, class 2: 0 / 1 (only predicted), class 3 never occurs
    assert values["miou"] == pytest.approx((1 / 3 + 3 / 6 + 0) / 3)
    assert values["pixel_accuracy"] == pytest.approx(4 / 7)
    # image 1: 2 right of 3, 2 / (2 + 1 + 1); image 2: 2 of 4, 2 / (2 + 2 + 2)
    assert values["image_iou"] == pytest.approx((2 / 4 + 2 / 6) / 2)


def test_an_image_without_labels_does_not_count():
    label = jnp.full((2, 2, 2), VOID).at[1].set(0)
    sums = total(jax.vmap(metrics.segmentation_sums)(jnp.zeros((2, 2, 2, 3)).at[..., 0].set(1), label))
    assert metrics.segmentation_values(sums)["image_iou"] == 1.0


def test_depth_by_hand():
    label = jnp.array([[1.0, 2.0], [4.0, 0.0]])
    prediction = jnp.array([[1.2, 2.0], [2.0, 9.0]])[..., None]
    values = metrics.normalized_depth_values(total(jax.vmap(metrics.depth_sums)(prediction[None], label[None])))
    assert values["mae_normalized"] == pytest.approx((0.2 + 0 + 2) / 3)
    assert values["abs_rel_normalized"] == pytest.approx((0.2 + 0 + 0.5) / 3)
    assert values["rmse_normalized"] == pytest.approx(((0.04 + 4) / 3) ** 0.5)
    # ratios 1.2, 1, 2: the thresholds are 1.25, 1.5625, 1.953125
    assert [values[f"delta{k}_normalized"] for k in (1, 2, 3)] == pytest.approx([2 / 3] * 3)


def test_depth_in_meters_reports_the_normalized_error_too():
    label = jnp.array([[2.0, 4.0], [8.0, 0.0]])
    scale = metrics.depth_scale(label)
    sums = metrics.metric_depth_sums((label * 1.1)[..., None], label, scale)
    values = metrics.metric_depth_values(sums)
    assert values["mae"] == pytest.approx((0.2 + 0.4 + 0.8) / 3, rel=1e-5)
    top = np.percentile([0.25, 0.5, 1.0], 99)
    assert values["mae_normalized"] == pytest.approx((0.025 + 0.05 + 0) / 3, rel=1e-4)
    assert top < 1, "both sides of the third pixel are clipped to the 99th percentile"
    few = metrics.metric_depth_values(metrics.metric_depth_sums((label * 1.1)[:1, ..., None], label[:1], scale))
    assert few["mae_normalized"] == pytest.approx((0.025 + 0.05) / 2, rel=1e-4), "by the maximum of the whole image"


def test_normals_by_hand():
    degrees = np.array([0.0, 10.0, 20.0, 30.5])
    prediction = jnp.stack([np.sin(np.deg2rad(degrees)), np.zeros(4), np.cos(np.deg2rad(degrees))], -1)
    label = jnp.tile(jnp.array([0.0, 0.0, 1.0]), (4, 1))
    # a fifth pixel has no label; the length of a prediction does not matter
    prediction = jnp.concatenate([2 * prediction, jnp.ones((1, 3))])[None, None]
    label = jnp.concatenate([label, jnp.zeros((1, 3))])[None, None]
    values = metrics.normals_values(total(jax.vmap(metrics.normals_sums)(prediction, label)))
    assert values["mean_angle"] == pytest.approx(60.5 / 4, abs=0.02)
    assert values["cosine"] == pytest.approx(np.cos(np.deg2rad(degrees)).mean(), rel=1e-6)
    assert 10 <= values["median_angle"] <= 20
    assert [values[f"within_{limit}"] for limit in ("11.25", "22.5", "30")] == [0.5, 0.75, 0.75]


def test_median_angle_is_that_of_all_pixels():
    rng = np.random.default_rng(0)
    prediction, label = rng.normal(size=(2, 1, 60, 80, 3))
    prediction /= np.linalg.norm(prediction, axis=-1, keepdims=True)
    label /= np.linalg.norm(label, axis=-1, keepdims=True)
    values = metrics.normals_values(total(jax.vmap(metrics.normals_sums)(prediction, label)))
    exact = np.median(np.rad2deg(np.arccos((prediction * label).sum(-1))))
    assert values["median_angle"] == pytest.approx(exact, abs=0.1)


def test_edges_by_hand():
    sums = total(jax.vmap(metrics.edge_sums)(jnp.full((1, 2, 2, 1), 0.25), jnp.array([[[1.0, 0.0], [0.0, 0.5]]])))
    assert metrics.edge_values(sums)["mae"] == pytest.approx((0.75 + 0.25 + 0.25 + 0.25) / 4)


def test_nothing_to_count_is_nan_not_zero():
    sums = total(jax.vmap(metrics.depth_sums)(jnp.ones((1, 2, 2, 1)), jnp.zeros((1, 2, 2))))
    assert np.isnan(metrics.normalized_depth_values(sums)["mae_normalized"])


def attribute_values(probability, label, **settings):
    sums = functools.partial(metrics.attribute_sums, **settings)
    return metrics.attribute_values(total(jax.vmap(sums)(jnp.asarray(probability), jnp.asarray(label))))


def test_attributes_by_hand():
    probability = [0.9, 0.6, 0.45, 0.2, 0.7, 0.1, 0.99]
    label = [1, 1, 1, 0, 0, 0, VOID]
    values = attribute_values(probability, label)
    assert values["accuracy"] == pytest.approx(4 / 6)
    assert values["balanced_accuracy"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert values["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert values["auroc"] == pytest.approx((3 + 2 + 2) / 9), "0.9 beats all three, 0.6 and 0.45 lose to 0.7"
    lower = attribute_values(probability, label, threshold=0.45)
    assert lower["accuracy"] == pytest.approx(5 / 6) and lower["f1"] == pytest.approx(6 / 7)
    rare = attribute_values([0.1, 0.2, 0.3, 0.8], [0, 0, 1, 0])
    assert rare["accuracy"] == 0.5 and rare["balanced_accuracy"] == pytest.approx((2 / 3 + 0) / 2) and rare["f1"] == 0


def test_auroc_is_that_of_the_ranks():
    """Against Mann-Whitney's U, also where probabilities are so near 0 and 1 that bins of them would be one."""
    rng = np.random.default_rng(0)
    label = rng.random(800) < 0.3
    for shift, deviation in ((0.0, 1.0), (9.0, 2.0), (-12.0, 1.0)):
        logit = shift + deviation * rng.normal(size=800) + 1.5 * label
        probability = np.asarray(jax.nn.sigmoid(jnp.float32(logit)))
        exact = stats.mannwhitneyu(probability[label], probability[~label]).statistic / (label.sum() * (~label).sum())
        assert attribute_values(probability, label)["auroc"] == pytest.approx(exact, abs=3e-4)


def test_one_constant_probability_has_no_rank():
    assert attribute_values([0.3] * 4, [0, 1, 0, 0])["auroc"] == 0.5
    only = attribute_values([0.3, 0.6], [1, 1])
    assert only["accuracy"] == only["balanced_accuracy"] == 0.5 and np.isnan(only["auroc"])


def test_without_positives_the_metrics_are_scikit_learns():
    """balanced_accuracy_score averages the recalls of the labels that occur; f1_score is 0 where it is undefined."""
    none = attribute_values([0.3, 0.1, 0.6], [0, 0, 0])
    assert none["balanced_accuracy"] == pytest.approx(2 / 3) and none["f1"] == 0 and np.isnan(none["auroc"])
    assert attribute_values([0.3, 0.1], [0, 0])["f1"] == 0
    unlabeled = attribute_values([0.3], [VOID])
    assert np.isnan(unlabeled["f1"]) and np.isnan(unlabeled["balanced_accuracy"])


@pytest.mark.parametrize(("shift", "deviation"), [(25, 3), (-60, 4), (0, 0.1), (300, 30)])
def test_auroc_of_raw_logits_is_that_of_the_ranks_wherever_they_are(shift, deviation):
    rng = np.random.default_rng(0)
    label = rng.random(800) < 0.3
    logit = np.float32(shift + deviation * (rng.normal(size=800) + 2.5 * label))
    sums = total(jax.vmap(lambda p, y, raw: metrics.attribute_sums(p, y, raw))(jax.nn.sigmoid(logit), label, logit))
    exact = stats.mannwhitneyu(logit[label], logit[~label]).statistic / (label.sum() * (~label).sum())
    assert metrics.attribute_values(sums)["auroc"] == pytest.approx(exact, abs=1e-3)
