"""Backbones other than the ResNet: depthwise convolutions, the registry, and what a run finds in their graph."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from configs import nyu
from mtl_sparse.models import backbones, costs, depthwise, efficientnet, layers, multitask
from mtl_sparse.training import config as config_lib
from mtl_sparse.training import groups as groups_lib
from tests.conftest import raises
from tests.own_backbone import NARROW, ROWS

HEADS = (("segmentation", "deeplab", 3), ("depth", "deeplab", 1))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, row in ROWS.items():
        monkeypatch.setitem(backbones.BACKBONES, name, row)


def config_of(name, **sparsity):
    config = nyu.get_config()
    config.tasks = ("segmentation", "depth")
    config.data.size = (32, 48)
    config.model.update(backbone=name, head_features=4)
    config.sparsity.update(**sparsity)
    return config


@pytest.mark.parametrize(
    ("size", "taps", "stride", "rate"),
    [((8, 12), 3, 1, 1), ((9, 7), 5, 2, 1), ((8, 12), 3, 2, 1), ((6, 9), 5, 1, 4), ((3, 2), 3, 1, 4)],
)
def test_depthwise_convolutions_are_the_plain_ones(size, taps, stride, rate):
    draw = np.random.default_rng(0).normal
    x, kernel = (
        jnp.asarray(draw(size=(2, *size, 5)), jnp.float32),
        jnp.asarray(draw(size=(taps, taps, 1, 5)), jnp.float32),
    )
    options = {"rhs_dilation": (rate, rate), "feature_group_count": 5, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    found, expected = (
        jax.value_and_grad(
            lambda *args, conv=conv: jnp.sum(jnp.sin(conv(*args, (stride, stride), "SAME", **options))), (0, 1)
        )(x, kernel)
        for conv in (depthwise.conv, lax.conv_general_dilated)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    text = str(jax.make_jaxpr(lambda *args: depthwise.conv(*args, (stride, stride), "SAME", **options))(x, kernel))
    assert "conv_general_dilated" not in text


def test_a_convolution_of_several_groups_is_left_to_xla():
    draw = np.random.default_rng(0).normal
    x, kernel = draw(size=(1, 5, 5, 4)).astype(np.float32), draw(size=(3, 3, 2, 6)).astype(np.float32)
    options = {"rhs_dilation": (1, 1), "feature_group_count": 2, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    expected = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", **options)
    np.testing.assert_allclose(depthwise.conv(x, kernel, (1, 1), "SAME", **options), expected, atol=1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_heads_read_the_points_they_name(name):
    """Features before the last stride are average-pooled, and no layer is built after the last point."""
    points = ROWS[name].points
    model = multitask.MultiTaskModel(HEADS, backbone=name, head_features=4, attach=points[:2])
    images = jnp.ones((2, 32, 48, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    first, second = jax.eval_shape(lambda *args: model.apply(*args, only_features=True), variables, images)
    assert first.shape[:3] == second.shape[:3] == (2, 4, 6)
    outputs = jax.eval_shape(model.apply, variables, images)
    assert {task: raw.shape for task, raw in outputs.items()} == {"segmentation": (2, 4, 6, 3), "depth": (2, 4, 6, 1)}
    whole = model.clone(attach=())
    assert whole.points() == (points[-1],) * 2
    built = [multitask.shapes(one.clone()) for one in (model, whole)]
    built = [{path for path in paths if "/backbone/" in path} for paths in built]
    assert built[0] < built[1] or name == "own"


def test_inner_points_end_a_block():
    model = efficientnet.EfficientNetLite(points=("block2_0/expand",), stages=NARROW, stem=8)
    variables = model.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    assert set(variables["params"]["block2_0"]) == {"expand", "expand_bn"}
    (features,) = model.apply(variables, jnp.ones((1, 32, 32, 3)))
    assert features.shape == (1, 8, 8, 16) and float(features.max()) <= 6


@pytest.mark.slow
def test_training_updates_the_statistics_of_every_batch_norm():
    model = multitask.MultiTaskModel(HEADS, backbone="narrow", head_features=4, bn_momentum=0.0)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32, 48, 3)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    train = jax.jit(
        lambda *args: model.apply(*args, True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
    )
    _, new = train(variables, images)
    before, after = (jax.tree.leaves(tree["batch_stats"]["backbone"]) for tree in (variables, new))
    assert len(after) == 2 * (1 + 3 * 5 - 1)  # the first block has no expansion
    assert all(np.any(a != b) for a, b in zip(before, after, strict=True))


def test_names_and_sizes_that_do_not_work(monkeypatch):
    with raises("OPTION_UNKNOWN_VALUE", naming="nearest: efficientnet_lite0"):
        config_lib.check(config_of("efficientnet_lite1"))
    config = config_of("narrow")
    config.model.attach = ("layer1_0", "stem")
    with raises("OPTION_UNKNOWN_VALUE", naming="attachment points of narrow"):
        config_lib.check(config)
    coarse = backbones.Backbone(
        lambda **options: efficientnet.EfficientNetLite(stages=NARROW, stem=8, output_stride=32, **options),
        ("block3_1",),
    )
    monkeypatch.setitem(backbones.BACKBONES, "coarse", coarse)
    with raises("BACKBONE_SIZE", naming="features of 8x8 or more"):
        multitask.shapes.__wrapped__(multitask.MultiTaskModel(HEADS, backbone="coarse"))


def test_groups_are_where_the_channels_are():
    found = {one.name: one for one in groups_lib.find(config_of("narrow"))}
    kernels = [path for path in multitask.shapes(multitask.MultiTaskModel(HEADS, backbone="narrow", head_features=4))
               if path.startswith("params/backbone") and path.endswith("kernel")]  # fmt: skip
    assert set(found) == {path.replace("params/", "model/") for path in kernels}
    depthwise_one, expand = (found[f"model/backbone/block2_0/{layer}/kernel"] for layer in ("depthwise", "expand"))
    assert (depthwise_one.axis, depthwise_one.count, depthwise_one.size) == (3, 16, 25)
    assert (expand.axis, expand.count, expand.size) == (2, 8, 16)
    assert found["model/backbone/stem/kernel"].count == 3


def test_coupled_groups_of_a_depthwise_kernel_are_its_reader_s():
    found = groups_lib.find(config_of("narrow", groups="coupled"))
    (one,) = [one for one in found if "model/backbone/block2_0/depthwise/kernel" in one.paths]
    assert set(one.paths) == {f"model/backbone/block2_0/{layer}/kernel" for layer in ("depthwise", "project")}
    assert one.count == 16


def test_zero_groups_are_counted_there():
    config = config_of("narrow")
    model = multitask.build(config.model, [_Spec("segmentation", 3), _Spec("depth", 1)])
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 32, 48, 3)))["params"]
    kernel = params["backbone"]["block2_1"]["depthwise"]["kernel"]
    params["backbone"]["block2_1"]["depthwise"]["kernel"] = kernel.at[..., :3].set(0)
    layers_of = {layer.path: layer for layer in groups_lib.count(config, params).layers}
    layer = layers_of["backbone/block2_1/depthwise/kernel"]
    assert (layer.groups, layer.zero_groups, layer.group_size, layer.zero_weights) == (16, 3, 25, 75)
    assert sum(layer.zero_groups for layer in layers_of.values()) == 3


class _Spec:
    head = "deeplab"

    def __init__(self, name, outputs):
        self.name, self.outputs = name, outputs


def test_layers_that_no_path_goes_around():
    """Residual blocks can be zeroed; the first block of each stage, which changes the width, cannot."""
    found = groups_lib.unavoidable(config_of("narrow"))
    names = [path.removeprefix("params/") for path in multitask.shapes(
        multitask.MultiTaskModel(HEADS, backbone="narrow", head_features=4)) if path.endswith("kernel")]  # fmt: skip
    kept = {name for name in names if re.fullmatch(found, f"model/{name}") and name.startswith("backbone/")}
    front = ["stem", "block1_0/depthwise", "block1_0/project"]
    firsts = [f"block{stage}_0/{layer}" for stage in (2, 3) for layer in ("expand", "depthwise", "project")]
    assert kept == {f"backbone/{layer}/kernel" for layer in front + firsts}
    assert all(re.fullmatch(found, f"model/{name}") for name in names if name.startswith("head_"))


def test_layers_are_ordered_as_in_the_network():
    model = multitask.MultiTaskModel(HEADS, backbone="narrow", head_features=4)
    order = [layer for layer in costs.layers(model, (32, 48)) if layer.startswith("backbone/")]
    assert sorted(sorted(order), key=layers.network_order) == order
    assert sorted(["conv10", "conv2", "layer1_0/conv1"], key=layers.network_order) == [
        "conv2",
        "conv10",
        "layer1_0/conv1",
    ]
