"""From raw head outputs [..., C] to predictions in the label's unit."""

import jax
import jax.numpy as jnp


def probabilities(raw):
    """Softmax over classes."""
    return jax.nn.softmax(raw)


def unit_depth(raw):
    """Normalised depth in (0, 1)."""
    return jax.nn.sigmoid(raw)


def metric_depth(raw):
    """Depth in metres, positive."""
    return jax.nn.softplus(raw)


def unit_normals(raw):
    """Unit vectors: tanh, then normalised, as in the paper's code."""
    raw = jnp.tanh(raw)
    # max before the root: its gradient at a zero vector is 0 and not NaN
    return raw / jnp.sqrt(jnp.maximum(jnp.sum(raw * raw, -1, keepdims=True), 1e-12))


def probability(raw):
    """Probability of an edge, or of an attribute."""
    return jax.nn.sigmoid(raw)
