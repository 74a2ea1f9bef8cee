"""Convolutions computed in the way that is fastest: 1x1 as a product, 3x3 at a large rate as a sum over taps."""

import contextlib
import contextvars

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from mtl_sparse.errors import UserError

# From this rate on, the taps are taken one by one. XLA's CPU convolution slows with the rate although most
# taps of a large rate meet only padding on an ASPP feature map (32x32 and less).
_FIRST_TAPPED_RATE = 5


_plain = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain_convolutions():
    """Within it, models are traced with plain dilated convolutions, which other runtimes have a fast kernel for."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def _by_taps(size, rate) -> bool:
    """Whether a sum over taps is faster than the plain convolution, forward and backward, as measured on a CPU.

    At rate 4, that of the last stage, it is where maps are so small (16x16) that a quarter of an outer tap's products
    are with padding; at rate 1 and 2 it never is.
    """
    return not _plain.get() and (rate >= _FIRST_TAPPED_RATE or (rate == 4 and 4 * rate >= max(size)))


def conv(x, kernel, strides, padding, *, rhs_dilation, **settings):
    """`lax.conv_general_dilated` for NHWC and HWIO, as `nn.Conv` calls it: 1x1 as a product, 3x3 by taps if faster."""
    if kernel.shape[:2] == (1, 1) and not _plain.get():
        return x[:, :: strides[0], :: strides[1]] @ kernel[0, 0]
    rate = rhs_dilation[0]
    if kernel.shape[:2] == (3, 3) and tuple(strides) == (1, 1) and _by_taps(x.shape[1:3], rate):
        return conv3x3(x, kernel, rate)
    return lax.conv_general_dilated(x, kernel, strides, padding, rhs_dilation=rhs_dilation, **settings)


def conv3x3(x, kernel, rate: int):
    """Stride-1 3x3 convolution with dilation `rate` and zero padding `rate`.

    Args:
      x: features, shape [B, H, W, I].
      kernel: shape [3, 3, I, O]; a side of 1 holds the middle taps alone, where H (or W) <= rate: the others would
        meet only padding.
      rate: dilation >= 1.

    Returns:
      Features of shape [B, H, W, O], equal up to rounding to the plain convolution.

    Raises:
      UserError: the kernel has no taps for features of this size.
    """
    taps = kernel.shape[:2]
    if any(side == 1 and size > rate for side, size in zip(taps, x.shape[1:3], strict=True)):
        raise UserError(
            f"this compact model lacks the atrous taps of rate {rate} that need features of more than {rate} rows or "
            f"columns, not {x.shape[1]}x{x.shape[2]}: compact the original run with --config.compact.drop_taps=False"
        )
    if not _by_taps(x.shape[1:3], rate):
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(1, 1),
            padding=[(rate * (side // 2),) * 2 for side in taps],
            rhs_dilation=(rate, rate),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    out = jnp.zeros((*x.shape[:3], kernel.shape[3]), x.dtype)
    for i, j, (top, bottom), (left, right), dy, dx in _windows(x.shape[1:3], taps, rate):
        window = x[:, top + dy : bottom + dy, left + dx : right + dx]
        out = out.at[:, top:bottom, left:right].add(window @ kernel[i, j])
    return out


def _windows(size, taps, rate):
    """Taps that meet real pixels: (row, column in the kernel, rows, columns of the output, offset of the input)."""
    height, width = size
    for i in range(taps[0]):
        for j in range(taps[1]):
            dy, dx = (i - taps[0] // 2) * rate, (j - taps[1] // 2) * rate
            rows, columns = (max(0, -dy), min(height, height - dy)), (max(0, -dx), min(width, width - dx))
            if rows[0] < rows[1] and columns[0] < columns[1]:
                yield i, j, rows, columns, dy, dx


def macs(size: tuple[int, int], kernel_shape: tuple[int, ...], rate: int) -> int:
    """Multiply-accumulates of `conv3x3` on one image with features of `size` (H, W): taps on padding do not count."""
    if not _by_taps(size, rate):
        pixels = size[0] * size[1] * kernel_shape[0] * kernel_shape[1]
    else:
        windows = _windows(size, kernel_shape[:2], rate)
        pixels = sum((bottom - top) * (right - left) for _, _, (top, bottom), (left, right), _, _ in windows)
    return pixels * kernel_shape[2] * kernel_shape[3]


class AtrousConv(nn.Module):
    """3x3 convolution without bias at dilation `rate`; parameter `kernel` [*taps, I, features], see `conv3x3`."""

    features: int
    rate: int
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.float32
    taps: tuple[int, int] = (3, 3)

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (*self.taps, x.shape[-1], self.features), jnp.float32)
        return conv3x3(x.astype(self.dtype), kernel.astype(self.dtype), self.rate)
