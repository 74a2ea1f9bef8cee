"""Fast convolutions: 1x1 as a matrix product, 3x3 at a large dilation as a sum over taps.

Both have handwritten gradients. With JAX's own, the gradient of the kernel would transpose the larger of two operands,
and that of the taps would sum nine whole kernels, each zero except for one tap: 15 % of a training step on a CPU.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mtl_sparse.runtime.errors import UserError

Maps = Float[Array, "B H W C"]
Kernel = Float[Array, "kH kW I O"]
Size = tuple[int, ...]  # (height, width)
Window = tuple[slice, slice, slice]  # index of a part of `Maps`

# Cost of a product in a sum over taps, relative to its cost in the plain convolution, which also computes the products
# with padding. Measured on two CPU cores, forward and both gradients: 1.0 to 1.2 (docs/benchmarks.md).
_TAP_COST = 1.2

# Up to this many input channels, a product is written as a sum, which XLA fuses with the BatchNorm and the residual
# that follow: the result of [H W, 8] @ [8, 2048] takes longer to write and to read again than to compute.
_FEW_INPUTS = 8

_plain: contextvars.ContextVar[bool] = contextvars.ContextVar("plain", default=False)


@contextlib.contextmanager
def plain_convolutions() -> Iterator[None]:
    """Trace models with plain dilated convolutions, for which other runtimes have fast kernels."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def is_plain() -> bool:
    """Return whether models are traced with plain convolutions."""
    return _plain.get()


def _by_taps(size: Size, rate: int) -> bool:
    """Return whether a 3x3 convolution at dilation `rate` of a map of `size` costs less as a sum over taps."""
    return not _plain.get() and _TAP_COST * _pixels(size, (3, 3), rate) < 9 * size[0] * size[1]


def conv(
    x: Maps, kernel: Kernel, strides: Sequence[int], padding: Any, *, rhs_dilation: Sequence[int], **options: Any
) -> Maps:
    """Convolve as `lax.conv_general_dilated` does: 1x1 as a product, 3x3 as a sum over taps where that is faster.

    Args:
      x: features, NHWC.
      kernel: HWIO.
      strides: strides of the rows and the columns.
      padding: as `nn.Conv` passes it.
      rhs_dilation: dilation of the rows and the columns.
      **options: further arguments that `nn.Conv` passes.

    Returns:
      Features, equal up to rounding to the plain convolution.
    """
    is_grouped = options.get("feature_group_count", 1) != 1
    if kernel.shape[:2] == (1, 1) and not is_grouped and not _plain.get():
        return _product(x[:, :: strides[0], :: strides[1]], kernel[0, 0])
    rate = rhs_dilation[0]
    if kernel.shape[:2] == (3, 3) and not is_grouped and tuple(strides) == (1, 1) and _by_taps(x.shape[1:3], rate):
        return conv3x3(x, kernel, rate)
    return lax.conv_general_dilated(x, kernel, strides, padding, rhs_dilation=rhs_dilation, **options)


@jax.custom_vjp
def _product(x: Float[Array, "... I"], kernel: Float[Array, "I O"]) -> Float[Array, "... O"]:
    """Return x @ kernel."""
    inputs = kernel.shape[0]
    if 0 < inputs <= _FEW_INPUTS:
        return cast(Array, sum(x[..., i, None] * kernel[i] for i in range(inputs)))
    return x @ kernel


def _product_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    return _to_input(dy, kernel), _to_kernel(x, dy)


_product.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _product_backward)


def _to_input(dy: Float[Array, "... O"], kernel: Float[Array, "I O"], dtype: Any = None) -> Float[Array, "... I"]:
    """Return the gradient of a product's input, in `dtype`; None is the operands' dtype."""
    return lax.dot_general(dy, kernel, (((dy.ndim - 1,), (1,)), ((), ())), preferred_element_type=dtype)


def _to_kernel(x: Float[Array, "... I"], dy: Float[Array, "... O"]) -> Float[Array, "I O"]:
    """Return the gradient of a product's kernel; the smaller of the two operands is transposed."""
    over = tuple(range(x.ndim - 1))
    if x.shape[-1] <= dy.shape[-1]:
        return lax.dot_general(x, dy, ((over, over), ((), ())))
    return lax.dot_general(dy, x, ((over, over), ((), ()))).T


def max_pool(x: Maps) -> Maps:
    """Return the maximum of each 3x3 window at stride 2, padding 1, of a map that is not negative.

    It is a maximum over rows, then one over columns. Unlike that of `nn.max_pool`, its gradient writes no indices.
    """
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # zeros serve as well as -inf here, and ONNX supports them
    for axis in (1, 2):
        last = x.shape[axis] - 2
        first, middle, third = (lax.slice_in_dim(x, i, last + i, 2, axis) for i in range(3))
        x = jnp.maximum(jnp.maximum(first, middle), third)
    return x


def conv3x3(x: Maps, kernel: Kernel, rate: int) -> Maps:
    """Convolve by 3x3 at stride 1, with dilation `rate` and zero padding `rate`.

    Args:
      x: features, shape [B, H, W, I].
      kernel: shape [3, 3, I, O]. A side of 1 holds only the middle taps, where H (or W) <= rate: the others would meet
        only padding.
      rate: dilation >= 1.

    Returns:
      Features of shape [B, H, W, O], equal up to rounding to the plain convolution.

    Raises:
      UserError: the kernel of a compact model lacks taps that features of this size need.
    """
    taps = kernel.shape[:2]
    if any(side == 1 and size > rate for side, size in zip(taps, x.shape[1:3], strict=True)):
        raise UserError(
            "MODEL_TAPS_MISSING",
            f"expected features of at most {rate} rows or columns, because this compact model lacks the atrous taps of "
            f"rate {rate} beyond them, got {x.shape[1]}x{x.shape[2]}; compact the original run with "
            "--config.compact.drop_taps=False",
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
def _sum_of_taps(x: Maps, kernel: Kernel, rate: int) -> Maps:
    """Return the sum of the taps' products, added in float32 where the operands have fewer bits."""
    sum_dtype = jnp.promote_types(x.dtype, jnp.float32)
    out = jnp.zeros((*x.shape[:3], kernel.shape[3]), sum_dtype)
    for i, j, to, of in _windows(x.shape[1:3], kernel.shape[:2], rate):
        out = out.at[to].add(jnp.matmul(x[of], kernel[i, j], preferred_element_type=sum_dtype))
    return out.astype(x.dtype)


def _sum_of_taps_backward(rate: int, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    taps, dx = kernel.shape[:2], jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
    dk = [[jnp.zeros(kernel.shape[2:], kernel.dtype)] * taps[1] for _ in range(taps[0])]
    for i, j, to, of in _windows(x.shape[1:3], taps, rate):
        dx = dx.at[of].add(_to_input(dy[to], kernel[i, j], dx.dtype))
        dk[i][j] = _to_kernel(x[of], dy[to])
    return dx.astype(x.dtype), jnp.stack([jnp.stack(row) for row in dk])


_sum_of_taps.defvjp(lambda x, kernel, rate: (_sum_of_taps(x, kernel, rate), (x, kernel)), _sum_of_taps_backward)


def _windows(size: Size, taps: Size, rate: int) -> Iterator[tuple[int, int, Window, Window]]:
    """Yield the taps that meet real pixels: (row, column in the kernel, window of the output, window of the input)."""
    height, width = size
    for i in range(taps[0]):
        for j in range(taps[1]):
            dy, dx = (i - taps[0] // 2) * rate, (j - taps[1] // 2) * rate
            rows, columns = (max(0, -dy), min(height, height - dy)), (max(0, -dx), min(width, width - dx))
            if rows[0] < rows[1] and columns[0] < columns[1]:
                to = slice(None), slice(*rows), slice(*columns)
                of = slice(None), slice(rows[0] + dy, rows[1] + dy), slice(columns[0] + dx, columns[1] + dx)
                yield i, j, to, of


def _pixels(size: Size, taps: Size, rate: int) -> int:
    """Return the number of output pixels that a tap reaches, summed over the taps."""
    windows = [to for _, _, to, _ in _windows(size, taps, rate)]
    return sum((rows.stop - rows.start) * (columns.stop - columns.start) for _, rows, columns in windows)


def tap_share(size: Size, rate: int) -> float:
    """Return the fraction of the products of a dilated 3x3 convolution that meet pixels, not padding."""
    return _pixels(size, (3, 3), rate) / (9 * size[0] * size[1])


def macs(size: tuple[int, int], kernel_shape: tuple[int, ...], rate: int) -> int:
    """Return the multiply-accumulates of `conv3x3` on one image.

    Args:
      size: (height, width) of the features.
      kernel_shape: HWIO.
      rate: dilation.

    Returns:
      The number of products; those with padding count where the plain convolution computes them.
    """
    if not _by_taps(size, rate):
        pixels = size[0] * size[1] * kernel_shape[0] * kernel_shape[1]
    else:
        pixels = _pixels(size, kernel_shape[:2], rate)
    return pixels * kernel_shape[2] * kernel_shape[3]


class AtrousConv(nn.Module):
    """3x3 convolution without bias.

    Attributes:
      features: output channels.
      rate: dilation.
      kernel_init: initializer of the parameter `kernel` [*taps, I, features].
      dtype: dtype of the computation.
      taps: height and width of the kernel, 3 or 1, see `conv3x3`.
    """

    features: int
    rate: int
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.float32
    taps: tuple[int, int] = (3, 3)

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Map features [B, H, W, I] to [B, H, W, features]."""
        kernel = self.param("kernel", self.kernel_init, (*self.taps, x.shape[-1], self.features), jnp.float32)
        return conv3x3(x.astype(self.dtype), kernel.astype(self.dtype), self.rate)
