"""Dropout that does not depend on how a batch is divided among devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Dropout(nn.Module):
    """Dropout whose mask depends on the example's place in the global batch, not on the device it is on.

    So the same seed gives the same masks on any number of devices.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        if not train or self.rate == 0:
            return x
        index = jnp.arange(x.shape[0])
        if self.axis_name is not None:
            index += jax.lax.axis_index(self.axis_name) * x.shape[0]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), index)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - self.rate), 0)
