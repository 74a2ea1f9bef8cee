"""Metrics as sums over one image, and the values that follow from sums over many.

The `*_sums` functions take one image's prediction, in the label's unit, and its label. The evaluator adds their results
up in float64 over a whole split, and the `*_values` functions divide once, at the end. So no metric depends on the
batch size or on the number of devices.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from mtl_sparse.tasks import labels

Sums = dict[str, Array]
Totals = Mapping[str, Any]  # NumPy arrays of the shapes of `Sums`; scalars where those are []
Scalar = Float[Array, ""]

_BINS_PER_DEGREE = 10
# Bins of asinh(logit): 0.0072 wide near a logit of 0, 0.7 % of the logit far from it, up to logits of a million.
_ASINH_LIMIT, _ASINH_BINS = 14.5, 4050


def segmentation_sums(probabilities: Float[Array, "H W C"], label: Shaped[Array, "H W"]) -> Sums:
    """Return the confusion matrix [label, prediction] of an image, and its IoU."""
    classes = probabilities.shape[-1]
    valid = labels.has_class(label)
    predicted = jnp.argmax(probabilities, -1)
    cell = jnp.where(valid, label * classes + predicted, classes * classes)
    confusion = jnp.bincount(cell.ravel(), length=classes * classes + 1)[:-1].reshape(classes, classes)
    pixels = jnp.sum(confusion)
    correct = jnp.trace(confusion)
    # True positives over (true + false positives + false negatives), each summed over the classes.
    return {
        "confusion": confusion,
        "image_iou": correct / jnp.maximum(2 * pixels - correct, 1),
        "images": (pixels > 0).astype(jnp.int32),
    }


def segmentation_values(sums: Totals) -> dict[str, float]:
    """Return the segmentation metrics.

    Args:
      sums: totals of `segmentation_sums`.

    Returns:
      miou: mean IoU over the classes that occur as a label or a prediction; pixel_accuracy; image_iou: the paper's
      metric, the mean IoU over images.
    """
    confusion = sums["confusion"]
    hits = np.diagonal(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    seen = union > 0
    return {
        "miou": _divide(np.sum(hits[seen] / union[seen]), seen.sum()),
        "pixel_accuracy": _divide(hits.sum(), confusion.sum()),
        "image_iou": _divide(sums["image_iou"], sums["images"]),
    }


def depth_sums(prediction: Float[Array, "H W 1"], label: Float[Array, "H W"]) -> Sums:
    """Return the errors of an image's depth, in the unit of both arguments; labels that are 0 are ignored."""
    valid = labels.has_depth(label)
    target = jnp.where(valid, label, 1.0)
    predicted = jnp.where(valid, jnp.maximum(prediction[..., 0], 1e-6), 1.0)
    error = jnp.abs(predicted - target)
    ratio = jnp.maximum(predicted / target, target / predicted)
    return {
        "pixels": jnp.sum(valid),
        "absolute": jnp.sum(error),
        "relative": jnp.sum(error / target),
        "squared": jnp.sum(error * error),
        "within": jnp.stack([jnp.sum(valid & (ratio < 1.25**k)) for k in (1, 2, 3)]),
    }


def normalized_depth_values(sums: Totals) -> dict[str, float]:
    """Return the depth metrics on the paper's normalized depth, where each image's maximum is 1."""
    return {f"{name}_normalized": value for name, value in depth_values(sums).items()}


def depth_scale(label: Float[Array, "H W"]) -> tuple[Scalar, Scalar]:
    """Return the two values of an image's depth that the paper's normalization uses.

    Args:
      label: depth in meters.

    Returns:
      (the maximum, the 99th percentile as a fraction of the maximum).
    """
    largest = jnp.maximum(jnp.max(label), 1e-6)
    return largest, jnp.maximum(
        jnp.nanpercentile(jnp.where(labels.has_depth(label), label / largest, jnp.nan), 99), 0.1
    )


def metric_depth_sums(
    prediction: Float[Array, "H W 1"], label: Float[Array, "H W"], scale: tuple[Scalar, Scalar]
) -> Sums:
    """Return `depth_sums` in meters, and the absolute error after the paper's normalization.

    Args:
      prediction: depth in meters.
      label: depth in meters; 0 is no measurement.
      scale: `depth_scale` of the label at full resolution.

    Returns:
      The sums of one image.
    """
    valid, (largest, top) = labels.has_depth(label), scale
    error = jnp.abs(jnp.clip(prediction[..., 0] / largest, 0.1, top) - jnp.clip(label / largest, 0.1, top))
    return {**depth_sums(prediction, label), "normalized": jnp.sum(jnp.where(valid, error, 0.0))}


def metric_depth_values(sums: Totals) -> dict[str, float]:
    """Return the depth metrics in meters; mae_normalized is comparable with that of normalized depth."""
    normalized = _divide(sums["normalized"], sums["pixels"])
    return {**depth_values(sums), "mae_normalized": normalized}


def depth_values(sums: Totals) -> dict[str, float]:
    """Return the depth metrics in the unit of the label: absolute and relative error, RMSE, and ratios below 1.25^k."""
    pixels = sums["pixels"]
    return {
        "mae": _divide(sums["absolute"], pixels),
        "abs_rel": _divide(sums["relative"], pixels),
        "rmse": _divide(sums["squared"], pixels) ** 0.5,
        **{f"delta{k}": _divide(sums["within"][k - 1], pixels) for k in (1, 2, 3)},
    }


def normals_sums(prediction: Float[Array, "H W 3"], label: Float[Array, "H W 3"]) -> Sums:
    """Return the cosines and angles of an image's normals against unit labels; zero labels are ignored."""
    valid = labels.has_normal(label)
    length = jnp.maximum(jnp.linalg.norm(prediction, axis=-1), 1e-6)
    cosine = jnp.clip(jnp.sum(prediction * label, -1) / length, -1, 1)
    degrees = jnp.rad2deg(jnp.arccos(cosine))
    last = 180 * _BINS_PER_DEGREE
    cell = jnp.where(valid, jnp.minimum((degrees * _BINS_PER_DEGREE).astype(jnp.int32), last - 1), last)
    return {
        "pixels": jnp.sum(valid),
        "cosine": jnp.sum(jnp.where(valid, cosine, 0.0)),
        "degrees": jnp.sum(jnp.where(valid, degrees, 0.0)),
        "within": jnp.stack([jnp.sum(valid & (degrees < limit)) for limit in (11.25, 22.5, 30)]),
        "histogram": jnp.bincount(cell.ravel(), length=last + 1)[:-1],
    }


def normals_values(sums: Totals) -> dict[str, float]:
    """Return the mean cosine and the angles in degrees; the median is interpolated in bins of 0.1 degree."""
    pixels = sums["pixels"]
    cumulative = np.cumsum(sums["histogram"])
    half = cumulative[-1] / 2
    cell = int(np.searchsorted(cumulative, half))
    below = cumulative[cell - 1] if cell else 0
    median = (cell + _divide(half - below, sums["histogram"][cell])) / _BINS_PER_DEGREE
    return {
        "cosine": _divide(sums["cosine"], pixels),
        "mean_angle": _divide(sums["degrees"], pixels),
        "median_angle": float(median),
        "within_11.25": _divide(sums["within"][0], pixels),
        "within_22.5": _divide(sums["within"][1], pixels),
        "within_30": _divide(sums["within"][2], pixels),
    }


def edge_sums(prediction: Float[Array, "H W 1"], label: Float[Array, "H W"]) -> Sums:
    """Return the absolute error of an image's edge probability."""
    return {"pixels": jnp.asarray(label.size), "absolute": jnp.sum(jnp.abs(prediction[..., 0] - label))}


def edge_values(sums: Totals) -> dict[str, float]:
    """Return the mean absolute error of the edge probability."""
    return {"mae": _divide(sums["absolute"], sums["pixels"])}


def attribute_sums(
    probability: Scalar, label: Shaped[Array, ""], raw: Scalar | None = None, *, threshold: float = 0.5
) -> Sums:
    """Count an image as right or wrong, and sort it into the histogram that the ROC curve is computed from.

    Args:
      probability: predicted probability of the attribute.
      label: 0 or 1; VOID is ignored.
      raw: the logit. None computes it from the probability, which ties all logits above about 16.
      threshold: smallest probability that counts as a prediction of the attribute.

    Returns:
      right [2]: correct predictions for images without and with the attribute; histogram [2, bins]: those images by
      their logit.
    """
    valid, positive = labels.has_class(label), label == 1
    if raw is None:
        limited = jnp.clip(probability, 1e-7, 1 - 1e-7)
        raw = jnp.log(limited) - jnp.log1p(-limited)
    cell = (jnp.arcsinh(raw) / _ASINH_LIMIT + 1) * (_ASINH_BINS / 2)
    histogram = jax.nn.one_hot(jnp.clip(cell, 0, _ASINH_BINS - 1).astype(jnp.int32), _ASINH_BINS, dtype=jnp.int32)
    predicted = probability >= threshold
    return {
        "right": jnp.stack([valid & ~positive & ~predicted, valid & positive & predicted]).astype(jnp.int32),
        "histogram": histogram * jnp.stack([valid & ~positive, valid & positive])[:, None],
    }


def attribute_values(sums: Totals) -> dict[str, float]:
    """Return accuracy, balanced accuracy, F1 and AUROC; images in one bin of the histogram count as tied.

    As in scikit-learn, balanced accuracy averages over the labels that occur, and F1 without any positive label or
    prediction is 0. AUROC without images of both kinds is NaN.
    """
    images = sums["histogram"].sum(-1)  # without, with
    right = sums["right"]
    missed, false = images[1] - right[1], images[0] - right[0]
    below = np.cumsum(sums["histogram"][0]) - sums["histogram"][0]
    wins = np.sum(sums["histogram"][1] * (below + 0.5 * sums["histogram"][0]))
    return {
        "accuracy": _divide(right.sum(), images.sum()),
        "balanced_accuracy": _divide(np.sum(right[images > 0] / images[images > 0]), np.sum(images > 0)),
        "f1": float(2 * right[1] / max(2 * right[1] + missed + false, 1)) if images.sum() else float("nan"),
        "auroc": _divide(wins, images[0] * images[1]),
    }


def _divide(total: Any, count: Any) -> float:
    """Return total / count; NaN where nothing was counted."""
    return float(total / count) if count > 0 else float("nan")
