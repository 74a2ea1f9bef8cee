"""Convolutions and pooling, against the plain ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mtl_sparse.models import atrous, resnet, widths


@pytest.mark.parametrize("rate", [1, 4, 5, 7, 8, 12])
@pytest.mark.parametrize("size", [(8, 12), (7, 5), (1, 9)])
def test_equals_the_plain_convolution_with_gradients(rate, size):
    keys = jax.random.split(jax.random.key(rate), 3)
    x = jax.random.normal(keys[0], (2, *size, 5))
    kernel = jax.random.normal(keys[1], (3, 3, 5, 4))
    weights = jax.random.normal(keys[2], (2, *size, 4))

    def plain(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), [(rate, rate)] * 2, rhs_dilation=(rate, rate), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def loss(conv):
        return jax.value_and_grad(lambda x, kernel: jnp.sum(weights * jnp.square(conv(x, kernel))), (0, 1))

    got, got_grads = loss(lambda x, k: atrous.conv3x3(x, k, rate))(x, kernel)
    want, want_grads = loss(plain)(x, kernel)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 3), (1, 4), (5, 3), (3, 5), (8, 9), (9, 8)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_product_equals_the_plain_1x1_with_gradients(inputs, outputs, stride):
    keys = jax.random.split(jax.random.key(inputs), 2)
    x, kernel = jax.random.normal(keys[0], (2, 7, 4, inputs)), jax.random.normal(keys[1], (1, 1, inputs, outputs))
    settings = {"rhs_dilation": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def loss(conv):
        call = lambda x, k: conv(x, k, (stride, stride), [(0, 0)] * 2, **settings)  # noqa: E731
        return call(x, kernel), jax.grad(lambda x, k: jnp.sum(jnp.sin(call(x, k))), (0, 1))(x, kernel)

    for a, b in zip(jax.tree.leaves(loss(atrous.conv)), jax.tree.leaves(loss(lax.conv_general_dilated)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, strict=True)


@pytest.mark.parametrize("size", [(8, 10), (7, 9), (2, 3), (1, 1)])
def test_max_pool_is_flaxs_with_its_gradient(size):
    """After a ReLU, as in the stem: where several pixels of a window are zero, their gradient is zero anyway."""
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))

    def loss(pool):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(pool(jax.nn.relu(x)))))(x)

    settings = {"window_shape": (3, 3), "strides": (2, 2), "padding": ((1, 1), (1, 1))}
    for a, b in zip(loss(atrous.max_pool), loss(lambda x: nn.max_pool(x, **settings)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_gradients_of_a_block_are_those_of_plain_convolutions():
    """A block of the last stage, whose 3x3 is a sum over taps; in float64, so that only the method can differ."""
    with jax.enable_x64(True):
        block = resnet.Block(widths.Block((3, 3, 12)), 1, 4, bottleneck=True, dtype=jnp.float64)
        x = jax.random.normal(jax.random.key(0), (2, 8, 8, 12), jnp.float64)
        variables = block.init(jax.random.key(1), x, True)
        variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)

        def loss(params, x):
            (y, _), _ = block.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y))

        ours = jax.jit(jax.value_and_grad(loss, (0, 1)))(variables["params"], x)
        with atrous.plain_convolutions():
            plain = jax.jit(jax.value_and_grad(lambda *given: loss(*given), (0, 1)))(variables["params"], x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), ours, plain)


@pytest.mark.parametrize(
    ("size", "rate", "by_taps"),
    [
        ((16, 16), 1, False),
        ((16, 16), 2, False),  # 84 % of the products are with pixels
        ((16, 16), 4, True),  # 69 %
        ((32, 32), 4, False),  # 84 %
        ((32, 32), 12, True),
        ((8, 8), 2, True),
        ((90, 120), 6, False),
        ((4, 64), 3, True),
    ],
)
def test_taps_are_taken_where_they_cost_less(size, rate, by_taps):
    products = atrous.macs(size, (3, 3, 2, 5), rate)
    rows, columns = (1 + 2 * max(0, side - rate) / side for side in size)
    whole = 9 * size[0] * size[1] * 10
    assert products == (round(size[0] * rows * size[1] * columns * 10) if by_taps else whole)
    with atrous.plain_convolutions():
        assert atrous.macs(size, (3, 3, 2, 5), rate) == whole


def test_bfloat16_taps_are_summed_in_float32():
    """The error is that of rounding the result once, as in the plain convolution, not that of nine rounded maps."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 12, 12, 16)).astype(jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (3, 3, 16, 8)).astype(jnp.bfloat16)
    dy = jax.random.normal(keys[2], (2, 12, 12, 8)).astype(jnp.bfloat16)

    def maps(x, kernel, dy):
        out, vjp = jax.vjp(lambda x, kernel: atrous._sum_of_taps(x, kernel, 2), x, kernel)
        return out, vjp(dy)[0]

    exact = maps(*(value.astype(jnp.float32) for value in (x, kernel, dy)))
    for got, want in zip(maps(x, kernel, dy), exact, strict=True):
        assert got.dtype == jnp.bfloat16
        error, once = (
            float(jnp.abs(value.astype(jnp.float32) - want).mean()) for value in (got, want.astype(jnp.bfloat16))
        )
        assert error < 1.1 * once
