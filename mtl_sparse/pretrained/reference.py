"""Checkpoints of the released PyTorch code of "Less is More" and LOMT as models of this package."""

from collections.abc import Mapping

import numpy as np

from mtl_sparse.models import multitask
from mtl_sparse.pretrained import state_dicts
from mtl_sparse.runtime.errors import UserError

# Decoders of the released checkpoints and our tasks. The released code does not say which eyebrows it means.
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

# Below a decoder.
_DEEPLAB = (
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
_CLASSIFIER = (("conv", "conv", "conv"), ("fc([12])", "fc{}", "dense"))
_BACKBONE = (
    (r"stem1\.0", "stem_conv1", "conv"),
    (r"stem1\.1", "stem_bn1", "norm"),
    (r"stem1\.3", "stem_conv2", "conv"),
    (r"stem1\.4", "stem_bn2", "norm"),
    (r"stem1\.6", "stem_conv3", "conv"),
    (r"stem1\.7", "stem_bn3", "norm"),
    *state_dicts.BLOCKS,
    *state_dicts.SHORTCUTS,
)


def from_state_dict(state_dict: Mapping[str, np.ndarray], task: str | None = None):
    """The model that a released checkpoint is of, and its variables.

    Depth, widths, tasks and outputs are read off the tensors. PyTorch is not needed.

    Args:
      state_dict: names of the released code (`backbone.stem1.0.weight`, `decoders.<task>.0.convs.0.0.weight`, ...) ->
        arrays, in PyTorch's order of axes.
      task: ours, of a single-task checkpoint, whose decoder has no name. Needed where its outputs do not tell it.

    Returns:
      (`multitask.MultiTaskModel`, {"params", "batch_stats"} of float32 NumPy arrays).

    Raises:
      UserError: names that are missing, left over, or of another shape than the model's, with a list of them; a decoder
        or a backbone that is not known; a single-task checkpoint whose task must be said.
    """
    decoders = _decoders(state_dict)
    heads = {decoder: (task or _guess(state_dict)) if decoder == "" else TASKS[decoder] for decoder in decoders}
    tensors, unknown = [], []
    for key, value in state_dict.items():
        found = _place(key, np.asarray(value), heads)
        (tensors if found else unknown).append(found or key)
    model = _model(tensors, tuple(heads.values()))
    return model, state_dicts.variables(model, tensors, unknown, f"a ResNet-{model.depth} of the released code")


def _decoders(state_dict) -> tuple[str, ...]:
    """Names of the decoders, in order; ("",) of a single-task checkpoint."""
    names = dict.fromkeys(key.split(".")[1] for key in state_dict if key.startswith("decoders."))
    if not names:
        raise UserError("this checkpoint has no decoders.*: it is not one of the released multi-task code")
    own = {"0", "1", "2", "4", "conv", "fc1", "fc2"}
    if names.keys() <= own:
        return ("",)
    unknown = [name for name in names if name not in TASKS]
    if unknown:
        raise UserError(f"unknown decoders {', '.join(unknown)}; the released ones are {', '.join(TASKS)}")
    return tuple(names)


def _guess(state_dict) -> str:
    """Our task of a single-task checkpoint by its decoder."""
    outputs = len(state_dict["decoders.4.bias"]) if "decoders.4.bias" in state_dict else 0
    if outputs in (0, 1):
        kind = "attribute" if outputs == 0 else "task of one output (depth or edge)"
        raise UserError(f"this single-task checkpoint does not say which {kind} it is of: name it with task=")
    return "normals" if outputs == 3 else "segmentation"


def _place(key, value, heads) -> state_dicts.Tensor | None:
    """What becomes of a tensor; None of one that is not known."""
    if key.startswith("backbone."):
        return state_dicts.place(_BACKBONE, key, value, "backbone.", "backbone/")
    for decoder, task in heads.items():
        prefix = f"decoders.{decoder}." if decoder else "decoders."
        if key.startswith(prefix):
            return state_dicts.place((*_DEEPLAB, *_CLASSIFIER), key, value, prefix, f"head_{task}/")
    return None


def _model(tensors, tasks) -> multitask.MultiTaskModel:
    """The model by the shapes of its leaves; what does not fit it is found afterwards."""
    depth, width = state_dicts.backbone(tensors, "backbone/")
    leaves = {tensor.path: tensor.value for tensor in tensors if tensor.path}
    settings, heads = {}, []
    for task in tasks:
        out = leaves.get(f"params/head_{task}/out/kernel")
        is_pixel = f"params/head_{task}/project/kernel" in leaves or out is not None
        if is_pixel:
            branch = leaves.get(f"params/head_{task}/aspp0/kernel")
            settings.setdefault("head_features", 256 if branch is None else branch.shape[-1])
        else:
            widths = [leaves.get(f"params/head_{task}/{name}/kernel") for name in ("conv", "fc1")]
            default = multitask.MultiTaskModel.classifier_features
            features = tuple(w.shape[-1] if w is not None else d for w, d in zip(widths, default, strict=True))
            settings.setdefault("classifier_features", features)
            out = leaves.get(f"params/head_{task}/fc2/kernel")
        heads.append((task, "deeplab" if is_pixel else "classifier", 1 if out is None else out.shape[-1]))
    return multitask.MultiTaskModel(tuple(heads), depth=depth, width=width, **settings)
