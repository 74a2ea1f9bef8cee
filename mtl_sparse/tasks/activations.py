"""Activations: from the raw outputs of a head to predictions in the label's unit."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def probabilities(raw: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Return the softmax over the classes."""
    return jax.nn.softmax(raw)


def unit_depth(raw: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return normalized depth in (0, 1), by a sigmoid."""
    return jax.nn.sigmoid(raw)


def metric_depth(raw: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return positive depth in meters, by a softplus."""
    return jax.nn.softplus(raw)


def unit_normals(raw: Float[Array, "... 3"]) -> Float[Array, "... 3"]:
    """Return unit vectors: tanh, then division by the length, as in the reference implementation."""
    raw = jnp.tanh(raw)
    # The maximum comes before the root, so that the gradient at a zero vector is 0 and not NaN.
    return raw / jnp.sqrt(jnp.maximum(jnp.sum(raw * raw, -1, keepdims=True), 1e-12))


def probability(raw: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the probability of an edge or an attribute, by a sigmoid."""
    return jax.nn.sigmoid(raw)
