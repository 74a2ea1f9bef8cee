import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_sparse.models import deeplab, multitask, resnet, widths
from mtl_sparse.sparsity import groups


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def shapes(model, images=(1, 64, 64, 3)):
    return jax.eval_shape(lambda key: model.init(key, jnp.zeros(images)), jax.random.key(0))


@pytest.mark.parametrize(
    ("depth", "parameters", "layers", "group_count"),
    [(18, 11_324_992, 23, 4_163), (50, 23_631_808, 55, 22_787), (101, 42_623_936, 106, 48_899)],
)
def test_backbone_has_the_published_size(depth, parameters, layers, group_count):
    """Depth 50 is the paper's: 23,631,808 parameters, 22,787 groups in 55 layers; 18 and 101 follow from its rules."""
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
    """Where a unit impulse in one stage's 3x3 input reaches says its stride and dilation."""
    model = resnet.Block(widths.Block((16, 16, 64)), stride=1, dilation=4, bottleneck=True)
    x = jnp.zeros((1, 17, 17, 64)).at[0, 8, 8].set(1.0)
    variables = model.init(jax.random.key(0), x, False)
    difference = np.abs(model.apply(variables, x, False) - model.apply(variables, 0 * x, False)).sum(-1)[0]
    assert set(np.argwhere(difference > 0).ravel().tolist()) == {4, 8, 12}
    assert (resnet.STRIDES, resnet.DILATIONS) == ((1, 2, 1, 1), (1, 1, 2, 4))


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
