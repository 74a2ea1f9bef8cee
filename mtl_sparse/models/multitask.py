"""The multi-task model: one pass of the shared backbone, one head a task."""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from mtl_sparse.errors import UserError
from mtl_sparse.models import deeplab, resnet

HEADS = {"deeplab": deeplab.DeepLabHead}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class MultiTaskModel(nn.Module):
    """Shared dilated ResNet with a head for each task.

    Attributes:
      heads: (task name, head kind, outputs) of each task.
      depth, width: of the backbone, see `resnet.ResNet`.
      head_features, dropout: of the heads, see `deeplab.DeepLabHead`.
      dtype: dtype of the computation; parameters, BatchNorm statistics and predictions are float32.
      axis_name: pmap axis of the training step; None outside of one.
      bn_momentum: of every BatchNorm, see `resnet.ResNet`.
    """

    heads: tuple[tuple[str, str, int], ...]
    depth: int = 50
    width: int = 64
    head_features: int = 256
    dropout: float = 0.3
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None
    bn_momentum: float = 0.9

    @nn.compact
    def __call__(self, images, train: bool = False):
        """Images [B, H, W, 3] float32, normalised -> {task: raw prediction [B, H/8, W/8, outputs]}.

        Raw is before sigmoid, softmax or normalisation.
        """
        shared = {"dtype": self.dtype, "axis_name": self.axis_name, "bn_momentum": self.bn_momentum}
        features = resnet.ResNet(self.depth, self.width, **shared, name="backbone")(images, train)
        return {
            task: HEADS[kind](outputs, self.head_features, self.dropout, **shared, name=f"head_{task}")(features, train)
            for task, kind, outputs in self.heads
        }


def build(config, tasks: Sequence, axis_name: str | None = None) -> MultiTaskModel:
    """Builds the model of `config.model` with a head for each task.

    Raises:
      UserError: an unknown depth or dtype.
    """
    if config.depth not in resnet.STAGES:
        raise UserError(f"model.depth={config.depth}: the depths are {', '.join(map(str, resnet.STAGES))}")
    if config.dtype not in DTYPES:
        raise UserError(f"model.dtype={config.dtype!r}: the dtypes are {', '.join(DTYPES)}")
    return MultiTaskModel(
        heads=tuple((task.name, task.head, task.outputs) for task in tasks),
        depth=config.depth,
        width=config.width,
        head_features=config.head_features,
        dropout=config.dropout,
        dtype=DTYPES[config.dtype],
        axis_name=axis_name,
        bn_momentum=config.bn_momentum,
    )
