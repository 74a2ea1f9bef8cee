"""Data sets of one's own: what is opened is checked before anything is trained on it."""

import concurrent.futures

import numpy as np
import pytest

from input_pipeline import datasets
from input_pipeline.datasets import Data
from mtl_sparse.runtime.errors import UserError
from tests.conftest import tiny, tiny_faces


def frame(**changes):
    image = np.zeros((16, 24, 3), np.uint8)
    return {"image": image, "segmentation": np.ones((16, 24), np.uint8), "attribute:Large": np.uint8(1)} | changes


@pytest.fixture
def load(monkeypatch):
    """load(labels, data, num_classes=2): opens `data`, a list of frames of each split or a Data, as the set "mine"."""
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
    with pytest.raises(UserError, match="train split of config.data.name='mine' has no frames"):
        load([], [])
    with pytest.raises(UserError, match="'depth', which config.data.name='mine' does not have.*attribute:Large, segm"):
        load(["depth"], [frame()])
    with pytest.raises(UserError, match="'attribute:Larg'.*nearest: attribute:Large"):
        load(["attribute:Larg"], [frame()])
    with pytest.raises(UserError, match=r"'image' of uint8 \[H, W, 3\], not float32 \[16, 24, 3\]"):
        load([], [frame(image=np.zeros((16, 24, 3), np.float32))])
    with pytest.raises(UserError, match=r"'attribute:Large' of uint8 \[1\]; it must be one number"):
        load(["attribute:Large"], [frame(**{"attribute:Large": np.ones(1, np.uint8)})])
    with pytest.raises(UserError, match="'segmentation' of 16x16, its image is 16x24: their sides"):
        load(["segmentation"], [frame(segmentation=np.ones((16, 16), np.uint8))])
    with pytest.raises(UserError, match="segmentation of 8 to 8; with config.data.num_classes=2 it is 0 .void. to 2"):
        load(["segmentation"], [frame(segmentation=np.full((16, 24), 8, np.uint8))])
    load(["segmentation"], [frame(segmentation=np.ones((8, 12), np.uint8))])
    with pytest.raises(UserError, match="num_classes=2.*have 3 classes"):
        load([], Data([frame()], [frame()], [frame()], classes=("a", "b", "c")))
    with pytest.raises(UserError, match="unknown data set.*nyud_mt, celebamask_hq, mine"):
        config = tiny("").data
        config.name = "yours"
        load([], [frame()])
        datasets.load(config)


WRONG = {
    "negative class": ({"segmentation": np.full((16, 24), -1)}, "segmentation of -1 to -1; .* 0 .void. to 2"),
    "classes in colour": ({"segmentation": np.ones((16, 24, 3), np.uint8)}, r"'segmentation' of uint8 \[16, 24, 3\]"),
    "classes as floats": ({"segmentation": np.ones((16, 24))}, "'segmentation' of float64.*whole numbers"),
    "two depths": ({"depth": np.ones((16, 24, 2), np.float32)}, r"'depth' of float32 \[16, 24, 2\].*in metres"),
    "edges to 255": ({"edge": np.full((16, 24), 255, np.uint8)}, r"'edge' of uint8.*in \[0, 1\]"),
    "flat normals": ({"normals": np.ones((16, 24), np.float32)}, r"'normals' of float32 \[16, 24\].*\[H, W, 3\]"),
    "attribute of -1": ({"attribute:Large": np.int8(-1)}, "'attribute:Large' of int8.*1, 0 or 255"),
    "attribute unknown": ({"attribute:Large": np.float32("nan")}, "'attribute:Large' of float32.*1, 0 or 255"),
}


@pytest.mark.parametrize("case", WRONG)
def test_labels_of_another_form_are_named(load, case):
    changes, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        load(list(changes), [frame(**changes)])


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
def test_what_a_killed_preparation_left_goes(tmp_path, monkeypatch, locks):
    """Where no other can be at work on it."""

    def flock(*_):
        raise OSError(38, "Function not implemented")

    if not locks:
        monkeypatch.setattr(datasets.fcntl, "flock", flock)
    config = tiny("").data
    config.embedded.update(frames=12, height=32, width=48, folder=str(tmp_path / "drawn"))
    config.prepared = str(tmp_path / "prepared")
    left = tmp_path / "prepared" / "nyud_mt" / "incomplete.VUJNGM_1.0.0"
    left.mkdir(parents=True)
    (left / "half.array_record").write_text("half")
    datasets.load(config)
    assert left.exists() != locks and datasets.load(config).train[0]["image"].ndim == 3


def test_a_data_set_without_a_fingerprint_gets_one_of_its_frames(load):
    """It changes with any frame that it reads, with the number of frames and with their order; a given one stays."""
    frames = [frame(segmentation=np.full((16, 24), 1 + index, np.uint8)) for index in range(5)]
    first = load(["segmentation"], frames, num_classes=9).fingerprint
    assert len(first) == 16 and load(["segmentation"], list(frames), num_classes=9).fingerprint == first
    others = (frames[:4], frames[::-1], [*frames[:4], frame(segmentation=np.full((16, 24), 9, np.uint8))])
    found = [load(["segmentation"], other, num_classes=9).fingerprint for other in others]
    assert len({first, *found}) == 4
    named = Data(frames, frames, frames, fingerprint="mine")
    assert load(["segmentation"], named, num_classes=9).fingerprint == "mine"


def embedded(name, frames, folder):
    """config.data of that many embedded frames of a published data set, below a folder."""
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
        raise UserError("too short")

    with pytest.raises(UserError, match="too short"):
        datasets.load(config, check=check)
    assert not (tmp_path / "data").exists()


def test_the_check_of_the_length_gets_what_is_opened(tmp_path):
    for name in ("nyud_mt", "celebamask_hq"):
        config, counts = embedded(name, 20, tmp_path), []
        assert [len(datasets.load(config, check=counts.append).train)] * 2 == counts


def test_a_check_of_the_length_comes_before_anything_is_prepared(own_rooms):
    config = tiny(own_rooms).data

    def check(count):
        raise UserError(f"{count} are too few")

    with pytest.raises(UserError, match="18 are too few"):
        datasets.load(config, check=check)
    assert not own_rooms.with_name("NYUD_MT.tfds").exists()
