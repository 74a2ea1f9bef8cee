"""The nine metrics of the NYU-v2 protocol of MTAN and LibMTL against a direct computation in NumPy."""

import jax
import numpy as np
import pytest

from configs import nyu
from mtl_sparse import tasks
from mtl_sparse.runtime.labels import VOID
from mtl_sparse.training import evaluation

CLASSES = 13
SIZE = (24, 32)


def specs(depth_target="metres"):
    config = nyu.get_config()
    config.data.update(num_classes=CLASSES, depth_target=depth_target)
    return {task.name: task for task in tasks.resolve(config)}


@pytest.fixture
def split():
    """Return raw predictions at stride 8 and labels of five images: void, holes, and an image without any label."""
    rng = np.random.default_rng(0)
    raw = {name: rng.normal(size=(5, 3, 4, n)).astype(np.float32) for name, n in
           (("segmentation", CLASSES), ("depth", 1), ("normals", 3))}  # fmt: skip
    labels = {
        "segmentation": rng.integers(0, CLASSES, (5, *SIZE)).astype(np.int32),
        "depth": rng.uniform(0.5, 5, (5, *SIZE)).astype(np.float32),
        "normals": rng.normal(size=(5, *SIZE, 3)).astype(np.float32),
    }
    labels["normals"] /= np.linalg.norm(labels["normals"], axis=-1, keepdims=True)
    labels["segmentation"][:, :7], labels["depth"][:, :, :5], labels["normals"][1, 4:20] = VOID, 0, 0
    labels["segmentation"][4], labels["depth"][4], labels["normals"][4] = VOID, 0, 0
    return raw, labels


def ours(spec, raw, label):
    """Return the metrics as the evaluation adds them up, at the label's resolution."""
    sums = evaluation._sums_of(spec, evaluation.upsample(raw, label), label, label)
    return spec.values(jax.tree.map(lambda x: np.asarray(x, np.float64).sum(0), sums))


def predictions(raw):
    return np.asarray(jax.image.resize(raw, (*raw.shape[:1], *SIZE, raw.shape[-1]), "bilinear"), np.float64)


def test_segmentation(split):
    raw, label = (part["segmentation"] for part in split)
    values = ours(specs()["segmentation"], raw, label)
    predicted, valid = predictions(raw).argmax(-1), label != VOID
    ious = [
        np.sum((predicted == k) & (label == k))
        / np.sum(valid & ((predicted == k) | (label == k)))
        for k in range(CLASSES)
    ]  # fmt: skip
    assert values["miou"] == pytest.approx(np.mean(ious), rel=1e-6)
    assert values["pixel_accuracy"] == pytest.approx(np.mean(predicted[valid] == label[valid]), rel=1e-6)


@pytest.mark.parametrize("target", ["metres", "disparity"])
def test_depth_in_the_unit_of_the_label(split, target):
    raw, label = (part["depth"] for part in split)
    values = ours(specs(target)["depth"], raw, label)
    error = np.abs(np.log1p(np.exp(predictions(raw)[..., 0])) - label)[label > 0]
    assert values["mae"] == pytest.approx(error.mean(), rel=1e-4)
    assert values["abs_rel"] == pytest.approx((error / label[label > 0]).mean(), rel=1e-4)
    assert specs(target)["depth"].headline in values


def test_normals(split):
    raw, label = (part["normals"] for part in split)
    values = ours(specs()["normals"], raw, label)
    predicted = np.tanh(predictions(raw))
    predicted /= np.linalg.norm(predicted, axis=-1, keepdims=True)
    valid = (label != 0).any(-1)
    angles = np.rad2deg(np.arccos(np.clip((predicted * label).sum(-1), -1, 1)))[valid]
    assert values["mean_angle"] == pytest.approx(angles.mean(), rel=1e-4)
    assert values["median_angle"] == pytest.approx(np.median(angles), abs=0.1), "bins of 0.1 degree"
    for limit in (11.25, 22.5, 30):
        assert values[f"within_{limit:g}"] == pytest.approx((angles < limit).mean(), abs=1e-3)


def test_the_loss_on_disparity_is_the_absolute_error(split):
    raw, label = (part["depth"] for part in split)
    loss, valid = specs("disparity")["depth"].elementwise(raw, label[:, 4::8, 4::8])
    want = np.abs(np.log1p(np.exp(raw[..., 0])) - label[:, 4::8, 4::8])
    np.testing.assert_allclose(loss, np.where(label[:, 4::8, 4::8] > 0, want, 0), rtol=1e-5)
    np.testing.assert_array_equal(valid, label[:, 4::8, 4::8] > 0)
