"""Initializers: one for kernels that a normalization layer follows, one for layers that none follows."""

from typing import Any

import flax.linen as nn
import jax

# He et al. 2015 (arXiv 1502.01852), by fan-out. Its scale does not matter in front of a BatchNorm.
before_norm = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def without_norm(fan_in: int) -> dict[str, Any]:
    """Return kernel and bias initializers for a layer whose output no normalization layer rescales.

    Both draw from U(-b, b) with b = 1 / sqrt(fan_in), PyTorch's default for convolutions and linear layers, which the
    reference implementation uses. A fan-out initializer would saturate the sigmoid or tanh behind a layer with few
    outputs.

    Args:
      fan_in: inputs of one output, kernel height * kernel width * input channels.

    Returns:
      {"kernel_init", "bias_init"}, keyword arguments of `nn.Conv` and `nn.Dense`.
    """
    bound = fan_in**-0.5

    def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return {"kernel_init": uniform, "bias_init": uniform}
