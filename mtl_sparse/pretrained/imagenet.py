"""ImageNet weights of torchvision and timm as the start of a backbone."""

import pathlib
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from mtl_sparse.models import resnet
from mtl_sparse.pretrained import state_dicts
from mtl_sparse.runtime.errors import UserError

_CLASSIFIER = ("fc.weight", "fc.bias")  # of ImageNet's classes: not needed
# The names in front of the stages, and of the shortcuts behind timm's averages, see `state_dicts.place`.
_RULES = {
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


def from_state_dict(state_dict: Mapping[str, np.ndarray]):
    """The backbone that ImageNet weights are of, and its variables; their layer of 1000 classes is left out.

    Args:
      state_dict: names of torchvision's or timm's ResNet-18, 50, 101, or of timm's resnet18d, 50d, 101d -> arrays,
        in PyTorch's order of axes.

    Returns:
      (`resnet.ResNet`, {"params", "batch_stats"} of float32 NumPy arrays). The network is dilated as every backbone
      here, and a pixel of its features is an eighth of the image's, not a thirty-second: it computes another function
      of the same weights.

    Raises:
      UserError: names that are missing, left over, or of another shape than the network's, with a list of them; a
        network that is not known.
    """
    if any(key.startswith("backbone.") for key in state_dict):
        raise UserError(
            "this is a checkpoint of the released multi-task code: make a run of it with --job=import, and start from "
            "its folder"
        )
    stem = "resnet_d" if "conv1.0.weight" in state_dict else "7x7"
    tensors, unknown = [], []
    for key in state_dict.keys() - set(_CLASSIFIER):
        found = state_dicts.place((*_RULES[stem], *state_dicts.BLOCKS), key, np.asarray(state_dict[key]))
        (tensors if found else unknown).append(found or key)
    depth, width = state_dicts.backbone(tensors)
    model = resnet.ResNet(depth, width, stem)
    kind = f"a ResNet-{depth} of {'timm (resnet_d)' if stem == 'resnet_d' else 'torchvision or timm'}"
    return model, state_dicts.variables(model, tensors, sorted(unknown), kind)


def start(path: str | pathlib.Path, model, variables):
    """`variables` of a multi-task model with the ImageNet weights of a file in its backbone.

    Args:
      path: see `state_dicts.read`.
      model: `multitask.MultiTaskModel`; of one whose heads read in front of the backbone's end only what it has of it.

    Raises:
      UserError: as `state_dicts.read` and `from_state_dict`, or weights of another backbone than the model's.
    """
    given, weights = from_state_dict(state_dicts.read(path))
    for name in ("depth", "width", "stem"):
        theirs, ours = getattr(given, name), getattr(model, name)
        if theirs != ours:
            raise UserError(f"{path} has model.{name}={theirs}, this config {ours}: set --config.model.{name}={theirs}")
    if model.widths is not None:
        raise UserError("model.init_from names ImageNet weights, but config.model.widths is of a compact model")
    weights = traverse_util.flatten_dict(weights)
    started = {}
    for collection, tree in variables.items():
        backbone = traverse_util.flatten_dict(tree["backbone"])
        new = {name: weights[collection, *name].astype(leaf.dtype) for name, leaf in backbone.items()}
        started[collection] = {**tree, "backbone": traverse_util.unflatten_dict(new)}
    return started
