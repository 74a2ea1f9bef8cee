"""The builders of MTAN's folders: what is stored, how it is split, and what is said of a bad folder."""

import itertools
import json
import shutil

import numpy as np
import pytest

from configs import nyu
from input_pipeline import datasets, mtan
from input_pipeline.synthetic import mtan_rooms
from input_pipeline.transforms import Transform
from mtl_sparse.runtime.labels import VOID
from tests.conftest import raises

LAYOUTS = {"nyuv2_13": mtan.NYUV2_13, "cityscapes_7": mtan.CITYSCAPES_7}
DRAW = {"nyuv2_13": mtan_rooms.draw_nyuv2, "cityscapes_7": mtan_rooms.draw_cityscapes}
FOLDERS = {"image": "image", "segmentation": "label", "depth": "depth", "normals": "normal"}


def options(folder, name="nyuv2_13", **values):
    config = nyu.get_config().data
    config.update(name=name, folder=str(folder), split="", num_classes=len(LAYOUTS[name].class_names), **values)
    return config


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Return {name of the data set: its drawn folder of 20 + 4 samples of 24x32}; do not change them."""
    parent = tmp_path_factory.mktemp("mtan")
    return {name: draw(24, 24, 32, seed=0, folder=str(parent)) for name, draw in DRAW.items()}


@pytest.fixture
def own(drawn, tmp_path):
    """Return a copy of the NYU-v2 folder that a test may damage, not prepared."""
    return shutil.copytree(drawn["nyuv2_13"], tmp_path / "nyuv2")


@pytest.mark.parametrize("name", LAYOUTS)
def test_stored_samples_equal_the_arrays(drawn, name):
    folder = drawn[name]
    data = datasets.load(options(folder, name))
    for split, part in (("train", "train"), ("validation", "train"), ("test", "val")):
        assert data.names[split] and len(getattr(data, split)) == len(data.names[split])
        for frame, sample in zip(getattr(data, split), data.names[split], strict=True):
            assert frame["name"].decode() == sample and sample.startswith(f"{part}/")
            number = sample.partition("/")[2]
            arrays = {kind: np.load(folder / part / kind / f"{number}.npy") for kind in ("image", "depth")}
            label = np.load(folder / part / ("label" if name == "nyuv2_13" else "label_7") / f"{number}.npy")
            np.testing.assert_allclose(frame["image"] / 255, arrays["image"], atol=1e-6)
            np.testing.assert_array_equal(frame["segmentation"][..., 0].astype(int) - 1, label)
            np.testing.assert_array_equal(frame["depth"], arrays["depth"][..., 0])
            if name == "nyuv2_13":
                np.testing.assert_array_equal(frame["normals"], np.load(folder / part / "normal" / f"{number}.npy"))
    assert set(data.train[0]) == {"name", *LAYOUTS[name].files}


def test_void_is_void_and_classes_begin_at_zero(own):
    path = own / "train" / "label" / "0.npy"
    label = np.load(path)
    label[:5], label[5:9] = -1, 12
    np.save(path, label)
    data = datasets.load(options(own))
    transform = Transform((24, 32), labels=("segmentation",), num_classes=13)
    got = transform(data.train[data.names["train"].index("train/0")])["segmentation"]
    assert (got[:5] == VOID).all() and (got[5:9] == 12).all()
    np.testing.assert_array_equal(got[9:], label[9:])


def test_other_forms_of_the_arrays_are_read_alike(own):
    """Depth without its last axis, float64 images, integer labels, NaN where there is no measurement."""
    want = mtan.NYUV2_13.read_frame(own, "train/1")
    for kind, change in {
        "depth": lambda x: np.where(x[..., 0] > 0, x[..., 0], np.nan).astype(np.float64),
        "image": lambda x: x.astype(np.float64),
        "label": lambda x: x.astype(np.int64),
    }.items():
        path = own / "train" / kind / "1.npy"
        np.save(path, change(np.load(path)))
    got = mtan.NYUV2_13.read_frame(own, "train/1")
    assert all(np.array_equal(got[key], want[key]) and got[key].dtype == want[key].dtype for key in FOLDERS)


def test_a_tenth_of_train_is_held_out_in_blocks_and_val_is_the_test_split(drawn):
    data = datasets.load(options(drawn["nyuv2_13"]))
    every = [f"train/{n}" for n in range(20)]
    assert sorted(data.names["train"] + data.names["validation"]) == sorted(every)
    assert len(data.names["validation"]) == 2 and data.names["test"] == [f"val/{n}" for n in range(4)]
    chosen = sorted(mtan.held_out(795))
    assert len(chosen) == 80 and chosen == sorted(mtan.held_out(795)), "the same ones every time"
    assert sum(b != a + 1 for a, b in itertools.pairwise(chosen)) + 1 <= 5, "at most five blocks"
    assert len(mtan.held_out(2975)) == 298 and max(mtan.held_out(2975)) < 2975


def test_all_trains_on_every_sample_of_train_and_on_none_of_val(drawn, tmp_path):
    config = options(drawn["nyuv2_13"], prepared=str(tmp_path / "all"))
    config.split = "all"
    data = datasets.load(config)
    assert data.names["train"] == [f"train/{n}" for n in range(20)] and len(data.train) == 20
    assert set(data.names["validation"]) < set(data.names["train"])
    assert not set(data.names["test"]) & {*data.names["train"], *data.names["validation"]}
    config.folder = ""
    assert datasets.load(config).names == data.names, "the folder is not needed any more"
    config.split = ""
    with raises("DATA_SPLIT_DIFFERS", naming="config.data.split=''"):
        datasets.load(config)


def test_a_split_of_ones_own(drawn, tmp_path):
    lists = {"train": ["train/0", "train/2"], "validation": ["train/5"], "test": ["val/3"]}
    (tmp_path / "lists.json").write_text(json.dumps(lists))
    config = options(drawn["nyuv2_13"], prepared=str(tmp_path / "own"))
    config.split = str(tmp_path / "lists.json")
    assert datasets.load(config).names == lists
    (tmp_path / "lists.json").write_text(json.dumps(lists | {"test": ["val/99"]}))
    prepared = options("", prepared=str(tmp_path / "own"))
    prepared.split = "all"
    with raises("DATA_SPLIT_DIFFERS", naming="config.data.split='all'"):
        datasets.load(prepared)
    config.prepared = str(tmp_path / "other")
    with raises("DATA_SPLIT_INVALID", naming="val/99"):
        datasets.load(config)


def test_cityscapes_labels_may_be_in_label_as_libmtl_has_them(drawn, tmp_path):
    folder = shutil.copytree(drawn["cityscapes_7"], tmp_path / "cityscapes")
    want = mtan.CITYSCAPES_7.read_frame(folder, "train/3")
    for part in mtan.PARTS:
        (folder / part / "label_7").rename(folder / part / "label")
    np.testing.assert_array_equal(mtan.CITYSCAPES_7.read_frame(folder, "train/3")["segmentation"], want["segmentation"])
    (folder / "train" / "label" / "3.npy").unlink()
    with raises("FILE_MISSING", naming="train/label_7/3.npy"):
        datasets.load(options(folder, "cityscapes_7"))


def change(kind, function):
    def damage(folder):
        path = folder / "train" / kind / "3.npy"
        np.save(path, function(np.load(path)))

    return damage


def set_first(value):
    def function(array):
        array[0, 0] = value
        return array

    return function


def truncate(folder):
    path = folder / "train" / "normal" / "3.npy"
    path.write_bytes(path.read_bytes()[:300])


BAD_FOLDERS = {
    "no folder": (lambda folder: folder.rename(folder.with_name("moved")), "DATA_FOLDER_MISSING", "config.data.folder"),
    "no val": (lambda folder: shutil.rmtree(folder / "val"), "FILE_MISSING", "val/image"),
    "no image": (
        lambda folder: [path.unlink() for path in (folder / "val/image").iterdir()],
        "DATA_TOO_FEW_IMAGES",
        "val/image",
    ),
    "a gap": (lambda folder: (folder / "train/image/3.npy").unlink(), "FILE_MISSING", "train/image/3.npy"),
    "no label": (lambda folder: (folder / "train/depth/3.npy").unlink(), "FILE_MISSING", "train/depth/3.npy"),
    "no label of val": (lambda folder: (folder / "val/normal/3.npy").unlink(), "FILE_MISSING", "val/normal/3.npy"),
    "truncated": (truncate, "DATA_LABEL_DAMAGED", "train/normal/3.npy"),
    "pickled": (
        lambda folder: np.save(folder / "train/label/3.npy", np.array([{}]), allow_pickle=True),
        "DATA_LABEL_DAMAGED",
        "train/label/3.npy",
    ),
    "of words": (change("depth", lambda x: np.full(x.shape, "far")), "DATA_LABEL_FORMAT", "train/depth/3.npy"),
    "gray image": (change("image", lambda x: x[..., 0]), "DATA_IMAGE_FORMAT", "train/image/3.npy"),
    "image of 0 to 255": (change("image", lambda x: 255 * x), "DATA_IMAGE_FORMAT", "train/image/3.npy"),
    "image with NaN": (change("image", set_first(np.nan)), "DATA_IMAGE_FORMAT", "train/image/3.npy"),
    "smaller label": (change("label", lambda x: x[1:]), "DATA_LABEL_FORMAT", "train/label/3.npy"),
    "smaller depth": (change("depth", lambda x: x[:, 1:]), "DATA_LABEL_FORMAT", "train/depth/3.npy"),
    "depth of two": (change("depth", lambda x: np.repeat(x, 2, -1)), "DATA_LABEL_FORMAT", "train/depth/3.npy"),
    "flat normals": (change("normal", lambda x: x[..., 0]), "DATA_LABEL_FORMAT", "train/normal/3.npy"),
    "class 13": (change("label", set_first(13)), "DATA_LABEL_OUT_OF_RANGE", "train/label/3.npy"),
    "class -2": (change("label", set_first(-2)), "DATA_LABEL_OUT_OF_RANGE", "train/label/3.npy"),
    "half a class": (change("label", set_first(0.5)), "DATA_LABEL_OUT_OF_RANGE", "train/label/3.npy"),
    "class NaN": (change("label", set_first(np.nan)), "DATA_LABEL_OUT_OF_RANGE", "train/label/3.npy"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_named(own, case):
    damage, code, naming = BAD_FOLDERS[case]
    damage(own)
    with raises(code, naming=naming) as caught:
        datasets.load(options(own))
    assert "\n" not in str(caught.value)
    assert not (own.with_name("nyuv2.tfds") / "nyuv2_13" / "1.0.0").exists(), "no incomplete data are left for training"


def test_missing_files_are_named_before_anything_is_prepared(own, monkeypatch):
    monkeypatch.setattr(mtan.Layout, "read_frame", lambda *_: pytest.fail("a sample was read"))
    (own / "val" / "depth" / "2.npy").unlink()
    with raises("FILE_MISSING", naming="val/depth/2.npy"):
        datasets.load(options(own))
    assert not own.with_name("nyuv2.tfds").exists()


def test_a_folder_that_changed_since_it_was_prepared_is_refused(own):
    datasets.load(options(own))
    depth = np.load(own / "val" / "depth" / "1.npy")
    np.save(own / "val" / "depth" / "1.npy", depth + 1)
    with raises("DATA_CHANGED", naming=f"{own}.tfds"):
        datasets.load(options(own))


def test_wrong_options_are_named(drawn):
    config = options(drawn["nyuv2_13"])
    config.num_classes = 40
    with raises("OPTION_CONFLICT", naming="config.data.num_classes=40"):
        datasets.load(config)
    config = options(drawn["nyuv2_13"], classes=(("wall", ()),))
    with raises("OPTION_CONFLICT", naming="config.data.classes="):
        datasets.load(config)
    with raises("DATA_LABEL_MISSING", naming="'normals'"):
        datasets.load(options(drawn["cityscapes_7"], "cityscapes_7"), ["segmentation", "normals"])


def test_drawn_data_have_as_many_samples_as_announced(tmp_path):
    """`check` sees the number of training images before anything is drawn."""
    for name in LAYOUTS:
        config, announced = options("", name), []
        config.embedded.update(frames=13, height=16, width=16, folder=str(tmp_path))
        data = datasets.load(config, check=announced.append)
        assert announced[0] == len(data.train) == 10
        disparity = data.train[0]["depth"]
        assert name == "nyuv2_13" or (0 < disparity.max() <= 1 and disparity.min() >= 0)
