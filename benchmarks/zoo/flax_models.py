"""Nets written here in plain flax.linen: patterns that the other packages' classifiers lack."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from benchmarks.zoo.case import Case, key

norm = functools.partial(nn.BatchNorm, use_running_average=True)


def block(x, channels, stride=1):
    """Return relu(norm(conv3x3(x)))."""
    return nn.relu(norm()(nn.Conv(channels, (3, 3), stride, use_bias=False)(x)))


class UNet(nn.Module):
    """Skip concatenations, transposed convolutions, and an output of the input's size."""

    @nn.compact
    def __call__(self, x):
        """Return a map of 4 channels."""
        skips = []
        for channels in (16, 32, 64):
            x = block(block(x, channels), channels)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = block(x, 128)
        for skip in reversed(skips):
            x = nn.ConvTranspose(skip.shape[-1], (2, 2), (2, 2))(x)
            x = block(jnp.concatenate([x, skip], -1), skip.shape[-1])
        return nn.Conv(4, (1, 1))(x)


class Shuffle(nn.Module):
    """Grouped convolutions and channel shuffles, as in ShuffleNet v1."""

    @nn.compact
    def __call__(self, x):
        """Return logits."""
        x = block(x, 48, 2)
        for _ in range(3):
            y = nn.relu(norm()(nn.Conv(48, (1, 1), feature_group_count=4)(x)))
            y = y.reshape(*y.shape[:-1], 4, 12).swapaxes(-1, -2).reshape(y.shape)
            y = norm()(nn.Conv(48, (3, 3), feature_group_count=48)(y))
            x = nn.relu(x + norm()(nn.Conv(48, (1, 1), feature_group_count=4)(y)))
        return nn.Dense(10)(x.mean((1, 2)))


class Res2Net(nn.Module):
    """Blocks whose channels are split, convolved one part after the other, and joined."""

    @nn.compact
    def __call__(self, x):
        """Return logits."""
        x = block(x, 64, 2)
        for _ in range(3):
            parts = jnp.split(nn.relu(norm()(nn.Conv(64, (1, 1))(x))), 4, -1)
            done = [parts[0]]
            for part in parts[1:]:
                done.append(block(part + done[-1] if len(done) > 1 else part, 16))
            x = nn.relu(x + norm()(nn.Conv(64, (1, 1))(jnp.concatenate(done, -1))))
        return nn.Dense(10)(x.mean((1, 2)))


class SqueezeExcite(nn.Module):
    """Residual blocks with squeeze-and-excite."""

    @nn.compact
    def __call__(self, x):
        """Return logits."""
        x = block(x, 32, 2)
        for _ in range(3):
            y = block(block(x, 64), 32)
            gate = nn.Dense(32)(nn.relu(nn.Dense(8)(y.mean((1, 2)))))
            x = x + y * nn.sigmoid(gate)[:, None, None]
        return nn.Dense(10)(x.mean((1, 2)))


class Grouped(nn.Module):
    """A residual net with GroupNorm."""

    groups: int = 8

    @nn.compact
    def __call__(self, x):
        """Return logits."""
        x = nn.Conv(64, (3, 3), 2)(x)
        for _ in range(3):
            y = nn.Conv(64, (3, 3))(nn.relu(nn.GroupNorm(self.groups)(x)))
            x = x + nn.Conv(64, (3, 3))(nn.relu(nn.GroupNorm(self.groups)(y)))
        return nn.Dense(10)(nn.relu(nn.GroupNorm(self.groups)(x)).mean((1, 2)))


class ViT(nn.Module):
    """A vision transformer with a class token."""

    @nn.compact
    def __call__(self, x):
        """Return logits."""
        x = nn.Conv(64, (8, 8), 8)(x)
        x = x.reshape(x.shape[0], -1, 64)
        token = self.param("token", nn.initializers.normal(), (1, 1, 64))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 64)), x], 1)
        x = x + self.param("position", nn.initializers.normal(), (1, *x.shape[1:]))
        for _ in range(3):
            x = x + nn.MultiHeadAttention(4)(nn.LayerNorm()(x))
            x = x + nn.Dense(64)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x)[:, 0])


class ScannedMixer(nn.Module):
    """MLP-Mixer blocks whose parameters are stacked by nn.scan."""

    @nn.compact
    def __call__(self, x):
        """Return logits."""
        x = nn.Conv(32, (8, 8), 8)(x)
        x = x.reshape(x.shape[0], -1, 32)
        layers = nn.scan(Mixer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers()(x, None)
        return nn.Dense(10)(x.mean(1))


class Mixer(nn.Module):
    """One block of MLP-Mixer."""

    @nn.compact
    def __call__(self, x, _):
        """Return the next x, as nn.scan wants it."""
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        x = x + nn.Dense(y.shape[-1])(nn.gelu(nn.Dense(32)(y))).swapaxes(1, 2)
        y = nn.LayerNorm()(x)
        return x + nn.Dense(32)(nn.gelu(nn.Dense(64)(y))), None


class DenseBlocks(nn.Module):
    """DenseNet's concatenations before the norm, an ASPP head and bilinear resizing."""

    @nn.compact
    def __call__(self, x):
        """Return a map of 4 channels of the input's size."""
        shape = x.shape
        x = block(x, 32, 2)
        for _ in range(4):
            y = nn.Conv(16, (3, 3))(nn.relu(norm()(x)))
            x = jnp.concatenate([x, y], -1)
        x = nn.avg_pool(nn.Conv(48, (1, 1))(nn.relu(norm()(x))), (2, 2), (2, 2))
        pooled = jnp.broadcast_to(nn.Conv(16, (1, 1))(x.mean((1, 2), keepdims=True)), (*x.shape[:-1], 16))
        rates = [nn.Conv(16, (3, 3), kernel_dilation=rate)(x) for rate in (1, 2, 4)]
        x = block(jnp.concatenate([*rates, pooled], -1), 32)
        return nn.Conv(4, (1, 1))(jax.image.resize(x, (*shape[:-1], 32), "bilinear"))


class PixelShuffle(nn.Module):
    """Super-resolution: residual blocks, and channels rearranged to pixels."""

    @nn.compact
    def __call__(self, x):
        """Return images twice as large."""
        image = x
        x = first = nn.Conv(32, (3, 3))(x)
        for _ in range(3):
            x = x + 0.5 * nn.Conv(32, (3, 3))(nn.PReLU()(nn.Conv(48, (3, 3))(x)))
        x = nn.Conv(64, (3, 3))(x + first)
        batch, height, width, _ = x.shape
        x = x.reshape(batch, height, width, 2, 2, 16).transpose(0, 1, 3, 2, 4, 5)
        x = nn.Conv(3, (3, 3))(x.reshape(batch, 2 * height, 2 * width, 16))
        return x + jnp.repeat(jnp.repeat(image, 2, 1), 2, 2)


class Autoencoder(nn.Module):
    """A variational autoencoder's mean, through dense layers and reshapes between maps and vectors."""

    @nn.compact
    def __call__(self, x):
        """Return the reconstruction."""
        for channels in (16, 32, 64):
            x = block(x, channels, 2)
        shape = x.shape
        mean, _ = jnp.split(nn.Dense(64)(x.reshape(shape[0], -1)), 2, -1)
        x = nn.relu(nn.Dense(shape[1] * shape[2] * shape[3])(mean)).reshape(shape)
        for channels in (32, 16):
            x = nn.relu(norm()(nn.ConvTranspose(channels, (3, 3), (2, 2))(x)))
        return nn.sigmoid(nn.ConvTranspose(3, (3, 3), (2, 2))(x))


class GatedMaxout(nn.Module):
    """Maxout, gated linear units, a fire module and global max pooling."""

    @nn.compact
    def __call__(self, x):
        """Return logits."""
        x = nn.Conv(64, (3, 3), 2)(x)
        x = x.reshape(*x.shape[:-1], 32, 2).max(-1)
        x = nn.glu(nn.Conv(64, (3, 3))(x))
        squeezed = nn.relu(nn.Conv(16, (1, 1))(x))
        x = jnp.concatenate([nn.relu(nn.Conv(32, (1, 1))(squeezed)), nn.relu(nn.Conv(32, (3, 3))(squeezed))], -1)
        x = nn.silu(norm()(nn.Conv(48, (3, 3))(x)))
        return nn.Dense(10)(x.max((1, 2)))


def build(module, shape):
    """Return a module's apply and its variables' shapes."""
    return module.apply, jax.eval_shape(module.init, key(), jnp.zeros((1, *shape)))


def cases():
    """Return the nets of this file."""
    nets = {
        "U-Net": UNet(),
        "ShuffleNet v1 blocks": Shuffle(),
        "Res2Net": Res2Net(),
        "squeeze-and-excite": SqueezeExcite(),
        "GroupNorm": Grouped(),
        "GroupNorm of 1 group": Grouped(1),
        "InstanceNorm": Grouped(64),
        "ViT": ViT(),
        "Mixer in nn.scan": ScannedMixer(),
        "dense blocks and ASPP": DenseBlocks(),
        "super-resolution": PixelShuffle(),
        "autoencoder": Autoencoder(),
        "maxout and GLU": GatedMaxout(),
    }
    return [Case("flax", name, functools.partial(build, net, (32, 32, 3)), (32, 32, 3)) for name, net in nets.items()]
