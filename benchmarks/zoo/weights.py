"""Random weights that let an image through, and patterns of zeros in them."""

import math
import re
import zlib

import jax
import numpy as np

TABLES = re.compile(
    r"embed(?!.*kernel)(?!.*proj)|position|pos_|cls|token|relative|bias_table|positions|logit_scale", re.I
)


def path_of(path):
    """Return a leaf's path as text."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def generator(*names):
    """Return a NumPy generator that depends on names only."""
    return np.random.default_rng([zlib.crc32(str(name).encode()) for name in names])


def is_float(leaf):
    """Return whether a leaf is an array of real numbers."""
    return hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, np.floating)


def input_axes(path, shape, layout):
    """Return the axes of a kernel's input channels, or () if a leaf is not a kernel of channels.

    Depthwise kernels, tables (embeddings, positions) and kernels that read the image's channels are none.
    """
    last = path.lower().rsplit("/", 1)[-1]
    if len(shape) < 2 or (TABLES.search(path) and not re.search(r"kernel|proj", last) and len(shape) != 4):
        return ()
    depthwise = layout == "io" and len(shape) == 4 and shape[-1] == 1 and math.prod(shape[:2]) > 1
    if depthwise or "depthwise" in path.lower() or max(shape) == math.prod(shape):
        return ()
    if len(shape) == 3:
        if re.search(r"(query|key|value)/kernel$", path):
            return (0,)
        return (0, 1) if path.endswith("out/kernel") else ((1,) if "scan" in path.lower() or "Mixer" in path else ())
    transposed = last == "w" and "transpose" in path  # Haiku's transposed convolution has its inputs last
    axes = (1,) if layout == "oi" else (len(shape) - (1 if transposed else 2),)
    channels = math.prod(shape[axis] for axis in axes)
    return () if channels in (1, 3) or len(shape) not in (2, 4) or "bias" in last else axes


def draw(path, leaf, layout):
    """Return a random array for a leaf, by its name and shape."""
    rng, shape, name = generator("weights", path), leaf.shape, path.lower()
    last = name.rsplit("/", 1)[-1]
    vector = len(shape) < 2 or max(shape) == math.prod(shape)
    if re.search(r"var", last) or "var_ema" in name:
        return rng.uniform(0.5, 1.5, shape)
    if re.search(r"mean", last) or "mean_ema" in name:
        return rng.normal(0, 0.1, shape)
    if re.search(r"bias|beta|offset", last) or last == "b":
        return rng.normal(0, 0.1, shape)
    if vector:
        return rng.uniform(0.5, 1.5, shape)
    if TABLES.search(name) and len(shape) != 4 and "kernel" not in last:
        return rng.normal(0, 0.5, shape)
    if layout == "oi":
        inputs = math.prod(shape[1:])
    elif len(shape) == 4 and shape[-1] == 1 and math.prod(shape[:2]) > 1:
        inputs = math.prod(shape[:-2])
    elif len(shape) == 3 and re.search(r"(query|key|value)/kernel$", path):
        inputs = shape[0]
    else:
        inputs = math.prod(shape[:-1])
    return rng.normal(0, math.sqrt(2 / inputs), shape)


def is_kernel(path, shape):
    """Return whether a leaf is a kernel, of whatever channels."""
    table = TABLES.search(path) and len(shape) != 4 and "kernel" not in path.lower().rsplit("/", 1)[-1]
    return len(shape) > 1 and max(shape) != math.prod(shape) and not table


def randomize(params, layout, gain=1.0):
    """Return weights drawn anew, as float64 NumPy arrays; other leaves stay, or are zero if given by shape."""

    def one(path, leaf):
        if is_float(leaf):
            drawn = draw(path_of(path), leaf, layout).astype(np.float64)
            return drawn * gain if is_kernel(path_of(path), leaf.shape) else drawn
        return np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf

    return jax.tree_util.tree_map_with_path(one, params)


def kernels(params, layout):
    """Return the paths of the kernels whose input channels are set to zero."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [path_of(path) for path, leaf in leaves if is_float(leaf) and input_axes(path_of(path), leaf.shape, layout)]


def sparsify(params, layout, rate, whole=()):
    """Return weights with a random part of each kernel's input channels zero.

    What stays of a kernel is scaled so that its output keeps its size. The weights are float32 numbers.

    Args:
        params: tree of float64 NumPy arrays.
        layout: the case's.
        rate: fraction of a kernel's input channels that are set to zero, one choice a kernel.
        whole: paths of kernels that are wholly zero.
    """

    def one(path, leaf):
        name = path_of(path)
        axes = input_axes(name, leaf.shape, layout) if is_float(leaf) else ()
        if name in whole:
            return np.zeros_like(leaf)
        if not axes:
            return np.float32(leaf).astype(np.float64) if is_float(leaf) else leaf
        shape = tuple(size if axis in axes else 1 for axis, size in enumerate(leaf.shape))
        channels = math.prod(shape)
        count = min(round(rate * channels), channels - 1)
        kept = np.ones(channels)
        kept[generator("zeros", rate, name).permutation(channels)[:count]] = 0
        return np.float32(leaf * kept.reshape(shape) * math.sqrt(channels / (channels - count))).astype(np.float64)

    return jax.tree_util.tree_map_with_path(one, params)
