"""The DeepLab-v3 head: the scale of its initial outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_sparse.models import initializers
from mtl_sparse.models.deeplab import DeepLabHead


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("features", [64, 256])
def test_a_fresh_head_does_not_saturate(outputs, features):
    """Its last layer is followed by a sigmoid (depth) or tanh (normals), which are flat beyond a few units."""
    x = jax.random.normal(jax.random.key(1), (4, 6, 8, 32))
    head = DeepLabHead(outputs, features, dropout=0.0)

    def raw(key):
        return head.apply(head.init(key, x), x, train=True, mutable=["batch_stats"])[0]

    values = jax.jit(jax.vmap(raw))(jax.random.split(jax.random.key(0), 4))
    assert 0.05 < float(jnp.std(values)) < 2


def test_layers_without_a_norm_start_as_pytorchs():
    """U(-b, b), b = 1 / sqrt(fan-in): its standard deviation is b / sqrt(3), of the kernel and of the bias."""
    for fan_in in (9, 256):
        drawn = initializers.without_norm(fan_in)
        for seed, init in enumerate(drawn.values()):
            values = np.asarray(init(jax.random.key(seed), (4000,), jnp.float32))
            bound = fan_in**-0.5
            assert -bound <= values.min() < -0.99 * bound and 0.99 * bound < values.max() <= bound
            assert values.std() == pytest.approx(bound / 3**0.5, rel=0.03)


def test_the_heads_last_layer_is_drawn_by_its_fan_in():
    x = jnp.zeros((1, 2, 2, 8))
    out = DeepLabHead(40, 64).init(jax.random.key(0), x)["params"]["out"]
    assert {name: float(jnp.max(jnp.abs(leaf))) for name, leaf in out.items()} == {
        "kernel": pytest.approx(64**-0.5, rel=0.02),
        "bias": pytest.approx(64**-0.5, rel=0.2),
    }
