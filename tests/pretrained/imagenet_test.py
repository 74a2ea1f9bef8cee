"""ImageNet weights as initial weights, against torchvision and timm themselves (imagenet_reference.py)."""

import pathlib

import jax
import numpy as np
import pytest

from input_pipeline.transforms import image_statistics
from mtl_sparse.models import multitask, resnet
from mtl_sparse.pretrained import imagenet
from mtl_sparse.sparsity import groups, projections
from mtl_sparse.sparsity.projections import HoldNorm
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib
from tests.conftest import raises, tiny
from tests.pretrained.reference_test import images, weights_of

PATH = pathlib.Path(__file__).parents[1] / "data" / "imagenet_reference.npz"
SIZES = ((64, 64), (43, 53))
EVERY = 32  # one in so many of the features' channels is stored
REFERENCE = dict(np.load(PATH)) if PATH.exists() else {}
KINDS = {"resnet18": "7x7", "resnet50": "7x7", "resnet18d": "resnet_d", "resnet50d": "resnet_d"}


@pytest.mark.parametrize(
    "network", [pytest.param(x, marks=pytest.mark.slow if x == "resnet50d" else ()) for x in KINDS]
)
def test_features_are_those_of_torchvision_and_timm(network):
    state = weights_of(network, REFERENCE)
    model, variables = imagenet.from_state_dict(state)
    assert (model.depth, model.width, model.stem) == (int(network[6:8]), 64, KINDS[network])
    apply = jax.jit(model.apply)
    for height, width in SIZES:
        features = apply(variables, images(height, width))
        expected = REFERENCE[f"{network}/{height}x{width}"]
        assert features.shape == (*expected.shape[:3], expected.shape[3] * EVERY)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(features[..., ::EVERY], expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    used = [value for name, value in state.items() if not name.startswith("fc.") and "num_batches" not in name]
    leaves = jax.tree.leaves(variables)
    assert len(leaves) == len(used) and sum(leaf.size for leaf in leaves) == sum(value.size for value in used)


@pytest.mark.parametrize(
    ("stem", "depth", "parameters"),
    # As torchvision's resnet18, 50 and 101 and timm's resnet50d have without their layer of 1000 classes.
    [("7x7", 18, 11_176_512), ("7x7", 50, 23_508_032), ("7x7", 101, 42_500_160), ("resnet_d", 50, 23_527_264)],
)
def test_backbones_have_the_published_size(stem, depth, parameters):
    model = resnet.ResNet(depth, stem=stem)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == parameters


def test_a_run_starts_from_a_file(rooms, tmp_path):
    """The backbone, up to its last layer, has the file's weights; the heads and the optimizer start as without it."""
    np.savez(tmp_path / "resnet18.npz", **weights_of("resnet18", REFERENCE))
    config = tiny(rooms)
    config.model.update(depth=18, width=64, stem="7x7", attach=("layer2_1/conv1",) * len(config.tasks))
    plain = state_lib.initial(setup_lib.setup(config))
    config.model.init_from = str(tmp_path / "resnet18.npz")
    state = state_lib.initial(setup_lib.setup(config))
    _, given = imagenet.from_state_dict(weights_of("resnet18", REFERENCE))
    backbone = state.params["model"]["backbone"]
    assert "layer2_1" in backbone and "layer3_0" not in backbone
    for name, layer in backbone.items():
        jax.tree.map(np.testing.assert_array_equal, layer, {key: given["params"][name][key] for key in layer})
        if name in state.batch_stats["backbone"]:
            statistics = state.batch_stats["backbone"][name]
            expected = {key: given["batch_stats"][name][key] for key in statistics}
            jax.tree.map(np.testing.assert_array_equal, statistics, expected)
    heads = [{name: tree for name, tree in s.params["model"].items() if name != "backbone"} for s in (state, plain)]
    jax.tree.map(np.testing.assert_array_equal, *heads)
    assert jax.tree.structure(state) == jax.tree.structure(plain)
    held = projections.held_paths([HoldNorm()], groups.find(state.params), state.params)
    norm = state.opt_state.inner_state.norms[held.index("model/backbone/stem_conv1/kernel")]
    assert float(norm) == pytest.approx(float(np.linalg.norm(backbone["stem_conv1"]["kernel"])), rel=1e-5)


def test_weights_that_do_not_fit(rooms, tmp_path):
    state = weights_of("resnet18", REFERENCE)
    np.savez(tmp_path / "resnet18.npz", **state)
    model = multitask.MultiTaskModel((("depth", "deeplab", 1),), depth=50, stem="7x7")
    with raises("OPTION_CONFLICT", naming="resnet18.npz") as caught:
        imagenet.start(tmp_path / "resnet18.npz", model, {}, image_statistics(unit_range=False))
    assert "--config.model.depth=18" in str(caught.value) and "model.depth=50" in str(caught.value)
    with raises("OPTION_CONFLICT", naming="--config.model.stem=7x7") as caught:
        imagenet.start(
            tmp_path / "resnet18.npz", model.clone(depth=18, stem="deep"), {}, image_statistics(unit_range=False)
        )
    assert "model.stem=deep" in str(caught.value)
    with raises("WEIGHTS_DIFFER", naming="1 unexpected: conv1.bias"):
        imagenet.from_state_dict({**state, "conv1.bias": np.zeros(64)})
    with raises("WEIGHTS_DIFFER", naming="1 missing: params/stem_bn1/scale") as caught:
        imagenet.from_state_dict({name: value for name, value in state.items() if name != "bn1.weight"})
    assert "ResNet-18 of torchvision or timm" in str(caught.value) and ";" not in str(caught.value)
    with raises("WEIGHTS_UNSUPPORTED", naming="[0, 0, 0, 0] basic blocks"):
        imagenet.from_state_dict({"features.0.weight": np.zeros((1, 1, 1, 1))})
    with raises("WEIGHTS_UNSUPPORTED", naming="--job=import"):
        imagenet.from_state_dict({"backbone.stem1.0.weight": np.zeros((1, 1, 1, 1))})
    config = tiny(rooms)
    config.model.stem = "9x9"
    with raises("OPTION_UNKNOWN_VALUE", naming="model.stem=9x9") as caught:
        setup_lib.setup(config)
    assert "deep, 7x7, resnet_d" in str(caught.value)
