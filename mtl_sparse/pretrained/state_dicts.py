"""PyTorch state dictionaries: reading a file, and placing each tensor in a Flax model."""

import dataclasses
import importlib.util
import pathlib
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from flax import traverse_util

from mtl_sparse.models import multitask, resnet
from mtl_sparse.runtime.errors import UserError

_SHOWN = 5  # differing keys in an error
# (pattern of a PyTorch module's name, our name with {} for its groups, kind of layer), see `place`.
Rule = tuple[str, str, str]
BLOCKS: tuple[Rule, ...] = (
    (r"layer(\d+)\.(\d+)\.conv(\d)", "layer{}_{}/conv{}", "conv"),
    (r"layer(\d+)\.(\d+)\.bn(\d)", "layer{}_{}/bn{}", "norm"),
)
SHORTCUTS: tuple[Rule, ...] = (
    (r"layer(\d+)\.(\d+)\.downsample\.0", "layer{}_{}/downsample_conv", "conv"),
    (r"layer(\d+)\.(\d+)\.downsample\.1", "layer{}_{}/downsample_bn", "norm"),
)
# Kind of layer -> PyTorch's name of a tensor -> (collection, our name, axes in our order); None: not needed in Flax.
_LEAVES: dict[str, dict[str, tuple[str, str, tuple[int, ...]] | None]] = {
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
    """Replaces an object that was saved along with the weights, and ignores its state."""

    def __setstate__(self, state: Any) -> None:
        pass


_OPTIMIZERS = (
    "proxssi.optimizers.adamw_hf.AdamW",
    "proxssi.groups.resnet_gp.conv_groups_fn",
    "torch.optim.adam.Adam",
    "torch.optim.adamw.AdamW",
    "torch.optim.sgd.SGD",
)


def _no_default(*_: Any) -> dict[Any, Any]:
    """Replace the defaultdict of an optimizer, which the safe loader cannot fill."""
    return {}


_CONTAINERS = [(_no_default, "collections.defaultdict"), (dict, "builtins.dict")]


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Read the state dictionary in a file.

    Files .npz and .safetensors are read without PyTorch, others by PyTorch's safe loader. If the file has more than the
    weights, such as {"model", "epoch", "optimizer"} or {"state_dict", ...}, those of the model are returned. The
    reference implementation saves optimizers as objects. Their names are allowed here, but their code is never run.

    Args:
      path: the file.

    Returns:
      {name: array}.

    Raises:
      UserError: the file is missing, damaged, holds no tensors or would run code, or a package must be installed.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise UserError("FILE_MISSING", f"expected a file of weights, got {path}, which does not exist")
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
            raise UserError("WEIGHTS_INVALID", f"expected a dictionary of tensors in {path}, got another object")
        return {name: value.numpy() for name, value in found.items()}
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            "WEIGHTS_UNSAFE",
            f"expected only tensors in {path}, got other objects, and loading them could run code; save the state "
            "dictionary alone",
        ) from error
    except Exception as error:  # a damaged file can make a loader raise anything
        raise UserError(
            "FILE_DAMAGED", f"expected a checkpoint in {path}, got a damaged file ({type(error).__name__}: {error})"
        ) from error


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            "EXTRA_MISSING",
            f"expected the package {package} to be installed to read this file; run pip install -e '.[torch]', or save "
            "the file as .npz",
        )


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint and its place in the model.

    Attributes:
      key: its name in the checkpoint.
      path: its "/"-joined path in the model's variables; "" if the model does not need it.
      value: its value in Flax's order of axes.
    """

    key: str
    path: str
    value: np.ndarray


def place(rules: Sequence[Rule], key: str, value: np.ndarray, prefix: str = "", parent: str = "") -> Tensor | None:
    """Return a tensor with its place in the model.

    Args:
      rules: names of the checkpoint's modules and those of the model's layers.
      key: name of the tensor.
      value: its value.
      prefix: what is removed from the beginning of the key.
      parent: what is added to the beginning of the layer's name.

    Returns:
      The tensor; None if no rule matches its name.

    Raises:
      UserError: the tensor has another number of axes than such tensors have.
    """
    module, _, leaf = key.removeprefix(prefix).rpartition(".")
    for pattern, name, kind in rules:
        found = re.fullmatch(pattern, module)
        if found and leaf in _LEAVES[kind]:
            target = _LEAVES[kind][leaf]
            if target is None:
                return Tensor(key, "", value)
            collection, ours, axes = target
            if value.ndim != len(axes):
                raise UserError(
                    "WEIGHTS_DIFFER", f"expected {key} to have {len(axes)} axes, got the shape {value.shape}"
                )
            path = f"{collection}/{parent}{name.format(*found.groups())}/{ours}"
            return Tensor(key, path, np.ascontiguousarray(np.transpose(value, axes), np.float32))
    return None


def backbone(tensors: Sequence[Tensor], parent: str = "") -> tuple[int, int]:
    """Return (depth, width of the first stage) of a ResNet.

    Args:
      tensors: tensors of the checkpoint.
      parent: beginning of the names of the ResNet's layers.

    Returns:
      (depth, width).

    Raises:
      UserError: the ResNet is none of `resnet.STAGES`.
    """
    prefix, leaves = f"params/{parent}", {tensor.path: tensor.value for tensor in tensors}
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
        raise UserError(
            "WEIGHTS_UNSUPPORTED",
            f"expected a backbone of ResNet {', '.join(map(str, resnet.STAGES))}, got one of {blocks} {kind}",
        )
    return depth, first.shape[-1]


def variables(model: nn.Module, tensors: Sequence[Tensor], unknown: Sequence[str], what: str) -> dict[str, Any]:
    """Return the variables of a model from the tensors of a state dictionary.

    Args:
      model: a module of images.
      tensors: the tensors that a rule matched.
      unknown: keys that no rule matched.
      what: the network that the state dictionary should belong to, for the error.

    Returns:
      {"params", "batch_stats"}.

    Raises:
      UserError: tensors are missing, unexpected, or of another shape; the first few are listed.
    """
    leaves = {tensor.path: tensor.value for tensor in tensors if tensor.path}
    sources = {tensor.path: tensor.key for tensor in tensors if tensor.path}
    expected = multitask.shapes(model)
    problems = {
        "unexpected": list(unknown) + [sources[path] for path in leaves if path not in expected],
        "missing": [path for path in expected if path not in leaves],
        "of another shape": [
            f"{sources[path]} ({leaf.shape} instead of {expected[path]})"
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
        raise UserError("WEIGHTS_DIFFER", f"expected the weights of {what}, got {'; '.join(found)}")
    tree = traverse_util.unflatten_dict(leaves, sep="/")
    return {"params": tree["params"], "batch_stats": tree["batch_stats"]}
