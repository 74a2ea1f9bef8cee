import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mtl_sparse.models import atrous


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
