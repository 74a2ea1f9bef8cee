"""Conversion of checkpoints of the reference implementation of "Less is More" and LOMT, in PyTorch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtl_sparse.models import multitask
from mtl_sparse.pretrained import state_dicts
from mtl_sparse.runtime.errors import UserError

# Decoder of the reference implementation -> task. Which eyebrows it means is not documented.
TASKS = {
    "segmentsemantic": "segmentation",
    "surface_normal": "normals",
    "depth_euclidean": "depth",
    "edge_texture": "edge",
    "class_male": "attribute:Male",
    "class_smile": "attribute:Smiling",
    "class_eyebrows": "attribute:Arched_Eyebrows",
    "class_glasses": "attribute:Eyeglasses",
}

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
    state_dict: Mapping[str, np.ndarray], task: str | None = None
) -> tuple[multitask.MultiTaskModel, dict[str, Any]]:
    """Convert a checkpoint of the reference implementation to a model and its variables.

    Depth, widths, tasks and outputs are inferred from the tensors. PyTorch is not needed.

    Args:
      state_dict: names of the reference implementation (`backbone.stem1.0.weight`,
        `decoders.<task>.0.convs.0.0.weight`, ...) -> arrays, in PyTorch's order of axes.
      task: name of the task here, for a single-task checkpoint, whose decoder has no name. Needed where the number of
        outputs does not imply it.

    Returns:
      (model, {"params", "batch_stats"} of float32 NumPy arrays).

    Raises:
      UserError: tensors are missing, unexpected, or of another shape; a decoder or the backbone is unknown; `task` is
        needed.
    """
    decoders = _decoders(state_dict)
    heads = {decoder: (task or _infer_task(state_dict)) if decoder == "" else TASKS[decoder] for decoder in decoders}
    tensors: list[state_dicts.Tensor] = []
    unknown: list[str] = []
    for key, value in state_dict.items():
        found = _place(key, np.asarray(value), heads)
        if found is None:
            unknown.append(key)
        else:
            tensors.append(found)
    model = _model(tensors, tuple(heads.values()))
    kind = f"a ResNet-{model.depth} of the reference implementation"
    return model, state_dicts.variables(model, tensors, unknown, kind)


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
