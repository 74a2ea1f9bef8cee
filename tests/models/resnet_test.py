"""The backbone, its attachment points, and dropout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import nyu
from mtl_sparse import tasks
from mtl_sparse.models import deeplab, multitask, resnet, widths
from mtl_sparse.sparsity import groups
from tests.conftest import raises


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shapes(model, images=(1, 64, 64, 3)):
    return jax.eval_shape(lambda key: model.init(key, jnp.zeros(images)), jax.random.key(0))


@pytest.mark.parametrize(
    ("depth", "parameters", "layers", "group_count"),
    [
        (10, 5_054_272, 15, 2_243),
        (18, 11_324_992, 23, 4_163),
        (50, 23_631_808, 55, 22_787),
        (101, 42_623_936, 106, 48_899),
    ],
)
def test_backbone_has_the_published_size(depth, parameters, layers, group_count):
    """Depth 50 is the paper's: 23,631,808 parameters, 22,787 groups in 55 layers; the others follow from its rules."""
    backbone = shapes(resnet.ResNet(depth))["params"]
    found = groups.find(backbone)
    assert size(backbone) == parameters
    assert (len(found), sum(layer.count for layer in found)) == (layers, group_count)


def test_head_has_the_published_size():
    assert size(shapes(deeplab.DeepLabHead(40), (1, 8, 8, 2048))["params"]) == 16_135_720


def test_outputs_are_raw_predictions_at_an_eighth():
    heads = (("segmentation", "deeplab", 40), ("depth", "deeplab", 1), ("normals", "deeplab", 3))
    model = multitask.MultiTaskModel(heads, depth=50, width=4, head_features=4, dtype=jnp.bfloat16)
    images = jax.random.normal(jax.random.key(0), (2, 32, 48, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    outputs = jax.jit(model.apply)(variables, images)
    assert {task: raw.shape for task, raw in outputs.items()} == {
        "segmentation": (2, 4, 6, 40),
        "depth": (2, 4, 6, 1),
        "normals": (2, 4, 6, 3),
    }
    assert {raw.dtype for raw in outputs.values()} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
def test_bfloat16_computes_the_same_function():
    heads = (("depth", "deeplab", 1),)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    model = multitask.MultiTaskModel(heads, depth=18, width=8, head_features=8)
    variables = jax.jit(model.init)(jax.random.key(1), images)
    exact = jax.jit(model.apply)(variables, images)["depth"]
    rounded = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(variables, images)["depth"]
    assert not (exact == rounded).all()
    np.testing.assert_allclose(rounded, exact, atol=0.05 * float(jnp.abs(exact).max()))


def test_dilation_and_strides_of_the_stages():
    """The pixels that a unit impulse at the input of a 3x3 reaches show its stride and dilation."""
    model = resnet.Block(widths.Block((16, 16, 64)), stride=1, dilation=4, bottleneck=True)
    x = jnp.zeros((1, 17, 17, 64)).at[0, 8, 8].set(1.0)
    variables = model.init(jax.random.key(0), x, False)
    stream, nothing = (model.apply(variables, image, False)[0] for image in (x, 0 * x))
    difference = np.abs(stream - nothing).sum(-1)[0]
    assert set(np.argwhere(difference > 0).ravel().tolist()) == {4, 8, 12}
    assert (resnet.STRIDES, resnet.DILATIONS) == ((1, 2, 1, 1), (1, 1, 2, 4))


@pytest.mark.slow
def test_a_head_reads_where_it_is_attached_and_nothing_is_built_after():
    """Inside a block after a ReLU, on the stream after a block, after the stem; average-pooled to the head's stride."""
    images = jax.random.normal(jax.random.key(0), (2, 32, 48, 3))
    whole = resnet.ResNet(50, 4)
    variables = jax.jit(whole.init)(jax.random.key(1), images)
    apply = jax.jit(lambda v, x: whole.apply(v, x, capture_intermediates=True))
    inside = apply(variables, images)[1]["intermediates"]
    points = ("layer3_1/conv2", "layer2_3", "layer1_0/conv1", "stem")
    cut = resnet.ResNet(50, 4, points=points)
    backbone = jax.eval_shape(lambda: cut.init(jax.random.key(0), images))["params"]
    assert "layer3_1" in backbone and set(backbone["layer3_1"]) == {"conv1", "bn1", "conv2", "bn2"}
    assert not any(name.startswith(("layer3_2", "layer4")) for name in backbone)
    given = jax.tree.map(lambda _, leaf: leaf, *_common({"params": backbone}, variables))
    given["batch_stats"] = variables["batch_stats"]
    found = dict(zip(points, jax.jit(cut.apply)(given, images), strict=True))
    np.testing.assert_allclose(found["layer3_1/conv2"], nn.relu(inside["layer3_1"]["bn2"]["__call__"][0]), rtol=1e-5)
    np.testing.assert_allclose(found["layer2_3"], inside["layer2_3"]["__call__"][0][0], rtol=1e-5)
    fine = np.asarray(nn.relu(inside["layer1_0"]["bn1"]["__call__"][0]))
    assert fine.shape == (2, 8, 12, 4)
    means = fine.reshape(2, 4, 2, 6, 2, 4).mean((2, 4))
    np.testing.assert_allclose(found["layer1_0/conv1"], means, atol=1e-6)
    assert found["stem"].shape == (2, 4, 6, 8)
    odd = jax.eval_shape(cut.apply, given, images[:, :20, :44])
    assert {features.shape[1:3] for features in odd} == {(3, 6)}, "as the backbone's end"


@pytest.mark.slow
def test_a_head_reads_a_convolution_before_its_batch_norm_and_relu():
    """Of every place in a block; the last of them ends the network, and its BatchNorm is not built."""
    images = jax.random.normal(jax.random.key(0), (2, 32, 48, 3))
    whole = resnet.ResNet(50, 4)
    variables = jax.jit(whole.init)(jax.random.key(1), images)
    apply = jax.jit(lambda v, x: whole.apply(v, x, capture_intermediates=True))
    inside = apply(variables, images)[1]["intermediates"]
    points = ("layer3_1/conv2:raw", "layer2_3/conv3:raw", "layer2_0/conv2:raw", "layer3_1/conv1:raw", "layer3_1/conv1")
    for names, last in ((points, {"conv1", "bn1", "conv2"}), (points[1:2], {"conv1", "bn1", "conv2", "bn2", "conv3"})):
        cut = resnet.ResNet(50, 4, points=names)
        shapes = jax.eval_shape(lambda cut=cut: cut.init(jax.random.key(0), images))
        given = jax.tree.map(lambda _, leaf: leaf, *_common(shapes, variables))
        end = max(name for name in given["params"] if name.startswith("layer"))
        assert end == names[0].partition("/")[0] and set(given["params"][end]) == last
        found = dict(zip(names, jax.jit(cut.apply)(given, images), strict=True))
        for point in names:
            block, _, layer = point.partition("/")
            conv, _, raw = layer.partition(":")
            expected = inside[block][conv if raw else f"bn{conv[-1]}"]["__call__"][0]
            np.testing.assert_allclose(found[point], expected if raw else nn.relu(expected), atol=1e-4)


def test_attachment_points_are_in_the_order_of_the_network():
    assert resnet.points(10)[:5] == ("stem", "layer1_0/conv1:raw", "layer1_0/conv1", "layer1_0/conv2:raw", "layer1_0")
    block = ("conv1:raw", "conv1", "conv2:raw", "conv2", "conv3:raw")
    assert resnet.points(50)[-6:] == (*(f"layer4_2/{name}" for name in block), "layer4_2")
    assert resnet.dense(50, 4, ("layer2_1/conv1", "layer2_1/conv1:raw"))[1][-1].passed == (8,), "it has a BatchNorm"
    assert resnet.dense(50, 4, ("layer2_1/conv2:raw", "layer2_1/conv1"))[1][-1].passed == (8, 0)


def test_the_layers_on_every_path_to_a_raw_point():
    expressions = resnet.unavoidable(("layer3_3/conv2:raw", "layer4_0/conv3:raw", "layer4_2"))
    assert expressions[2:] == ("layer3_3/conv[1-2]", "layer4_0/conv[1-3]")


def _common(shapes, variables):
    """Return the tree, and the part of `variables` that is in it."""
    flat = traverse_util.flatten_dict(variables)
    return shapes, traverse_util.unflatten_dict({path: flat[path] for path in traverse_util.flatten_dict(shapes)})


@pytest.mark.parametrize(
    ("attach", "code", "naming", "also"),
    [
        (("layer3_9/conv1", "layer4_0"), "OPTION_UNKNOWN_VALUE", "'layer3_9/conv1'", "layer3_5/conv1"),
        (("layer4_0/conv3", "layer4_0"), "OPTION_UNKNOWN_VALUE", "'layer4_0/conv3'", "ResNet-50"),
        (("layer4_0",), "OPTION_CONFLICT", "model.attach=('layer4_0',)", "(depth, edge)"),
    ],
)
def test_impossible_attachment_points_are_named(attach, code, naming, also):
    config = nyu.get_config()
    config.tasks, config.model.attach = ("depth", "edge"), attach
    with raises(code, naming=naming) as caught:
        multitask.build(config.model, tasks.resolve(config))
    assert "model.attach" in str(caught.value) and also in str(caught.value)


def test_dropout_does_not_depend_on_how_a_batch_is_split():
    layer = deeplab.Dropout(0.5, axis_name="devices")
    x = jnp.ones((8, 3, 3, 4))
    key = jax.random.key(3)

    def apply(x):
        return layer.apply({}, x, True, rngs={"dropout": key})

    whole = jax.vmap(apply, axis_name="devices")(x[None])[0]
    parts = jax.vmap(apply, axis_name="devices")(x.reshape(4, 2, 3, 3, 4)).reshape(x.shape)
    np.testing.assert_array_equal(whole, parts)
    assert len({tuple(example.ravel().tolist()) for example in np.asarray(whole)}) == 8, "a mask for each example"
    assert set(np.unique(whole)) == {0.0, 2.0}
    np.testing.assert_array_equal(layer.apply({}, x, False), x)


@pytest.mark.parametrize("place", ["drop0", "drop1"])
def test_a_deeplab_head_draws_in_both_places_while_training_alone(place, monkeypatch):
    """One of the two is turned off."""
    plain = deeplab.Dropout.__call__
    monkeypatch.setattr(
        deeplab.Dropout, "__call__", lambda self, x, train: plain(self, x, train) if self.name == place else x
    )
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 5)).astype(np.float32)
    head = deeplab.DeepLabHead(3, features=8, dropout=0.5)
    variables = head.init(jax.random.key(0), x)

    def outputs(train, seed=0):
        return head.apply(variables, x, train, rngs={"dropout": jax.random.key(seed)}, mutable=["batch_stats"])[0]

    assert (np.asarray(outputs(True)) != outputs(True, 1)).mean() > 0.9
    np.testing.assert_array_equal(outputs(False), outputs(False, 1))
