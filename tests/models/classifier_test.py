"""The classification head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_sparse.models.classifier import Classifier


def initialized(head, features):
    variables = jax.jit(head.init)(jax.random.key(0), features)
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.05 * noise.normal(size=leaf.shape).astype(np.float32), variables)


def test_head_has_the_described_parameters():
    shapes = jax.eval_shape(Classifier().init, jax.random.key(0), jnp.zeros((1, 32, 32, 2048)))["params"]
    assert {name: tree["kernel"].shape for name, tree in shapes.items()} == {
        "conv": (3, 3, 2048, 64),
        "fc1": (64, 32),
        "fc2": (32, 1),
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 9 * 2048 * 64 + 64 + 64 * 32 + 32 + 32 + 1


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 3)])
def test_logits_by_the_description(size):
    """Convolution by loops, ReLU, maximum of each whole 2x2 cell, mean, two dense layers."""
    features = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
    head = Classifier(features=(5, 4))
    variables = initialized(head, features)
    params = jax.tree.map(np.float64, variables["params"])
    padded = np.pad(features.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    conv = np.zeros((2, *size, 5))
    for row in range(size[0]):
        for column in range(size[1]):
            window = padded[:, row : row + 3, column : column + 3]
            conv[:, row, column] = np.einsum("bijc,ijco->bo", window, params["conv"]["kernel"])
    conv = np.maximum(conv + params["conv"]["bias"], 0)
    step = [min(2, side) for side in size]
    cells = [
        conv[:, step[0] * i : step[0] * (i + 1), step[1] * j : step[1] * (j + 1)].max((1, 2))
        for i in range(size[0] // step[0])
        for j in range(size[1] // step[1])
    ]
    hidden = np.maximum(np.mean(cells, 0) @ params["fc1"]["kernel"] + params["fc1"]["bias"], 0)
    expected = (hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"])[:, 0]
    np.testing.assert_allclose(jax.jit(head.apply)(variables, features), expected, rtol=1e-4)


def test_dropout_is_on_while_training_alone():
    features = np.random.default_rng(1).normal(size=(64, 4, 4, 8)).astype(np.float32)
    head = Classifier(features=(16, 8))
    variables = initialized(head, features)
    still = head.apply(variables, features)
    draws = [head.apply(variables, features, True, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1)]
    assert (np.asarray(draws[0]) != draws[1]).mean() > 0.9
    np.testing.assert_array_equal(still, head.apply(variables, features))
    without = Classifier(features=(16, 8), dropout=(0.0, 0.0))
    np.testing.assert_array_equal(without.apply(variables, features, True), still)


def test_several_logits_and_bfloat16():
    features = np.random.default_rng(1).normal(size=(2, 4, 4, 8)).astype(np.float32)
    head = Classifier(outputs=3, features=(16, 8), dtype=jnp.bfloat16)
    variables = initialized(head, features)
    logits = head.apply(variables, features)
    assert logits.shape == (2, 3) and logits.dtype == jnp.float32
    exact = Classifier(outputs=3, features=(16, 8)).apply(variables, features)
    np.testing.assert_allclose(logits, exact, atol=0.03 * np.abs(exact).max())


def test_every_layer_is_drawn_by_its_fan_in():
    params = Classifier(features=(64, 32)).init(jax.random.key(0), jnp.zeros((1, 4, 4, 16)))["params"]
    for name, fan_in in (("conv", 9 * 16), ("fc1", 64), ("fc2", 32)):
        assert float(jnp.max(jnp.abs(params[name]["kernel"]))) == pytest.approx(fan_in**-0.5, rel=0.1), name
        assert 0 < float(jnp.max(jnp.abs(params[name]["bias"]))) <= fan_in**-0.5, name
