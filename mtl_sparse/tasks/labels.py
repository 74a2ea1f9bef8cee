"""Validity of labels, and their subsampling to the resolution of the predictions.

A missing label is VOID (classes and attributes), 0 (depth), or a zero vector (normals).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from mtl_sparse.models.resnet import OUTPUT_STRIDE
from mtl_sparse.runtime.labels import VOID

__all__ = ["VOID", "has_class", "has_depth", "has_normal", "strided"]


def has_class(label: Shaped[Array, "..."]) -> Bool[Array, "..."]:
    """Return where an integer label, of a class or an attribute, is not VOID."""
    return label != VOID


def has_depth(label: Float[Array, "..."]) -> Bool[Array, "..."]:
    """Return where a depth label is a measurement."""
    return label > 0


def has_normal(label: Float[Array, "... 3"]) -> Bool[Array, "..."]:
    """Return where a normal label is a unit vector, not zero."""
    return jnp.sum(label * label, -1) > 0.25


def strided(label: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """Subsample labels to the backbone's stride: one label at the center of each output cell.

    Args:
      label: [B, H, W, ...] of a pixel-level task, or [B] of an image-level task, which is returned unchanged.

    Returns:
      Labels [B, h, w, ...] at the resolution of the predictions, or [B].
    """
    if label.ndim < 3:
        return label
    return label[:, OUTPUT_STRIDE // 2 :: OUTPUT_STRIDE, OUTPUT_STRIDE // 2 :: OUTPUT_STRIDE]
