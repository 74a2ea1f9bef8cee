"""Metrics as sums over one image, or its valid pixels, and the values that follow from sums over many.

`*_sums` take one image's prediction [H, W, C], in the label's unit, and its label; the evaluator adds them up
in float64 over a whole split. `*_values` divide once, at the end. So no figure depends on the batch size or
on the number of devices.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mtl_sparse.tasks import labels

_BINS_PER_DEGREE = 10
# Bins of asinh(logit): 0.0072 wide near a logit of 0, 0.7 % of the logit far from it, up to logits of a million.
_ASINH_LIMIT, _ASINH_BINS = 14.5, 4050


def segmentation_sums(probabilities, label):
    """Confusion matrix [label, prediction], and the image's own IoU."""
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


def segmentation_values(sums):
    """miou: mean over the classes that occur as label or prediction; image_iou: the paper's, mean over images."""
    confusion = sums["confusion"]
    hits = np.diagonal(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hits
    seen = union > 0
    return {
        "miou": _divide(np.sum(hits[seen] / union[seen]), seen.sum()),
        "pixel_accuracy": _divide(hits.sum(), confusion.sum()),
        "image_iou": _divide(sums["image_iou"], sums["images"]),
    }


def depth_sums(prediction, label):
    """Errors of depth [H, W, 1] against [H, W], in whatever unit both are in; label 0 counts nowhere."""
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


def normalized_depth_values(sums):
    """On the paper's normalised depth (each image's maximum is 1)."""
    return {f"{name}_normalized": value for name, value in _depth_values(sums).items()}


def depth_scale(label):
    """What the paper's normalisation takes of an image's depth: (maximum, 99th percentile as a share of that)."""
    largest = jnp.maximum(jnp.max(label), 1e-6)
    return largest, jnp.maximum(
        jnp.nanpercentile(jnp.where(labels.has_depth(label), label / largest, jnp.nan), 99), 0.1
    )


def metric_depth_sums(prediction, label, scale):
    """`depth_sums` in metres, and the absolute error after the paper's normalisation by `depth_scale` of the label."""
    valid, (largest, top) = labels.has_depth(label), scale
    error = jnp.abs(jnp.clip(prediction[..., 0] / largest, 0.1, top) - jnp.clip(label / largest, 0.1, top))
    return {**depth_sums(prediction, label), "normalized": jnp.sum(jnp.where(valid, error, 0.0))}


def metric_depth_values(sums):
    """In metres (mae, rmse); mae_normalized is comparable with the normalised task's."""
    normalized = _divide(sums["normalized"], sums["pixels"])
    return {**_depth_values(sums), "mae_normalized": normalized}


def _depth_values(sums):
    pixels = sums["pixels"]
    return {
        "mae": _divide(sums["absolute"], pixels),
        "abs_rel": _divide(sums["relative"], pixels),
        "rmse": _divide(sums["squared"], pixels) ** 0.5,
        **{f"delta{k}": _divide(sums["within"][k - 1], pixels) for k in (1, 2, 3)},
    }


def normals_sums(prediction, label):
    """Cosines and angles of vectors [H, W, 3] against unit labels; a zero label counts nowhere."""
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


def normals_values(sums):
    """Angles in degrees; the median is interpolated in a histogram of 0.1 degree bins."""
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


def edge_sums(prediction, label):
    """Absolute error of the edge probability [H, W, 1] against [H, W]."""
    return {"pixels": jnp.asarray(label.size), "absolute": jnp.sum(jnp.abs(prediction[..., 0] - label))}


def edge_values(sums):
    return {"mae": _divide(sums["absolute"], sums["pixels"])}


def attribute_sums(probability, label, raw=None, *, threshold: float = 0.5):
    """Count hits and misses of one image, and sort it into the histogram that the ROC curve is made of.

    Args:
      probability: [], of the attribute.
      label: [], 0 or 1; VOID counts nowhere.
      raw: [], the logit; None takes it from the probability, which ties all logits above about 16.
      threshold: probability from which on the attribute is predicted.

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


def attribute_values(sums):
    """Divide the sums: accuracy, balanced accuracy, F1 and AUROC; images in one bin of the histogram count as tied.

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


def _divide(total, count):
    """total / count as a float; NaN where nothing was counted."""
    return float(total / count) if count > 0 else float("nan")
