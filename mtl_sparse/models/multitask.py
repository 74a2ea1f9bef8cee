"""The multi-task model: one pass of the shared backbone, one head a task."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mtl_sparse.models import classifier, deeplab, resnet
from mtl_sparse.models import widths as widths_lib
from mtl_sparse.runtime import text
from mtl_sparse.runtime.errors import UserError

HEADS = {"deeplab": deeplab.DeepLabHead, "classifier": classifier.Classifier}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class MultiTaskModel(nn.Module):
    """Shared dilated ResNet with a head for each task.

    Attributes:
      heads: (task name, head kind, outputs) of each task.
      depth, width, stem: of the backbone, see `resnet.ResNet`.
      head_features, dropout: of the heads, see `deeplab.DeepLabHead`.
      classifier_features, classifier_dropout: of the classification heads, see `classifier.Classifier`.
      dtype: dtype of the computation; parameters, BatchNorm statistics and predictions are float32.
      axis_name: pmap axis of the training step; None outside of one.
      bn_momentum: of every BatchNorm, see `resnet.ResNet`.
      attach: for each head, where in the backbone it reads, of `resnet.points`; () is the end for all.
      widths: of every layer, for a compact model; None is dense, from width and head_features.
    """

    heads: tuple[tuple[str, str, int], ...]
    depth: int = 50
    width: int = 64
    stem: str = "deep"
    head_features: int = 256
    dropout: float = 0.3
    classifier_features: tuple[int, int] = (64, 32)
    classifier_dropout: tuple[float, float] = (0.6, 0.4)
    dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None
    bn_momentum: float = 0.9
    attach: tuple[str, ...] = ()
    widths: widths_lib.Widths | None = None

    @nn.compact
    def __call__(self, images, train: bool = False):
        """Images [B, H, W, 3] float32, normalised -> {task: raw prediction}.

        Raw is before upsampling and the task's activation, see `mtl_sparse.activations`: [B, H/8, W/8, outputs] of a
        pixel task, logits [B] of an attribute.
        """
        shared = {"dtype": self.dtype, "axis_name": self.axis_name, "bn_momentum": self.bn_momentum}
        layers = self.layers()
        backbone = resnet.ResNet(
            self.depth,
            self.width,
            self.stem,
            **shared,
            layers=(layers.stem, layers.blocks),
            points=self.points(),
            name="backbone",
        )
        outputs = {}
        for (task, kind, channels), head, features in zip(
            self.heads, layers.heads, backbone(images, train), strict=True
        ):
            own = {"features": self.head_features, "dropout": self.dropout}
            if kind == "classifier":
                own = {"features": self.classifier_features, "dropout": self.classifier_dropout}
            if head:
                own["widths"] = head
            module = HEADS[kind](channels, **own, **shared, name=f"head_{task}")
            raw = module(features, train)
            # What nothing of the images reaches is computed once for all of them.
            outputs[task] = jnp.broadcast_to(raw, (images.shape[0], *raw.shape[1:]))
        return outputs

    def points(self) -> tuple[str, ...]:
        """Where each head reads the backbone."""
        return self.attach or (resnet.points(self.depth)[-1],) * len(self.heads)

    def layers(self) -> widths_lib.Widths:
        """Widths of every layer, whether dense or compact."""
        if self.widths is not None:
            return self.widths
        dense = {"deeplab": deeplab.dense(self.head_features), "classifier": widths_lib.Classifier()}
        heads = tuple(dense.get(kind) for _, kind, _ in self.heads)
        return widths_lib.Widths(*resnet.dense(self.depth, self.width, self.points(), self.stem), heads, self.attach)


@functools.lru_cache(maxsize=16)
def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every variable of a model of images [B, H, W, 3], by "/"-joined path; do not change it."""
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32)))
    return {"/".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(variables).items()}


def build(config, tasks: Sequence, axis_name: str | None = None) -> MultiTaskModel:
    """Builds the model of `config.model` with a head for each task.

    Raises:
      UserError: an unknown depth, stem, dtype or attachment point.
    """
    if config.depth not in resnet.STAGES:
        raise UserError(f"model.depth={config.depth}: the depths are {', '.join(map(str, resnet.STAGES))}")
    if config.stem not in resnet.STEMS:
        raise UserError(f"unknown model.stem={config.stem!r}; the stems are {', '.join(resnet.STEMS)}")
    if config.dtype not in DTYPES:
        raise UserError(f"model.dtype={config.dtype!r}: the dtypes are {', '.join(DTYPES)}")
    model = MultiTaskModel(
        heads=tuple((task.name, task.head, task.outputs) for task in tasks),
        depth=config.depth,
        width=config.width,
        stem=config.stem,
        head_features=config.head_features,
        dropout=config.dropout,
        classifier_features=tuple(config.classifier_features),
        classifier_dropout=tuple(config.classifier_dropout),
        dtype=DTYPES[config.dtype],
        axis_name=axis_name,
        bn_momentum=config.bn_momentum,
        attach=_attach(config, tasks),
    )
    return model.clone(widths=_widths(config.widths, model)) if config.widths else model


def _attach(config, tasks):
    attach, points = tuple(config.attach), resnet.points(config.depth)
    for point in attach:
        if point not in points:
            near = ", ".join(text.nearest(point, points)) or f"{points[0]}, ..., {points[-1]}"
            raise UserError(f"model.attach: a ResNet-{config.depth} has no {point!r}; near it are {near}")
    if attach and len(attach) != len(tasks):
        names = ", ".join(task.name for task in tasks)
        raise UserError(f"model.attach={attach}: it has one point for each of the tasks ({names}), in their order")
    return attach


def _widths(encoded, dense):
    try:
        widths = widths_lib.Widths.from_json(encoded)
    except ValueError as error:
        raise UserError(f"config.model.widths: {error}; it is written by --job=compact") from error
    layers = dense.layers()
    given, wanted = ((len(of.heads), len(of.blocks), of.attach, len(of.stem.features)) for of in (widths, layers))
    if given != wanted:
        raise UserError(
            f"config.model.widths is of a compact model with {len(widths.heads)} tasks and {len(widths.blocks)} "
            f"blocks: neither config.tasks ({len(dense.heads)} now), model.depth={dense.depth}, "
            f"model.stem={dense.stem} nor model.attach can be another than when it was made"
        )
    return widths
