"""PyTorch state dictionaries: reading the file, and giving each tensor its place in a Flax model."""

import dataclasses
import importlib.util
import pathlib
import pickle
import re
from collections.abc import Mapping, Sequence

import numpy as np
from flax import traverse_util

from mtl_sparse.models import multitask, resnet
from mtl_sparse.runtime.errors import UserError

_SHOWN = 5  # differing keys in an error
# (pattern of a PyTorch module's name, our name with {} for its groups, kind of layer), see `place`.
BLOCKS = (
    (r"layer(\d+)\.(\d+)\.conv(\d)", "layer{}_{}/conv{}", "conv"),
    (r"layer(\d+)\.(\d+)\.bn(\d)", "layer{}_{}/bn{}", "norm"),
)
SHORTCUTS = (
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


class _Inert:
    """In place of an object that was saved beside the weights."""

    def __setstate__(self, state):
        pass


_OPTIMIZERS = (
    "proxssi.optimizers.adamw_hf.AdamW",
    "proxssi.groups.resnet_gp.conv_groups_fn",
    "torch.optim.adam.Adam",
    "torch.optim.adamw.AdamW",
    "torch.optim.sgd.SGD",
)


def _no_default(*_):
    """In place of the defaultdict of an optimizer, which the safe loader cannot fill."""
    return {}


_CONTAINERS = [(_no_default, "collections.defaultdict"), (dict, "builtins.dict")]


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The state dictionary in a file: .npz and .safetensors without PyTorch, anything else by PyTorch's safe loader.

    Of a file with more in it, {"model", "epoch", "optimizer"} or {"state_dict", ...}, that of the model. The released
    code saves its optimizers as objects: their names are known here, but nothing of them is made or run.

    Raises:
      UserError: no such file; one that is damaged, holds no tensors or would run code; a package that is needed.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path} does not exist: name a file of weights")
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

        with torch.serialization.safe_globals([*((_Inert, name) for name in _OPTIMIZERS), *_CONTAINERS]):
            found = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("model", "state_dict"):
            found = found.get(name, found) if isinstance(found, Mapping) else found
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


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor of the checkpoint goes, or that it is not needed."""

    key: str
    path: str | None
    value: np.ndarray | None


def place(rules, key: str, value: np.ndarray, prefix: str = "", parent: str = "") -> Tensor | None:
    """Where the tensor `key`, without `prefix`, goes below our `parent`; None where no rule knows it.

    Raises:
      UserError: it has not as many axes as such a tensor has.
    """
    module, _, leaf = key.removeprefix(prefix).rpartition(".")
    for pattern, name, kind in rules:
        found = re.fullmatch(pattern, module)
        if found and leaf in _LEAVES[kind]:
            if _LEAVES[kind][leaf] is None:
                return Tensor(key, None, None)
            collection, ours, axes = _LEAVES[kind][leaf]
            if value.ndim != len(axes):
                raise UserError(f"{key} has the shape {value.shape}, and should have {len(axes)} axes")
            path = f"{collection}/{parent}{name.format(*found.groups())}/{ours}"
            return Tensor(key, path, np.ascontiguousarray(np.transpose(value, axes), np.float32))
    return None


def backbone(tensors: Sequence[Tensor], parent: str = "") -> tuple[int, int]:
    """(depth, width of the first stage) of the ResNet whose layers are below `parent`.

    Raises:
      UserError: it is none of `resnet.STAGES`.
    """
    prefix, leaves = f"params/{parent}", {tensor.path: tensor.value for tensor in tensors if tensor.path}
    blocks = [0] * len(resnet.STRIDES)
    for path in leaves:
        found = re.fullmatch(prefix + r"layer(\d+)_(\d+)/conv1/kernel", path)
        if found and 1 <= int(found[1]) <= len(blocks):
            blocks[int(found[1]) - 1] += 1
    first = leaves.get(f"{prefix}layer1_0/conv1/kernel")
    stages = any(path.startswith(f"{prefix}layer") and path.endswith("/conv3/kernel") for path in leaves), tuple(blocks)
    depth = next((depth for depth, of in resnet.STAGES.items() if of == stages), None)
    if depth is None or first is None:
        kind = "bottlenecks" if stages[0] else "basic blocks"
        raise UserError(f"a backbone of {blocks} {kind} is none of ResNet {', '.join(map(str, resnet.STAGES))}")
    return depth, first.shape[-1]


def variables(model, tensors: Sequence[Tensor], unknown: Sequence[str], what: str) -> dict:
    """{"params", "batch_stats"} of `model` (a Flax module that takes images) from a state dictionary's tensors.

    Args:
      unknown: keys that no rule knew.
      what: what the state dictionary should be of, for the error.

    Raises:
      UserError: keys that are missing, left over or of another shape than the model's, with the first of them.
    """
    leaves = {tensor.path: tensor.value for tensor in tensors if tensor.path}
    sources = {tensor.path: tensor.key for tensor in tensors if tensor.path}
    expected = multitask.shapes(model)
    problems = {
        "left over": list(unknown) + [sources[path] for path in leaves if path not in expected],
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
        raise UserError(f"this checkpoint is not of {what}: {'; '.join(found)}")
    tree = traverse_util.unflatten_dict(leaves, sep="/")
    return {"params": tree["params"], "batch_stats": tree["batch_stats"]}
