"""Convolutions computed in the way that is fastest: 1x1 as a product, 3x3 at a large rate as a sum over taps.

Both have their gradients written out. Derived by JAX, the kernel's would be made transposed, of the larger of two
operands, and the taps' a sum of nine whole kernels that are zero but for one tap: 15 % of a training step on a CPU.
"""

import contextlib
import contextvars
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from mtl_sparse.runtime.errors import UserError

# What a product costs when the taps are taken one by one, over its cost in the plain convolution, which also computes
# those with padding. Measured on two CPU cores, forward and both gradients: 1.0 to 1.2 (docs/benchmarks.md).
_TAP_COST = 1.2

# Up to so many input channels a product is written as a sum, which XLA fuses with the BatchNorm and the residual that
# follow: the result of [H W, 8] @ [8, 2048] takes longer to write and to read again than to compute.
_FEW_INPUTS = 8

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
    """Whether a 3x3 convolution at dilation `rate` of a map of `size` costs less as a sum over taps."""
    return not _plain.get() and _TAP_COST * _pixels(size, (3, 3), rate) < 9 * size[0] * size[1]


def conv(x, kernel, strides, padding, *, rhs_dilation, **settings):
    """`lax.conv_general_dilated` for NHWC and HWIO, as `nn.Conv` calls it: 1x1 as a product, 3x3 by taps if faster."""
    if kernel.shape[:2] == (1, 1) and not _plain.get():
        return _product(x[:, :: strides[0], :: strides[1]], kernel[0, 0])
    rate = rhs_dilation[0]
    if kernel.shape[:2] == (3, 3) and tuple(strides) == (1, 1) and _by_taps(x.shape[1:3], rate):
        return conv3x3(x, kernel, rate)
    return lax.conv_general_dilated(x, kernel, strides, padding, rhs_dilation=rhs_dilation, **settings)


@jax.custom_vjp
def _product(x, kernel):
    """x [..., I] @ kernel [I, O]."""
    inputs = kernel.shape[0]
    if 0 < inputs <= _FEW_INPUTS:
        return sum(x[..., i, None] * kernel[i] for i in range(inputs))
    return x @ kernel


def _product_backward(residuals, dy):
    x, kernel = residuals
    return _to_input(dy, kernel), _to_kernel(x, dy)


_product.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _product_backward)


def _to_input(dy, kernel, dtype=None):
    """Gradient [..., I] of a product's input, in the operands' dtype or this one."""
    return lax.dot_general(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)


def _to_kernel(x, dy):
    """Gradient [I, O] of a product's kernel: the smaller of the two operands is the one that is transposed."""
    over = tuple(range(x.ndim - 1))
    if x.shape[-1] <= dy.shape[-1]:
        return lax.dot_general(x, dy, ((over, over), ((), ())))
    return lax.dot_general(dy, x, ((over, over), ((), ()))).T


def max_pool(x):
    """Largest of each 3x3 window at stride 2, padding 1; x [B, H, W, C] is not negative.

    A maximum over rows and one over columns: its gradient needs no indices, which `nn.max_pool`'s writes out.
    """
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # zeros are as good as -inf here, and ONNX knows them
    for axis in (1, 2):
        last = x.shape[axis] - 2
        first, middle, third = (lax.slice_in_dim(x, i, last + i, 2, axis) for i in range(3))
        x = jnp.maximum(jnp.maximum(first, middle), third)
    return x


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
    return _sum_of_taps(x, kernel, rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sum_of_taps(x, kernel, rate):
    """Sum of the taps' products, in float32 where the operands have fewer bits."""
    sum_dtype = jnp.promote_types(x.dtype, jnp.float32)
    out = jnp.zeros((*x.shape[:3], kernel.shape[3]), sum_dtype)
    for i, j, to, of in _windows(x.shape[1:3], kernel.shape[:2], rate):
        out = out.at[to].add(jnp.matmul(x[of], kernel[i, j], preferred_element_type=sum_dtype))
    return out.astype(x.dtype)


def _sum_of_taps_backward(rate, residuals, dy):
    x, kernel = residuals
    taps, dx = kernel.shape[:2], jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
    dk = [[jnp.zeros(kernel.shape[2:], kernel.dtype)] * taps[1] for _ in range(taps[0])]
    for i, j, to, of in _windows(x.shape[1:3], taps, rate):
        dx = dx.at[of].add(_to_input(dy[to], kernel[i, j], dx.dtype))
        dk[i][j] = _to_kernel(x[of], dy[to])
    return dx.astype(x.dtype), jnp.stack([jnp.stack(row) for row in dk])


_sum_of_taps.defvjp(lambda x, kernel, rate: (_sum_of_taps(x, kernel, rate), (x, kernel)), _sum_of_taps_backward)


def _windows(size, taps, rate):
    """Taps that meet real pixels: (row, column in the kernel, index of the output's window, of the input's)."""
    height, width = size
    for i in range(taps[0]):
        for j in range(taps[1]):
            dy, dx = (i - taps[0] // 2) * rate, (j - taps[1] // 2) * rate
            rows, columns = (max(0, -dy), min(height, height - dy)), (max(0, -dx), min(width, width - dx))
            if rows[0] < rows[1] and columns[0] < columns[1]:
                to = slice(None), slice(*rows), slice(*columns)
                of = slice(None), slice(rows[0] + dy, rows[1] + dy), slice(columns[0] + dx, columns[1] + dx)
                yield i, j, to, of


def _pixels(size, taps, rate) -> int:
    """Output pixels that the taps reach, summed over the taps."""
    windows = [to for _, _, to, _ in _windows(size, taps, rate)]
    return sum((rows.stop - rows.start) * (columns.stop - columns.start) for _, rows, columns in windows)


def macs(size: tuple[int, int], kernel_shape: tuple[int, ...], rate: int) -> int:
    """Multiply-accumulates of `conv3x3` on one image with features of `size` (H, W): taps on padding do not count."""
    if not _by_taps(size, rate):
        pixels = size[0] * size[1] * kernel_shape[0] * kernel_shape[1]
    else:
        pixels = _pixels(size, kernel_shape[:2], rate)
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
