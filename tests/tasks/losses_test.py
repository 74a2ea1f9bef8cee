"""Losses and activations of the tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_sparse.runtime.labels import VOID
from mtl_sparse.tasks import activations, losses


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]]))
    loss, valid = losses.cross_entropy(logits, jnp.array([0, VOID]), smoothing=0.3)
    # smoothed target: (0.8, 0.1, 0.1)
    want = -(0.8 * np.log(0.7) + 0.1 * np.log(0.2) + 0.1 * np.log(0.1))
    np.testing.assert_allclose(loss, [want, 0], rtol=1e-6)
    np.testing.assert_array_equal(valid, [1, 0])


def test_depth_losses_by_hand():
    raw = jnp.zeros((3, 1))
    label = jnp.array([0.75, 0.5, 0.0])
    loss, valid = losses.depth_mse(raw, label)
    np.testing.assert_allclose(loss, [0.0625, 0, 0], atol=1e-7)
    np.testing.assert_array_equal(valid, [1, 1, 0])
    loss, _ = losses.depth_l1(raw, label)
    np.testing.assert_allclose(loss, [0.75 - np.log(2), np.log(2) - 0.5, 0], rtol=1e-5)


def test_normals_loss_by_hand():
    raw = jnp.array([[0.0, 0.0, 5.0], [0.5, 0.0, 0.0], [1.0, 1.0, 1.0]])
    label = jnp.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    loss, valid = losses.one_minus_cosine(raw, label)
    np.testing.assert_allclose(loss, [0, 1, 0], atol=1e-6)
    np.testing.assert_array_equal(valid, [1, 1, 0])


def test_normals_gradient_is_finite_at_zero():
    grad = jax.grad(lambda raw: losses.one_minus_cosine(raw, jnp.array([0.0, 0.0, 1.0]))[0])(jnp.zeros(3))
    assert jnp.isfinite(grad).all()


def test_edge_loss_by_hand():
    loss, _ = losses.binary_cross_entropy(jnp.array([[0.0], [0.0]]), jnp.array([1.0, 0.3]))
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)


def test_normals_are_unit_and_depths_positive():
    raw = jax.random.normal(jax.random.key(0), (50, 3)) * 4
    np.testing.assert_allclose(jnp.linalg.norm(activations.unit_normals(raw), axis=-1), 1, rtol=1e-5)
    assert (activations.metric_depth(raw) > 0).all()


@pytest.mark.parametrize("loss", [losses.depth_mse, losses.depth_l1, losses.one_minus_cosine])
def test_labels_that_are_none_give_no_gradient(loss):
    raw = jnp.ones((2, 3 if loss is losses.one_minus_cosine else 1))
    label = jnp.full((2, 3) if loss is losses.one_minus_cosine else (2,), 0.6).at[1].set(jnp.nan)
    (value, valid), grads = loss(raw, label), jax.grad(lambda raw: loss(raw, label)[0].sum())(raw)
    np.testing.assert_array_equal(valid, [1, 0])
    assert np.isfinite(value).all() and np.isfinite(grads).all() and not np.any(grads[1])


def test_attribute_loss_by_hand():
    """On logits, with one sigmoid: also where that is 0 or 1 in float32."""
    logits, label = jnp.array([0.0, 2.0, -3.0, 40.0, -40.0]), jnp.array([1, 0, 1, 0, VOID])
    loss, valid = losses.attribute_cross_entropy(logits, label, pos_weight=3.0)
    want = [3 * np.log(2), np.log1p(np.exp(2)), 3 * np.log1p(np.exp(3)), 40, 0]
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_array_equal(valid, [1, 1, 1, 1, 0])
    with pytest.raises(ValueError, match=r"\(5,\).*\(5, 1\)"):
        losses.attribute_cross_entropy(logits, label[:, None])
    slope = jax.grad(lambda x: losses.attribute_cross_entropy(x, jnp.array(1))[0])(0.5)
    assert float(slope) == pytest.approx(1 / (1 + np.exp(-0.5)) - 1, rel=1e-6)
