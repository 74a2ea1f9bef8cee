"""Latency, throughput and memory of several models, compared."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_sparse.compaction.rewritten import Model, Rewritten
from mtl_sparse.models import backbones, costs, multitask
from mtl_sparse.runtime import progress
from mtl_sparse.runtime.timing import timed


@dataclasses.dataclass(frozen=True)
class Part:
    """A module to time, a whole model or only its backbone, with its variables.

    Attributes:
      model: the module.
      variables: its variables.
    """

    model: Model
    variables: Mapping[str, Any]

    @classmethod
    def backbone(cls, model: multitask.MultiTaskModel, variables: Mapping[str, Any]) -> "Part":
        """Return the backbone of a model."""
        options: dict[str, Any] = {"dtype": model.dtype}
        if model.backbone == backbones.RESNET:
            layers = model.layers()
            options["layers"] = layers.stem, layers.blocks
        points = tuple(dict.fromkeys(model.points()))  # each map once, even if several heads read it
        alone = model.row().module(points=points, **options)
        return cls(alone, {name: tree["backbone"] for name, tree in variables.items() if "backbone" in tree})

    def compiled(self, images: jax.Array) -> tuple[Callable[[], Any], int]:
        """Compile the module for a batch of images.

        Args:
          images: [B, H, W, 3].

        Returns:
          (function () -> outputs, bytes that the compiled program needs: arguments, outputs and temporaries).
        """
        variables = jax.device_put(self.variables)
        program = jax.jit(self.model.apply).lower(variables, images).compile()
        memory = program.memory_analysis()
        sizes = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
        return lambda: program(variables, images), sum(getattr(memory, name) for name in sizes)


def compare(
    models: Mapping[str, tuple[Model, Mapping[str, Any]]],
    size: tuple[int, int],
    batch: int,
    rounds: int,
    parts: Sequence[str] = ("backbone", "model"),
) -> list[dict[str, Any]]:
    """Time parts of several models, in alternation.

    Args:
      models: name -> (model, variables); the first model is the baseline of the speedups.
      size: (height, width) of the images.
      batch: images in a call.
      rounds: how many times each model is timed.
      parts: "backbone", "model" or both. The backbone is left out where it is a part of a rewritten model.

    Returns:
      A dictionary for each part and model: "part", "model", "batch", "parameters", "macs" (for one image), "median_ms",
      "p90_ms", "speedup" (median over the rounds of the baseline's time divided by the model's), "images_per_second",
      "gmacs_per_second", "memory_mib".
    """
    images = jnp.asarray(np.random.default_rng(0).normal(size=(batch, *size, 3)), jnp.float32)
    rows = []
    is_whole = any(isinstance(model, Rewritten) for model, _ in models.values())
    for part in parts if not is_whole else ("model",):
        make: Callable[..., Part] = Part.backbone if part == "backbone" else Part
        timed_parts = {name: make(*model) for name, model in models.items()}
        compiled = {
            name: timed_parts[name].compiled(images) for name in progress.track(timed_parts, f"compiling the {part}")
        }
        seconds = timed({name: function for name, (function, _) in compiled.items()}, rounds)
        first = next(iter(seconds.values()))
        for name, one in timed_parts.items():
            macs = sum(layer.macs for layer in costs.layers(one.model, size).values())
            median = float(np.median(seconds[name]))
            rows.append(
                {
                    "part": part,
                    "model": name,
                    "batch": batch,
                    "parameters": costs.parameter_count(one.variables),
                    "macs": macs,
                    "median_ms": 1e3 * median,
                    "p90_ms": 1e3 * float(np.quantile(seconds[name], 0.9)),
                    "speedup": float(np.median(first / seconds[name])),
                    "images_per_second": batch / median,
                    "gmacs_per_second": batch * macs / median / 1e9,
                    "memory_mib": compiled[name][1] / 2**20,
                }
            )
    return rows
