"""DeepLab-v3 head: atrous spatial pyramid pooling and two convolutions (Chen et al. 2017, arXiv 1706.05587)."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_sparse.models import atrous, initializers, resnet
from mtl_sparse.models import widths as widths_lib
from mtl_sparse.models.dropout import Dropout

RATES = (12, 24, 36)
BRANCHES = ("aspp0", "aspp1", "aspp2", "aspp3", "pool")

Maps = Float[Array, "B h w C"]


class DeepLabHead(nn.Module):
    """DeepLab-v3 head at the backbone's resolution.

    Attributes:
      outputs: channels of the prediction.
      features: channels of each branch (256 in the paper).
      dropout: dropout rate after the ASPP projection and after the first branch.
      dtype: dtype of the computation.
      axis_name: pmap axis of the training step, which BatchNorm and dropout need.
      bn_momentum: momentum of every BatchNorm, see `resnet.ResNet`.
      widths: widths of every layer; None is dense, from `features`.
    """

    outputs: int
    features: int = 256
    dropout: float = 0.3
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None
    bn_momentum: float = 0.9
    widths: widths_lib.Head | None = None

    @nn.compact
    def __call__(self, x: Maps, train: bool = False) -> Maps:
        """Map features to a raw prediction.

        Args:
          x: features of the backbone.
          train: whether to apply dropout and to normalize by the statistics of the batch.

        Returns:
          Raw prediction [B, h, w, outputs], float32 (float64 where that is the dtype). A compact head that reads
          nothing of x returns [1, h, w, outputs].
        """
        layers = self.widths or dense(self.features)
        raw_dtype = jnp.promote_types(jnp.float32, self.dtype)
        if layers.dead == 3:
            constant = self.param("constant", nn.initializers.zeros_init(), (self.outputs,), jnp.float32)
            return jnp.broadcast_to(constant, (1, *x.shape[1:3], self.outputs)).astype(raw_dtype)

        def normalized(y: Maps, name: str) -> Maps:
            return nn.relu(resnet.batch_norm(self, train, name)(y))

        conv = functools.partial(resnet.conv, dtype=self.dtype)
        drop = functools.partial(Dropout, self.dropout, self.axis_name)
        if layers.dead == 0:
            y = jnp.concatenate(self._branches(x, layers, conv, normalized, drop, train), -1)
            y = conv(layers.trunk[0], 1, name="project")(y)
            y = drop(name="drop1")(normalized(y, "project_bn"), train)
        else:
            y = jnp.ones((1, *x.shape[1:3], 1), self.dtype)
        y = normalized(conv(layers.trunk[1], 3, name="conv")(y), "conv_bn")
        options = initializers.without_norm(y.shape[-1])
        out = nn.Conv(self.outputs, (1, 1), dtype=self.dtype, conv_general_dilated=atrous.conv, **options, name="out")
        return out(y).astype(raw_dtype)

    def _branches(
        self,
        x: Maps,
        layers: widths_lib.Head,
        conv: Callable[..., nn.Conv],
        normalized: Callable[[Maps, str], Maps],
        drop: Callable[..., Dropout],
        train: bool,
    ) -> list[Maps]:
        """Return the outputs of the branches that remain: 1x1, one for each atrous rate, pooling."""
        branches = []
        selected = [widths_lib.select(x, reads) for reads in layers.reads]
        if layers.branches[0]:
            y = normalized(conv(layers.branches[0], 1, name="aspp0")(selected[0]), "aspp0_bn")
            branches.append(drop(name="drop0")(y, train))
        for i, rate in enumerate(RATES, 1):
            if layers.branches[i]:
                layer = atrous.AtrousConv(
                    layers.branches[i],
                    rate,
                    initializers.before_norm,
                    self.dtype,
                    layers.taps[i - 1],
                    name=f"aspp{i}",
                )
                branches.append(normalized(layer(selected[i]), f"aspp{i}_bn"))
        if layers.branches[-1]:
            mean_dtype = jnp.promote_types(jnp.float32, self.dtype)
            y = jnp.mean(selected[-1], (1, 2), keepdims=True, dtype=mean_dtype).astype(x.dtype)
            y = normalized(conv(layers.branches[-1], 1, name="pool")(y), "pool_bn")
            branches.append(jnp.broadcast_to(y, (*x.shape[:3], y.shape[-1])))
        return branches


def dense(features: int) -> widths_lib.Head:
    """Return the widths of a head whose branches all have `features` channels."""
    return widths_lib.Head(branches=(features,) * (2 + len(RATES)), trunk=(features, features))
