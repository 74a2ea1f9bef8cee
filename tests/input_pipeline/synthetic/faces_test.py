"""The drawn images agree with the masks and attributes."""

import cv2
import numpy as np
import pytest

from input_pipeline import celebamask_hq
from input_pipeline.celebamask_hq import ATTRIBUTES, PARTS
from input_pipeline.synthetic import faces

SIDE = 96


def face(seed):
    return faces.random_face(np.random.default_rng((7, seed)))


def drawn(one):
    return faces.draw(one, SIDE, SIDE, np.random.default_rng(0))


@pytest.fixture(scope="module")
def many():
    return [(one, *drawn(one)) for one in map(face, range(60))]


def has_part(parts, *names):
    return any((parts == 1 + PARTS.index(name)).any() for name in names)


@pytest.mark.parametrize(
    "attribute, parts",
    [("Eyeglasses", ["eye_g"]), ("Wearing_Hat", ["hat"]), ("Wearing_Necklace", ["neck_l"]), ("Bald", ["hair"])],
)
def test_an_attribute_shows_as_its_part(many, attribute, parts):
    present = [has_part(found, *parts) == (attribute in one.true) for one, _, found in many]
    if attribute == "Bald":
        assert not any(present), "hair exactly if the head is not bald"
    else:
        assert all(present)
    assert 0 < sum(attribute in one.true for one, _, _ in many) < len(many)


def test_a_smile_has_its_corners_above_the_middle_of_the_mouth(many):
    for one, _, parts in many:
        x, y = faces._head_coordinates(one, SIDE, SIDE)
        mouth = np.isin(parts, [1 + PARTS.index(name) for name in ("mouth", "u_lip", "l_lip")])
        side = np.abs(x)[mouth]
        corners, middle = y[mouth][side > 0.17].mean(), y[mouth][side < 0.06].mean()
        assert (corners < middle - 0.03) == ("Smiling" in one.true)


def test_an_open_mouth_shows_its_inside(many):
    for one, _, parts in many:
        assert has_part(parts, "mouth") == ("Mouth_Slightly_Open" in one.true)


def test_hair_has_the_color_of_its_attribute(many):
    tones = {"Black_Hair": [], "Blond_Hair": [], "Gray_Hair": []}
    for one, image, parts in many:
        for name in tones.keys() & one.true:
            tones[name].append(image[parts == 1 + PARTS.index("hair")].mean(0))
    black, blond, gray = (np.mean(tones[name], 0) for name in tones)
    assert black.max() < 60 < gray.min() and np.ptp(gray) < 10
    assert blond[0] > blond[2] + 50


def test_labels_are_those_of_the_pixel_centers():
    """An image of three times the resolution has the same labels at the centers of the coarse pixels."""
    one = face(3)
    _, coarse = drawn(one)
    _, fine = faces.draw(one, 3 * SIDE, 3 * SIDE, np.random.default_rng(0))
    np.testing.assert_array_equal(fine[1::3, 1::3], coarse)


def test_attributes_exclude_one_another_and_are_the_published_ones():
    for seed in range(300):
        true = face(seed).true
        assert true <= set(ATTRIBUTES)
        assert len(true & {"Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair"}) == ("Bald" not in true)
        assert ("No_Beard" in true) == (not true & {"Mustache", "Goatee"})
        assert "Male" in true or not true & {"Bald", "Mustache", "Goatee"}


def test_folder_has_the_official_layout_and_is_drawn_once(tmp_path):
    folder = faces.draw_folder(12, 40, 48, seed=5, folder=str(tmp_path))
    attributes = celebamask_hq.read_attributes(folder)
    assert list(attributes) == [str(index) for index in range(12)]
    for index in range(12):
        one = faces.random_face(np.random.default_rng((5, index)))
        assert {name for name, value in zip(ATTRIBUTES, attributes[str(index)], strict=True) if value} == one.true
        image, parts = faces.draw(one, 40, 48, np.random.default_rng((5, index, 1)))
        read = celebamask_hq.read_face(folder, str(index))
        np.testing.assert_array_equal(read["parts"][..., 0], parts)
        assert np.abs(cv2.imread(read["image"])[..., ::-1].astype(int) - image).mean() < 10, "up to the JPEG encoder"
    before = (folder / "CelebA-HQ-img" / "0.jpg").stat().st_mtime_ns
    assert faces.draw_folder(12, 40, 48, seed=5, folder=str(tmp_path)) == folder
    assert (folder / "CelebA-HQ-img" / "0.jpg").stat().st_mtime_ns == before
