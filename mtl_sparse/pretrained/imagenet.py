"""ImageNet weights of torchvision and timm as initial weights of a backbone."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from mtl_sparse.models import multitask, resnet
from mtl_sparse.pretrained import state_dicts
from mtl_sparse.runtime.errors import UserError

_CLASSIFIER = ("fc.weight", "fc.bias")  # of ImageNet's classes, not needed
# For each stem, its names and those of the shortcuts, which timm's averages shift by one; see `state_dicts.place`.
_RULES: dict[str, tuple[state_dicts.Rule, ...]] = {
    "7x7": (("conv1", "stem_conv1", "conv"), ("bn1", "stem_bn1", "norm"), *state_dicts.SHORTCUTS),
    "resnet_d": (
        (r"conv1\.0", "stem_conv1", "conv"),
        (r"conv1\.1", "stem_bn1", "norm"),
        (r"conv1\.3", "stem_conv2", "conv"),
        (r"conv1\.4", "stem_bn2", "norm"),
        (r"conv1\.6", "stem_conv3", "conv"),
        ("bn1", "stem_bn3", "norm"),
        (r"layer(\d+)\.(\d+)\.downsample\.1", "layer{}_{}/downsample_conv", "conv"),
        (r"layer(\d+)\.(\d+)\.downsample\.2", "layer{}_{}/downsample_bn", "norm"),
    ),
}


def from_state_dict(state_dict: Mapping[str, np.ndarray]) -> tuple[resnet.ResNet, dict[str, Any]]:
    """Convert ImageNet weights to a backbone and its variables, without the layer of 1000 classes.

    The network is dilated like every backbone here, with output stride 8 instead of 32. So it computes another function
    of the same weights.

    Args:
      state_dict: names of torchvision's or timm's ResNet-18, 50, 101, or of timm's resnet18d, 50d, 101d -> arrays,
        in PyTorch's order of axes.

    Returns:
      (backbone, {"params", "batch_stats"} of float32 NumPy arrays).

    Raises:
      UserError: the network is unknown, or tensors are missing, unexpected, or of another shape.
    """
    if any(key.startswith("backbone.") for key in state_dict):
        raise UserError(
            "WEIGHTS_UNSUPPORTED",
            "expected ImageNet weights, got a checkpoint of the reference implementation (backbone.*); convert it to a "
            "run with --job=import, and start from the folder of that run",
        )
    stem = "resnet_d" if "conv1.0.weight" in state_dict else "7x7"
    tensors: list[state_dicts.Tensor] = []
    unknown: list[str] = []
    for key in state_dict.keys() - set(_CLASSIFIER):
        found = state_dicts.place((*_RULES[stem], *state_dicts.BLOCKS), key, np.asarray(state_dict[key]))
        if found is None:
            unknown.append(key)
        else:
            tensors.append(found)
    depth, width = state_dicts.backbone(tensors)
    model = resnet.ResNet(depth, width, stem)
    kind = f"a ResNet-{depth} of {'timm (resnet_d)' if stem == 'resnet_d' else 'torchvision or timm'}"
    return model, state_dicts.variables(model, tensors, sorted(unknown), kind)


def start(
    path: str | pathlib.Path, model: multitask.MultiTaskModel, variables: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return initial variables of a multi-task model, with the ImageNet weights of a file in its backbone.

    Args:
      path: file of weights, see `state_dicts.read`.
      model: the model. Weights of layers that its backbone does not build, after the last head, are ignored.
      variables: initial variables of the model.

    Returns:
      The variables with the backbone's weights replaced.

    Raises:
      UserError: the file cannot be read, or its weights do not fit the model's backbone.
    """
    given, weights = from_state_dict(state_dicts.read(path))
    for name in ("depth", "width", "stem"):
        theirs, ours = getattr(given, name), getattr(model, name)
        if theirs != ours:
            raise UserError(
                "OPTION_CONFLICT",
                f"expected model.{name}={theirs}, the {name} of the weights in {path}, got model.{name}={ours}; set "
                f"--config.model.{name}={theirs}",
            )
    if model.widths is not None:
        raise UserError(
            "OPTION_CONFLICT",
            f"expected a dense model for model.init_from={path}, got config.model.widths of a compact one; clear "
            "one of them",
        )
    weights = traverse_util.flatten_dict(weights)
    started: dict[str, dict[str, Any]] = {}
    for collection, tree in variables.items():
        backbone = traverse_util.flatten_dict(tree["backbone"])
        new = {name: weights[collection, *name].astype(leaf.dtype) for name, leaf in backbone.items()}
        started[collection] = {**tree, "backbone": traverse_util.unflatten_dict(new)}
    return started
