"""The difference between two models' outputs."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_sparse.compaction.rewritten import Model


def largest_difference(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> float:
    """Return the largest difference of two models' outputs, relative to the largest value of each task.

    The largest value of a task with few logits for each image counts as at least 1: a logit near 0 has no smaller
    rounding error than others.

    Args:
      expected: {task: raw prediction} of one model.
      actual: outputs of the other model.

    Returns:
      The relative difference; NaN if an output has a NaN.
    """
    pairs = [(np.asarray(raw, np.float64), np.asarray(actual[task], np.float64)) for task, raw in expected.items()]
    least = [1.0 if a.ndim < 3 else 1e-30 for a, _ in pairs]
    return float(
        np.max([np.max(np.abs(b - a)) / max(np.max(np.abs(a)), x) for (a, b), x in zip(pairs, least, strict=True)])
    )


def difference(
    model: Model,
    variables: Mapping[str, Any],
    small: Model,
    small_variables: Mapping[str, Any],
    size: tuple[int, int],
) -> float:
    """Return `largest_difference` of two models on images of noise, both in float32.

    Args:
      model: one model.
      variables: its variables.
      small: the other model.
      small_variables: its variables.
      size: (height, width) of the images.

    Returns:
      The relative difference.
    """
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    with jax.default_matmul_precision("float32"):
        expected, actual = (
            jax.device_get(jax.jit(one.clone(dtype=jnp.float32).apply)(values, images))
            for one, values in ((model, variables), (small, small_variables))
        )
    return largest_difference(expected, actual)
