"""Costs of a model, layer by layer: parameters and multiply-accumulates (MACs)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtl_sparse.models import atrous


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One convolution or dense layer.

    Attributes:
      kernel: shape of its kernel, [H, W, I, O] or [I, O].
      macs: multiply-accumulates for one image. As usual, products with zero padding count, also in the backbone's
        dilated convolutions, where small maps skip them. Only the heads' atrous taps that are never computed do not.
    """

    kernel: tuple[int, ...]
    macs: int

    @property
    def parameters(self) -> int:
        """Number of the kernel's parameters."""
        return math.prod(self.kernel)


@functools.lru_cache(maxsize=16)
def layers(model: Any, size: tuple[int, int]) -> dict[str, LayerCost]:
    """Return the cost of each convolution and dense layer on an image.

    Args:
      model: a module of images [B, H, W, 3], or a model that has its costs as `layer_costs(size)`.
      size: (height, width) of the image.

    Returns:
      The costs by "/"-joined path. The dictionary is cached; do not change it.
    """
    if hasattr(model, "layer_costs"):
        return model.layer_costs(size)
    found = {}

    def record(
        call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: nn.module.InterceptorContext
    ) -> Any:
        out = call(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and isinstance(module, nn.Conv | nn.Dense | atrous.AtrousConv):
            kernel = module.variables["params"]["kernel"].shape
            if isinstance(module, atrous.AtrousConv):
                macs = atrous.macs(out.shape[1:3], kernel, module.rate)
            else:
                macs = math.prod(out.shape[1:-1]) * math.prod(kernel)
            found["/".join(module.path)] = LayerCost(kernel, macs)
        return out

    with nn.intercept_methods(record):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *size, 3))))
    return found


def total(model: Any, variables: Mapping[str, Any], size: tuple[int, int]) -> dict[str, int]:
    """Return {"parameters", "macs"} of a whole model on an image [*size, 3]."""
    parts = by_part(model, variables, size).values()
    return {kind: sum(part[kind] for part in parts) for kind in ("parameters", "macs")}


def by_part(model: Any, variables: Mapping[str, Any], size: tuple[int, int]) -> dict[str, dict[str, int]]:
    """Return {"parameters", "macs"} of each part of a model, "backbone" or "head_depth", on an image [*size, 3]."""
    params = variables.get("params", {})
    found = {name: {"parameters": parameter_count({"params": tree}), "macs": 0} for name, tree in params.items()}
    for path, layer in layers(model, size).items():
        found.setdefault(path.partition("/")[0], {"parameters": 0, "macs": 0})["macs"] += layer.macs
    return found


def parameter_count(variables: Mapping[str, Any]) -> int:
    """Return the number of trainable parameters in `variables["params"]`."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables.get("params", {})))
