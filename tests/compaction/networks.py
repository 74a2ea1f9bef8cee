"""A grammar of random networks: the network is data, `init` draws its parameters and `apply` is a pure function.

Every layer adapts to the shape that it gets (a 3x3 convolution without padding is padded if the image is 2x2, say),
so that any list of layers is a network, and hypothesis shrinks one by leaving layers out.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

SIZE, CHANNELS = (8, 8), 3
NHWC = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True, repr=False)
class Layer:
    """A layer: its kind, the options that differ from the defaults, and the layers of its branches."""

    kind: str
    options: tuple[tuple[str, Any], ...] = ()
    branches: tuple[tuple["Layer", ...], ...] = ()

    def __getitem__(self, name):
        return dict(self.options)[name]

    def get(self, name, default):
        return dict(self.options).get(name, default)

    def __repr__(self):
        options = [f"{name}={value!r}" for name, value in self.options]
        return f"layer({', '.join([repr(self.kind), *map(repr, self.branches), *options])})"


def layer(kind, *branches, **options):
    return Layer(kind, tuple(sorted(options.items())), tuple(tuple(branch) for branch in branches))


@dataclasses.dataclass(frozen=True)
class Zeros:
    """Fractions: of a kernel's inputs, filters, pairs of both, and taps; of whole kernels; of the entries of scales."""

    inputs: float = 0.6
    filters: float = 0.0
    whole: float = 0.0
    scales: float = 0.0
    pairs: float = 0.0
    taps: float = 0.0


@dataclasses.dataclass(frozen=True)
class Network:
    """Layers in a chain, zeros, the seed of the parameters, and the layers whose outputs are returned, too."""

    layers: tuple[Layer, ...]
    zeros: Zeros = Zeros()
    seed: int = 0
    taps: tuple[int, ...] = ()


class _Values:
    """The parameters that exist, by name."""

    def __init__(self, values):
        self.values = values

    def scope(self, name):
        return _Values(self.values.get(name, {}))

    def _get(self, name, *args, **kwargs):
        return self.values[name]

    kernel = vector = scale = positive = mask = _get


class _Drawn:
    """Parameters drawn when a layer asks for them."""

    def __init__(self, rng, zeros):
        self.rng, self.zeros, self.values = rng, zeros, {}

    def scope(self, name):
        child = _Drawn(self.rng, self.zeros)
        self.values[name] = child.values
        return child

    def _set(self, name, value):
        self.values[name] = np.asarray(value)
        return jnp.asarray(value, jnp.float32)  # the image's type, of which only the shape matters here

    def kernel(self, name, shape, inputs=-2, filters=-1):
        value = self.rng.normal(size=shape)
        fan_in = max(1, math.prod(shape) // max(1, shape[filters])) if filters is not None else 1
        value *= math.sqrt(2 / fan_in)
        if inputs is not None:
            self._clear(value, inputs, self.zeros.inputs)
        if filters is not None and self.rng.random() < 0.5:
            self._clear(value, filters, self.zeros.filters)
        if self.rng.random() < self.zeros.whole:
            value[:] = 0
        if self.zeros.pairs and inputs is not None and filters is not None:
            pair = [n if axis in (inputs % value.ndim, filters % value.ndim) else 1 for axis, n in enumerate(shape)]
            value *= self.rng.random(pair) >= self.zeros.pairs
        if self.zeros.taps:
            value *= self.rng.random(shape) >= self.zeros.taps
        return self._set(name, value)

    def _clear(self, value, axis, fraction):
        """Set a fraction of the slices along the axis to zero, but never all by chance."""
        zero = self.rng.random(value.shape[axis]) < fraction
        zero[self.rng.integers(value.shape[axis])] = False
        np.moveaxis(value, axis, 0)[zero] = 0

    def vector(self, name, shape):
        return self._set(name, self.rng.normal(size=shape) * 0.3)

    def positive(self, name, shape):
        return self._set(name, self.rng.uniform(0.5, 2, shape))

    def scale(self, name, shape):
        """Factors, some of them zero."""
        return self._set(name, self.rng.uniform(0.5, 1.5, shape) * (self.rng.random(shape) >= self.zeros.scales))

    def mask(self, name, shape):
        """Zeros and ones."""
        return self._set(name, (self.rng.random(shape) >= self.zeros.inputs).astype(float))


def init(network, dtype=np.float64):
    """Return the parameters, a nested dict of NumPy arrays."""
    drawn = _Drawn(np.random.default_rng(network.seed), network.zeros)
    image = jax.ShapeDtypeStruct((2, *SIZE, CHANNELS), np.float32)
    jax.eval_shape(lambda image: _apply(network, drawn, image), image)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), drawn.values)


def apply(network, params, images):
    """Return the outputs for images (batch, height, width, 3): an array, or a dict if the network has taps."""
    return _apply(network, _Values(params), images)


def apply_from(start, network, params, x):
    """Return the outputs of the layers from index `start` on, for the activations that enter them."""
    for i, one in enumerate(network.layers[start:], start):
        x = _layer(one, _Values(params).scope(f"{i}_{one.kind}"), x)
    return x


def _apply(network, params, x):
    taps = {}
    for i, one in enumerate(network.layers):
        x = _layer(one, params.scope(f"{i}_{one.kind}"), x)
        if i in network.taps:
            taps[f"tap{i}"] = x
    return {"output": x, "taps": taps} if taps else x


def _layer(one, params, x):
    out = KINDS[one.kind](one, params, x)
    assert out.dtype == x.dtype, one
    return out


def _chain(layers, params, x):
    for i, one in enumerate(layers):
        x = _layer(one, params.scope(f"{i}_{one.kind}"), x)
    return x


def images(batch=2, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, *SIZE, CHANNELS)).astype(dtype)


# Steps (comparisons, signs, the largest of many) are not at 0: of a channel that is 0, rounding may leave the sign.
KINDS: dict[str, Callable] = {}


def kind(function):
    KINDS[function.__name__] = function
    return function


# ---------------------------------------------------------------------------------------------- convolutions


def _padding(one, x, kernel):
    reach = (kernel - 1) * one.get("dilation", 1) + 1
    padding = one.get("padding", "SAME")
    return padding if reach <= min(x.shape[1:3]) else "SAME"


def _convolve(one, x, kernel, groups=1, numbers=NHWC):
    return lax.conv_general_dilated(
        x,
        kernel,
        (one.get("stride", 1),) * 2,
        _padding(one, x, kernel.shape[numbers[1].index("H")]),
        rhs_dilation=(one.get("dilation", 1),) * 2,
        dimension_numbers=numbers,
        feature_group_count=groups,
    )


def _bias(one, params, x):
    return x + params.vector("bias", x.shape[-1:]) if one.get("bias", False) else x


@kind
def conv(one, params, x):
    groups = math.gcd(x.shape[-1], one.get("groups", 1))
    features = -(-one["features"] // groups) * groups
    size = one.get("kernel", 3)
    kernel = params.kernel("kernel", (size, size, x.shape[-1] // groups, features))
    return _bias(one, params, _convolve(one, x, kernel, groups))


@kind
def depthwise(one, params, x):
    size, channels = one.get("kernel", 3), x.shape[-1]
    kernel = params.kernel("kernel", (size, size, 1, channels * one.get("multiplier", 1)), inputs=-1)
    return _bias(one, params, _convolve(one, x, kernel, channels))


@kind
def channels_first(one, params, x):
    """A convolution of NCHW activations with an OIHW kernel."""
    size = one.get("kernel", 3)
    kernel = params.kernel("kernel", (one["features"], x.shape[-1], size, size), inputs=1, filters=0)
    out = lax.conv_general_dilated(jnp.moveaxis(x, -1, 1), kernel, (1, 1), "SAME")
    if one.get("bias", False):
        out = out + params.vector("bias", (one["features"],))[:, None, None]
    return jnp.moveaxis(out, 1, -1)


@kind
def conv_1d(one, params, x):
    """A convolution over the pixels in a row."""
    kernel = params.kernel("kernel", (3, x.shape[-1], one["features"]))
    pixels = x.reshape(x.shape[0], -1, x.shape[-1])
    out = lax.conv_general_dilated(pixels, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return out.reshape(*x.shape[:3], -1)


@kind
def batch_grouped(one, params, x):
    """A convolution whose groups are those of the batch: the second copy of the images reads other filters."""
    kernel = params.kernel("kernel", (1, 1, x.shape[-1], 2 * one["features"]))
    both = jnp.concatenate([x, x * 0.5])
    return lax.conv_general_dilated(both, kernel, (1, 1), "SAME", dimension_numbers=NHWC, batch_group_count=2)


@kind
def conv_transpose(one, params, x):
    stride = one.get("stride", 2) if max(x.shape[1:3]) <= 8 else 1
    flipped, features = one.get("transpose_kernel", False), one["features"]
    shape = (3, 3, features, x.shape[-1]) if flipped else (3, 3, x.shape[-1], features)
    kernel = params.kernel("kernel", shape, inputs=-1 if flipped else -2, filters=-2 if flipped else -1)
    out = lax.conv_transpose(
        x, kernel, (stride, stride), one.get("padding", "SAME"), dimension_numbers=NHWC, transpose_kernel=flipped
    )
    return _bias(one, params, out)


@kind
def weight_standardized(one, params, x):
    """A convolution whose kernel has mean 0 and variance 1, over all of a filter or over each of its channels."""
    kernel = params.kernel("kernel", (3, 3, x.shape[-1], one["features"]))
    axes = (0, 1) if one.get("each", False) else (0, 1, 2)
    mean, variance = jnp.mean(kernel, axes, keepdims=True), jnp.var(kernel, axes, keepdims=True)
    return _bias(one, params, _convolve(one, x, 0.3 * (kernel - mean) * lax.rsqrt(variance + 1e-3)))


@kind
def shared_conv(one, params, x):
    """Two convolutions with one kernel."""
    kernel = params.kernel("kernel", (3, 3, x.shape[-1], x.shape[-1]))
    return _convolve(one, jax.nn.relu(_convolve(one, x, kernel)), kernel)


@kind
def patches(one, params, x):
    """A dense layer on 3x3 patches."""
    out = lax.conv_general_dilated_patches(x, (3, 3), (1, 1), "SAME", dimension_numbers=NHWC)
    return out @ params.kernel("kernel", (out.shape[-1], one["features"]))


# ---------------------------------------------------------------------------------------------- products


@kind
def dense(one, params, x):
    return _bias(one, params, x @ params.kernel("kernel", (x.shape[-1], one["features"])))


@kind
def dense_transposed(one, params, x):
    """A kernel stored as (out, in)."""
    kernel = params.kernel("kernel", (one["features"], x.shape[-1]), inputs=1, filters=0)
    return _bias(one, params, jnp.einsum("bhwc,fc->bhwf", x, kernel))


@kind
def autoencoder(one, params, x):
    """A kernel and its transpose."""
    kernel = params.kernel("kernel", (x.shape[-1], one["features"]))
    return jax.nn.relu(x @ kernel) @ kernel.T


@kind
def low_rank(one, params, x):
    """A kernel and a product of two matrices added to it."""
    kernel = params.kernel("kernel", (x.shape[-1], one["features"]))
    update = params.kernel("down", (x.shape[-1], 2)) @ params.kernel("up", (2, one["features"]))
    return x @ (kernel + update) if one.get("base", True) else x @ update


@kind
def masked(one, params, x):
    """A kernel times a mask that is a parameter."""
    kernel = params.kernel("kernel", (x.shape[-1], one["features"]), inputs=None)
    return _bias(one, params, x @ (kernel * params.mask("mask", (x.shape[-1], 1))))


@kind
def bilinear(one, params, x):
    kernel = params.kernel("kernel", (x.shape[-1], x.shape[-1], one["features"]))
    return jnp.einsum("bhwc,cdf,bhwd->bhwf", x, kernel, x)


@kind
def flatten_dense(one, params, x):
    flat = x.reshape(x.shape[0], -1)
    out = _bias(one, params, flat @ params.kernel("kernel", (flat.shape[-1], one["features"])))
    return out.reshape(x.shape[0], 1, 1, -1)


@kind
def unflatten(one, params, x):
    """A dense layer whose outputs are pixels and channels."""
    mean = x.mean((1, 2))
    return (mean @ params.kernel("kernel", (x.shape[-1], 4 * one["features"]))).reshape(x.shape[0], 2, 2, -1)


@kind
def dynamic_kernel(one, params, x):
    """A dense layer whose kernel depends on the image."""
    flat = x.mean((1, 2)) @ params.kernel("kernel", (x.shape[-1], x.shape[-1] * one["features"]))
    kernels = flat.reshape(x.shape[0], x.shape[-1], one["features"])
    if one.get("loop", False):  # as many convolutions as images
        return jnp.concatenate([_convolve(one, x[i : i + 1], kernels[i][None, None]) for i in range(x.shape[0])])
    return jnp.einsum("bhwc,bcf->bhwf", x, kernels)


@kind
def quantized(one, params, x):
    """A product of integers."""
    kernel = jnp.round(params.kernel("kernel", (x.shape[-1], one["features"])) * 16).astype(jnp.int8)
    integers = jnp.clip(jnp.round(x * 8 + 0.1), -127, 127).astype(jnp.int8)
    out = lax.dot_general(integers, kernel, (((3,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return out.astype(x.dtype) / 64 + 0.1 * x.mean(-1, keepdims=True)


@kind
def attention(one, params, x):
    """Attention over the pixels; the kernels of queries, keys and values are one, or three."""
    heads, width, features = one.get("heads", 2), 3, one["features"]
    pixels = x.reshape(x.shape[0], -1, x.shape[-1])
    if one.get("fused", True):
        fused = pixels @ params.kernel("qkv", (x.shape[-1], 3 * heads * width))
        fused = fused + params.vector("bias", (3 * heads * width,))
        q, k, v = jnp.moveaxis(fused.reshape(*pixels.shape[:2], 3, heads, width), 2, 0)
    else:
        q, k, v = (
            jnp.einsum("bnc,chd->bnhd", pixels, params.kernel(name, (x.shape[-1], heads, width), inputs=0))
            for name in "qkv"
        )
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width)
    if one.get("causal", False):
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[2:], bool)), logits, -jnp.inf)
    weights = jax.nn.softmax(logits, -1)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    if one.get("merged", True):
        out = out.reshape(*pixels.shape[:2], -1) @ params.kernel("out", (heads * width, features))
    else:  # zeros are whole heads, or the same index in all heads
        kernel = params.kernel("out", (heads, width, features), inputs=one.get("zero_axis", 0))
        out = jnp.einsum("bnhd,hdf->bnf", out, kernel)
    return out.reshape(*x.shape[:3], features)


@kind
def dot_product_attention(one, params, x):
    """Attention of jax.nn."""
    pixels = x.reshape(x.shape[0], -1, x.shape[-1])
    q, k, v = (
        jnp.einsum("bnc,chd->bnhd", pixels, params.kernel(name, (x.shape[-1], 2, 4), inputs=0)) for name in "qkv"
    )
    out = jax.nn.dot_product_attention(q, k, v).reshape(*x.shape[:3], -1)
    return out @ params.kernel("out", (8, one["features"]))


# ---------------------------------------------------------------------------------------------- norms, scales


@kind
def batch_norm(one, params, x):
    channels = x.shape[-1:]
    mean, variance = params.vector("mean", channels), params.positive("var", channels)
    factor = lax.rsqrt(variance + 1e-5)
    if one.get("scale", True):
        factor = factor * params.scale("scale", channels)
    out = (x - mean) * factor
    return out + params.vector("bias", channels) if one.get("bias", True) else out


@kind
def batch_norm_training(one, params, x):
    """BatchNorm with the statistics of the batch."""
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) * lax.rsqrt(variance + 1e-2) * params.scale("scale", x.shape[-1:])


@kind
def layer_norm(one, params, x):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    out = (x - mean) * lax.rsqrt(variance + 1e-2) * params.scale("scale", x.shape[-1:])
    return _bias(one, params, out)


@kind
def rms_norm(one, params, x):
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-2) * params.scale("scale", x.shape[-1:])


@kind
def group_norm(one, params, x):
    groups = math.gcd(x.shape[-1], one.get("groups", 2))
    grouped = x.reshape(*x.shape[:3], groups, -1)
    mean, variance = grouped.mean((1, 2, 4), keepdims=True), grouped.var((1, 2, 4), keepdims=True)
    out = ((grouped - mean) * lax.rsqrt(variance + 1e-2)).reshape(x.shape)
    return _bias(one, params, out * params.scale("scale", x.shape[-1:]))


@kind
def unit_length(one, params, x):
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 0.1)


@kind
def layer_scale(one, params, x):
    return x * params.scale("scale", x.shape[-1:])


@kind
def position(one, params, x):
    """An embedding of the pixels, all of it a parameter."""
    return x + params.vector("embedding", x.shape[1:])


# ---------------------------------------------------------------------------------------------- elementwise


def _sign(x):
    return jnp.sign(x)


straight_through = jax.custom_vjp(_sign)
straight_through.defvjp(lambda x: (jnp.sign(x), x), lambda x, g: (jnp.where(jnp.abs(x) < 1, g, 0.1 * g),))

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "hard_swish": jax.nn.hard_swish,
    "relu6": jax.nn.relu6,
    "tanh": jnp.tanh,
    "softplus": jax.nn.softplus,
    "square": jnp.square,
    "clip": lambda x: jnp.clip(x, -0.5, 1.0),
    "where": lambda x: jnp.where(x > 0.1, x, jnp.cos(x)),
    "stop": lambda x: x + lax.stop_gradient(x),
    "barrier": lax.optimization_barrier,
    "cast": lambda x: x + (x > 0.02).astype(x.dtype),
}


@kind
def activation(one, params, x):
    return ACTIVATIONS[one["name"]](x)


@kind
def sign(one, params, x):
    """A layer whose gradient is not the function's."""
    return straight_through(x + 0.03) + 0.1 * x


@kind
def prelu(one, params, x):
    return jnp.where(x > 0, x, params.scale("slope", x.shape[-1:]) * x)


@kind
def channel_mask(one, params, x):
    """Every third channel is multiplied by 0."""
    return x * (jnp.arange(x.shape[-1]) % 3 > 0)


@kind
def channel_where(one, params, x):
    """Every third channel is replaced by a parameter."""
    return jnp.where(np.arange(x.shape[-1]) % 3 > 0, x, params.vector("other", x.shape[-1:]))


@kind
def softmax(one, params, x):
    return 3 * jax.nn.softmax(x, -1)


@kind
def cumsum(one, params, x):
    return jnp.cumsum(x, -1) * 0.5


@kind
def sort(one, params, x):
    return jnp.sort(x, -1)


@kind
def largest(one, params, x):
    """The largest channels, in order."""
    return lax.top_k(x, max(1, x.shape[-1] // 2))[0]


@kind
def ranks(one, params, x):
    """The channels in the order of their means."""
    return jnp.take_along_axis(x, jnp.argsort(x.mean((1, 2)), -1)[:, None, None], -1)


@kind
def one_hot(one, params, x):
    return x.mean(-1, keepdims=True) + jax.nn.one_hot(
        jnp.argmax(x + 0.01 * jnp.arange(x.shape[-1]), -1), 6, dtype=x.dtype
    )


@kind
def statistics(one, params, x):
    """Reductions over the channels."""
    total = jax.nn.logsumexp(x, -1, keepdims=True)
    return jnp.concatenate([total, x.min(-1, keepdims=True), jnp.prod(jnp.cos(x), -1, keepdims=True)], -1)


@kind
def dropout(one, params, x):
    """Dropout with the same mask for all images, the same each time."""
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.8, x.shape[1:]), x, 0) / 0.8


@kind
def embedding(one, params, x):
    """The row of a table at the index of the largest channel, added."""
    table = params.kernel("table", (x.shape[-1], x.shape[-1]), inputs=-1)
    return x + table[jnp.argmax(x + 0.01 * np.arange(x.shape[-1]), -1)]


# ---------------------------------------------------------------------------------------------- pixels


@kind
def pool(one, params, x):
    window, stride = one.get("window", 2), one.get("stride", 2)
    padding = "SAME" if window > min(x.shape[1:3]) else one.get("padding", "VALID")
    shape, strides = (1, window, window, 1), (1, stride, stride, 1)
    if one.get("name", "max") == "max":
        return lax.reduce_window(x, -jnp.inf, lax.max, shape, strides, padding)
    total = lax.reduce_window(x, 0.0, lax.add, shape, strides, padding)
    return total / lax.reduce_window(jnp.ones_like(x), 0.0, lax.add, shape, strides, padding)


@kind
def global_mean(one, params, x):
    return x.mean((1, 2), keepdims=True)


@kind
def global_max(one, params, x):
    return x.max((1, 2)).reshape(x.shape[0], 1, 1, -1)


@kind
def mean_map(one, params, x):
    """The mean over the pixels, at each pixel."""
    return jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape)


@kind
def resize(one, params, x):
    shape = (x.shape[0], min(12, 2 * x.shape[1]), min(12, 2 * x.shape[2]), x.shape[3])
    return jax.image.resize(x, shape, one.get("method", "linear"))


@kind
def crop(one, params, x):
    return x[:, ::2, : max(1, x.shape[2] - 1)]


@kind
def mean_subtracted(one, params, x):
    return x - 0.5 * x.mean((1, 2), keepdims=True)


@kind
def pixels_updated(one, params, x):
    """A row is set, another added to, a pixel set where an index says."""
    x = x.at[:, 0].set(0.5 * x[:, -1]).at[:, -1].add(x[:, 0])
    return lax.dynamic_update_slice(x, x[:, :1, :1] ** 2, (0, jnp.argmax(jnp.ones(3)), 0, 0))


@kind
def best_pixel(one, params, x):
    """The pixel whose first channel is the largest, and the mean of its neighbors, added."""
    pixels = x.reshape(x.shape[0], -1, x.shape[-1])
    index = jnp.argmax(pixels[..., :1], 1, keepdims=True)
    return x + jnp.take_along_axis(pixels, index, 1)[:, :, None]


@kind
def running(one, params, x):
    """Running sums, products and maxima over the pixels."""
    return lax.cummax(x, 1) + 0.1 * jnp.cumsum(x, 2) + jnp.cumprod(jnp.cos(x), 1)


@kind
def fourier(one, params, x):
    return jnp.abs(jnp.fft.fft(x, axis=1)) * 0.3


# ---------------------------------------------------------------------------------------------- channels


@kind
def channel_slice(one, params, x):
    return x[..., one.get("start", 1) if x.shape[-1] > 1 else 0 :: one.get("step", 1)]


@kind
def dynamic_slice(one, params, x):
    keep = max(1, x.shape[-1] // 2)
    return lax.dynamic_slice_in_dim(x, x.shape[-1] - keep, keep, 3)


@kind
def take(one, params, x):
    return x[..., np.random.default_rng(x.shape[-1]).integers(x.shape[-1], size=x.shape[-1])]


@kind
def channel_update(one, params, x):
    """Every second channel is overwritten."""
    return x.at[..., ::2].set(0.5 * x[..., ::2] ** 2)


@kind
def roll(one, params, x):
    return jnp.roll(x, 1, -1)


@kind
def reverse(one, params, x):
    return x[..., ::-1]


@kind
def channel_pad(one, params, x):
    """Zeros before and after the channels, or between them."""
    low, high, interior = one.get("pad", (1, 2, 0))
    return lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 0, 0), (0, 0, 0), (low, high, interior)))


@kind
def shuffle(one, params, x):
    groups = math.gcd(x.shape[-1], one.get("groups", 2))
    return x.reshape(*x.shape[:3], groups, -1).swapaxes(-1, -2).reshape(x.shape)


@kind
def repeat(one, params, x):
    if x.shape[-1] > 16:
        return x
    return jnp.repeat(x, 2, -1) if one.get("each", True) else jnp.tile(x, 2)


@kind
def maxout(one, params, x):
    return x.reshape(*x.shape[:3], -1, math.gcd(2, x.shape[-1])).max(-1)


@kind
def space_to_depth(one, params, x):
    batch, height, width, channels = x.shape
    if height % 2 or width % 2 or channels > 12:
        return x
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // 2, width // 2, 4 * channels)


@kind
def depth_to_space(one, params, x):
    batch, height, width, channels = x.shape
    if channels % 4 or height > 8:
        return x
    x = x.reshape(batch, height, width, 2, 2, channels // 4).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4)


@kind
def constant_channels(one, params, x):
    """Two channels of coordinates, appended."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in x.shape[1:3]), indexing="ij"), -1)
    return jnp.concatenate([x, jnp.broadcast_to(grid, (x.shape[0], *grid.shape)).astype(x.dtype)], -1)


# ---------------------------------------------------------------------------------------------- branches


def _branches(one, params, x):
    return [_chain(branch, params.scope(f"branch{i}"), x) for i, branch in enumerate(one.branches)]


def _fit(x, channels):
    """Pad with zero channels, or cut channels off."""
    missing = channels - x.shape[-1]
    return jnp.pad(x, ((0, 0),) * 3 + ((0, missing),)) if missing > 0 else x[..., :channels]


@kind
def concat(one, params, x):
    return jnp.concatenate([x, *_branches(one, params, x)][0 if one.get("dense", False) else 1 :], -1)


@kind
def residual(one, params, x):
    (out,) = _branches(one, params, x)
    if one.get("project", False):
        return out + x @ params.kernel("project", (x.shape[-1], out.shape[-1]))
    return out + _fit(x, out.shape[-1])


@kind
def split(one, params, x):
    """The halves of the channels go different ways."""
    if x.shape[-1] == 1:
        return x
    halves = jnp.split(x, [x.shape[-1] // 2], -1)
    parts = [
        _chain(b, params.scope(f"branch{i}"), h) for i, (b, h) in enumerate(zip(one.branches, halves, strict=True))
    ]
    if one.get("join", "concat") == "concat":
        return jnp.concatenate(parts, -1)
    return parts[0] + _fit(parts[1], parts[0].shape[-1])


@kind
def gate(one, params, x):
    """The product of two branches."""
    first, second = _branches(one, params, x)
    return first * _fit(jax.nn.sigmoid(second) if one.get("sigmoid", True) else second, first.shape[-1])


@kind
def glu(one, params, x):
    first, second = jnp.split(x[..., : x.shape[-1] // 2 * 2], 2, -1) if x.shape[-1] > 1 else (x, x)
    return first * jax.nn.sigmoid(second)


@kind
def stack(one, params, x):
    """The largest of two branches, or their sum, over a new axis."""
    first, second = _branches(one, params, x)
    both = jnp.stack([first, _fit(second, first.shape[-1])])
    return both.sum(0) if one.get("sum", True) else both.max(0)


@kind
def upper_lower(one, params, x):
    """One branch in the upper half of the image, another in the lower, with zero channels where it is narrower."""
    first, second = _branches(one, params, x)
    half = x.shape[1] // 2
    return jnp.concatenate([first[:, :half], _fit(second, first.shape[-1])[:, half:]], 1)


@kind
def overwritten(one, params, x):
    """One branch, whose first row of pixels is written by the other one."""
    first, second = _branches(one, params, x)
    return lax.dynamic_update_slice(first, _fit(second, first.shape[-1])[:, :1], (0, 0, 0, 0))


@kind
def squeeze_excite(one, params, x):
    squeezed = jax.nn.relu(x.mean((1, 2)) @ params.kernel("down", (x.shape[-1], 4)) + params.vector("bias", (4,)))
    return x * jax.nn.sigmoid(squeezed @ params.kernel("up", (4, x.shape[-1])))[:, None, None]


# ---------------------------------------------------------------------------------------------- calls


@kind
def checkpoint(one, params, x):
    """A block that is computed again for the gradients; parameters are drawn outside."""
    inner = params.scope("inner")
    if isinstance(inner, _Drawn):
        return _chain(one.branches[0], inner, x)
    return jax.checkpoint(lambda values, x: _chain(one.branches[0], _Values(values), x))(inner.values, x)


@kind
def jitted(one, params, x):
    """A block under jit."""
    inner = params.scope("inner")
    if isinstance(inner, _Drawn):
        return _chain(one.branches[0], inner, x)
    return jax.jit(lambda values, x: _chain(one.branches[0], _Values(values), x))(inner.values, x)


@kind
def barrier(one, params, x):
    """A product of what passed an optimization barrier, together."""
    kernel = params.kernel("kernel", (x.shape[-1], one["features"]))
    x, kernel = lax.optimization_barrier((x, kernel))
    return x @ kernel


@kind
def scan(one, params, x):
    """Two dense layers by lax.scan, whose kernels are one parameter."""
    kernels = params.kernel("kernel", (2, x.shape[-1], x.shape[-1]))
    return lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]


@kind
def loop(one, params, x):
    """One dense layer, twice, by lax.fori_loop."""
    kernel = params.kernel("kernel", (x.shape[-1], x.shape[-1]))
    return lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ kernel), x)


@kind
def cond(one, params, x):
    first, second = (params.kernel(name, (x.shape[-1], one["features"])) for name in ("first", "second"))
    return lax.cond(jnp.sum(x) > 0.01, lambda x: x @ first, lambda x: x @ second, x)


# ---------------------------------------------------------------------------------------------- strategies

_FEATURES = st.integers(1, 12)
_EXPLICIT = ((1, 0), (0, 2))


def _options(kind, **options):
    """Return a strategy of layers of a kind; options other than the features are at their default half of the time."""
    features = {"features": options.pop("features")} if "features" in options else {}
    return st.fixed_dictionaries(features, optional=options).map(lambda options: layer(kind, **options))


_BIAS = st.just(True)
_KEEP_SIZE = {  # the kinds that keep the size of the images
    "conv": dict(
        features=_FEATURES, kernel=st.just(1), dilation=st.just(2), bias=_BIAS, groups=st.sampled_from([2, 3])
    ),
    "depthwise": dict(multiplier=st.just(2), kernel=st.just(1), dilation=st.just(2), bias=_BIAS),
    "channels_first": dict(features=_FEATURES, bias=_BIAS),
    "conv_1d": dict(features=_FEATURES),
    "weight_standardized": dict(features=_FEATURES, each=st.just(True), bias=_BIAS),
    "shared_conv": {},
    "patches": dict(features=_FEATURES),
    "batch_grouped": dict(features=_FEATURES),
    "dense": dict(features=_FEATURES, bias=_BIAS),
    "dense_transposed": dict(features=_FEATURES, bias=_BIAS),
    "autoencoder": dict(features=_FEATURES),
    "low_rank": dict(features=_FEATURES, base=st.just(False)),
    "masked": dict(features=_FEATURES, bias=_BIAS),
    "bilinear": dict(features=_FEATURES),
    "dynamic_kernel": dict(features=_FEATURES, loop=st.just(True)),
    "quantized": dict(features=_FEATURES),
    "barrier": dict(features=_FEATURES),
    "attention": dict(
        features=_FEATURES,
        heads=st.just(3),
        fused=st.just(False),
        merged=st.just(False),
        zero_axis=st.just(1),
        causal=st.just(True),
    ),
    "dot_product_attention": dict(features=_FEATURES),
    "batch_norm": dict(scale=st.just(False), bias=st.just(False)),
    "batch_norm_training": {},
    "layer_norm": dict(bias=_BIAS),
    "rms_norm": {},
    "group_norm": dict(groups=st.sampled_from([3, 4]), bias=_BIAS),
    "unit_length": {},
    "layer_scale": {},
    "position": {},
    "sign": {},
    "prelu": {},
    "channel_mask": {},
    "channel_where": {},
    "softmax": {},
    "cumsum": {},
    "sort": {},
    "embedding": {},
    "largest": {},
    "ranks": {},
    "one_hot": {},
    "statistics": {},
    "dropout": {},
    "pixels_updated": {},
    "best_pixel": {},
    "running": {},
    "fourier": {},
    "mean_subtracted": {},
    "mean_map": {},
    "channel_slice": dict(start=st.integers(0, 2), step=st.just(2)),
    "dynamic_slice": {},
    "take": {},
    "channel_update": {},
    "roll": {},
    "reverse": {},
    "channel_pad": dict(pad=st.sampled_from([(2, 0, 0), (0, 1, 1), (-1, 2, 0), (1, -1, 2)])),
    "shuffle": dict(groups=st.sampled_from([3, 4])),
    "repeat": dict(each=st.just(False)),
    "maxout": {},
    "constant_channels": {},
    "glu": {},
    "squeeze_excite": {},
    "scan": {},
    "loop": {},
    "cond": dict(features=_FEATURES),
}
_CHANGE_SIZE = {
    "conv": dict(
        features=_FEATURES, stride=st.just(2), padding=st.sampled_from(["VALID", _EXPLICIT]), dilation=st.just(2)
    ),
    "depthwise": dict(stride=st.just(2), padding=st.sampled_from(["VALID", _EXPLICIT])),
    "conv_transpose": dict(
        features=_FEATURES,
        stride=st.just(1),
        padding=st.just("VALID"),
        transpose_kernel=st.just(True),
        bias=_BIAS,
    ),
    "flatten_dense": dict(features=_FEATURES, bias=_BIAS),
    "unflatten": dict(features=_FEATURES),
    "pool": dict(name=st.just("mean"), window=st.just(3), stride=st.just(1), padding=st.just("SAME")),
    "global_mean": {},
    "global_max": {},
    "resize": dict(method=st.sampled_from(["nearest", "cubic"])),
    "crop": {},
    "space_to_depth": {},
    "depth_to_space": {},
}


def _either(*strategies):
    """Draw from one of the strategies, each with the same probability, however many alternatives it has."""
    return st.integers(0, len(strategies) - 1).flatmap(lambda i: strategies[i])


def _kinds(table):
    return _either(*(_options(kind, **options) for kind, options in table.items()))


def _branching(inner):
    chain = st.lists(inner, min_size=1, max_size=3)
    return _either(
        st.builds(lambda a, project: layer("residual", a, project=project), chain, st.booleans()),
        st.builds(lambda a, b, dense: layer("concat", a, b, dense=dense), chain, chain, st.booleans()),
        st.builds(lambda a, b, add: layer("split", a, b, join="add" if add else "concat"), chain, chain, st.booleans()),
        st.builds(lambda a, b, sigmoid: layer("gate", a, b, sigmoid=sigmoid), chain, chain, st.booleans()),
        st.builds(lambda a, b, total: layer("stack", a, b, sum=total), chain, chain, st.booleans()),
        st.builds(lambda a, b: layer("upper_lower", a, b), chain, chain),
        st.builds(lambda a, b: layer("overwritten", a, b), chain, chain),
        st.builds(lambda a: layer("checkpoint", a), chain),
        st.builds(lambda a: layer("jitted", a), chain),
    )


_ACTIVATIONS = st.sampled_from(list(ACTIVATIONS)).map(lambda name: layer("activation", name=name))
_NORM = st.sampled_from(["batch_norm", "batch_norm", "batch_norm", "layer_norm", "group_norm"]).map(layer)
_CONV = _options("conv", **_KEEP_SIZE["conv"])
_SMALL = _either(_CONV, _ACTIVATIONS, _NORM, _kinds(_KEEP_SIZE), _kinds(_KEEP_SIZE))
_BRANCHING = _branching(_either(_SMALL, _SMALL, _SMALL, _branching(_SMALL)))
_LAYER = _either(_CONV, _ACTIVATIONS, _NORM, _kinds(_KEEP_SIZE), _kinds(_KEEP_SIZE), _kinds(_CHANGE_SIZE), _BRANCHING)
ZEROS = st.builds(
    Zeros,
    inputs=st.sampled_from([0.5, 0.65, 0.8, 0.0]),
    filters=st.sampled_from([0.0, 0.3, 0.6]),
    whole=st.sampled_from([0.0, 0.0, 0.15]),
    scales=st.sampled_from([0.0, 0.3]),
    pairs=st.sampled_from([0.0, 0.6]),
    taps=st.sampled_from([0.0, 0.4]),
)


@st.composite
def networks(draw, most=6):
    """Return a strategy of networks of 3 to `most` layers that end with a convolution, so that it can read less."""
    layers = [*draw(st.lists(_LAYER, min_size=2, max_size=most - 1)), draw(_CONV)]
    taps = draw(st.sets(st.integers(0, len(layers) - 2), max_size=1)) if draw(st.integers(0, 3)) == 3 else ()
    return Network(tuple(layers), draw(ZEROS), draw(st.integers(0, 1000)), tuple(sorted(taps)))
