"""Elementwise losses of the tasks.

Each function takes a raw prediction, [..., C] or logits [...], and its label, and returns (loss [...], valid [...]).
`valid` is 1 where there is a label and 0 elsewhere. Where it is 0, the loss and its gradient are 0, even if the label
is NaN. The trainer divides the sum of the losses by the sum of `valid`, both over the global batch.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Shaped

from mtl_sparse.tasks import activations, labels

LossAndMask = tuple[Float[Array, "..."], Float[Array, "..."]]


def cross_entropy(logits: Float[Array, "... C"], label: Shaped[Array, "..."], smoothing: float = 0.0) -> LossAndMask:
    """Return the softmax cross entropy with label smoothing; labels that are VOID are ignored."""
    valid = labels.has_class(label)
    classes = logits.shape[-1]
    target = optax.smooth_labels(jax.nn.one_hot(jnp.where(valid, label, 0), classes), smoothing)
    return _masked(optax.softmax_cross_entropy(logits, target), valid)


def depth_mse(raw: Float[Array, "... 1"], label: Float[Array, "..."]) -> LossAndMask:
    """Return the squared error of sigmoid(raw) against normalized depth; labels that are 0 are ignored."""
    valid = labels.has_depth(label)
    return _masked(jnp.square(activations.unit_depth(raw)[..., 0] - jnp.where(valid, label, 0)), valid)


def depth_l1(raw: Float[Array, "... 1"], label: Float[Array, "..."]) -> LossAndMask:
    """Return the absolute error in meters of softplus(raw) against depth; labels that are 0 are ignored."""
    valid = labels.has_depth(label)
    return _masked(jnp.abs(activations.metric_depth(raw)[..., 0] - jnp.where(valid, label, 0)), valid)


def one_minus_cosine(raw: Float[Array, "... 3"], label: Float[Array, "... 3"]) -> LossAndMask:
    """Return 1 - cosine of the angle between predicted and labeled normal; zero labels are ignored."""
    valid = labels.has_normal(label)
    cosine = jnp.sum(activations.unit_normals(raw) * jnp.where(valid[..., None], label, 0), -1)
    return _masked(1.0 - cosine, valid)


def binary_cross_entropy(logits: Float[Array, "... 1"], label: Float[Array, "..."]) -> LossAndMask:
    """Return the sigmoid cross entropy against labels that are probabilities."""
    return _masked(optax.sigmoid_binary_cross_entropy(logits[..., 0], label), jnp.ones_like(label, bool))


def attribute_cross_entropy(
    logits: Float[Array, "..."], label: Shaped[Array, "..."], pos_weight: float = 1.0
) -> LossAndMask:
    """Return the sigmoid cross entropy against labels 0 or 1; labels that are VOID are ignored.

    Args:
      logits: one for each label.
      label: 0, 1 or VOID.
      pos_weight: weight of images that have the attribute, as in PyTorch's `BCEWithLogitsLoss`.

    Returns:
      (loss, valid), see the module.

    Raises:
      ValueError: logits and labels differ in shape. They would be broadcast.
    """
    if jnp.shape(logits) != jnp.shape(label):
        raise ValueError(f"expected labels of the logits' shape {jnp.shape(logits)}, got {jnp.shape(label)}")
    weight = jnp.where(label == 1, pos_weight, 1.0)
    return _masked(weight * optax.sigmoid_binary_cross_entropy(logits, label == 1), labels.has_class(label))


def _masked(loss: Float[Array, "..."], valid: Bool[Array, "..."]) -> LossAndMask:
    return jnp.where(valid, loss, 0.0), valid.astype(jnp.float32)
