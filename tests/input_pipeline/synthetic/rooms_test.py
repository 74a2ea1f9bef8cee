"""The rendered labels are exact: they agree with one another and with the geometry of the image."""

import cv2
import numpy as np
import pytest

from input_pipeline import nyud_mt
from input_pipeline.synthetic import rooms

HEIGHT, WIDTH = 48, 64


@pytest.fixture(params=range(4))
def scene(request):
    room = rooms.random_room(np.random.default_rng((5, request.param)))
    return room, rooms.render(room, HEIGHT, WIDTH, np.random.default_rng(0))


def points(room, depth):
    """Camera coordinates [H, W, 3] of what each pixel sees."""
    v, u = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    focal = room.focal * HEIGHT
    return depth[..., None] * np.stack([(u - WIDTH / 2) / focal, (v - HEIGHT / 2) / focal, np.ones_like(u)], -1)


def test_depth_and_normals_are_of_the_same_planes(scene):
    room, frame = scene
    where = points(room, frame["depth"].astype(np.float64))
    same = frame["surface"][:, 1:] == frame["surface"][:, :-1]
    along = np.sum((where[:, 1:] - where[:, :-1]) * frame["normals"][:, 1:], -1)
    assert same.mean() > 0.8
    assert np.abs(along[same]).max() < 1e-5, "neighbors on one plane lie along it"
    assert np.abs(along[~same]).max() > 1e-2, "elsewhere they need not"


def test_normals_are_unit_and_face_the_camera(scene):
    room, frame = scene
    np.testing.assert_allclose(np.linalg.norm(frame["normals"], axis=-1), 1, rtol=1e-5)
    assert (np.sum(points(room, frame["depth"]) * frame["normals"], -1) < 1e-6).all()


def test_everything_is_inside_the_room(scene):
    room, frame = scene
    _, rotation = rooms._rays(room, HEIGHT, WIDTH)
    world = points(room, frame["depth"].astype(np.float64)) @ rotation.T
    assert (world > room.low - 1e-4).all() and (world < room.high + 1e-4).all()
    floor = world[frame["segmentation"] == 2]
    np.testing.assert_allclose(floor[:, 1], room.high[1], atol=1e-4)


def test_edges_are_where_the_surface_changes(scene):
    surface, edge = scene[1]["surface"], scene[1]["edge"]
    changed = np.zeros_like(edge)
    for row in range(HEIGHT):
        for column in range(WIDTH):
            left, above = surface[row, max(column - 1, 0)], surface[max(row - 1, 0), column]
            changed[row, column] = surface[row, column] != left or surface[row, column] != above
    np.testing.assert_array_equal(edge, changed)


def test_folder_has_the_published_layout_and_is_rendered_once(tmp_path):
    folder = rooms.render_folder(6, 2, 16, 24, seed=3, folder=str(tmp_path))
    splits = nyud_mt.read_splits(folder)
    assert {split: len(names) for split, names in splits.items()} == {"train": 5, "validation": 1, "test": 2}
    frame = nyud_mt.read_frame(folder, splits["train"][0])
    assert frame["depth"].shape == (16, 24) and frame["normals"].shape == (16, 24, 3)
    image = cv2.imread(frame["image"])
    assert image.shape == (16, 24, 3) and image.std() > 10
    before = (folder / "images" / "00000.jpg").stat().st_mtime_ns
    assert rooms.render_folder(6, 2, 16, 24, seed=3, folder=str(tmp_path)) == folder
    assert (folder / "images" / "00000.jpg").stat().st_mtime_ns == before


def test_the_seed_decides_everything(tmp_path):
    a, b, c = (
        rooms.render_folder(2, 1, 16, 24, seed, str(tmp_path / name)) for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    )
    read = lambda folder: (folder / "images" / "00001.jpg").read_bytes()  # noqa: E731
    assert read(a) == read(b) != read(c)
