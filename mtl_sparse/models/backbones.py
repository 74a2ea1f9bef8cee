"""The backbones that `config.model.backbone` names, and how to add one of your own."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn

from mtl_sparse.models import efficientnet, resnet
from mtl_sparse.runtime import text
from mtl_sparse.runtime.errors import UserError

RESNET = "resnet"


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A backbone: an entry of `BACKBONES`.

    Attributes:
      module: function that makes the Flax module from the keywords `points` (those that the heads read, a tuple with
        repetitions), `dtype`, `axis_name` and `bn_momentum` (for BatchNorm) and `name`. The module maps (images [B, H,
        W, 3], train) to a tuple of features, one for each point. They have the size H/8, W/8, or a multiple of it, and
        are then average-pooled to that size. It builds no layers after the last of its points.
      points: names of all points where a head can read features, in the order of the network; the last is the default.
        A point that has the name of a layer, or of the module around it, is the one where LOMT attaches a head for it.
    """

    module: Callable[..., nn.Module]
    points: tuple[str, ...]


BACKBONES: dict[str, Backbone] = {
    "efficientnet_lite0": Backbone(efficientnet.EfficientNetLite, efficientnet.points()),
}


def find(name: str, depth: int = 50, width: int = 64, stem: str = "deep") -> Backbone:
    """Return the backbone with this name.

    Args:
      name: "resnet", or a key of `BACKBONES`.
      depth: depth of a ResNet; other backbones have no options.
      width: width of a ResNet.
      stem: stem of a ResNet.

    Raises:
      UserError: there is no backbone with this name.
    """
    if name == RESNET:
        return Backbone(functools.partial(resnet.ResNet, depth, width, stem), resnet.points(depth))
    if name not in BACKBONES:
        near = ", ".join(text.nearest(name, names()))
        raise UserError(
            "OPTION_UNKNOWN_VALUE",
            f"expected model.backbone to be one of {', '.join(names())}, got model.backbone={name!r}; "
            + (f"nearest: {near}" if near else "register your own in mtl_sparse.models.backbones.BACKBONES"),
        )
    return BACKBONES[name]


def names() -> tuple[str, ...]:
    """Return the names of all backbones."""
    return (RESNET, *BACKBONES)
