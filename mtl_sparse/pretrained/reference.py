"""Conversion of checkpoints of the reference implementation of "Less is More" and LOMT, in PyTorch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from mtl_sparse.models import multitask, resnet
from mtl_sparse.pretrained import state_dicts
from mtl_sparse.runtime.errors import UserError

# Decoder of the reference implementation -> task.
TASKS = {
    "segmentsemantic": "segmentation",
    "surface_normal": "normals",
    "depth_euclidean": "depth",
    "edge_texture": "edge",
    "class_male": "attribute:Male",
    "class_smile": "attribute:Smiling",
    "class_eyebrows": "attribute:Arched_Eyebrows",
    "class_glasses": "attribute:Eyeglasses",
    "class_biglips": "attribute:Big_Lips",
    "class_highcheekbones": "attribute:High_Cheekbones",
    "class_lipstick": "attribute:Wearing_Lipstick",
}
# The published choices of LOMT: (depth, task -> attachment point), on NYU-v2 with ResNet-50 and 101, and on
# CelebAMask-HQ. The reference implementation names them in its configs, "layer3[3].conv1", not in its checkpoints.
PUBLISHED: tuple[tuple[int, dict[str, str]], ...] = (
    (
        50,
        {
            "segmentation": "layer3_3/conv1:raw",
            "normals": "layer4_0/conv1:raw",
            "depth": "layer3_3/conv1:raw",
            "edge": "layer2_3/conv2:raw",
        },
    ),
    (
        101,
        {
            "segmentation": "layer3_4/conv2:raw",
            "normals": "layer4_0/conv1:raw",
            "depth": "layer4_0/conv1:raw",
            "edge": "layer3_22/conv1:raw",
        },
    ),
    (
        50,
        {
            "segmentation": "layer3_5/conv1:raw",
            "attribute:Male": "layer3_5/conv1:raw",
            "attribute:Smiling": "layer3_4/conv3:raw",
            "attribute:Arched_Eyebrows": "layer4_2/conv3:raw",
            "attribute:Big_Lips": "layer4_0/conv1:raw",
            "attribute:High_Cheekbones": "layer3_5/conv1:raw",
            "attribute:Wearing_Lipstick": "layer3_0/conv2:raw",
        },
    ),
)

# Names below a decoder, and below the backbone; see `state_dicts.place`.
_DEEPLAB: tuple[state_dicts.Rule, ...] = (
    (r"0\.convs\.([0-3])\.0", "aspp{}", "conv"),
    (r"0\.convs\.([0-3])\.1", "aspp{}_bn", "norm"),
    (r"0\.convs\.4\.1", "pool", "conv"),
    (r"0\.convs\.4\.2", "pool_bn", "norm"),
    (r"0\.project\.0", "project", "conv"),
    (r"0\.project\.1", "project_bn", "norm"),
    (r"1", "conv", "conv"),
    (r"2", "conv_bn", "norm"),
    (r"4", "out", "conv"),
)
_CLASSIFIER: tuple[state_dicts.Rule, ...] = (("conv", "conv", "conv"), ("fc([12])", "fc{}", "dense"))
_BACKBONE: tuple[state_dicts.Rule, ...] = (
    (r"stem1\.0", "stem_conv1", "conv"),
    (r"stem1\.1", "stem_bn1", "norm"),
    (r"stem1\.3", "stem_conv2", "conv"),
    (r"stem1\.4", "stem_bn2", "norm"),
    (r"stem1\.6", "stem_conv3", "conv"),
    (r"stem1\.7", "stem_bn3", "norm"),
    *state_dicts.BLOCKS,
    *state_dicts.SHORTCUTS,
)


def from_state_dict(
    state_dict: Mapping[str, np.ndarray], task: str | None = None, attach: Mapping[str, str] | None = None
) -> tuple[multitask.MultiTaskModel, dict[str, Any]]:
    """Convert a checkpoint of the reference implementation to a model and its variables.

    Depth, widths, tasks and outputs are inferred from the tensors. PyTorch is not needed. A checkpoint of LOMT has the
    whole backbone, and does not name the layers that its heads read: the layers after the last of them are left out.

    Args:
      state_dict: names of the reference implementation (`backbone.stem1.0.weight`,
        `decoders.<task>.0.convs.0.0.weight`, ...) -> arrays, in PyTorch's order of axes.
      task: name of the task here, for a single-task checkpoint, whose decoder has no name. Needed where the number of
        outputs does not imply it.
      attach: attachment point of each task's head, see `resnet.points`; LOMT's heads read raw points. By default, the
        end of the backbone if the heads are of its width, or else the one of `PUBLISHED` whose tasks and widths fit.

    Returns:
      (model, {"params", "batch_stats"} of float32 NumPy arrays).

    Raises:
      UserError: tensors are missing, unexpected, or of another shape; a decoder or the backbone is unknown; `task` or
        `attach` is needed, or `attach` does not fit.
    """
    decoders = _decoders(state_dict)
    heads = {decoder: (task or _infer_task(state_dict)) if decoder == "" else TASKS[decoder] for decoder in decoders}
    tensors: list[state_dicts.Tensor] = []
    unknown: list[str] = []
    for key, value in state_dict.items():
        if key in TASKS and np.size(value) == 1:
            continue  # the learned weight of a task's loss
        found = _place(key, np.asarray(value), heads)
        if found is None:
            unknown.append(key)
        else:
            tensors.append(found)
    model = _model(tensors, tuple(heads.values()))
    model = model.clone(attach=_attach(model, tensors, attach or {}))
    kind = f"a ResNet-{model.depth} of the reference implementation"
    return model, state_dicts.variables(model, _needed(model, tensors), unknown, kind)


def _decoders(state_dict: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Return the names of the decoders, in order; ("",) for a single-task checkpoint."""
    names = dict.fromkeys(key.split(".")[1] for key in state_dict if key.startswith("decoders."))
    if not names:
        raise UserError(
            "WEIGHTS_UNSUPPORTED", "expected a checkpoint of the reference implementation, got one without decoders.*"
        )
    own = {"0", "1", "2", "4", "conv", "fc1", "fc2"}
    if names.keys() <= own:
        return ("",)
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise UserError("WEIGHTS_UNSUPPORTED", f"expected decoders among {', '.join(TASKS)}, got {', '.join(unknown)}")
    return tuple(names)


def _infer_task(state_dict: Mapping[str, np.ndarray]) -> str:
    """Return the task of a single-task checkpoint, by the outputs of its decoder."""
    outputs = len(state_dict["decoders.4.bias"]) if "decoders.4.bias" in state_dict else 0
    if outputs in (0, 1):
        kind = "attribute" if outputs == 0 else "task of one output (depth or edge)"
        raise UserError(
            "OPTION_MISSING", f"expected task= for this single-task checkpoint, because it does not name its {kind}"
        )
    return "normals" if outputs == 3 else "segmentation"


def _place(key: str, value: np.ndarray, heads: Mapping[str, str]) -> state_dicts.Tensor | None:
    """Return a tensor with its path in the model; None if its name is unknown."""
    if key.startswith("backbone."):
        return state_dicts.place(_BACKBONE, key, value, "backbone.", "backbone/")
    for decoder, task in heads.items():
        prefix = f"decoders.{decoder}." if decoder else "decoders."
        if key.startswith(prefix):
            return state_dicts.place((*_DEEPLAB, *_CLASSIFIER), key, value, prefix, f"head_{task}/")
    return None


def _model(tensors: Sequence[state_dicts.Tensor], tasks: Sequence[str]) -> multitask.MultiTaskModel:
    """Return the model that the tensors' shapes imply; `state_dicts.variables` then checks that all of them fit."""
    depth, width = state_dicts.backbone(tensors, "backbone/")
    leaves = {tensor.path: tensor.value for tensor in tensors}
    options: dict[str, Any] = {}
    heads = []
    for task in tasks:
        out = leaves.get(f"params/head_{task}/out/kernel")
        is_pixel = f"params/head_{task}/project/kernel" in leaves or out is not None
        if is_pixel:
            branch = leaves.get(f"params/head_{task}/aspp0/kernel")
            options.setdefault("head_features", 256 if branch is None else branch.shape[-1])
        else:
            widths = [leaves.get(f"params/head_{task}/{name}/kernel") for name in ("conv", "fc1")]
            default = multitask.MultiTaskModel.classifier_features
            features = tuple(w.shape[-1] if w is not None else d for w, d in zip(widths, default, strict=True))
            options.setdefault("classifier_features", features)
            out = leaves.get(f"params/head_{task}/fc2/kernel")
        heads.append((task, "deeplab" if is_pixel else "classifier", 1 if out is None else out.shape[-1]))
    return multitask.MultiTaskModel(tuple(heads), depth=depth, width=width, **options)


def _attach(
    model: multitask.MultiTaskModel, tensors: Sequence[state_dicts.Tensor], given: Mapping[str, str]
) -> tuple[str, ...]:
    """Return the attachment point of each head; () for the end of the backbone."""
    leaves = {tensor.path: tensor.value for tensor in tensors}
    layers = {"deeplab": "aspp0", "classifier": "conv"}
    reads = {task: leaves.get(f"params/head_{task}/{layers[kind]}/kernel") for task, kind, _ in model.heads}
    widths = {task: kernel.shape[2] for task, kernel in reads.items() if kernel is not None}
    if given:
        _check_attach(model, widths, given)
        return tuple(given[task] for task, *_ in model.heads)
    end = _channels(model, resnet.points(model.depth)[-1])
    if all(width == end for width in widths.values()):
        return ()
    found = [
        choices
        for depth, choices in PUBLISHED
        if depth == model.depth
        and reads.keys() <= choices.keys()
        and all(_channels(model, choices[task]) == width for task, width in widths.items())
    ]
    if len(found) != 1:
        inside = ", ".join(f"{task} ({width} channels)" for task, width in widths.items())
        fitting = f"{len(found)} published choices fit" if found else "no published choice fits"
        raise UserError(
            "OPTION_MISSING",
            f"expected attach= with the layer that each head reads, got a checkpoint with heads inside the backbone, "
            f"{inside}, and {fitting}; give --config.tasks and --config.model.attach, where the reference "
            "implementation's hook layer3[3].conv1 is layer3_3/conv1:raw",
        )
    attach = tuple(found[0][task] for task in reads)
    logging.info("Attachment points as published: %s", dict(zip(reads, attach, strict=True)))
    return attach


def _check_attach(model: multitask.MultiTaskModel, widths: Mapping[str, int], given: Mapping[str, str]) -> None:
    """Raise UserError if the given attachment points are not those of the heads."""
    tasks, points = [task for task, *_ in model.heads], resnet.points(model.depth)
    if given.keys() != set(tasks):
        raise UserError(
            "OPTION_CONFLICT",
            f"expected an attachment point for each task of the checkpoint ({', '.join(tasks)}), got those of "
            f"{', '.join(given)}; name the same tasks in --config.tasks and give --config.model.attach in their order",
        )
    # Maps have an eighth of the image's size from the convolution with the last stride on.
    first = "layer2_0/conv2:raw" if resnet.STAGES[model.depth][0] else "layer2_0/conv1:raw"
    for task, point in given.items():
        if point not in points[points.index(first) :]:
            raise UserError(
                "WEIGHTS_UNSUPPORTED",
                f"expected attachment points of a ResNet-{model.depth} from {first} on, got {point!r} for {task}; "
                "heads before it would run at another resolution than those of the reference implementation",
            )
        wanted, width = _channels(model, point), widths.get(task)
        if width not in (None, wanted):
            raise UserError(
                "WEIGHTS_DIFFER",
                f"expected the head of {task} to read the {wanted} channels of {point}, got one that reads {width}; "
                "give the attachment point that the checkpoint was trained with",
            )


def _channels(model: multitask.MultiTaskModel, point: str) -> int:
    """Return the number of features at an attachment point."""
    stem, blocks = resnet.dense(model.depth, model.width, (point,), model.stem)
    return blocks[-1].features[-1] if blocks else stem.stream


def _needed(model: multitask.MultiTaskModel, tensors: Sequence[state_dicts.Tensor]) -> Sequence[state_dicts.Tensor]:
    """Return the tensors without those of the backbone's layers after the last attachment point."""
    if not model.attach:
        return tensors
    whole = multitask.shapes(resnet.ResNet(model.depth, model.width, model.stem))
    paths = {path.replace("/", "/backbone/", 1) for path in whole} - multitask.shapes(model).keys()
    return [tensor for tensor in tensors if tensor.path not in paths]
