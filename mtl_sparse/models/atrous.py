"""3x3 convolution at a large dilation rate, as a sum over the taps that meet real pixels."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

# From this rate on, the taps are taken one by one. XLA's CPU convolution slows with the rate although most
# taps of a large rate meet only padding on an ASPP feature map (32x32 and less); up to rate 4, the backbone's
# own dilations, the plain convolution is as good.
_FIRST_TAPPED_RATE = 5


def conv3x3(x, kernel, rate: int):
    """Stride-1 3x3 convolution with dilation `rate` and zero padding `rate`.

    Args:
      x: features, shape [B, H, W, I].
      kernel: shape [3, 3, I, O].
      rate: dilation >= 1.

    Returns:
      Features of shape [B, H, W, O], equal up to rounding to the plain convolution.
    """
    if rate < _FIRST_TAPPED_RATE:
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(1, 1),
            padding=((rate, rate), (rate, rate)),
            rhs_dilation=(rate, rate),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    height, width = x.shape[1:3]
    out = jnp.zeros((*x.shape[:3], kernel.shape[3]), x.dtype)
    for i in range(3):
        for j in range(3):
            dy, dx = (i - 1) * rate, (j - 1) * rate
            top, bottom = max(0, -dy), min(height, height - dy)
            left, right = max(0, -dx), min(width, width - dx)
            if top >= bottom or left >= right:
                continue  # this tap meets only padding
            window = x[:, top + dy : bottom + dy, left + dx : right + dx]
            out = out.at[:, top:bottom, left:right].add(window @ kernel[i, j])
    return out


class AtrousConv(nn.Module):
    """3x3 convolution without bias at dilation `rate`; parameter `kernel` [3, 3, I, features]."""

    features: int
    rate: int
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.features), jnp.float32)
        return conv3x3(x.astype(self.dtype), kernel.astype(self.dtype), self.rate)
