"""Losses of the tasks, element by element.

Each takes a raw prediction, [..., C] or logits [...], and its label, and returns (loss [...], valid [...]): `valid` is
1 where there is a label and 0 elsewhere, and the loss and its gradient are 0 there, though the label were NaN. The
trainer divides the sum of one by the sum of the other over the whole global batch.
"""

import jax
import jax.numpy as jnp
import optax

from mtl_sparse.tasks import activations, labels


def cross_entropy(logits, label, smoothing: float = 0.0):
    """Softmax cross entropy with label smoothing; label int [...], VOID is ignored."""
    valid = labels.has_class(label)
    classes = logits.shape[-1]
    target = optax.smooth_labels(jax.nn.one_hot(jnp.where(valid, label, 0), classes), smoothing)
    return _masked(optax.softmax_cross_entropy(logits, target), valid)


def depth_mse(raw, label):
    """Squared error of sigmoid(raw [..., 1]) against normalised depth [...]; 0 is no measurement."""
    valid = labels.has_depth(label)
    return _masked(jnp.square(activations.unit_depth(raw)[..., 0] - jnp.where(valid, label, 0)), valid)


def depth_l1(raw, label):
    """Absolute error in metres of softplus(raw [..., 1]) against depth [...]; 0 is no measurement."""
    valid = labels.has_depth(label)
    return _masked(jnp.abs(activations.metric_depth(raw)[..., 0] - jnp.where(valid, label, 0)), valid)


def one_minus_cosine(raw, label):
    """1 - cosine of the angle between the predicted normal and the unit label [..., 3]; 0 is no label."""
    valid = labels.has_normal(label)
    cosine = jnp.sum(activations.unit_normals(raw) * jnp.where(valid[..., None], label, 0), -1)
    return _masked(1.0 - cosine, valid)


def binary_cross_entropy(logits, label):
    """Sigmoid cross entropy of logits [..., 1] against probabilities [...]."""
    return _masked(optax.sigmoid_binary_cross_entropy(logits[..., 0], label), jnp.ones_like(label, bool))


def attribute_cross_entropy(logits, label, pos_weight: float = 1.0):
    """Sigmoid cross entropy of logits [...] against labels [...], 0 or 1, VOID is ignored.

    Args:
      pos_weight: counts an image that has the attribute this many times (PyTorch's `BCEWithLogitsLoss`).

    Raises:
      ValueError: other shapes than the logits' own: they would be broadcast.
    """
    if jnp.shape(logits) != jnp.shape(label):
        raise ValueError(f"logits of shape {jnp.shape(logits)} against labels of shape {jnp.shape(label)}")
    weight = jnp.where(label == 1, pos_weight, 1.0)
    return _masked(weight * optax.sigmoid_binary_cross_entropy(logits, label == 1), labels.has_class(label))


def _masked(loss, valid):
    return jnp.where(valid, loss, 0.0), valid.astype(jnp.float32)
