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


@pytest.mark.parametrize("scale", [1e-10, 1e-12, 0.5e-13, 1e-14])
def test_small_groups_in_a_metric_of_ones_are_shrunk_as_plain_ones(scale):
    z = jnp.full((4, 1), scale, jnp.float32)
    plain = prox.group_lasso(z, scale, group_axis=1)
    np.testing.assert_allclose(prox.group_lasso(z, scale, jnp.ones_like(z), group_axis=1), plain, rtol=1e-5)


def test_threshold_is_on_the_norm_in_the_metric():
    z, d = jnp.array([[3.0], [2.0]]), jnp.array([[1.0], [2.0]])  # |D z| = 5
    zero = lambda weight: bool((prox.group_lasso(z, weight, d, group_axis=1) == 0).all())  # noqa: E731
    assert zero(5.0) and zero(5.001) and not zero(4.999)


def draw(rng, spread, shape=(9, 64, 4)):
    """64 groups: z, metric spanning 10^(3 - spread) .. 1e3, weight; a third of the groups close to the threshold."""
    z = rng.normal(size=shape) * 10 ** rng.uniform(-4, 1, (1, shape[1], 1))
    d = 10 ** rng.uniform(3 - spread, 3, size=shape)
    if rng.random() < 0.3:
        d[:, :, 1:] = d[:, :, 1:].min()  # a few large entries among many small ones
    norm = np.linalg.norm(d * z, axis=(0, 2))
    near = 1 + rng.choice([-1, 1], shape[1]) * 10 ** rng.uniform(-6, -2, shape[1])
    weight = norm * np.where(rng.random(shape[1]) < 0.3, near, 10 ** rng.uniform(-6, 1, shape[1]))
    return z, d, weight


GROUP_LASSO, GROUP_MCP, L1 = map(jax.jit, (prox.group_lasso, prox.group_mcp, prox.l1))


def norms(x):
    return np.linalg.norm(np.asarray(x, np.float64), axis=(0, 2))


# float32: rounding alone reached 2.5e-4 in 7500 draws of metrics over 6 to 11 decades; one step fewer, 1.5e-2.
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-6), (jnp.float32, 5e-4)])
DRAWS = hypothesis.given(seed=st.integers(0, 10**6), spread=st.floats(0, 11))
SETTINGS = hypothesis.settings(deadline=None, max_examples=40)


def as_dtype(dtype, *arrays):
    return tuple(jnp.asarray(array, dtype) for array in arrays)


def as_float64(*arrays):
    return tuple(np.asarray(array, np.float64) for array in arrays)


@PRECISIONS
@SETTINGS
@DRAWS
def test_group_lasso_is_optimal(dtype, tolerance, seed, spread):
    """D (x - z) + weight x / |x| = 0 where x is not zero; |D z| <= weight where it is. 2560 groups a precision."""
    with jax.enable_x64(dtype == jnp.float64):
        z, d, weight = as_dtype(dtype, *draw(np.random.default_rng(seed), spread))
        x = GROUP_LASSO(z, weight, d)
        assert x.dtype == dtype
    x, z, d, weight = as_float64(x, z, d, weight)
    zero = norms(x) == 0
    assert (norms(d * z)[zero] <= weight[zero] * (1 + tolerance)).all()
    assert (norms(d * z)[~zero] >= weight[~zero] * (1 - tolerance)).all()
    residual = d * (x - z) + weight[:, None] * x / np.maximum(norms(x), 1e-300)[:, None]
    assert (norms(residual) <= tolerance * norms(d * z))[~zero].all()


@PRECISIONS
@SETTINGS
@DRAWS
def test_group_mcp_is_optimal(dtype, tolerance, seed, spread):
    """D (x - z) + max(0, weight - |x| / gamma) x / |x| = 0 where x is not zero; |D z| <= weight where it is."""
    rng = np.random.default_rng(seed)
    with jax.enable_x64(dtype == jnp.float64):
        z, d, weight = as_dtype(dtype, *draw(rng, spread))
        gamma = float((1 + 10 ** rng.uniform(-1, 3)) / jnp.min(d))
        x = GROUP_MCP(z, weight, gamma, d)
    x, z, d, weight = as_float64(x, z, d, weight)
    zero = norms(x) == 0
    assert (norms(d * z)[zero] <= weight[zero] * (1 + tolerance)).all()
    assert (norms(d * z)[~zero] >= weight[~zero] * (1 - tolerance)).all()
    pull = np.maximum(weight - norms(x) / gamma, 0)
    residual = d * (x - z) + pull[:, None] * x / np.maximum(norms(x), 1e-300)[:, None]
    assert (norms(residual) <= tolerance * norms(d * z))[~zero].all()
    flat = norms(z) > 1.001 * gamma * weight
    np.testing.assert_array_equal(x[:, flat], z[:, flat], "not shrunk at all where the penalty is flat")


@PRECISIONS
@SETTINGS
@DRAWS
def test_group_l0_is_optimal(dtype, tolerance, seed, spread):
    """Each group is zero, at the cost |z|^2_D / 2, or that of z, at the cost of the penalty: the smaller of both."""
    with jax.enable_x64(dtype == jnp.float64):
        z, d, weight = as_dtype(dtype, *draw(np.random.default_rng(seed), spread))
        weight = jnp.median(0.5 * jnp.sum(d * z**2, (0, 2))) * jnp.ones_like(weight)
        x = prox.group_l0(z, weight, d, group_axis=1)
        assert x.dtype == dtype
    x, z, d, weight = as_float64(x, z, d, weight)
    zero, of_zero = norms(x) == 0, 0.5 * (d * z**2).sum((0, 2))
    assert 0 < zero.mean() < 1
    np.testing.assert_array_equal(x, np.where(zero[:, None], 0, z))
    assert (np.where(zero, of_zero, weight) <= np.minimum(of_zero, weight) * (1 + tolerance)).all()


@PRECISIONS
@SETTINGS
@DRAWS
def test_l1_is_optimal(dtype, tolerance, seed, spread):
    with jax.enable_x64(dtype == jnp.float64):
        z, d, weight = as_dtype(dtype, *draw(np.random.default_rng(seed), spread))
        weight = jnp.median(d * jnp.abs(z))
        x = prox.l1(z, weight, d)
    x, z, d, weight = as_float64(x, z, d, weight)
    zero = x == 0
    assert 0 < zero.mean() < 1
    assert (np.abs(d * z)[zero] <= weight * (1 + tolerance)).all()
    residual = np.abs(d * (x - z) + weight * np.sign(x))[~zero]
    assert (residual <= tolerance * np.abs(d * z)[~zero]).all()


@SETTINGS
@DRAWS
def test_the_convex_ones_are_firmly_non_expansive_in_their_metric(seed, spread):
    """<x - y, D (u - v)> >= |x - y|^2_D for x = prox(u), y = prox(v): what makes a step with them converge."""
    rng = np.random.default_rng(seed)
    u, d, weight = draw(rng, spread)
    v = u + rng.normal(size=u.shape) * 10 ** rng.uniform(-3, 0) * np.abs(u)
    with jax.enable_x64(True):
        for metric in (d, np.ones_like(d)):
            for operator, w in ((GROUP_LASSO, weight), (L1, np.median(weight))):
                x, y = np.asarray(operator(u, w, metric)), np.asarray(operator(v, w, metric))
                left, right = np.sum((x - y) * metric * (u - v)), np.sum(metric * (x - y) ** 2)
                assert left >= right - 1e-9 * np.sum(metric * (u - v) ** 2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["group_lasso", "group_mcp", "l1"])
def test_agrees_with_an_independent_solver(name, seed):
    rng = np.random.default_rng(seed)
    z, d = rng.normal(size=4), 10 ** rng.uniform(-2, 1, 4)
    weight, gamma = 0.4 * np.linalg.norm(d * z), 1.5 / d.min()

    def penalty(x):
        norm = np.linalg.norm(x)
        if name == "l1":
            return weight * np.abs(x).sum()
        if name == "group_lasso":
            return weight * norm
        return weight * norm - norm**2 / (2 * gamma) if norm < gamma * weight else gamma * weight**2 / 2

    def objective(x):
        return 0.5 * np.sum(d * (x - z) ** 2) + penalty(x)

    options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 10000}
    best = z
    for _ in range(8):  # it stalls on kinks; a new start continues
        best = optimize.minimize(objective, best, method="Nelder-Mead", options=options).x
    with jax.enable_x64(True):
        arguments = (gamma,) if name == "group_mcp" else ()
        axis = {} if name == "l1" else {"group_axis": 1}
        x = getattr(prox, name)(z[:, None], weight, *arguments, metric=d[:, None], **axis)[:, 0]
    assert objective(np.asarray(x)) <= objective(best) + 1e-12
    np.testing.assert_allclose(x, best, atol=1e-4)


def test_group_mcp_lies_between_the_group_lasso_and_hard_thresholding():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        z, d = rng.normal(size=(9, 64, 4)), 10 ** rng.uniform(-1, 1, (9, 64, 4))
        weight = np.median(norms(d * z))
        lasso = prox.group_lasso(z, weight, d)
        distances = [norms(prox.group_mcp(z, weight, gamma, d) - lasso).max() for gamma in (1e2, 1e4, 1e6)]
        assert distances[0] > distances[1] > distances[2] and distances[2] < 1e-4
        one = np.full_like(z, 2.0)  # gamma d -> 1: zero up to the threshold, z itself beyond it
        weight = np.median(norms(one * z))
        hard = np.where((norms(one * z) <= weight)[:, None], 0, z)
        np.testing.assert_allclose(prox.group_mcp(z, weight, (1 + 1e-9) / 2, one), hard, rtol=1e-6)
        np.testing.assert_allclose(
            prox.group_mcp(z, weight, 1e9), prox.group_lasso(z, weight), rtol=1e-6, err_msg="plain, gamma -> infinity"
        )


def test_plain_group_mcp_is_firm_thresholding():
    z = jnp.array([[3.0, 0.3, 9.0], [4.0, 0.4, 12.0]])  # norms 5, 0.5, 15
    x = prox.group_mcp(z, 2.0, 4.0, group_axis=1)  # flat beyond 8
    np.testing.assert_allclose(x, [[3.0 * 4 / 3 * 0.6, 0.0, 9.0], [4.0 * 4 / 3 * 0.6, 0.0, 12.0]], rtol=1e-5)


def test_gamma_too_small_for_the_metric_is_named():
    z, d = jnp.ones((3, 2)), jnp.array([[1.0, 0.01]] * 3)
    with pytest.raises(ValueError, match="gamma=50.0 is too small for the metric, whose smallest entry is 0.01"):
        prox.group_mcp(z, 0.1, 50.0, d, group_axis=1)
    with pytest.raises(ValueError, match="gamma=1.0 is too small"):
        prox.group_mcp(z, 0.1, 1.0, group_axis=1)
    x = jax.jit(lambda z, d: prox.group_mcp(z, 0.1, 50.0, d, group_axis=1))(z, d)
    assert jnp.isfinite(x[:, 0]).all() and jnp.isnan(x[:, 1]).all(), "under jit the group concerned is NaN"


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1e3])
@pytest.mark.parametrize("d_scale", [1e-8, 1e-2, 1e3])
def test_float32_agrees_with_float64_at_every_scale(scale, d_scale):
    """Adam's metric is 1e-8 for weights without a gradient, and revived groups are tiny: squares must not underflow."""
    rng = np.random.default_rng(0)
    z = np.float32(scale * rng.normal(size=(9, 64, 8)))
    d = np.float32(d_scale * 10 ** rng.uniform(-0.5, 0.5, z.shape))
    weight = np.float32(np.median(norms(np.float64(d) * z)))
    x = prox.group_lasso(z, weight, d)
    with jax.enable_x64(True):
        want = np.asarray(prox.group_lasso(np.float64(z), np.float64(weight), np.float64(d)))
    assert 0.3 < (want == 0).mean() < 0.7
    np.testing.assert_allclose(x, want, rtol=2e-4, atol=1e-5 * scale)


OPERATORS = {
    "group_lasso": lambda z, weight, d: prox.group_lasso(z, weight, d, group_axis=1),
    "group_mcp": lambda z, weight, d: prox.group_mcp(z, weight, 1e4, d, group_axis=1),
    "group_l0": lambda z, weight, d: prox.group_l0(z, weight, d, group_axis=1),
    "l1": prox.l1,
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("jitted", [False, True])
def test_edges_of_the_domain(name, jitted):
    operator = jax.jit(OPERATORS[name]) if jitted else OPERATORS[name]
    z = jnp.array([[0.0, 1.0, jnp.nan], [0.0, 2.0, 1.0]])
    d = jnp.full_like(z, 1e-3)
    for metric in (None, d):
        assert (operator(z, 1e-9, metric)[:, 0] == 0).all(), "zero stays zero"
        x = operator(z, 0.0, metric)
        np.testing.assert_array_equal(x, z, "no penalty changes nothing")
        assert jnp.isnan(operator(z, 1e-4, metric)[:, 2]).any(), "NaN stays visible"
        assert jnp.isnan(operator(z, 1e4, metric)[:, 2]).any(), "NaN is not pruned away"
        assert (operator(z, 1e4, metric)[:, 1] == 0).all()
        assert jnp.isnan(operator(z, jnp.nan, metric)[:, 1]).any(), "a NaN weight stays visible"
        broken = d.at[0, 1].set(jnp.nan)
        assert jnp.isnan(operator(z, 1e-4, broken)[:, 1]).any(), "NaN in the metric stays visible"


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_plain_neither_under_nor_overflows(scale):
    z = jnp.array([[3.0, 0.3], [4.0, 0.4]]) * scale
    np.testing.assert_allclose(prox.group_lasso(z, scale, group_axis=1) / scale, [[2.4, 0], [3.2, 0]], rtol=1e-5)
    np.testing.assert_array_equal(prox.group_lasso(z, 0.0, group_axis=1), z)


def test_a_weight_for_each_group():
    z = jnp.ones((2, 3))
    d = jnp.full_like(z, 2.0)
    weight = jnp.array([0.1, 100.0, 0.1])
    for metric in (None, d):
        x = prox.group_lasso(z, weight, metric, group_axis=1)
        assert (x[:, 1] == 0).all() and (x[:, 0] > 0).all()
        alone = prox.group_lasso(z[:, :1], 0.1, None if metric is None else d[:, :1], group_axis=1)
        np.testing.assert_allclose(x[:, :1], alone, rtol=1e-6)


@pytest.mark.parametrize("name", OPERATORS)
def test_jit_and_vmap(name):
    z = jax.random.normal(jax.random.key(1), (4, 5, 6, 2))
    d = jnp.exp(jax.random.normal(jax.random.key(2), z.shape))
    batched = jax.jit(jax.vmap(lambda z, d: OPERATORS[name](z, 6.0, d)))(z, d)
    single = jnp.stack([OPERATORS[name](a, 6.0, b) for a, b in zip(z, d, strict=True)])
    assert 0 < (single == 0).mean() < 1
    np.testing.assert_allclose(batched, single, rtol=1e-5, atol=1e-6)
