import cv2
import numpy as np
import pytest

from input_pipeline import transforms
from input_pipeline.transforms import Transform
from mtl_sparse.runtime.labels import VOID
from tests.conftest import raises


@pytest.fixture
def frame():
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(16, 24, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    frame = {
        "image": rng.integers(0, 256, (16, 24, 3), np.uint8),
        "segmentation": rng.integers(0, 41, (16, 24, 1), np.uint8),
        "depth": rng.uniform(1, 5, (16, 24)).astype(np.float32),
        "normals": normals,
        "edge": (rng.random((16, 24)) < 0.2).astype(np.float32),
    }
    frame["segmentation"][:4], frame["depth"][:, :3], frame["normals"][-2:] = 0, 0, 0
    return frame


def test_masks_are_kept_and_classes_begin_at_zero(frame):
    example = Transform((16, 24), depth_target="metres")(frame)
    assert (example["segmentation"][:4] == VOID).all()
    np.testing.assert_array_equal(example["segmentation"][4:] == VOID, frame["segmentation"][4:, :, 0] == 0)
    present = example["segmentation"] != VOID
    np.testing.assert_array_equal(example["segmentation"][present], frame["segmentation"][..., 0][present] - 1)
    np.testing.assert_array_equal(example["depth"], frame["depth"])
    np.testing.assert_array_equal(example["normals"][-2:], 0)
    np.testing.assert_allclose(np.linalg.norm(example["normals"][:-2], axis=-1), 1, rtol=1e-6)
    assert example["mask"] == 1


def test_image_round_trip(frame):
    example = Transform((16, 24))(frame)
    np.testing.assert_array_equal(transforms.unnormalize_image(example["image"]), frame["image"])
    unit = Transform((16, 24), depth_target="metres", unit_range=True)(frame)["image"]
    np.testing.assert_allclose(unit, frame["image"] / np.float32(255), rtol=1e-6)
    np.testing.assert_array_equal(transforms.unnormalize_image(unit, True), frame["image"])
    white = transforms.normalize_image(np.full((1, 1, 3), 255, np.uint8))
    np.testing.assert_allclose(white[0, 0], (1 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225], rtol=1e-6)


def test_depth_normalisation_by_hand():
    depth = np.array([[0.0, 0.2, 4.0], [2.0, 1.0, 0.0]], np.float32)
    top = np.percentile([0.05, 1.0, 0.5, 0.25], 99)
    np.testing.assert_allclose(transforms.normalize_depth(depth), [[0, 0.1, top], [0.5, 0.25, 0]], rtol=1e-6)
    assert (transforms.normalize_depth(np.zeros((2, 2), np.float32)) == 0).all()


def test_resizing_keeps_label_values(frame):
    example = Transform((8, 16), depth_target="metres")(frame)
    assert {value.shape for key, value in example.items() if key != "mask"} == {(8, 16), (8, 16, 3)}
    assert set(np.unique(example["depth"])) <= set(np.unique(frame["depth"]))
    assert set(np.unique(example["segmentation"])) <= {VOID, *range(40)}
    length = np.linalg.norm(example["normals"], axis=-1)
    assert ((np.abs(length - 1) < 1e-5) | (length == 0)).all()
    assert example["edge"].mean() == pytest.approx(frame["edge"].mean(), rel=1e-5), "the area mean keeps the edges"


class Always:
    """A random generator with given results."""

    def __init__(self, uniform=1.0, integer=0, random=0.0):
        self.uniform = lambda low, high: uniform
        self.integers = lambda high: min(integer, high - 1)
        self.random = lambda: random


def test_flip_mirrors_everything_and_the_normals_x(frame):
    plain = Transform((16, 24), depth_target="metres")(frame)
    flipped = Transform((16, 24), depth_target="metres", flip=True)(frame, Always())
    for key in ("image", "segmentation", "depth", "edge"):
        np.testing.assert_array_equal(flipped[key], plain[key][:, ::-1])
    np.testing.assert_allclose(flipped["normals"], plain["normals"][:, ::-1] * [-1, 1, 1])
    kept = Transform((16, 24), depth_target="metres", flip=True)(frame, Always(random=0.9))
    np.testing.assert_array_equal(kept["depth"], plain["depth"])


def test_zoom_crops_jointly_and_divides_depth(frame):
    frame["segmentation"][4:, :, 0] = np.arange(24) % 40 + 1
    zoomed = Transform((8, 12), depth_target="metres", max_scale=2.0)(frame, Always(uniform=2.0, integer=5))
    window = np.s_[5:13, 5:17]
    np.testing.assert_allclose(zoomed["depth"], frame["depth"][window] / 2)
    np.testing.assert_array_equal(zoomed["segmentation"], frame["segmentation"][window][..., 0].astype(int) - 1)
    np.testing.assert_array_equal(transforms.unnormalize_image(zoomed["image"]), frame["image"][window])


def test_disparity_is_multiplied_by_the_scale(frame):
    """A scene that appears twice as large is at half the distance, so its inverse depth doubles."""
    options = {"labels": ("depth",), "max_scale": 2.0}
    zoomed = Transform((8, 12), depth_target="disparity", **options)(frame, Always(uniform=2.0, integer=5))
    np.testing.assert_allclose(zoomed["depth"], 2 * frame["depth"][5:13, 5:17])
    near = frame | {"depth": np.where(frame["depth"] > 0, 1 / np.maximum(frame["depth"], 1e-3), 0)}
    depth = Transform((8, 12), depth_target="metres", **options)(frame, Always(uniform=2.0, integer=5))["depth"]
    inverse = Transform((8, 12), depth_target="disparity", **options)(near, Always(uniform=2.0, integer=5))["depth"]
    np.testing.assert_allclose(inverse[depth > 0], 1 / depth[depth > 0], rtol=1e-6)


def test_scales_are_the_only_zooms(frame):
    """MTAN's scales: depth is divided by 1, 1.2 or 1.5, each about as often, and a normal is turned alike."""
    frame["depth"][:] = 6.0
    frame["normals"][:] = np.array([0.6, 0.0, 0.8], np.float32)
    transform = Transform((16, 24), labels=("depth", "normals"), depth_target="metres", scales=(1.0, 1.2, 1.5))
    rng, found = np.random.default_rng(0), []
    for _ in range(300):
        example = transform(frame, rng)
        (depth,) = np.unique(example["depth"])
        found.append(round(6.0 / float(depth), 4))
        turned = np.array([0.6, 0.0, 0.8 * found[-1]])
        np.testing.assert_allclose(example["normals"][3, 4], turned / np.linalg.norm(turned), atol=1e-5)
    counts = {scale: found.count(scale) for scale in sorted(set(found))}
    assert list(counts) == [1.0, 1.2, 1.5] and min(counts.values()) > 70
    np.testing.assert_array_equal(transform(frame)["depth"], frame["depth"])


def test_zoom_turns_normals_as_the_zoomed_depth_has_them():
    """For a tilted plane and a pinhole camera, three zoomed points span a plane with the zoomed normal."""
    normal, focal = np.array([0.5, 0.3, -0.8]) / np.linalg.norm([0.5, 0.3, -0.8]), 40.0
    v, u = np.mgrid[:32, :32] - 15.5
    rays = np.stack([u / focal, v / focal, np.ones_like(u)], -1)
    frame = {"image": np.zeros((32, 32, 3), np.uint8), "depth": (-3 / (rays @ normal)).astype(np.float32)}
    frame["normals"] = np.broadcast_to(normal, (32, 32, 3)).astype(np.float32)
    transform = Transform((16, 16), labels=("depth", "normals"), depth_target="metres", max_scale=2.0)
    zoomed = transform(
        frame, Always(uniform=2.0, integer=8)
    )  # of half the size, so the same camera's focal length halves
    rays = np.stack([u[8:24, 8:24] / (focal / 2), v[8:24, 8:24] / (focal / 2), np.ones((16, 16))], -1)
    a, b, c = ((zoomed["depth"][..., None] * rays)[at] for at in ((2, 3), (2, 13), (12, 4)))
    spanned = np.cross(c - a, b - a)
    spanned *= -np.sign(spanned[2]) / np.linalg.norm(spanned)
    np.testing.assert_allclose(zoomed["normals"], np.broadcast_to(spanned, (16, 16, 3)), atol=1e-4)
    assert np.abs(spanned - normal).max() > 0.05


def test_labels_out_of_range_and_missing_measurements(frame):
    bad = frame | {"segmentation": np.full((16, 24), 255, np.uint8)}
    with raises("DATA_LABEL_OUT_OF_RANGE", naming="config.data.num_classes=40"):
        Transform((8, 12), num_classes=40)(bad)
    holes = frame["depth"].copy()
    holes[8, 3:6] = np.nan, np.inf, -1
    expected = np.where(np.isfinite(holes) & (holes > 0), holes, 0)
    for target in ("metres", "normalized"):
        transform = Transform((16, 24), labels=("depth",), depth_target=target)
        marked = transform(frame | {"depth": holes[..., None]})["depth"]
        np.testing.assert_array_equal(np.maximum(marked, 0), transform(frame | {"depth": expected})["depth"])


def test_without_a_generator_nothing_is_augmented(frame):
    example = Transform((16, 24), depth_target="metres", flip=True, max_scale=2.0)(frame)
    np.testing.assert_array_equal(example["depth"], frame["depth"])


def test_a_label_of_a_user_keeps_its_last_axis():
    frame = {"image": np.zeros((16, 24, 3), np.uint8), "heat": np.ones((16, 24, 1), np.float32)}
    assert Transform((8, 12), labels=("heat",))(frame)["heat"].shape == (8, 12, 1)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float16, np.float64])
def test_edges_of_every_dtype_are_resized_alike(frame, dtype):
    """An edge one pixel wide keeps its mean when it is resized; rounding as an integer would remove it."""
    transform = Transform((8, 12), labels=("edge",))
    want = transform(frame)["edge"]
    assert 0 < want.max() < 1
    np.testing.assert_array_equal(transform(frame | {"edge": frame["edge"].astype(dtype)})["edge"], want)


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.float16, np.float64])
def test_depth_and_labels_of_every_dtype_are_resized_alike(frame, dtype):
    whole = frame | {"depth": np.round(frame["depth"]), "mine": frame["segmentation"][..., 0]}
    transform = Transform((8, 12), labels=("depth", "mine"))
    want = transform(whole)
    got = transform(whole | {key: whole[key].astype(dtype) for key in ("depth", "mine")})
    np.testing.assert_array_equal(got["depth"], want["depth"])
    np.testing.assert_array_equal(got["mine"], want["mine"])
    assert got["mine"].dtype == dtype


def test_nearest_takes_opencvs_pixels():
    rng = np.random.default_rng(0)
    for shape, size in (((37, 53), (24, 40)), ((24, 40, 3), (37, 53)), ((16, 16), (16, 16))):
        x = rng.random(shape).astype(np.float32)
        want = cv2.resize(x, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        np.testing.assert_array_equal(Transform(size)._nearest(x), want)
