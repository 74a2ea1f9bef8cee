"""How far two models' outputs are apart."""

import jax
import jax.numpy as jnp
import numpy as np


def largest_difference(expected, actual) -> float:
    """Largest difference of two {task: raw prediction}, over the largest value of each task; NaN if one has any.

    An image's few logits count as at least 1: that one of them is near 0 by chance makes its rounding no larger.
    """
    pairs = [(np.asarray(raw, np.float64), np.asarray(actual[task], np.float64)) for task, raw in expected.items()]
    least = [1.0 if a.ndim < 3 else 1e-30 for a, _ in pairs]
    return float(
        np.max([np.max(np.abs(b - a)) / max(np.max(np.abs(a)), x) for (a, b), x in zip(pairs, least, strict=True)])
    )


def difference(model, variables, small, small_variables, size) -> float:
    """`largest_difference` of the two models' outputs on noise of (height, width) `size`, both in float32."""
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    with jax.default_matmul_precision("float32"):
        expected, actual = (
            jax.device_get(jax.jit(one.clone(dtype=jnp.float32).apply)(values, images))
            for one, values in ((model, variables), (small, small_variables))
        )
    return largest_difference(expected, actual)
