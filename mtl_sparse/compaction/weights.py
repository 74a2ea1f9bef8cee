"""The weights of a model as flat dictionaries of NumPy arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from mtl_sparse.compaction import liveness


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters and BatchNorm statistics of a model, by "/"-joined path.

    Attributes:
      params: the parameters.
      stats: the running statistics.
    """

    params: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    stats: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_variables(cls, variables: Mapping[str, Any]) -> "Weights":
        """Return the weights of {"params", "batch_stats"}."""
        variables = jax.device_get(variables)
        return cls(
            traverse_util.flatten_dict(variables["params"], sep="/"),
            traverse_util.flatten_dict(variables.get("batch_stats", {}), sep="/"),
        )

    def to_variables(self) -> dict[str, Any]:
        """Return {"params", "batch_stats"}."""
        return {
            "params": traverse_util.unflatten_dict(self.params, sep="/"),
            "batch_stats": traverse_util.unflatten_dict(self.stats, sep="/"),
        }

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the parameters."""
        return next(iter(self.params.values())).dtype

    def below(self, prefix: str) -> "Weights":
        """Return the weights whose path begins with `prefix` and a slash, with the same paths."""
        parts = ({p: x for p, x in part.items() if p.startswith(f"{prefix}/")} for part in (self.params, self.stats))
        return Weights(*parts)

    def conv(self, prefix: str, name: str, norm: str | None, relu: bool) -> liveness.Conv:
        """Return a convolution.

        Args:
          prefix: path of the module that has the layers.
          name: name of the convolution in it.
          norm: name of the BatchNorm after it; None for a convolution with a bias, or with nothing after it.
          relu: whether a ReLU follows.
        """
        path = f"{prefix}/{name}"
        kernel = self.params[f"{path}/kernel"]
        if norm is None:
            bias = {"bias": self.params[f"{path}/bias"]} if f"{path}/bias" in self.params else {}
            return liveness.Conv(path, path, kernel, bias, relu)
        norm_path = f"{prefix}/{norm}"
        values = {part: self.params[f"{norm_path}/{part}"] for part in ("scale", "bias")}
        values |= {part: self.stats[f"{norm_path}/{part}"] for part in ("mean", "var")}
        return liveness.Conv(path, norm_path, kernel, values, relu)
