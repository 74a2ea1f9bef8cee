"""Dilated ResNet 10, 18, 50 and 101 with output stride 8.

The stem has three 3x3 convolutions, the bottlenecks are v1.5 (the stride is in the 3x3), and the stages have widths
64/128/256/512, strides 1/2/1/1 and dilations 1/1/2/4. That is the reference implementation of "Less is More", except
for the first convolution of a basic block, which it does not dilate. Other stems are those of networks with published
ImageNet weights (`STEMS`). Padding is explicit and symmetric, as in PyTorch, whose weights give the same outputs here.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_sparse.models import atrous, initializers
from mtl_sparse.models import widths as widths_lib

# depth -> (bottleneck blocks?, blocks in each of the four stages)
STAGES = {10: (False, (1, 1, 1, 1)), 18: (False, (2, 2, 2, 2)), 50: (True, (3, 4, 6, 3)), 101: (True, (3, 4, 23, 3))}
STRIDES = (1, 2, 1, 1)
DILATIONS = (1, 1, 2, 4)
OUTPUT_STRIDE = 8
# Outputs of the stem's convolutions, relative to the width of the first stage: one is a 7x7, three are 3x3.
STEMS: dict[str, tuple[float, ...]] = {
    "deep": (1, 1, 2),  # the paper's
    "7x7": (1,),  # torchvision's
    # timm's resnet50d (He et al. 2019, "Bag of Tricks", ResNet-D): shortcuts that change the width average 2x2 pixels
    # instead of using a stride. As in timm, they also average where a dilation replaces the stride.
    "resnet_d": (0.5, 0.5, 1),
}
BN_EPSILON = 1e-5

Maps = Float[Array, "B H W C"]


def conv(features: int, size: int, stride: int = 1, dilation: int = 1, *, dtype: Any, name: str) -> nn.Conv:
    """Return a convolution without bias, zero-padded so that stride 1 keeps the size."""
    pad = dilation * (size // 2)
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=((pad, pad), (pad, pad)),
        kernel_dilation=(dilation, dilation),
        use_bias=False,
        kernel_init=initializers.before_norm,
        dtype=dtype,
        conv_general_dilated=atrous.conv,
        name=name,
    )


def batch_norm(module: Any, train: bool, name: str, epsilon: float = BN_EPSILON) -> nn.BatchNorm:
    """Return a BatchNorm that is synchronized over devices, with statistics and parameters in float32.

    Args:
      module: module with a `dtype`, an `axis_name` and a `bn_momentum`, which the BatchNorm takes over.
      train: whether to normalize by the statistics of the batch.
      name: name of the layer.
      epsilon: added to the variance.

    Returns:
      The layer.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=module.bn_momentum,
        epsilon=epsilon,
        dtype=module.dtype,
        axis_name=module.axis_name,
        name=name,
    )


def averaged(x: Maps, size: tuple[int, ...]) -> Maps:
    """Return x average-pooled to the height and width `size`."""
    strides = tuple(round(side / wanted) for side, wanted in zip(x.shape[1:3], size, strict=True))
    if strides == (1, 1):
        return x
    # jax2onnx's avg_pool takes keywords only.
    return nn.avg_pool(x, window_shape=strides, strides=strides, padding="SAME", count_include_pad=False)


def _ones(x: Maps, stride: int) -> Maps:
    """Return the input of a convolution whose inputs are constant: a map of ones, of the size of x over `stride`."""
    return jnp.ones((1, -(-x.shape[1] // stride), -(-x.shape[2] // stride), 1), x.dtype)


def _averaged_2x2(x: Maps, stride: int) -> Maps:
    """Return means over 2x2 pixels as timm's ResNet-D does: padding counts as zeros at stride 1, and not otherwise."""
    if stride == 1:
        return nn.avg_pool(jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))), window_shape=(2, 2))
    strides = (stride, stride)
    return nn.avg_pool(x, window_shape=(2, 2), strides=strides, padding="SAME", count_include_pad=False)


class Block(nn.Module):
    """Residual block: bottleneck (1x1, 3x3, 1x1) or basic (3x3, 3x3).

    Attributes:
      widths: widths of its layers.
      stride: stride of the first 3x3 convolution and the shortcut.
      dilation: dilation of the 3x3 convolutions.
      bottleneck: whether it is a bottleneck.
      averages: whether the shortcut's convolution reads means over 2x2 pixels instead of using a stride.
      dtype: dtype of the computation.
      axis_name: pmap axis over which BatchNorm is synchronized while training.
      bn_momentum: momentum of every BatchNorm, see `ResNet`.
    """

    widths: widths_lib.Block
    stride: int
    dilation: int
    bottleneck: bool
    averages: bool = False
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> tuple[Maps, dict[str, Maps]]:
        """Map the residual stream before the block to that after it.

        Args:
          x: the stream before the block.
          train: whether to normalize by the statistics of the batch.

        Returns:
          (the stream after the block, {"conv1:raw": output of the branch's first convolution, "conv1": the same after
          BatchNorm and ReLU, and so on; the last convolution has only "conv3:raw", or "conv2:raw"}).
        """
        stream = self.widths.stream
        nothing = x[:, :: self.stride, :: self.stride, :0]
        if not self.widths.features[-1]:
            return nothing, {}
        norm = functools.partial(batch_norm, self, train)
        y, inner = self._branch(x, norm)
        if self.widths.shortcut == "none":
            return nothing, inner
        if self.widths.shortcut == "conv":
            x = widths_lib.select(x, self.widths.shortcut_reads)
            x, stride_left = (_averaged_2x2(x, self.stride), 1) if self.averages else (x, self.stride)
            x = norm("downsample_bn")(conv(stream, 1, stride_left, dtype=self.dtype, name="downsample_conv")(x))
        elif self.widths.shortcut == "identity":
            x = x[..., :stream]
        else:
            x = jnp.zeros((1, *x[:, :: self.stride, :: self.stride].shape[1:3], stream), x.dtype)
        if isinstance(y, int) or self.widths.shortcut == "constant":
            y += self.param("constant", nn.initializers.zeros_init(), (stream,), jnp.float32).astype(x.dtype)
        return nn.relu(x + y), inner

    def _branch(self, x: Maps, norm: Callable[[str], nn.BatchNorm]) -> tuple[Any, dict[str, Maps]]:
        """Return (the branch's output, 0 where all of its convolutions are removed; the outputs inside it)."""
        features, dead = self.widths.features, self.widths.dead
        # (kernel size, stride, dilation) of the branch's convolutions
        spatial = (3, self.stride, self.dilation)
        layers = [(1, 1, 1), spatial, (1, 1, 1)] if self.bottleneck else [spatial, (3, 1, self.dilation)]
        inner: dict[str, Maps] = {}
        if dead == len(layers):
            return 0, inner
        removed_stride = math.prod(stride for _, stride, _ in layers[:dead])
        ones = dead or self.widths.reads == ()
        y = _ones(x, removed_stride) if ones else widths_lib.select(x, self.widths.reads)
        for i, (size, stride, dilation) in enumerate(layers[dead : len(features)], dead + 1):
            y = conv(features[i - 1], size, stride, dilation, dtype=self.dtype, name=f"conv{i}")(y)
            inner[f"conv{i}:raw"] = y
            passed = self.widths.passed[i - 1]
            if not passed:
                break
            y = norm(f"bn{i}")(y if passed == features[i - 1] else y[..., :passed])
            if i < len(layers):
                y = inner[f"conv{i}"] = nn.relu(y)
        return y, inner


class ResNet(nn.Module):
    """Dilated ResNet.

    Attributes:
      depth: 10, 18, 50 or 101.
      width: channels of the first stage (64 in the paper); the others follow from it.
      stem: a key of `STEMS`.
      dtype: dtype of the computation; parameters and BatchNorm statistics are float32.
      axis_name: pmap axis over which BatchNorm is synchronized while training.
      bn_momentum: fraction of the old running statistics that a step keeps (PyTorch's 0.1 is 0.9 here).
      layers: widths of the stem and the blocks; None is dense, from `width`.
      points: where features are read, of `points(depth)`; None is the end. Layers after the last point are not built.
    """

    depth: int = 50
    width: int = 64
    stem: str = "deep"
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None
    bn_momentum: float = 0.9
    layers: tuple[widths_lib.Stem, tuple[widths_lib.Block, ...]] | None = None
    points: tuple[str, ...] | None = None

    @nn.compact
    def __call__(self, x: Maps, train: bool = False) -> Maps | tuple[Maps, ...]:
        """Map images to features.

        Args:
          x: images [B, H, W, 3].
          train: whether to normalize by the statistics of the batch.

        Returns:
          Features [B, H/8, W/8, C], 32 * width channels when dense (8 * width for depths 10 and 18). With `points`, a
          tuple of the features at each point; those before the last stride are average-pooled to H/8, W/8. A compact
          model that reads nothing of x returns [1, H/8, W/8, C].
        """
        stem, blocks = self.layers or dense(self.depth, self.width, self.points, self.stem)
        size = tuple(-(-side // OUTPUT_STRIDE) for side in x.shape[1:3])
        x = self._stem(x.astype(self.dtype), train, stem)
        found = {"stem": x}
        for place, widths in zip(places(self.depth), blocks, strict=False):
            x, inner = Block(
                widths=widths,
                stride=place.stride,
                dilation=place.dilation,
                bottleneck=STAGES[self.depth][0],
                averages=self.stem == "resnet_d" and place.stage > 0,
                dtype=self.dtype,
                axis_name=self.axis_name,
                bn_momentum=self.bn_momentum,
                name=place.name,
            )(x, train)
            found |= {place.name: x, **{f"{place.name}/{name}": y for name, y in inner.items()}}
        if self.points is None:
            return x
        nothing = jnp.zeros((1, *size, 0), x.dtype)  # compaction removed a point that no head needs
        return tuple(averaged(found.get(point, nothing), size) for point in self.points)

    def _stem(self, x: Maps, train: bool, widths: widths_lib.Stem) -> Maps:
        features, dead = widths.features, widths.dead
        if not features[-1]:
            return x[:1, ::4, ::4, :0]
        if dead == len(features):
            constant = self.param("constant", nn.initializers.zeros_init(), (features[-1],), jnp.float32)
            return jnp.broadcast_to(constant.astype(x.dtype), (1, *x[:, ::4, ::4].shape[1:3], features[-1]))
        x = _ones(x, 2) if dead else widths_lib.select(x, widths.reads)
        for i in range(dead + 1, len(features) + 1):
            x = conv(
                features[i - 1],
                7 if len(features) == 1 else 3,
                2 if i == 1 else 1,
                dtype=self.dtype,
                name=f"stem_conv{i}",
            )(x)
            x = nn.relu(batch_norm(self, train, f"stem_bn{i}")(x))
        return atrous.max_pool(x)


@dataclasses.dataclass(frozen=True)
class Place:
    """Position of a block in the network.

    Attributes:
      name: name of the block's module.
      stage: index of its stage.
      stride: stride of its first 3x3 convolution and its shortcut.
      dilation: dilation of its 3x3 convolutions.
    """

    name: str
    stage: int
    stride: int
    dilation: int


def places(depth: int) -> tuple[Place, ...]:
    """Return the positions of a network's blocks, in order."""
    return tuple(
        Place(f"layer{stage + 1}_{index}", stage, STRIDES[stage] if index == 0 else 1, DILATIONS[stage])
        for stage, count in enumerate(STAGES[depth][1])
        for index in range(count)
    )


def points(depth: int) -> tuple[str, ...]:
    """Return the attachment points of a network, where a head can read features, in order.

    They are "stem", "layer3_2" (the residual stream after that block), "layer3_2/conv1" (inside it, after the
    convolution's BatchNorm and ReLU), and "layer3_2/conv1:raw" (the output of the convolution itself, before both). The
    last point is the default.
    """
    last = 3 if STAGES[depth][0] else 2
    inner = [*(f"/conv{i}{kind}" for i in range(1, last) for kind in (":raw", "")), f"/conv{last}:raw", ""]
    return ("stem", *(place.name + name for place in places(depth) for name in inner))


def unavoidable(read: Sequence[str] = ()) -> tuple[str, ...]:
    """Return regular expressions of the layers on every path from the images to a point in `read`.

    They are the stem, the convolution of a shortcut that changes width or stride, and, for a point inside a block, the
    convolutions of that block up to the point. While none of them is entirely zero, the features depend on the images.

    Args:
      read: attachment points, see `points`; () is the end of the network.

    Returns:
      Expressions of layer names below the backbone, such as "layer2_0/downsample_conv".
    """
    inner = [point.removesuffix(":raw").rpartition("/conv") for point in read if "/conv" in point]
    return (r"stem_conv\d", r"[^/]+/downsample_conv", *(f"{block}/conv[1-{last}]" for block, _, last in inner))


def dense(
    depth: int, width: int, read: tuple[str, ...] | None = None, stem: str = "deep"
) -> tuple[widths_lib.Stem, tuple[widths_lib.Block, ...]]:
    """Return the widths of the dense network.

    Args:
      depth: a key of `STAGES`.
      width: channels of the first stage.
      read: attachment points, see `points`; None is the end of the network.
      stem: a key of `STEMS`.

    Returns:
      (stem, blocks up to the last point).
    """
    bottleneck = STAGES[depth][0]
    last = points(depth)[-1] if read is None else max(read, key=points(depth).index)
    front = widths_lib.Stem(tuple(max(1, int(fraction * width)) for fraction in STEMS[stem]))
    before = front.stream
    blocks: list[widths_lib.Block] = []
    for place in places(depth) if last != "stem" else ():
        inner = width * 2**place.stage
        after = inner * (4 if bottleneck else 1)
        features: tuple[int, ...] = (inner, inner, after) if bottleneck else (inner, after)
        shortcut = "conv" if place.stride != 1 or before != after else "identity"
        block, _, layer = last.removesuffix(":raw").partition("/conv")
        normalized: tuple[int, ...] = ()
        if place.name == block and layer:
            features, shortcut = features[: int(layer)], "none"
            normalized = (*features[:-1], 0) if last.endswith(":raw") else ()
        blocks.append(widths_lib.Block(features, shortcut, normalized=normalized))
        before = after
        if place.name == block:
            break
    return front, tuple(blocks)
