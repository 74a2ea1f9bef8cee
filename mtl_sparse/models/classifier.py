"""Head of an image-level task: one convolution, two dense layers, one logit."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_sparse.models import atrous, initializers
from mtl_sparse.models import widths as widths_lib
from mtl_sparse.models.dropout import Dropout


class Classifier(nn.Module):
    """3x3 convolution, ReLU, 2x2 max-pooling, mean over the map, dropout, dense, ReLU, dropout, dense.

    Attributes:
      outputs: logits for each image.
      features: channels of the convolution and of the first dense layer; (64, 32) in the reference implementation.
      dropout: dropout rate before each dense layer; (0.6, 0.4) in the reference implementation.
      dtype: dtype of the computation.
      axis_name: pmap axis of the training step, which dropout needs.
      bn_momentum: not used; every head takes it, and this one has no BatchNorm.
      widths: channels that a compact head reads; None is dense.
    """

    outputs: int = 1
    features: tuple[int, int] = (64, 32)
    dropout: tuple[float, float] = (0.6, 0.4)
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None
    bn_momentum: float = 0.9
    widths: widths_lib.Classifier | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B h w C"], train: bool = False) -> Float[Array, "B ..."]:
        """Map features to logits.

        Args:
          x: features of the backbone.
          train: whether to apply dropout.

        Returns:
          Logits [B], or [B, outputs] for more than one output; float32 (float64 where that is the dtype). A compact
          head that reads nothing of x returns [1] or [1, outputs].
        """
        layers = self.widths or widths_lib.Classifier()
        raw_dtype = jnp.promote_types(jnp.float32, self.dtype)
        if layers.dead:
            constant = self.param("constant", nn.initializers.zeros_init(), (self.outputs,), jnp.float32)
            return self._squeezed(constant[None].astype(raw_dtype))
        x = widths_lib.select(x, layers.reads[0])
        options = initializers.without_norm(9 * x.shape[-1])
        conv = nn.Conv(
            self.features[0],
            (3, 3),
            padding=1,
            dtype=self.dtype,
            conv_general_dilated=atrous.conv,
            **options,
            name="conv",
        )
        y = nn.relu(conv(x))
        window = tuple(min(2, side) for side in y.shape[1:3])
        y = jnp.mean(nn.max_pool(y, window_shape=window, strides=window), (1, 2), dtype=raw_dtype).astype(self.dtype)
        y = Dropout(self.dropout[0], self.axis_name, name="drop1")(y, train)
        options = initializers.without_norm(y.shape[-1])
        y = nn.relu(nn.Dense(self.features[1], dtype=self.dtype, **options, name="fc1")(y))
        y = Dropout(self.dropout[1], self.axis_name, name="drop2")(y, train)
        options = initializers.without_norm(y.shape[-1])
        return self._squeezed(nn.Dense(self.outputs, dtype=self.dtype, **options, name="fc2")(y).astype(raw_dtype))

    def _squeezed(self, logits: Float[Array, "B outputs"]) -> Float[Array, "B ..."]:
        return logits[:, 0] if self.outputs == 1 else logits
