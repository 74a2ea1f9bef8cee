"""Checkpoints of the released PyTorch code of "Less is More" and LOMT as models of this package."""

import dataclasses
import importlib.util
import json
import pathlib
import pickle
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util

from mtl_sparse import checkpoints, cost, optim, weighting
from mtl_sparse import tasks as tasks_lib
from mtl_sparse.errors import UserError
from mtl_sparse.models import multitask, resnet
from mtl_sparse.report import records
from mtl_sparse.run import TrainState

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
_SHOWN = 5  # differing keys in an error

# Below a decoder; {} is empty or the decoder's name with a dot.
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
    (r"layer(\d+)\.(\d+)\.conv(\d)", "layer{}_{}/conv{}", "conv"),
    (r"layer(\d+)\.(\d+)\.bn(\d)", "layer{}_{}/bn{}", "norm"),
    (r"layer(\d+)\.(\d+)\.downsample\.0", "layer{}_{}/downsample_conv", "conv"),
    (r"layer(\d+)\.(\d+)\.downsample\.1", "layer{}_{}/downsample_bn", "norm"),
)
# PyTorch's name of a module's tensor -> (collection, our name, axes in our order); None: not needed in Flax.
_LEAVES = {
    "conv": {"weight": ("params", "kernel", (2, 3, 1, 0)), "bias": ("params", "bias", (0,))},
    "dense": {"weight": ("params", "kernel", (1, 0)), "bias": ("params", "bias", (0,))},
    "norm": {
        "weight": ("params", "scale", (0,)),
        "bias": ("params", "bias", (0,)),
        "running_mean": ("batch_stats", "mean", (0,)),
        "running_var": ("batch_stats", "var", (0,)),
        "num_batches_tracked": None,
    },
}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor of the checkpoint goes, or that it is not needed."""

    key: str
    path: str | None
    value: np.ndarray | None


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
    leaves = {tensor.path: tensor.value for tensor in tensors if tensor.path}
    sources = {tensor.path: tensor.key for tensor in tensors if tensor.path}
    model = _model(leaves, tuple(heads.values()))
    _check(model, leaves, sources, unknown)
    variables = traverse_util.unflatten_dict(leaves, sep="/")
    return model, {"params": variables["params"], "batch_stats": variables["batch_stats"]}


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


def _place(key, value, heads) -> _Tensor | None:
    """What becomes of a tensor; None of one that is not known."""
    module, _, leaf = key.rpartition(".")
    if module.startswith("backbone."):
        return _match(_BACKBONE, key, module.removeprefix("backbone."), leaf, value, "backbone")
    for decoder, task in heads.items():
        prefix = f"decoders.{decoder}." if decoder else "decoders."
        if module.startswith(prefix):
            rest = module.removeprefix(prefix)
            return _match((*_DEEPLAB, *_CLASSIFIER), key, rest, leaf, value, f"head_{task}")
    return None


def _match(rules, key, module, leaf, value, parent) -> _Tensor | None:
    for pattern, name, kind in rules:
        found = re.fullmatch(pattern, module)
        if found and leaf in _LEAVES[kind]:
            if _LEAVES[kind][leaf] is None:
                return _Tensor(key, None, None)
            collection, ours, axes = _LEAVES[kind][leaf]
            if value.ndim != len(axes):
                raise UserError(f"{key} has the shape {value.shape}, and should have {len(axes)} axes")
            path = f"{collection}/{parent}/{name.format(*found.groups())}/{ours}"
            return _Tensor(key, path, np.ascontiguousarray(np.transpose(value, axes), np.float32))
    return None


def _model(leaves, tasks) -> multitask.MultiTaskModel:
    """The model by the shapes of its leaves; what does not fit it is found afterwards."""
    blocks = [0] * len(resnet.STRIDES)
    for path in leaves:
        found = re.fullmatch(r"params/backbone/layer(\d+)_(\d+)/conv1/kernel", path)
        if found and 1 <= int(found[1]) <= len(blocks):
            blocks[int(found[1]) - 1] += 1
    stages = any(path.endswith("/conv3/kernel") and "backbone/layer" in path for path in leaves), tuple(blocks)
    depth = next((depth for depth, of in resnet.STAGES.items() if of == stages), None)
    stem = leaves.get("params/backbone/stem_conv1/kernel")
    if depth is None or stem is None:
        kind = "bottlenecks" if stages[0] else "basic blocks"
        stem = " without stem1.0" if stem is None else ""
        raise UserError(f"a backbone of {blocks} {kind}{stem} is none of ResNet-D {', '.join(map(str, resnet.STAGES))}")
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
    return multitask.MultiTaskModel(tuple(heads), depth=depth, width=stem.shape[-1], **settings)


def _check(model, leaves, sources, unknown):
    """Raises UserError where the checkpoint's tensors are not the model's."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32)))
    expected = {"/".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(shapes).items()}
    problems = {
        "left over": unknown + [sources[path] for path in leaves if path not in expected],
        "missing": [path for path in expected if path not in leaves],
        "of another shape": [
            f"{sources[path]} (gives {leaf.shape}, not {expected[path]})"
            for path, leaf in leaves.items()
            if path in expected and leaf.shape != expected[path]
        ],
    }
    found = [
        f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise UserError(f"this checkpoint is not of a ResNet-{model.depth} of the released code: {'; '.join(found)}")


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The state dictionary in a file: .npz and .safetensors without PyTorch, anything else by PyTorch's safe loader.

    Of a file as the released code writes it, {"model", "epoch", "optimizer"}, that of the model.

    Raises:
      UserError: no such file; one that is damaged, holds no tensors or would run code; a package that is needed.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path} does not exist: --checkpoint names a file of weights")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        if path.suffix == ".safetensors":
            _need("safetensors")
            from safetensors.numpy import load_file

            return load_file(path)
        _need("torch")
        import torch

        found = torch.load(path, map_location="cpu", weights_only=True)
        found = found.get("model", found) if isinstance(found, Mapping) else found
        if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
            raise UserError(f"{path} holds no state dictionary: names and their tensors")
        return {name: value.numpy() for name, value in found.items()}
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} was refused: it holds more than tensors, and loading it could run code") from error
    except Exception as error:  # what a loader trips over in a damaged file is anything
        raise UserError(f"{path} is damaged or no checkpoint ({type(error).__name__}: {error})") from error


def _need(package):
    if importlib.util.find_spec(package) is None:
        raise UserError(f"reading this file needs {package}: pip install -e '.[torch]', or save it as .npz")


def run_job(config, workdir: str | pathlib.Path, checkpoint: str | pathlib.Path) -> pathlib.Path:
    """`--job=import`: makes a run of a released checkpoint, which can be evaluated, compacted, timed and exported.

    Args:
      config: all that the checkpoint does not say, such as the data; its tasks are those of a single-task checkpoint.
      workdir: the new run's folder.
      checkpoint: file of the weights, see `read`.

    Returns:
      The folder.

    Raises:
      UserError: as `read` and `from_state_dict`, or a folder that holds a run.
    """
    workdir = pathlib.Path(workdir).expanduser()
    if (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds a run already: give another --workdir")
    task = config.tasks[0] if len(config.tasks) == 1 else None
    model, variables = from_state_dict(read(checkpoint), task)
    config = config.copy_and_resolve_references()
    config.tasks = tuple(name for name, *_ in model.heads)
    config.model.update(depth=model.depth, width=model.width, head_features=model.head_features)
    config.model.classifier_features = model.classifier_features
    outputs = {name: count for name, _, count in model.heads}
    config.data.num_classes = outputs.get("segmentation", config.data.num_classes)
    same = multitask.build(config.model, tasks_lib.resolve(config))
    if same.heads != model.heads:
        raise UserError(f"the checkpoint's heads {model.heads} are not those of config.tasks here, {same.heads}")
    params = {"model": variables["params"], "weighting": weighting.init(config.loss.weighting, config.tasks)}
    opt_state = optim.build(config, total_steps=1).init(jax.tree.map(jnp.asarray, params))
    state = TrainState(jnp.zeros([], jnp.int32), params, variables["batch_stats"], opt_state)
    workdir.mkdir(parents=True, exist_ok=True)
    saved = checkpoints.Checkpoints(workdir)
    try:
        for kind in checkpoints.KINDS:  # a run that has ended: --job=train would only evaluate it
            saved.save(kind, 0, jax.device_get(state), {"stopped": True})
        saved.wait()
    finally:
        saved.close()
    records.write_json(workdir / "config.json", json.loads(config.to_json()))
    count = cost.parameter_count(variables)
    logging.info("%s holds a run of %s now, with %d parameters", workdir, ", ".join(config.tasks), count)
    return workdir
