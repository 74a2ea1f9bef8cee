"""Real images, if they are there, in `../shared/data` beside the project. They are never part of the repository."""

import importlib.util
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from input_pipeline import datasets
from mtl_sparse.jobs import train
from tests.conftest import tiny, tiny_faces

SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"
pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not (SHARED / "nyuv2_320x240.tar").exists(), reason="the real images are not here"),
]


@pytest.fixture(scope="module")
def expand():
    spec = importlib.util.spec_from_file_location("expand", SHARED / "expand.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def celeb(expand, tmp_path_factory):
    """Return a CelebAMask-HQ folder of the 133 real faces."""
    return expand.expand_celeb(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def nyu(expand, tmp_path_factory):
    """Return an NYUD_MT folder of 20 real training and 6 test images, in the layout of `expand.py`."""
    root = tmp_path_factory.mktemp("real") / "NYUD_MT"
    for kind in ("images", "segmentation", "depth", "normals", "edge", "gt_sets"):
        (root / kind).mkdir(parents=True)
    with tarfile.open(SHARED / "nyuv2_320x240.tar") as archive:
        for split, count in (("train", 20), ("val", 6)):
            names = archive.extractfile(f"{split}.txt").read().decode().split()[:count]
            (root / "gt_sets" / f"{split}.txt").write_text("\n".join(names))
            for name in names:
                image = archive.extractfile(f"rgb/{name}.jpg").read()
                (root / "images" / f"{name}.jpg").write_bytes(image)
                label = expand.read_png(archive, f"label40/{name}.png")
                label[label == 40] = 0
                Image.fromarray(label).save(root / "segmentation" / f"{name}.png")
                depth = expand.metres(expand.read_png(archive, f"depth/{name}.png"))
                np.save(root / "depth" / f"{name}.npy", depth)
                np.save(root / "normals" / f"{name}.npy", expand.normals_from_depth(depth))
                np.save(root / "edge" / f"{name}.npy", expand.boundaries(label))
    return root


def test_real_images_load_and_train(nyu, tmp_path):
    config = tiny(nyu)
    config.tasks = ("segmentation", "normals")
    config.data.flip, config.data.max_scale = True, 1.5
    results = train.train(config, tmp_path)
    assert results["frames"] == {"train": 18, "validation": 2, "test": 6}
    assert all(np.isfinite(value) for value in results["test"].values())


def test_real_labels_are_in_the_documented_units(nyu):
    sample = datasets.load(tiny(nyu).data).test[0]
    assert sample["image"].shape == (240, 320, 3)
    assert sample["depth"].min() > 0.3 and sample["depth"].max() < 10.1
    np.testing.assert_allclose(np.linalg.norm(sample["normals"], axis=-1), 1, atol=1e-4)
    assert set(np.unique(sample["segmentation"])) <= set(range(40))
    # floors face up (y points down) and walls are upright
    floor = sample["segmentation"][..., 0] == 2
    assert floor.sum() == 0 or sample["normals"][floor][:, 1].mean() < -0.5


def test_real_faces_load_and_train(celeb, expand, tmp_path):
    config = tiny_faces(celeb)
    config.tasks = ("segmentation", "attribute:Smiling")
    config.data.update(flip=True, max_scale=1.2)
    config.train.update(batch_size=16, epochs=1)
    results = train.train(config, tmp_path)
    assert results["frames"] == {"train": 80, "validation": 26, "test": 27}
    assert all(np.isfinite(value) for value in results["test"].values())
    assert results["test"]["segmentation/miou"] > 0.1

    data = datasets.load(config.data)
    rows = {line.split()[0]: line.split()[1:] for line in (celeb / "CelebAMask-HQ-attribute-anno.txt").open()}
    column = rows["5_o_Clock_Shadow"].index("Smiling") + 1  # the header's first name is its key here
    with tarfile.open(SHARED / "celebamask_hq_133.tar") as archive:
        for name, face in zip(data.names["test"], data.test, strict=True):
            assert face["image"].shape == (512, 512, 3)
            assert face["attribute:Smiling"] == (rows[f"{name}.jpg"][column] == "1")
            whole = expand.read_png(archive, f"masks/{name}.png")
            np.testing.assert_array_equal(face["segmentation"][..., 0] == 3, whole == expand.PARTS.index("hair"))
            skin = [expand.PARTS.index(part) for part in dict(config.data.classes)["skin"]]
            np.testing.assert_array_equal(face["segmentation"][..., 0] == 2, np.isin(whole, skin))
