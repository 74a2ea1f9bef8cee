import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import optimize

from mtl_sparse.sparsity import prox


def test_plain_is_block_soft_thresholding():
    z = jnp.array([[3.0, 0.3], [4.0, 0.4]])  # groups are columns: norms 5 and 0.5
    x = prox.group_lasso(z, 1.0, group_axis=1)
    np.testing.assert_allclose(x, [[2.4, 0.0], [3.2, 0.0]], rtol=1e-6)
    assert (x[:, 1] == 0).all()


def test_metric_of_ones_is_the_plain_one():
    z = jax.random.normal(jax.random.key(0), (3, 3, 7, 5))
    plain = prox.group_lasso(z, 6.7)
    weighted = prox.group_lasso(z, 6.7, jnp.ones_like(z))
    assert 0 < (plain == 0).mean() < 1
    np.testing.assert_allclose(weighted, plain, rtol=1e-4, atol=1e-5)


def test_threshold_is_on_the_norm_in_the_metric():
    z, d = jnp.array([[3.0], [2.0]]), jnp.array([[1.0], [2.0]])  # |D z| = 5
    zero = lambda weight: bool((prox.group_lasso(z, weight, d, group_axis=1) == 0).all())  # noqa: E731
    assert zero(5.0) and zero(5.001) and not zero(4.999)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-6), (jnp.float32, 1e-4)])
@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(seed=st.integers(0, 10**6), spread=st.floats(0, 11), weight=st.floats(-6, 2))
def test_optimality_conditions(dtype, tolerance, seed, spread, weight):
    """D (x - z) + weight x / |x| = 0 where x is not zero; |D z| <= weight where it is. 64 groups a draw."""
    rng = np.random.default_rng(seed)
    with jax.enable_x64(dtype == jnp.float64):
        z = jnp.asarray(rng.normal(size=(9, 64, 4)), dtype)
        d = jnp.asarray(10 ** rng.uniform(3 - spread, 3, size=z.shape), dtype)  # 1e-8 .. 1e3 at most
        weight = 10**weight * float(np.median(np.linalg.norm(d * z, axis=(0, 2))))
        x = np.asarray(prox.group_lasso(z, weight, d), np.float64)
    z, d = np.asarray(z, np.float64), np.asarray(d, np.float64)
    norm_dz = np.linalg.norm(d * z, axis=(0, 2))
    zero = (x == 0).all((0, 2))
    assert (norm_dz[zero] <= weight * (1 + tolerance)).all()
    assert (norm_dz[~zero] >= weight * (1 - tolerance)).all()
    residual = d * (x - z) + weight * x / np.maximum(np.linalg.norm(x, axis=(0, 2)), 1e-300)[:, None]
    size = np.linalg.norm(residual, axis=(0, 2))[~zero]
    assert (size <= tolerance * norm_dz[~zero]).all()


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_an_independent_solver(seed):
    rng = np.random.default_rng(seed)
    z, d = rng.normal(size=4), 10 ** rng.uniform(-2, 1, 4)
    weight = 0.4 * np.linalg.norm(d * z)

    def objective(x):
        return 0.5 * np.sum(d * (x - z) ** 2) + weight * np.linalg.norm(x)

    best = optimize.minimize(objective, z, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14}).x
    with jax.enable_x64(True):
        x = prox.group_lasso(jnp.asarray(z)[:, None], weight, jnp.asarray(d)[:, None], group_axis=1)[:, 0]
    assert objective(np.asarray(x)) <= objective(best) + 1e-12
    np.testing.assert_allclose(x, best, atol=1e-4)


def test_edges_of_the_domain():
    z = jnp.array([[0.0, 1.0, jnp.nan], [0.0, 2.0, 1.0]])
    d = jnp.full_like(z, 1e-3)
    for metric in (None, d):
        assert (prox.group_lasso(z, 1e-9, metric, group_axis=1)[:, 0] == 0).all(), "zero stays zero"
        x = prox.group_lasso(z, 0.0, metric, group_axis=1)
        np.testing.assert_array_equal(x, z, "no penalty changes nothing")
        assert jnp.isnan(prox.group_lasso(z, 1e-4, metric, group_axis=1)[:, 2]).any(), "NaN stays visible"


def test_a_weight_for_each_group():
    z = jnp.ones((2, 3))
    d = jnp.full_like(z, 2.0)
    weight = jnp.array([0.1, 100.0, 0.1])
    for metric in (None, d):
        x = prox.group_lasso(z, weight, metric, group_axis=1)
        assert (x[:, 1] == 0).all() and (x[:, 0] > 0).all()
        alone = prox.group_lasso(z[:, :1], 0.1, None if metric is None else d[:, :1], group_axis=1)
        np.testing.assert_allclose(x[:, :1], alone, rtol=1e-6)


def test_jit_and_vmap():
    z = jax.random.normal(jax.random.key(1), (4, 3, 3, 6, 2))
    d = jnp.exp(jax.random.normal(jax.random.key(2), z.shape))
    batched = jax.jit(jax.vmap(lambda z, d: prox.group_lasso(z, 2.0, d)))(z, d)
    single = jnp.stack([prox.group_lasso(a, 2.0, b) for a, b in zip(z, d, strict=True)])
    np.testing.assert_allclose(batched, single, rtol=1e-6, atol=1e-7)
