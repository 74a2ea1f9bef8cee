import json
import shutil

import cv2
import numpy as np
import pytest

from configs import demo_faces
from input_pipeline import celebamask_hq, datasets, folders
from input_pipeline.celebamask_hq import ATTRIBUTE_FILE, ATTRIBUTES, PARTS
from input_pipeline.transforms import Transform
from mtl_sparse.runtime.errors import UserError
from tests.conftest import tiny_faces

PAPER = ("background", "skin", "hair")


def load(folder, labels=("segmentation",), **settings):
    config = tiny_faces(folder).data
    config.update(**settings)
    return datasets.load(config, labels)


@pytest.fixture
def own_faces(faces, tmp_path):
    """A copy of the folder that a test may damage, not prepared."""
    return shutil.copytree(faces, tmp_path / "CelebAMask-HQ")


def test_the_split_is_60_20_20_and_the_same_every_time(faces):
    data = load(faces)
    assert {split: len(names) for split, names in data.names.items()} == {"train": 12, "validation": 4, "test": 4}
    assert [len(source) for source in (data.train, data.validation, data.test)] == [12, 4, 4]
    together = sum(data.names.values(), [])
    assert sorted(together, key=int) == [str(i) for i in range(20)]
    assert data.names["train"] != [str(i) for i in range(12)], "drawn, not cut"
    assert celebamask_hq.read_splits(faces) == data.names


def test_drawn_splits_have_the_fractions_for_any_number():
    for count in (5, 133, 30000):
        parts = folders.draw_splits([str(i) for i in range(count)], celebamask_hq.FRACTIONS, 0)
        assert [len(part) for part in parts] == [round(0.6 * count), round(0.8 * count) - round(0.6 * count),
                                                 count - round(0.8 * count)]  # fmt: skip
        assert len(set(sum(parts, []))) == count


def test_lists_of_ones_own(faces, tmp_path):
    path = tmp_path / "lists.json"
    path.write_text(json.dumps({"train": [3, 1, 2], "validation": ["7"], "test": [11, 5]}))
    data = load(faces, split=str(path), prepared=str(tmp_path / "prepared"))
    assert data.names == {"train": ["3", "1", "2"], "validation": ["7"], "test": ["11", "5"]}
    assert [data.test[i]["image"].shape for i in range(2)] == [(32, 32, 3)] * 2
    row = celebamask_hq.read_attributes(faces)["11"]
    assert [data.test[0][f"attribute:{name}"] for name in ATTRIBUTES] == row.tolist()
    with pytest.raises(UserError, match="has changed since .*prepared .*another config.data.prepared"):
        load(faces, prepared=str(tmp_path / "prepared"))
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"train": [3, 1], "validation": ["7"], "test": [11, 5]}))
    for split in ("", str(other)):
        with pytest.raises(UserError, match=f"prepared with other lists than those of config.data.split='{split}'"):
            load("", split=split, prepared=str(tmp_path / "prepared"))
    assert load("", split=str(path), prepared=str(tmp_path / "prepared")).names == data.names


def test_faces_are_the_folders(faces):
    data = load(faces)
    lines = (faces / ATTRIBUTE_FILE).read_text().splitlines()
    header = lines[1].split()
    for index, name in enumerate(data.names["train"]):
        frame = data.train[index]
        image = cv2.imread(str(faces / "CelebA-HQ-img" / f"{name}.jpg"))[..., ::-1]
        assert np.abs(frame["image"].astype(int) - image).max() <= 3, "up to the JPEG decoder"
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
    """As published: images 1024x1024, masks 512x512. A zoom takes the same window of both."""
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
    "no folder": (lambda folder: folder.rename(folder.with_name("gone")), "does not exist.*config.data.folder"),
    "no attributes": (lambda folder: (folder / ATTRIBUTE_FILE).unlink(), "attribute-anno.txt is missing"),
    "attribute file cut short": (
        lambda folder: rewrite(folder, lambda lines: lines[:9]),
        "rows of 7 faces, its first line says 20",
    ),
    "row cut short": (
        lambda folder: rewrite(folder, lambda lines: [*lines[:-1], lines[-1][:-9]]),
        r"the row of 19.jpg has \d+ of 40 values",
    ),
    "no header": (
        lambda folder: rewrite(folder, lambda lines: lines[:1] + lines[2:]),
        "must begin with the number of faces and a line of the 40 attributes' names",
    ),
    "strange value": (
        lambda folder: rewrite(folder, lambda lines: [*lines[:-1], lines[-1].replace("-1", "0", 1)]),
        "row of 19.jpg has values other than -1 and 1",
    ),
    "no row": (
        lambda folder: rewrite(folder, lambda lines: ["19", *lines[1:5], *lines[6:]]),
        "CelebA-HQ-img/3.jpg has no row",
    ),
    "no image": (lambda folder: (folder / "CelebA-HQ-img" / "3.jpg").unlink(), "CelebA-HQ-img/3.jpg is missing"),
    "no masks": (lambda folder: [path.unlink() for path in mask(folder).parent.glob("00003_*")], "no part of face 3"),
    "image cut short": (
        lambda folder: (folder / "CelebA-HQ-img" / "3.jpg").write_bytes(
            (folder / "CelebA-HQ-img" / "3.jpg").read_bytes()[:500]
        ),
        "CelebA-HQ-img/3.jpg cannot be decoded",
    ),
    "unreadable mask": (lambda folder: mask(folder).write_bytes(b"no png"), "00003_skin.png cannot be decoded"),
    "mask of ones": (
        lambda folder: cv2.imwrite(str(mask(folder)), np.ones((32, 32), np.uint8)),
        "00003_skin.png has no value above 1; a part's pixels are 255",
    ),
    "mask of another size": (
        lambda folder: cv2.imwrite(str(mask(folder, "mouth")), np.zeros((16, 16), np.uint8)),
        "00003_mouth.png has size 16x16.*other masks",
    ),
    "masks that do not divide the image": (
        lambda folder: [cv2.imwrite(str(path), np.zeros((20, 32), np.uint8)) for path in mask(folder).parent.iterdir()],
        r"size 20x32.*image \(32x32\)",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_named(own_faces, case):
    damage, message = BAD_FOLDERS[case]
    damage(own_faces)
    with pytest.raises(UserError, match=message) as caught:
        load(own_faces)
    assert "\n" not in str(caught.value)
    assert not (own_faces.with_name("CelebAMask-HQ.tfds") / "celebamask_hq" / "1.0.0").exists()


def test_a_folder_that_changed_since_it_was_prepared_is_refused(own_faces):
    load(own_faces)
    mask(own_faces, "nose").unlink()
    with pytest.raises(UserError, match="has changed since .*CelebAMask-HQ.tfds.* delete"):
        load(own_faces)


BAD_LISTS = {
    "does not exist": None,
    "is not JSON": "train: 1",
    "cannot be read .Is a directory": "",
    "three lists train, validation, test": '{"train": [1], "val": [2], "test": [3]}',
    "list test is empty": '{"train": [1], "validation": [2], "test": []}',
    "frame 1 stands in it twice": '{"train": [1], "validation": [1], "test": [3]}',
    "names frame 99, which the data set lacks": '{"train": [1], "validation": [99], "test": [3]}',
}


@pytest.mark.parametrize("message", BAD_LISTS)
def test_bad_lists_are_named(faces, tmp_path, message):
    path = tmp_path / "lists.json"
    if BAD_LISTS[message]:
        path.write_text(BAD_LISTS[message])
    elif BAD_LISTS[message] == "":
        path.mkdir()
    with pytest.raises(UserError, match=message):
        load(faces, split=str(path))


BAD_CLASSES = {
    "holds 'skin'; it takes pairs": dict(classes=("skin", "hair")),
    "unknown part 'nase' of skin": dict(classes=(("rest", ()), ("skin", ("nase",)))),
    "'nose' stands in skin and in hair": dict(classes=(("rest", ()), ("skin", ("nose",)), ("hair", ("nose",)))),
    "classes is empty": dict(classes=()),
    "tells l_eye from r_eye": dict(classes=(("rest", ()), ("left", ("l_eye",))), num_classes=2, flip=True),
    "num_classes=40.* 3 classes": dict(num_classes=40),
}


@pytest.mark.parametrize("message", BAD_CLASSES)
def test_bad_classes_are_named(faces, message):
    with pytest.raises(UserError, match=message):
        load(faces, **BAD_CLASSES[message])


def test_unknown_attributes_are_refused_with_the_nearest_before_anything_is_prepared(own_faces):
    for label, near in (("attribute:Smile", "attribute:Smiling"), ("attribute:Eye_glasses", "attribute:Eyeglasses")):
        with pytest.raises(UserError, match=f"{label}.*nearest: .*{near}"):
            load(own_faces, ["segmentation", label])
    with pytest.raises(UserError, match="'depth', which config.data.name='celebamask_hq' does not have"):
        load(own_faces, ["depth"])
    assert not own_faces.with_name("CelebAMask-HQ.tfds").exists()


def test_the_papers_classes_and_all_forty_attributes():
    config = demo_faces.get_config().data
    assert celebamask_hq.classes(config) == PAPER
    named = [part for _, parts in config.classes for part in parts]
    assert set(PARTS) - set(named) == {"hat", "ear_r", "neck_l", "neck", "cloth"}
    assert len(set(ATTRIBUTES)) == 40 and len(celebamask_hq.LABELS) == 41
