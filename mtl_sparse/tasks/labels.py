"""Which labels count, and which of them a prediction answers for.

A label that is missing is VOID (classes and attributes), 0 (depth), or a zero vector (normals).
"""

import jax.numpy as jnp

from input_pipeline.labels import VOID
from mtl_sparse.models.resnet import OUTPUT_STRIDE

__all__ = ["VOID", "has_class", "has_depth", "has_normal", "strided"]


def has_class(label):
    """Return where an integer label, of a class or an attribute, is not VOID: bool, of the label's shape."""
    return label != VOID


def has_depth(label):
    """Return where a depth label [...] is a measurement: bool [...]."""
    return label > 0


def has_normal(label):
    """Return where a normal label [..., 3] is a unit vector, not zero: bool [...]."""
    return jnp.sum(label * label, -1) > 0.25


def strided(label):
    """Return the labels that a prediction at the backbone's stride is compared with: the centers of its cells.

    Args:
      label: [B, H, W, ...] of a pixel task, or [B] of an image task, which is returned as it is.
    """
    if label.ndim < 3:
        return label
    return label[:, OUTPUT_STRIDE // 2 :: OUTPUT_STRIDE, OUTPUT_STRIDE // 2 :: OUTPUT_STRIDE]
