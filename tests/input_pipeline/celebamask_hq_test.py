import itertools
import json
import shutil

import cv2
import numpy as np
import pytest

from configs import demo_faces
from input_pipeline import celebamask_hq, datasets, folders
from input_pipeline.celebamask_hq import ATTRIBUTE_FILE, ATTRIBUTES, PARTS
from input_pipeline.transforms import Transform
from tests.conftest import raises, tiny_faces

PAPER = ("background", "skin", "hair")


def load(folder, labels=("segmentation",), **settings):
    config = tiny_faces(folder).data
    config.update(**settings)
    return datasets.load(config, labels)


@pytest.fixture
def own_faces(faces, tmp_path):
    """Return a copy of the folder, not prepared, that a test may damage."""
    return shutil.copytree(faces, tmp_path / "CelebAMask-HQ")


def test_the_split_is_60_20_20_and_the_same_every_time(faces):
    data = load(faces)
    assert {split: len(names) for split, names in data.names.items()} == {"train": 12, "validation": 4, "test": 4}
    assert [len(source) for source in (data.train, data.validation, data.test)] == [12, 4, 4]
    together = list(itertools.chain(*data.names.values()))
    assert sorted(together, key=int) == [str(i) for i in range(20)]
    assert data.names["train"] != [str(i) for i in range(12)], "drawn, not cut"
    assert celebamask_hq.read_splits(faces) == data.names


def test_drawn_splits_have_the_fractions_for_any_number():
    for count in (5, 133, 30000):
        parts = folders.draw_splits([str(i) for i in range(count)], celebamask_hq.FRACTIONS, 0)
        assert [len(part) for part in parts] == [round(0.6 * count), round(0.8 * count) - round(0.6 * count),
                                                 count - round(0.8 * count)]  # fmt: skip
        assert len(set(itertools.chain(*parts))) == count


def test_splits_from_a_file(faces, tmp_path):
    path = tmp_path / "lists.json"
    path.write_text(json.dumps({"train": [3, 1, 2], "validation": ["7"], "test": [11, 5]}))
    data = load(faces, split=str(path), prepared=str(tmp_path / "prepared"))
    assert data.names == {"train": ["3", "1", "2"], "validation": ["7"], "test": ["11", "5"]}
    assert [data.test[i]["image"].shape for i in range(2)] == [(32, 32, 3)] * 2
    row = celebamask_hq.read_attributes(faces)["11"]
    assert [data.test[0][f"attribute:{name}"] for name in ATTRIBUTES] == row.tolist()
    with raises("DATA_CHANGED", naming=str(tmp_path / "prepared")):
        load(faces, prepared=str(tmp_path / "prepared"))
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"train": [3, 1], "validation": ["7"], "test": [11, 5]}))
    for split in ("", str(other)):
        with raises("DATA_SPLIT_DIFFERS", naming=f"config.data.split='{split}'"):
            load("", split=split, prepared=str(tmp_path / "prepared"))
    assert load("", split=str(path), prepared=str(tmp_path / "prepared")).names == data.names


def test_stored_faces_equal_the_folder(faces):
    data = load(faces)
    lines = (faces / ATTRIBUTE_FILE).read_text().splitlines()
    header = lines[1].split()
    for index, name in enumerate(data.names["train"]):
        frame = data.train[index]
        image = cv2.imread(str(faces / "CelebA-HQ-img" / f"{name}.jpg"))[..., ::-1]
        np.testing.assert_array_equal(frame["image"], image)
        masks = {
            part: cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127
            for part in PARTS
            if (path := faces / "CelebAMask-HQ-mask-anno" / "0" / f"{int(name):05d}_{part}.png").exists()
        }
        expected = np.ones((32, 32), int)
        for part, mask in masks.items():  # drawn masks do not overlap
            expected[mask] = 3 if part == "hair" else 1 if part in ("neck", "cloth", "hat", "neck_l", "ear_r") else 2
        np.testing.assert_array_equal(frame["segmentation"][..., 0], expected)
        (row,) = [line.split() for line in lines if line.startswith(f"{name}.jpg ")]
        for attribute, value in zip(header, row[1:], strict=True):
            assert frame[f"attribute:{attribute}"] == (value == "1")


def test_parts_are_painted_in_the_official_order(own_faces):
    folder = own_faces / "CelebAMask-HQ-mask-anno" / "0"
    for path in folder.glob("00003_*"):
        path.unlink()
    for part, columns in (("hat", slice(20, 32)), ("hair", slice(10, 24)), ("skin", slice(0, 16))):
        mask = np.zeros((32, 32), np.uint8)
        mask[:, columns] = 255
        cv2.imwrite(str(folder / f"00003_{part}.png"), mask)
    parts = celebamask_hq.read_face(own_faces, "3")["parts"][..., 0]
    assert [PARTS[i - 1] for i in parts[0, [5, 12, 22, 30]]] == ["skin", "hair", "hat", "hat"]


def test_other_classes_need_no_new_preparation(faces):
    load(faces)
    classes = (("rest", ()), ("eyes", ("l_eye", "r_eye")))
    frame = load(faces, classes=classes, num_classes=2).train[0]
    name = load(faces).names["train"][0]
    stored = celebamask_hq.read_face(faces, name)["parts"]
    eyes = np.isin(stored, [1 + PARTS.index("l_eye"), 1 + PARTS.index("r_eye")])
    assert eyes.any()
    np.testing.assert_array_equal(frame["segmentation"], 1 + eyes)


def test_an_image_may_be_finer_than_its_masks(own_faces):
    """Published images are 1024x1024 and masks 512x512. A zoom crops the same window of both."""
    path = own_faces / "CelebA-HQ-img" / "3.jpg"
    image = np.zeros((64, 64, 3), np.uint8)
    image[16:48, 32:] = 255
    cv2.imwrite(str(path), image)
    for mask in (own_faces / "CelebAMask-HQ-mask-anno" / "0").glob("00003_*"):
        mask.unlink()
    cv2.imwrite(str(own_faces / "CelebAMask-HQ-mask-anno" / "0" / "00003_hair.png"), image[::2, ::2, 0])
    data = load(own_faces)
    split, names = next((split, names) for split, names in data.names.items() if "3" in names)
    frame = getattr(data, split)[names.index("3")]
    assert (frame["image"].shape, frame["segmentation"].shape) == ((64, 64, 3), (32, 32, 1))
    for seed in range(5):
        example = Transform((32, 32), ("segmentation",), flip=True, max_scale=2.0)(frame, np.random.default_rng(seed))
        bright = example["image"].mean(-1) > 0
        assert 0.1 < bright.mean() < 0.9
        assert ((example["segmentation"] == 2) == bright).mean() > 0.93, "up to the border's interpolation"


def rewrite(folder, change):
    path = folder / ATTRIBUTE_FILE
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def mask(folder, part="skin"):
    return folder / "CelebAMask-HQ-mask-anno" / "0" / f"00003_{part}.png"


BAD_FOLDERS = {
    "no folder": (
        lambda folder: folder.rename(folder.with_name("moved")),
        "DATA_FOLDER_MISSING",
        "config.data.folder",
    ),
    "no attributes": (lambda folder: (folder / ATTRIBUTE_FILE).unlink(), "FILE_MISSING", ATTRIBUTE_FILE),
    "truncated attribute file": (
        lambda folder: rewrite(folder, lambda lines: lines[:9]),
        "FILE_DAMAGED",
        ATTRIBUTE_FILE,
    ),
    "truncated line": (
        lambda folder: rewrite(folder, lambda lines: [*lines[:-1], lines[-1][:-9]]),
        "FILE_DAMAGED",
        "19.jpg",
    ),
    "no header": (
        lambda folder: rewrite(folder, lambda lines: lines[:1] + lines[2:]),
        "FILE_DAMAGED",
        ATTRIBUTE_FILE,
    ),
    "strange value": (
        lambda folder: rewrite(folder, lambda lines: [*lines[:-1], lines[-1].replace("-1", "0", 1)]),
        "FILE_DAMAGED",
        "19.jpg",
    ),
    "face listed twice": (
        lambda folder: rewrite(folder, lambda lines: [*lines, lines[-1]]),
        "FILE_DAMAGED",
        "'19.jpg'",
    ),
    "no line": (
        lambda folder: rewrite(folder, lambda lines: ["19", *lines[1:5], *lines[6:]]),
        "DATA_LABEL_MISSING",
        "CelebA-HQ-img/3.jpg",
    ),
    "no image": (
        lambda folder: (folder / "CelebA-HQ-img" / "3.jpg").unlink(),
        "FILE_MISSING",
        "CelebA-HQ-img/3.jpg",
    ),
    "no masks": (
        lambda folder: [path.unlink() for path in mask(folder).parent.glob("00003_*")],
        "DATA_LABEL_MISSING",
        "face 3",
    ),
    "truncated image": (
        lambda folder: (folder / "CelebA-HQ-img" / "3.jpg").write_bytes(
            (folder / "CelebA-HQ-img" / "3.jpg").read_bytes()[:500]
        ),
        "DATA_IMAGE_DAMAGED",
        "CelebA-HQ-img/3.jpg",
    ),
    "unreadable mask": (lambda folder: mask(folder).write_bytes(b"no png"), "DATA_IMAGE_DAMAGED", "00003_skin.png"),
    "mask of ones": (
        lambda folder: cv2.imwrite(str(mask(folder)), np.ones((32, 32), np.uint8)),
        "DATA_LABEL_OUT_OF_RANGE",
        "00003_skin.png",
    ),
    "mask of another size": (
        lambda folder: cv2.imwrite(str(mask(folder, "mouth")), np.zeros((16, 16), np.uint8)),
        "DATA_LABEL_FORMAT",
        "00003_mouth.png",
    ),
    "masks that do not divide the image": (
        lambda folder: [cv2.imwrite(str(path), np.zeros((20, 32), np.uint8)) for path in mask(folder).parent.iterdir()],
        "DATA_LABEL_FORMAT",
        "20x32",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_named(own_faces, case):
    damage, code, naming = BAD_FOLDERS[case]
    damage(own_faces)
    with raises(code, naming=naming) as caught:
        load(own_faces)
    assert "\n" not in str(caught.value)
    assert not (own_faces.with_name("CelebAMask-HQ.tfds") / "celebamask_hq" / "1.0.0").exists()


def test_a_folder_that_changed_since_it_was_prepared_is_refused(own_faces):
    load(own_faces)
    mask(own_faces, "nose").unlink()
    with raises("DATA_CHANGED", naming=f"{own_faces}.tfds"):
        load(own_faces)


BAD_LISTS = {
    "missing": (None, "FILE_MISSING", "lists.json"),
    "no JSON": ("train: 1", "FILE_DAMAGED", "lists.json"),
    "a folder": ("", "FILE_DAMAGED", "lists.json"),
    "other keys": ('{"train": [1], "val": [2], "test": [3]}', "DATA_SPLIT_INVALID", "train, validation, test"),
    "empty list": ('{"train": [1], "validation": [2], "test": []}', "DATA_SPLIT_INVALID", "list test"),
    "a sample twice": ('{"train": [1], "validation": [1], "test": [3]}', "DATA_SPLIT_INVALID", "sample 1"),
    "unknown sample": ('{"train": [1], "validation": [99], "test": [3]}', "DATA_SPLIT_INVALID", "sample 99"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_lists_are_named(faces, tmp_path, case):
    content, code, naming = BAD_LISTS[case]
    path = tmp_path / "lists.json"
    if content:
        path.write_text(content)
    elif content == "":
        path.mkdir()
    with raises(code, naming=naming) as caught:
        load(faces, split=str(path))
    assert f"config.data.split={str(path)!r}" in str(caught.value)


BAD_CLASSES = {
    "names": (dict(classes=("skin", "hair")), "OPTION_TYPE", "'skin'"),
    "unknown part": (dict(classes=(("rest", ()), ("skin", ("nase",)))), "OPTION_UNKNOWN_VALUE", "'nase'"),
    "a part twice": (
        dict(classes=(("rest", ()), ("skin", ("nose",)), ("hair", ("nose",)))),
        "OPTION_CONFLICT",
        "'nose'",
    ),
    "none": (dict(classes=()), "OPTION_MISSING", "config.data.classes"),
    "left and right with mirroring": (
        dict(classes=(("rest", ()), ("left", ("l_eye",))), num_classes=2, flip=True),
        "OPTION_CONFLICT",
        "l_eye",
    ),
    "another number": (dict(num_classes=40), "OPTION_CONFLICT", "config.data.num_classes=40"),
}


@pytest.mark.parametrize("case", BAD_CLASSES)
def test_bad_classes_are_named(faces, case):
    settings, code, naming = BAD_CLASSES[case]
    with raises(code, naming=naming):
        load(faces, **settings)


def test_unknown_attributes_are_refused_with_the_nearest_before_anything_is_prepared(own_faces):
    for label, near in (("attribute:Smile", "attribute:Smiling"), ("attribute:Eye_glasses", "attribute:Eyeglasses")):
        with raises("DATA_LABEL_MISSING", naming=f"'{label}'") as caught:
            load(own_faces, ["segmentation", label])
        assert near in str(caught.value)
    with raises("DATA_LABEL_MISSING", naming="'depth'"):
        load(own_faces, ["depth"])
    assert not own_faces.with_name("CelebAMask-HQ.tfds").exists()


def test_the_papers_classes_and_all_forty_attributes():
    config = demo_faces.get_config().data
    assert celebamask_hq.classes(config) == PAPER
    named = [part for _, parts in config.classes for part in parts]
    assert set(PARTS) - set(named) == {"hat", "ear_r", "neck_l", "neck", "cloth"}
    assert len(set(ATTRIBUTES)) == 40 and len(celebamask_hq.LABELS) == 41
