"""Tests of opening data sets, registered and published: data are checked before training."""

import concurrent.futures
from unittest import mock

import numpy as np
import pytest

from input_pipeline import datasets
from input_pipeline.datasets import Data
from mtl_sparse.runtime import files, progress
from mtl_sparse.runtime.errors import UserError
from tests.conftest import raises, tiny, tiny_faces


def frame(**changes):
    image = np.zeros((16, 24, 3), np.uint8)
    return {"image": image, "segmentation": np.ones((16, 24), np.uint8), "attribute:Large": np.uint8(1)} | changes


@pytest.fixture
def load(monkeypatch):
    """Return load(labels, data, num_classes=2), which opens `data`, a list of samples or a Data, as the set "mine"."""
    monkeypatch.setattr(datasets, "DATASETS", dict(datasets.DATASETS))

    def load(labels, data, num_classes=2):
        config = tiny("").data
        config.update(name="mine", num_classes=num_classes)
        datasets.DATASETS["mine"] = lambda config: data if isinstance(data, Data) else Data(data, data[:1], data[:1])
        return datasets.load(config, labels)

    return load


def test_lists_of_frames_are_sources(load):
    data = load(["segmentation", "attribute:Large"], [frame(), frame()])
    assert data.names == {"train": ["0", "1"], "validation": ["0"], "test": ["0"]}
    named = Data([frame()], [frame()], [frame()], names={"train": ["a"], "validation": ["b"], "test": ["c"]})
    assert load([], named).names["test"] == ["c"]


def test_what_cannot_be_trained_on_is_named(load):
    with raises("DATA_TOO_FEW_IMAGES", naming="train split of config.data.name='mine'"):
        load([], [])
    with raises("DATA_LABEL_MISSING", naming="'depth'") as caught:
        load(["depth"], [frame()])
    assert "attribute:Large" in str(caught.value) and "segmentation" in str(caught.value), "lists the labels"
    with raises("DATA_LABEL_MISSING", naming="'attribute:Larg'") as caught:
        load(["attribute:Larg"], [frame()])
    assert "attribute:Large" in str(caught.value), "lists near names"
    with raises("DATA_IMAGE_FORMAT", naming="float32 [16, 24, 3]"):
        load([], [frame(image=np.zeros((16, 24, 3), np.float32))])
    with raises("DATA_LABEL_FORMAT", naming="'attribute:Large'") as caught:
        load(["attribute:Large"], [frame(**{"attribute:Large": np.ones(1, np.uint8)})])
    assert "uint8 [1]" in str(caught.value)
    with raises("DATA_LABEL_FORMAT", naming="'segmentation'") as caught:
        load(["segmentation"], [frame(segmentation=np.ones((16, 16), np.uint8))])
    assert "16x16" in str(caught.value) and "16x24" in str(caught.value)
    with raises("DATA_LABEL_OUT_OF_RANGE", naming="config.data.num_classes=2"):
        load(["segmentation"], [frame(segmentation=np.full((16, 24), 8, np.uint8))])
    load(["segmentation"], [frame(segmentation=np.ones((8, 12), np.uint8))])
    with raises("OPTION_CONFLICT", naming="config.data.num_classes=2"):
        load([], Data([frame()], [frame()], [frame()], classes=("a", "b", "c")))
    config = tiny("").data
    config.name = "yours"
    with raises("OPTION_UNKNOWN_VALUE", naming="config.data.name='yours'") as caught:
        datasets.load(config)
    assert all(name in str(caught.value) for name in ("nyud_mt", "celebamask_hq", "mine"))


def test_a_function_that_returns_no_data_is_named(monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "mine", lambda config: [frame()])
    config = tiny("").data
    config.name = "mine"
    with raises("DATA_FORMAT", naming="DATASETS['mine']"):
        datasets.load(config)


WRONG = {
    "colored classes": ({"segmentation": np.ones((16, 24, 3), np.uint8)}, "uint8 [16, 24, 3]"),
    "classes as floats": ({"segmentation": np.ones((16, 24))}, "float64"),
    "two depths": ({"depth": np.ones((16, 24, 2), np.float32)}, "float32 [16, 24, 2]"),
    "edges to 255": ({"edge": np.full((16, 24), 255, np.uint8)}, "uint8"),
    "flat normals": ({"normals": np.ones((16, 24), np.float32)}, "float32 [16, 24]"),
    "attribute of -1": ({"attribute:Large": np.int8(-1)}, "int8"),
    "attribute unknown": ({"attribute:Large": np.float32("nan")}, "float32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_labels_of_another_form_are_named(load, case):
    changes, found = WRONG[case]
    with raises("DATA_LABEL_FORMAT", naming=repr(next(iter(changes)))) as caught:
        load(list(changes), [frame(**changes)])
    assert found in str(caught.value)


def test_negative_classes_are_named(load):
    with raises("DATA_LABEL_OUT_OF_RANGE", naming="config.data.num_classes=2"):
        load(["segmentation"], [frame(segmentation=np.full((16, 24), -1))])


def test_one_of_several_draws_and_prepares_what_all_open(tmp_path, caplog):
    config = tiny("").data
    config.embedded.update(frames=12, height=32, width=48, folder=str(tmp_path / "drawn"))
    caplog.set_level("INFO")
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        opened = list(pool.map(datasets.load, [config] * 3))
    assert len({data.fingerprint for data in opened}) == 1
    assert [len(data.train) for data in opened] == [9] * 3
    assert not list(tmp_path.rglob("incomplete*")) and not list(tmp_path.rglob("*.partial"))
    assert "Another process writes data" in caplog.text


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_killed_preparation_left_is_removed(tmp_path, monkeypatch, locks):
    """Only under a lock, since without one another process may be writing them."""

    def flock(*_):
        raise OSError(38, "Function not implemented")

    if not locks:
        monkeypatch.setattr(files.fcntl, "flock", flock)
    config = tiny("").data
    config.embedded.update(frames=12, height=32, width=48, folder=str(tmp_path / "drawn"))
    config.prepared = str(tmp_path / "prepared")
    left = tmp_path / "prepared" / "nyud_mt" / "incomplete.VUJNGM_1.0.0"
    left.mkdir(parents=True)
    (left / "half.array_record").write_text("half")
    datasets.load(config)
    assert left.exists() != locks and datasets.load(config).train[0]["image"].ndim == 3


def test_a_data_set_without_a_fingerprint_gets_one(load):
    """It changes with the samples that it reads, with their number and with their order; a given one is kept."""
    frames = [frame(segmentation=np.full((16, 24), 1 + index, np.uint8)) for index in range(5)]
    first = load(["segmentation"], frames, num_classes=9).fingerprint
    assert len(first) == 16 and load(["segmentation"], list(frames), num_classes=9).fingerprint == first
    others = (frames[:4], frames[::-1], [*frames[:4], frame(segmentation=np.full((16, 24), 9, np.uint8))])
    found = [load(["segmentation"], other, num_classes=9).fingerprint for other in others]
    assert len({first, *found}) == 4
    named = Data(frames, frames, frames, fingerprint="mine")
    assert load(["segmentation"], named, num_classes=9).fingerprint == "mine"


def embedded(name, frames, folder):
    """Return the config.data of that many embedded samples of a published data set, below a folder."""
    config = (tiny if name == "nyud_mt" else tiny_faces)("").data
    config.embedded.update(frames=frames, height=32, width=48, folder=str(folder / "data"))
    return config


@pytest.mark.parametrize(
    ("name", "frames", "images"), [("nyud_mt", 24, 18), ("nyud_mt", 480, 360), ("celebamask_hq", 24, 14)]
)
def test_a_check_of_the_length_comes_before_anything_is_drawn(name, frames, images, tmp_path):
    config = embedded(name, frames, tmp_path)

    def check(count):
        assert count == images
        raise UserError("DATA_TOO_FEW_IMAGES", "too short")

    with raises("DATA_TOO_FEW_IMAGES", naming="too short"):
        datasets.load(config, check=check)
    assert not (tmp_path / "data").exists()


def test_the_check_of_the_length_gets_what_is_opened(tmp_path):
    for name in ("nyud_mt", "celebamask_hq"):
        config, counts = embedded(name, 20, tmp_path), []
        assert [len(datasets.load(config, check=counts.append).train)] * 2 == counts


def test_a_check_of_the_length_comes_before_anything_is_prepared(own_rooms):
    config = tiny(own_rooms).data

    def check(count):
        raise UserError("DATA_TOO_FEW_IMAGES", f"{count} are too few")

    with raises("DATA_TOO_FEW_IMAGES", naming="18"):
        datasets.load(config, check=check)
    assert not own_rooms.with_name("NYUD_MT.tfds").exists()


def test_preparing_prints_nothing_and_counts_the_samples(own_rooms, capfd, monkeypatch):
    """A terminal shows it: not the bars and lines of TFDS."""
    ended = []
    display = mock.Mock(begin=lambda _: None, end=ended.append)
    monkeypatch.setattr(progress, "_displays", [display])
    datasets.load(tiny(own_rooms).data)
    out, err = capfd.readouterr()
    assert out == "" and "it/s" not in err and "examples" not in err
    assert [(phase.name, phase.done, phase.total) for phase in ended] == [
        ("preparing samples", 18, 18),
        ("preparing samples", 2, 2),
        ("preparing samples", 9, 9),
        ("preparing nyud_mt", 0, 0),
    ]
