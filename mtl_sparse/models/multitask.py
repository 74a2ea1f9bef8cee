"""The multi-task model: one pass of the shared backbone, and one head for each task."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from mtl_sparse.models import backbones, classifier, deeplab, resnet
from mtl_sparse.models import widths as widths_lib
from mtl_sparse.runtime import text
from mtl_sparse.runtime.errors import UserError

HEADS: dict[str, Callable[..., nn.Module]] = {"deeplab": deeplab.DeepLabHead, "classifier": classifier.Classifier}
DTYPES: dict[str, Any] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class HeadSpec(Protocol):
    """What the model needs to know about a task; `tasks.Task` has it."""

    @property
    def name(self) -> str:
        """Name of the task."""

    @property
    def head(self) -> str:
        """A key of `HEADS`."""

    @property
    def outputs(self) -> int:
        """Channels of the raw prediction."""


class MultiTaskModel(nn.Module):
    """Shared backbone, a dilated ResNet by default, with a head for each task.

    Attributes:
      heads: (task name, head kind, outputs) of each task.
      backbone: its name, see `backbones.find`.
      depth: depth of a ResNet, see `resnet.ResNet`.
      width: width of a ResNet.
      stem: stem of a ResNet.
      head_features: features of the pixel-level heads, see `deeplab.DeepLabHead`.
      dropout: dropout rate of the pixel-level heads.
      classifier_features: features of the classification heads, see `classifier.Classifier`.
      classifier_dropout: dropout rates of the classification heads.
      dtype: dtype of the computation; parameters, BatchNorm statistics and predictions are float32.
      axis_name: pmap axis of the training step; None outside of one.
      bn_momentum: momentum of every BatchNorm, see `resnet.ResNet`.
      attach: attachment point of each head, of the backbone's points; () attaches all to the end of the backbone.
      widths: widths of every layer of a compact model with a ResNet; None is dense, from width and head_features.
    """

    heads: tuple[tuple[str, str, int], ...]
    backbone: str = backbones.RESNET
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
    def __call__(
        self,
        images: Float[Array, "B H W 3"],
        train: bool = False,
        *,
        only_features: bool = False,
        features: Sequence[Float[Array, "B h w C"]] | None = None,
    ) -> Any:
        """Map images to the raw prediction of each task.

        Args:
          images: normalized images, float32.
          train: whether to apply dropout and to normalize by the statistics of the batch.
          only_features: whether to return the features that each head reads instead, without running the heads.
          features: those features, to run the heads alone.

        Returns:
          {task: raw prediction}, before upsampling and the task's activation (see `mtl_sparse.tasks.activations`):
          [B, H/8, W/8, outputs] of a pixel-level task, logits [B] of an attribute. With `only_features`, a tuple of
          the features of each head, [B, H/8, W/8, C].
        """
        shared: dict[str, Any] = {"dtype": self.dtype, "axis_name": self.axis_name, "bn_momentum": self.bn_momentum}
        backbone = self._backbone(**shared)
        read_features: Any = features
        if features is None:
            size = tuple(-(-side // resnet.OUTPUT_STRIDE) for side in images.shape[1:3])
            read_features = tuple(self._fitted(x, size) for x in backbone(images, train))
        if only_features:
            return read_features
        outputs = {}
        for (task, kind, channels), head, read in zip(self.heads, self._heads(), read_features, strict=True):
            own: dict[str, Any] = {"features": self.head_features, "dropout": self.dropout}
            if kind == "classifier":
                own = {"features": self.classifier_features, "dropout": self.classifier_dropout}
            if head:
                own["widths"] = head
            module = HEADS[kind](channels, **own, **shared, name=f"head_{task}")
            raw = module(read, train)
            # A prediction that does not depend on the images is computed once for all of them.
            outputs[task] = jnp.broadcast_to(raw, (images.shape[0], *raw.shape[1:]))
        return outputs

    def _backbone(self, **shared: Any) -> nn.Module:
        if self.backbone == backbones.RESNET:
            layers = self.layers()
            shared |= {"layers": (layers.stem, layers.blocks)}
        return self.row().module(points=self.points(), **shared, name="backbone")

    def _fitted(self, x: Float[Array, "B h w C"], size: tuple[int, ...]) -> Float[Array, "B h w C"]:
        """Return features average-pooled to the size that the heads read."""
        if x.ndim != 4 or any(have < wanted for have, wanted in zip(x.shape[1:3], size, strict=True)):
            raise UserError(
                "BACKBONE_SIZE",
                f"expected model.backbone={self.backbone} to have features of {size[0]}x{size[1]} or more, an eighth "
                f"of the images, got an array of shape {x.shape}; replace strides by dilations",
            )
        return resnet.averaged(x, size)

    def row(self) -> backbones.Backbone:
        """Return the backbone's entry of `BACKBONES`."""
        return backbones.find(self.backbone, self.depth, self.width, self.stem)

    def points(self) -> tuple[str, ...]:
        """Return the attachment point of each head."""
        return self.attach or (self.row().points[-1],) * len(self.heads)

    def layers(self) -> widths_lib.Widths:
        """Return the widths of every layer of a model with a ResNet, whether dense or compact."""
        if self.widths is not None:
            return self.widths
        dense = resnet.dense(self.depth, self.width, self.points(), self.stem)
        return widths_lib.Widths(*dense, self._heads(), self.attach)

    def _heads(self) -> tuple[widths_lib.Head | widths_lib.Classifier | None, ...]:
        """Return the widths of every head, whether dense or compact."""
        if self.widths is not None:
            return self.widths.heads
        dense: dict[str, widths_lib.Head | widths_lib.Classifier] = {
            "deeplab": deeplab.dense(self.head_features),
            "classifier": widths_lib.Classifier(),
        }
        return tuple(dense.get(kind) for _, kind, _ in self.heads)


@functools.lru_cache(maxsize=16)
def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every variable of a model.

    Args:
      model: a module of images [B, H, W, 3].

    Returns:
      The shapes by "/"-joined path, the collection first. The dictionary is cached; do not change it.
    """
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32)))
    return {"/".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(variables).items()}


def build(config: ConfigDict, tasks: Sequence[HeadSpec], axis_name: str | None = None) -> MultiTaskModel:
    """Build the model of a config, with a head for each task.

    Args:
      config: config.model.
      tasks: specs of the tasks.
      axis_name: pmap axis of the training step; None outside of one.

    Returns:
      The model; compact if config.widths is set and the backbone is a ResNet (`rewritten.build` builds any).

    Raises:
      UserError: the backbone, depth, stem, dtype or an attachment point is unknown, the attachment points are not one
        for each task, or config.widths is damaged or belongs to another model.
    """
    for option, known in (("depth", resnet.STAGES), ("stem", resnet.STEMS), ("dtype", DTYPES)):
        if config[option] not in known:
            raise UserError(
                "OPTION_UNKNOWN_VALUE",
                f"expected model.{option} to be one of {', '.join(map(str, known))}, got model.{option}="
                f"{config[option]}",
            )
    row = backbones.find(config.backbone, config.depth)
    model = MultiTaskModel(
        heads=tuple((task.name, task.head, task.outputs) for task in tasks),
        backbone=config.backbone,
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
        attach=_attach(config, tasks, row.points),
    )
    if not config.widths or config.backbone != backbones.RESNET:
        return model
    return model.clone(widths=_widths(config.widths, model))


def _attach(config: ConfigDict, tasks: Sequence[HeadSpec], points: Sequence[str]) -> tuple[str, ...]:
    attach = tuple(config.attach)
    for point in attach:
        if point not in points:
            near = ", ".join(text.nearest(point, points)) or f"{points[0]}, ..., {points[-1]}"
            kind = f"a ResNet-{config.depth}" if config.backbone == backbones.RESNET else config.backbone
            raise UserError(
                "OPTION_UNKNOWN_VALUE",
                f"expected model.attach to name attachment points of {kind}, such as {near}, got {point!r}",
            )
    if attach and len(attach) != len(tasks):
        names = ", ".join(task.name for task in tasks)
        raise UserError(
            "OPTION_CONFLICT",
            f"expected one attachment point for each of config.tasks ({names}), in their order, got "
            f"model.attach={attach}",
        )
    return attach


def _widths(encoded: str, dense: MultiTaskModel) -> widths_lib.Widths:
    """Return the widths of a compact model, checked against the dense one of the same config."""
    try:
        widths = widths_lib.Widths.from_json(encoded)
    except ValueError as error:
        raise UserError(
            "MODEL_WIDTHS_INVALID",
            f"expected config.model.widths as --job=compact writes it, got {encoded!r:.60}: {error}",
        ) from error
    layers = dense.layers()
    given, wanted = ((len(of.heads), len(of.blocks), of.attach, len(of.stem.features)) for of in (widths, layers))
    if given != wanted:
        raise UserError(
            "OPTION_CONFLICT",
            "expected config.tasks, model.depth, model.stem and model.attach as they were when config.model.widths was "
            f"written (for {len(widths.heads)} tasks and {len(widths.blocks)} blocks), got {len(dense.heads)} tasks, "
            f"model.depth={dense.depth}, model.stem={dense.stem}, model.attach={dense.attach}; restore them",
        )
    return widths
