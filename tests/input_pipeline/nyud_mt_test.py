import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image

from input_pipeline import datasets, folders, nyud_mt
from tests.conftest import raises, tiny


def load(folder):
    return datasets.load(tiny(folder).data)


def test_without_test_list_val_is_the_test_split_and_a_tenth_is_held_out(rooms):
    data = load(rooms)
    listed = {key: (rooms / "gt_sets" / f"{key}.txt").read_text().split() for key in ("train", "val")}
    assert data.names["test"] == listed["val"]
    assert len(data.names["validation"]) == 2
    assert sorted(data.names["train"] + data.names["validation"]) == listed["train"]
    assert nyud_mt.read_splits(rooms) == data.names, "the same samples are held out every time"


def test_with_three_lists_each_is_its_own_split(own_rooms):
    names = (own_rooms / "gt_sets" / "train.txt").read_text().split()
    (own_rooms / "gt_sets" / "test.txt").write_text("\n".join(names[:4]))
    (own_rooms / "gt_sets" / "train.txt").write_text("\n".join(names[4:]))
    data = load(own_rooms)
    assert data.names["test"] == names[:4] and data.names["train"] == names[4:]
    assert (len(data.train), len(data.validation), len(data.test)) == (16, 9, 4)


def test_stored_samples_equal_the_folder(rooms):
    data = load(rooms)
    for source, name in ((data.train, data.names["train"][3]), (data.test, data.names["test"][8])):
        index = 3 if source is data.train else 8
        frame = source[index]
        assert frame["name"].decode() == name
        image = cv2.imread(str(rooms / "images" / f"{name}.jpg"))[..., ::-1]
        np.testing.assert_array_equal(frame["image"], image)
        label = cv2.imread(str(rooms / "segmentation" / f"{name}.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(frame["segmentation"][..., 0], label)
        for kind in ("depth", "normals", "edge"):
            np.testing.assert_array_equal(frame[kind], np.load(rooms / kind / f"{name}.npy"))


@pytest.mark.slow
def test_drawing_preparing_and_training_need_no_tensorflow(tmp_path):
    script = f"""
import importlib.machinery as machinery
real = machinery.PathFinder.find_spec
def hidden(cls, name, path=None, target=None):
    return None if name.split(".")[0] in ("tensorflow", "keras") else real(name, path, target)
machinery.PathFinder.find_spec = classmethod(hidden)
import sys
from input_pipeline import datasets
from mtl_sparse.jobs import train
from tests.conftest import tiny, tiny_faces
config = tiny("")
config.data.embedded.update(frames=24, folder={str(tmp_path / "data")!r})
config.train.epochs = 1
config.tasks = ("depth",)
train.train(config, {str(tmp_path / "run")!r})
config = tiny_faces("").data
config.embedded.update(frames=20, height=32, width=32, folder={str(tmp_path / "data")!r})
assert datasets.load(config).train[0]["segmentation"].shape == (32, 32, 1)
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "results.json").exists() and list((tmp_path / "run").glob("events.out.tfevents.*"))
    assert len(list(tmp_path.rglob("dataset_info.json"))) == 2


def test_training_on_prepared_data_does_not_need_the_folder(rooms):
    config = tiny("nowhere").data
    config.prepared = f"{rooms}.tfds"
    data = datasets.load(config)
    assert data.fingerprint == load(rooms).fingerprint and data.names == load(rooms).names


def test_labels_are_stored_as_small_png_files_without_loss():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (37, 53, 1), dtype=np.uint8)
    label = np.repeat(np.repeat(rng.integers(0, 41, (30, 40, 1), dtype=np.uint8), 16, 0), 16, 1)
    for pixels in (noise, label):
        stored = folders.encode_png(pixels)
        assert stored[:8] == b"\x89PNG\r\n\x1a\n"
        read = cv2.imdecode(np.frombuffer(stored, np.uint8), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(read, pixels[..., 0])
    pillow = io.BytesIO()
    Image.fromarray(label[..., 0]).save(pillow, "PNG")
    assert len(stored) < 1.05 * len(pillow.getvalue()), "OpenCV's own choice is faster, and half as large again"


def test_data_that_tensorflow_encoded_read_the_same(own_rooms, monkeypatch, tmp_path):
    """As versions before 2026-11-27 prepared them: the builder has the same version and features."""
    pytest.importorskip("tensorflow", reason="extra 'tensorflow'")
    now = load(own_rooms)
    monkeypatch.setattr(folders, "encode_png", lambda pixels: pixels)
    config = tiny(own_rooms).data
    config.prepared = str(tmp_path / "earlier.tfds")
    earlier = datasets.load(config)
    assert (earlier.fingerprint, earlier.names) == (now.fingerprint, now.names)
    for before, after in zip(earlier.test, now.test, strict=True):
        for key in before:
            np.testing.assert_array_equal(before[key], after[key])
    (one, two) = (
        (folder / "nyud_mt" / "1.0.0" / "features.json").read_text()
        for folder in (tmp_path / "earlier.tfds", own_rooms.with_name("NYUD_MT.tfds"))
    )
    assert one == two


def damage_segmentation(folder, change):
    path = folder / "segmentation" / "00003.png"
    cv2.imwrite(str(path), change(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))


def set_class_41(label):
    label[2, 3] = 41
    return label


def png_that_claims(width, height):
    """Return a PNG of a few bytes whose header claims this size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def claim_shape(path, shape):
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


UPSIDE_DOWN = Image.Exif()
UPSIDE_DOWN[ExifTags.Base.Orientation] = 3

BAD_FOLDERS = {
    "no data folder": (
        lambda folder: folder.rename(folder.with_name("moved")),
        "DATA_FOLDER_MISSING",
        "config.data.folder",
    ),
    "no list": (lambda folder: (folder / "gt_sets" / "val.txt").unlink(), "FILE_MISSING", "gt_sets/val.txt"),
    "empty list": (
        lambda folder: (folder / "gt_sets" / "val.txt").write_text("\n"),
        "DATA_SPLIT_INVALID",
        "gt_sets/val.txt",
    ),
    "sample in two lists": (
        lambda folder: (folder / "gt_sets" / "val.txt").write_text("00003\n"),
        "DATA_SPLIT_INVALID",
        "sample 00003",
    ),
    "missing file": (lambda folder: (folder / "depth" / "00003.npy").unlink(), "FILE_MISSING", "depth/00003.npy"),
    "unreadable image": (
        lambda folder: (folder / "images" / "00003.jpg").write_bytes(b"\xff\xd8 no image"),
        "DATA_IMAGE_DAMAGED",
        "images/00003.jpg",
    ),
    "truncated image": (
        lambda folder: (folder / "images" / "00003.jpg").write_bytes(
            (folder / "images" / "00003.jpg").read_bytes()[:700]
        ),
        "DATA_IMAGE_DAMAGED",
        "images/00003.jpg",
    ),
    "edges out of range": (
        lambda folder: np.save(folder / "edge" / "00003.npy", np.full((32, 48), np.nan, np.float32)),
        "DATA_LABEL_OUT_OF_RANGE",
        "edge/00003.npy",
    ),
    "unreadable label": (
        lambda folder: (folder / "segmentation" / "00003.png").write_bytes(b"no png"),
        "DATA_IMAGE_DAMAGED",
        "segmentation/00003.png",
    ),
    "truncated array": (
        lambda folder: (folder / "normals" / "00003.npy").write_bytes(
            (folder / "normals" / "00003.npy").read_bytes()[:200]
        ),
        "DATA_LABEL_DAMAGED",
        "normals/00003.npy",
    ),
    "image that claims too many pixels": (
        lambda folder: (folder / "segmentation" / "00003.png").write_bytes(png_that_claims(30_000, 30_000)),
        "DATA_IMAGE_TOO_LARGE",
        "segmentation/00003.png",
    ),
    "array that claims a terabyte": (
        lambda folder: claim_shape(folder / "depth" / "00003.npy", (500_000, 500_000)),
        "DATA_LABEL_DAMAGED",
        "depth/00003.npy",
    ),
    "array of words": (
        lambda folder: np.save(folder / "edge" / "00003.npy", np.full((32, 48), "edge")),
        "DATA_LABEL_FORMAT",
        "edge/00003.npy",
    ),
    "pickled array": (
        lambda folder: np.save(folder / "edge" / "00003.npy", np.array([{}]), allow_pickle=True),
        "DATA_LABEL_DAMAGED",
        "edge/00003.npy",
    ),
    "label of another shape": (
        lambda folder: np.save(folder / "depth" / "00003.npy", np.ones((31, 48), np.float32)),
        "DATA_LABEL_FORMAT",
        "depth/00003.npy",
    ),
    "segmentation of another shape": (
        lambda folder: damage_segmentation(folder, lambda label: label[:, 1:]),
        "DATA_LABEL_FORMAT",
        "segmentation/00003.png",
    ),
    "image with an alpha channel": (
        lambda folder: Image.new("RGBA", (48, 32)).save(folder / "images" / "00003.jpg", "PNG"),
        "DATA_IMAGE_FORMAT",
        "images/00003.jpg",
    ),
    "image of 16 bits": (
        lambda folder: Image.new("I;16", (48, 32)).save(folder / "images" / "00003.jpg", "PNG"),
        "DATA_IMAGE_FORMAT",
        "images/00003.jpg",
    ),
    "image that EXIF rotates": (
        lambda folder: Image.new("RGB", (48, 32)).save(folder / "images" / "00003.jpg", exif=UPSIDE_DOWN),
        "DATA_IMAGE_FORMAT",
        "EXIF orientation 3",
    ),
    "class out of range": (
        lambda folder: damage_segmentation(folder, set_class_41),
        "DATA_LABEL_OUT_OF_RANGE",
        "segmentation/00003.png",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_named(own_rooms, case):
    damage, code, naming = BAD_FOLDERS[case]
    damage(own_rooms)
    with raises(code, naming=naming):
        load(own_rooms)
    prepared = own_rooms.with_name("NYUD_MT.tfds") / "nyud_mt" / "1.0.0"
    assert not prepared.exists(), "no incomplete data are left for training"


def test_a_folder_that_changed_since_it_was_prepared_is_refused(own_rooms):
    load(own_rooms)
    depth = np.load(own_rooms / "depth" / "00003.npy")
    np.save(own_rooms / "depth" / "00003.npy", depth + 1)
    with raises("DATA_CHANGED", naming=f"{own_rooms}.tfds"):
        load(own_rooms)
    np.save(own_rooms / "depth" / "00003.npy", depth)
    load(own_rooms)
    names = (own_rooms / "gt_sets" / "train.txt").read_text().split()
    (own_rooms / "gt_sets" / "train.txt").write_text("\n".join(names[:-1]))
    with raises("DATA_CHANGED", naming=f"{own_rooms}.tfds"):
        load(own_rooms)


def test_unknown_data_set_and_no_folder_are_named(rooms):
    config = tiny(rooms)
    config.data.name = "cityscapes"
    with raises("OPTION_UNKNOWN_VALUE", naming="config.data.name='cityscapes'") as caught:
        datasets.load(config.data)
    assert "nyud_mt" in str(caught.value)
    config = tiny(rooms)
    config.data.embedded.frames = 10
    with raises("OPTION_CONFLICT", naming="--config.data.embedded.frames=0"):
        datasets.load(config.data)
    config = tiny("")
    with raises("OPTION_MISSING", naming="config.data.folder"):
        datasets.load(config.data)


def numbered(folder, train, val=("9999",)):
    (folder / "gt_sets").mkdir(parents=True, exist_ok=True)
    for key, names in (("train", train), ("val", val)):
        (folder / "gt_sets" / f"{key}.txt").write_text("\n".join(names))
    return folder


def test_whole_scenes_are_held_out_if_the_numbers_show_them(tmp_path):
    """Scenes of two to five samples with gaps between them, as the official test samples leave them."""
    rng, numbers, start = np.random.default_rng(0), [], 1
    for _ in range(60):
        length = int(rng.integers(2, 6))
        numbers.append(range(start, start + length))
        start += length + 1
    names = [f"{number:04d}" for scene in numbers for number in scene]
    splits = nyud_mt.read_splits(numbered(tmp_path / "scenes", names), "scenes")
    assert sorted(splits["train"] + splits["validation"]) == names
    assert 0.1 * len(names) <= len(splits["validation"]) < 0.1 * len(names) + 5
    for scene in numbers:
        inside = {f"{number:04d}" in splits["validation"] for number in scene}
        assert len(inside) == 1, "no scene is in both"
    single = nyud_mt.read_splits(tmp_path / "scenes")["validation"]
    assert len(single) == round(0.1 * len(names)) and single != splits["validation"]


@pytest.mark.parametrize("names", [[f"{i:04d}" for i in range(1, 41)], [f"room{i}" for i in range(40)]])
def test_names_that_show_no_scenes_are_held_out_one_by_one(tmp_path, names):
    folder = numbered(tmp_path / "names", names)
    assert nyud_mt.read_splits(folder, "scenes") == nyud_mt.read_splits(folder)


def test_prepared_data_of_another_split_are_refused_without_their_folder(own_rooms):
    config = tiny(own_rooms).data
    config.split = "scenes"
    datasets.load(config)
    prepared = str(own_rooms.with_name("NYUD_MT.tfds"))
    config.update(folder="", prepared=prepared)
    assert len(datasets.load(config).train) == 18
    config.split = ""
    with raises("DATA_SPLIT_DIFFERS", naming="config.data.split=''"):
        datasets.load(config)


def test_a_jpeg_is_read_with_bytes_after_its_end_and_refused_if_truncated(own_rooms):
    """Cameras append previews. A truncated file has no end marker, or only that of a preview in its header."""
    path = own_rooms / "images" / "00003.jpg"
    whole = path.read_bytes()
    want = nyud_mt.folders.read_photo(path, "")
    for behind in (b"\0" * 9000, whole[:500], whole):
        path.write_bytes(whole + behind)
        np.testing.assert_array_equal(nyud_mt.folders.read_photo(path, ""), want)
    exif = b"Exif\0\0 thumbnail \xff\xd9"
    header = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    for cut in (0.3, 0.6, 0.9, 0.99):
        path.write_bytes(whole[:2] + header + whole[2 : int(cut * len(whole))])
        with raises("DATA_IMAGE_DAMAGED", naming="images/00003.jpg"):
            nyud_mt.folders.read_photo(path, "")
