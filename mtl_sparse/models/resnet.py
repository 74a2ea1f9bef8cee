"""Dilated ResNet-D 18, 50 and 101: output stride 8, trained from scratch.

Stem of three 3x3 convolutions (ResNet-D), v1.5 bottlenecks (the stride sits in the 3x3), stages of width
64/128/256/512 with strides 1/2/1/1 and dilations 1/1/2/4, as in the released code of "Less is More".
Padding is explicit and symmetric, as PyTorch's is, so that its weights give the same outputs here.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp

# depth -> (bottleneck blocks?, blocks in each of the four stages)
STAGES = {18: (False, (2, 2, 2, 2)), 50: (True, (3, 4, 6, 3)), 101: (True, (3, 4, 23, 3))}
STRIDES = (1, 2, 1, 1)
DILATIONS = (1, 1, 2, 4)
OUTPUT_STRIDE = 8

kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(features: int, size: int, stride: int = 1, dilation: int = 1, *, dtype, name: str) -> nn.Conv:
    """Convolution without bias, zero-padded so that stride 1 keeps the size."""
    pad = dilation * (size // 2)
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=((pad, pad), (pad, pad)),
        kernel_dilation=(dilation, dilation),
        use_bias=False,
        kernel_init=kernel_init,
        dtype=dtype,
        name=name,
    )


def batch_norm(module: nn.Module, train: bool, name: str) -> nn.BatchNorm:
    """BatchNorm by the dtype, axis_name and bn_momentum of the module that it belongs to.

    It is synchronised over `axis_name`; its statistics and parameters stay float32 whatever the dtype.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=module.bn_momentum,
        epsilon=1e-5,
        dtype=module.dtype,
        axis_name=module.axis_name,
        name=name,
    )


class Block(nn.Module):
    """Residual block: bottleneck (1x1, 3x3, 1x1 at 4 x width) or basic (3x3, 3x3 at width)."""

    width: int
    stride: int
    dilation: int
    bottleneck: bool
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train: bool):
        convolve = functools.partial(conv, dtype=self.dtype)
        norm = functools.partial(batch_norm, self, train)
        features = self.width * (4 if self.bottleneck else 1)
        spatial = {"stride": self.stride, "dilation": self.dilation}
        if self.bottleneck:
            y = nn.relu(norm("bn1")(convolve(self.width, 1, name="conv1")(x)))
            y = nn.relu(norm("bn2")(convolve(self.width, 3, **spatial, name="conv2")(y)))
            y = norm("bn3")(convolve(features, 1, name="conv3")(y))
        else:
            y = nn.relu(norm("bn1")(convolve(self.width, 3, **spatial, name="conv1")(x)))
            y = norm("bn2")(convolve(features, 3, dilation=self.dilation, name="conv2")(y))
        if self.stride != 1 or x.shape[-1] != features:
            x = convolve(features, 1, self.stride, name="downsample_conv")(x)
            x = norm("downsample_bn")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Dilated ResNet-D.

    Attributes:
      depth: 18, 50 or 101.
      width: channels of the first stage (64 in the paper); the others follow from it.
      dtype: dtype of the computation; parameters and BatchNorm statistics are float32.
      axis_name: pmap axis that BatchNorm is synchronised over while training.
      bn_momentum: share of the old running statistics that a step keeps (PyTorch's 0.1 is 0.9 here).
    """

    depth: int = 50
    width: int = 64
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train: bool = False):
        """[B, H, W, 3] -> features [B, H/8, W/8, 32 * width] (8 * width for depth 18)."""
        bottleneck, blocks = STAGES[self.depth]
        x = x.astype(self.dtype)
        for i, (features, stride) in enumerate([(self.width, 2), (self.width, 1), (2 * self.width, 1)], 1):
            x = conv(features, 3, stride, dtype=self.dtype, name=f"stem_conv{i}")(x)
            x = nn.relu(batch_norm(self, train, f"stem_bn{i}")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, count in enumerate(blocks):
            for index in range(count):
                x = Block(
                    width=self.width * 2**stage,
                    stride=STRIDES[stage] if index == 0 else 1,
                    dilation=DILATIONS[stage],
                    bottleneck=bottleneck,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    bn_momentum=self.bn_momentum,
                    name=f"layer{stage + 1}_{index}",
                )(x, train)
        return x
