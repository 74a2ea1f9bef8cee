"""DeepLab-v3 head: atrous spatial pyramid pooling and two convolutions (Chen et al. 2017, arXiv 1706.05587)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_sparse.models import resnet
from mtl_sparse.models.atrous import AtrousConv

RATES = (12, 24, 36)


class Dropout(nn.Module):
    """Dropout whose mask depends on the example's place in the global batch, not on the device it is on.

    So the same seed gives the same masks on any number of devices.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        if not train or self.rate == 0:
            return x
        index = jnp.arange(x.shape[0])
        if self.axis_name is not None:
            index += jax.lax.axis_index(self.axis_name) * x.shape[0]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), index)
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - self.rate), 0)


class DeepLabHead(nn.Module):
    """DeepLab-v3 head at the backbone's resolution.

    Attributes:
      outputs: channels of the prediction.
      features: channels of each branch (256 in the paper).
      dropout: rate after the ASPP projection and after the first branch.
    """

    outputs: int
    features: int = 256
    dropout: float = 0.3
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train: bool = False):
        """[B, h, w, C] -> raw prediction [B, h, w, outputs], float32."""

        def normalized(y, name):
            return nn.relu(resnet.batch_norm(self, train, name)(y))

        conv = functools.partial(resnet.conv, self.features, dtype=self.dtype)
        drop = functools.partial(Dropout, self.dropout, self.axis_name)
        branches = [drop(name="drop0")(normalized(conv(1, name="aspp0")(x), "aspp0_bn"), train)]
        for i, rate in enumerate(RATES, 1):
            atrous = AtrousConv(self.features, rate, resnet.kernel_init, self.dtype, name=f"aspp{i}")
            branches.append(normalized(atrous(x), f"aspp{i}_bn"))
        pooled = jnp.mean(x, (1, 2), keepdims=True, dtype=jnp.float32).astype(x.dtype)
        pooled = normalized(conv(1, name="pool")(pooled), "pool_bn")
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        y = conv(1, name="project")(jnp.concatenate(branches, -1))
        y = drop(name="drop1")(normalized(y, "project_bn"), train)
        y = normalized(conv(3, name="conv")(y), "conv_bn")
        y = nn.Conv(self.outputs, (1, 1), kernel_init=resnet.kernel_init, dtype=self.dtype, name="out")(y)
        return y.astype(jnp.float32)
