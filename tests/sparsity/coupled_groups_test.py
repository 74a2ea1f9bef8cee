"""Groups that span parameters: their proximal step, and the optimizer that takes it."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from scipy import optimize

from mtl_sparse.sparsity import control, groups, metrics, prox, stats, transform
from mtl_sparse.sparsity.groups import ConvGroups, CoupledGroups
from mtl_sparse.sparsity.penalties import L1, GroupL0, GroupLasso, GroupMCP
from mtl_sparse.sparsity.projections import FreezeZeros, HoldNorm, KeepStrongest

SHAPES = ((3, 3, 6, 4), (1, 1, 6, 5), (3, 8, 2))
# The second kernel reads the channels in another order, the third one two of them four times.
NUMBERS = (
    np.arange(6, dtype=np.int32).reshape(1, 1, 6, 1),
    np.array([3, 0, 5, 1, 2, 4], np.int32).reshape(1, 1, 6, 1),
    np.array([6, 1, 1, 6, 1, 1, 6, 6], np.int32).reshape(1, 8, 1),
)
PATHS = ("a/kernel", "b/kernel", "c/kernel")
SIZES = np.array([41.0, 41.0 + 24, 41.0, 41.0, 41.0, 41.0, 24.0])
COUPLED = CoupledGroups("a", PATHS, NUMBERS, 7, SIZES, costs=np.array([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]))


@jax.jit
def stepped(z, weight, d):
    return prox.group_lasso_over(COUPLED, z, weight, d)


def members(group):
    """Masks of one group's entries, found without the code under test."""
    return [np.broadcast_to(numbers == group, shape) for numbers, shape in zip(NUMBERS, SHAPES, strict=True)]


def gathered(arrays, group):
    return np.concatenate([np.asarray(a)[mask] for a, mask in zip(arrays, members(group), strict=True)])


def draw(rng, spread=3.0):
    z = [rng.normal(size=shape) for shape in SHAPES]
    d = [10 ** rng.uniform(-spread, 0, size=shape) for shape in SHAPES]
    weight = np.array([np.linalg.norm(gathered([a * b for a, b in zip(z, d, strict=True)], g)) for g in range(7)])
    return z, d, weight * 10 ** rng.uniform(-1, 0.5, 7)


def tree(arrays):
    return {path.split("/")[0]: {"kernel": jnp.asarray(a, jnp.float32)} for path, a in zip(PATHS, arrays, strict=True)}


def arrays_of(params):
    return [params[path.split("/")[0]]["kernel"] for path in PATHS]


def run(tx, params, steps=10, scale=1.0):
    state, update = tx.init(params), jax.jit(tx.update)
    rng = np.random.default_rng(5)
    for _ in range(steps):
        grads = jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape), jnp.float32), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def zeros(params):
    return np.array([not gathered(arrays_of(params), g).any() for g in range(7)])


def test_sizes_totals_and_spread():
    x = [jnp.asarray(a) for a in draw(np.random.default_rng(0))[0]]
    for g in range(7):
        assert COUPLED.sizes[g] == len(gathered(x, g))
        assert COUPLED.totals(x)[0][g] == pytest.approx(gathered(x, g).sum(), rel=1e-4)
        assert COUPLED.largest(x)[g] == pytest.approx(gathered(x, g).max(), rel=1e-6)
    spread = COUPLED.spread(jnp.arange(7), x)
    for numbers, values in zip(NUMBERS, spread, strict=True):
        np.testing.assert_array_equal(values, numbers)


@pytest.mark.parametrize("metric", [True, False])
def test_the_step_is_that_of_one_array_with_all_entries_of_a_group(metric):
    with jax.enable_x64(True):
        z, d, weight = draw(np.random.default_rng(1))
        d = d if metric else None
        x = prox.group_lasso_over(COUPLED, list(map(jnp.asarray, z)), weight, d and list(map(jnp.asarray, d)))
        y = prox.group_mcp_over(COUPLED, list(map(jnp.asarray, z)), weight, 2e3, d and list(map(jnp.asarray, d)))
        for g in range(7):
            column = gathered(z, g)[:, None]
            diagonal = d and gathered(d, g)[:, None]
            expected = prox.group_lasso(column, weight[g], diagonal, group_axis=1)[:, 0]
            np.testing.assert_allclose(gathered(x, g), expected, rtol=1e-10, atol=1e-14)
            expected = prox.group_mcp(column, weight[g], 2e3, diagonal, group_axis=1)[:, 0]
            np.testing.assert_allclose(gathered(y, g), expected, rtol=1e-10, atol=1e-14)


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(seed=st.integers(0, 10**6), spread=st.floats(0, 8))
def test_the_step_is_optimal(seed, spread):
    """D (x - z) + weight x / |x| = 0 where x is not zero; |D z| <= weight where it is."""
    z, d, weight = draw(np.random.default_rng(seed), spread)
    with jax.enable_x64(True):
        x = stepped(list(map(jnp.asarray, z)), weight, list(map(jnp.asarray, d)))
    for g in range(7):
        x_g, z_g, d_g = (gathered(arrays, g) for arrays in (x, z, d))
        if x_g.any():
            residual = d_g * (x_g - z_g) + weight[g] * x_g / np.linalg.norm(x_g)
            assert np.linalg.norm(residual) <= 1e-6 * np.linalg.norm(d_g * z_g)
        else:
            assert np.linalg.norm(d_g * z_g) <= weight[g] * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_an_independent_solver(seed):
    rng = np.random.default_rng(seed)
    numbers = (np.array([0, 1]), np.array([1, 0, 1]))
    both = CoupledGroups("", ("a", "b"), numbers, 2, np.array([2.0, 3.0]))
    z, d = [rng.normal(size=2), rng.normal(size=3)], [10 ** rng.uniform(-1, 1, n) for n in (2, 3)]
    flat_z, flat_d, flat_numbers = map(np.concatenate, (z, d, numbers))
    weight = 0.5 * np.array([np.linalg.norm((flat_d * flat_z)[flat_numbers == g]) for g in range(2)])

    def objective(x):
        penalty = sum(weight[g] * np.linalg.norm(x[flat_numbers == g]) for g in range(2))
        return 0.5 * np.sum(flat_d * (x - flat_z) ** 2) + penalty

    best = flat_z
    for _ in range(8):
        options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 10000}
        best = optimize.minimize(objective, best, method="Nelder-Mead", options=options).x
    with jax.enable_x64(True):
        found = prox.group_lasso_over(both, list(map(jnp.asarray, z)), weight, list(map(jnp.asarray, d)))
    found = np.concatenate([np.asarray(part) for part in found])
    assert objective(found) <= objective(best) + 1e-12
    np.testing.assert_allclose(found, best, atol=1e-4)


def test_the_step_is_firmly_non_expansive_in_its_metric():
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        for _ in range(20):
            u, d, weight = draw(rng)
            v = [a + 0.3 * rng.normal(size=a.shape) for a in u]
            x, y = (stepped(list(map(jnp.asarray, w)), weight, list(map(jnp.asarray, d))) for w in (u, v))
            left = sum(np.sum((a - b) * m * (p - q)) for a, b, m, p, q in zip(x, y, d, u, v, strict=True))
            right = sum(np.sum(m * (a - b) ** 2) for a, b, m in zip(x, y, d, strict=True))
            assert left >= right - 1e-9


@pytest.mark.parametrize("metric", ["adaptive", "group", "plain"])
def test_without_penalty_it_is_adamw_bit_for_bit(metric):
    params = tree(draw(np.random.default_rng(2))[0])
    penalty = GroupLasso(groups=(COUPLED,))
    for lambda_, decay in ((0.0, 0.1), (lambda step: jnp.float32(0), 0.0)):
        options = {"metric": metric, "fixed_norm": False, "weight_decay": decay}
        ours, _ = run(transform.proximal_adam(1e-2, lambda_, penalty=penalty, **options), params)
        theirs, _ = run(optax.adamw(1e-2, weight_decay=decay), params)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_group_l0_removes_whole_groups_and_leaves_the_others_as_they_are():
    z, d, _ = draw(np.random.default_rng(6))
    costs = [0.5 * np.sum(gathered(d, g) * gathered(z, g) ** 2) for g in range(7)]
    weight = float(np.median(costs))
    found = GroupL0(weights="none", groups=(COUPLED,)).prox(
        list(map(jnp.asarray, z)), weight, 1.0, list(map(jnp.asarray, d)), COUPLED
    )
    for g in range(7):
        want = 0 * gathered(z, g) if costs[g] <= 1.0001 * weight else gathered(z, g)
        if abs(costs[g] / weight - 1) > 1e-4:
            np.testing.assert_allclose(gathered(found, g), want, rtol=1e-6)
    assert sum(not gathered(found, g).any() for g in range(7)) in (3, 4)


def test_the_metric_of_a_group_is_the_mean_over_all_its_parameters():
    params = tree(draw(np.random.default_rng(2))[0])
    grads = jax.tree.map(lambda a: 0.1 + jnp.abs(a), tree(draw(np.random.default_rng(3))[0]))
    penalty = GroupLasso(groups=(COUPLED,))
    tx = transform.proximal_adam(1e-2, 85.0, penalty=penalty, fixed_norm=False, metric="group")
    updates, _ = tx.update(grads, tx.init(params), params)
    z = [a - 1e-2 for a in arrays_of(params)]  # Adam's first step
    d = [np.zeros_like(a) for a in z]
    for g in range(7):
        mean = gathered(arrays_of(grads), g).mean()
        for array, numbers in zip(d, NUMBERS, strict=True):
            array[np.broadcast_to(numbers == g, array.shape)] = mean
    weight = jnp.asarray(1e-2 * 85 * COUPLED.sizes**0.5)
    want = stepped(list(map(jnp.asarray, z)), weight, list(map(jnp.asarray, d)))
    new = optax.apply_updates(params, updates)
    assert 0 < zeros(new).sum() < 7
    found = arrays_of(new)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_group_is_zero_in_all_its_parameters_or_in_none():
    params = tree(draw(np.random.default_rng(2))[0])
    params["b"]["kernel"] = 0.1 * params["b"]["kernel"]
    params["c"]["kernel"] = params["c"]["kernel"].at[:, np.flatnonzero(NUMBERS[2].ravel() == 6)].multiply(0.1)
    tx = transform.proximal_adam(1e-2, 3.0, penalty=GroupLasso(groups=(COUPLED,)), fixed_norm=False, metric="plain")
    new, _ = run(tx, params, 10)
    alive = ~zeros(new)
    assert 0 < alive.sum() < 7
    for g in range(7):
        assert gathered(arrays_of(new), g).all() == alive[g]
    found = stats.sparsity(new, rules={r".*": -2}, groups=(COUPLED,))
    assert found.group == pytest.approx((~alive).mean())
    assert [(one.name, one.groups, one.zero_groups) for one in found.coupled] == [("a", 7, (~alive).sum())]


def test_groups_given_as_such_are_those_that_are_found_by_name():
    rng = np.random.default_rng(4)
    shapes = {"backbone": {"a": {"kernel": (3, 3, 6, 4)}, "b": {"kernel": (1, 1, 4, 5)}, "bn": {"scale": (5,)}}}
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    given = (ConvGroups("backbone/a/kernel", 2, 6, 36), ConvGroups("backbone/b/kernel", 2, 4, 5))
    target = control.TargetSparsity(0.6, 20)
    ends = [
        run(transform.proximal_adam(1e-2, target, penalty=penalty), params, 12)
        for penalty in (GroupLasso(), GroupLasso(groups=given))
    ]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert (np.asarray(ends[0][0]["backbone"]["a"]["kernel"]) == 0).any()


@pytest.mark.parametrize("regrowth", ["annealed", "free"])
def test_a_zero_group_regrows_as_a_whole(regrowth):
    """At a tenth of the highest learning rate, the free threshold lets groups regrow, the annealed one does not."""
    params = tree(draw(np.random.default_rng(2))[0])
    rate = lambda step: jnp.where(step < 1, 3e-2, 3e-3)  # noqa: E731
    lambda_ = lambda step: jnp.where(step < 1, 1e3, 0.2)  # noqa: E731
    tx = transform.proximal(
        optax.sgd(rate), rate, lambda_=lambda_, penalty=GroupLasso(groups=(COUPLED,)), regrowth=regrowth
    )
    gone, state = run(tx, params, 1)
    assert zeros(gone).all()
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 0.5), params)
    updates, _ = tx.update(grads, state, gone)
    back = optax.apply_updates(gone, updates)
    assert zeros(back).all() == (regrowth == "annealed") and (zeros(back).any() == zeros(back).all())


def test_projections_over_several_parameters():
    params = tree(draw(np.random.default_rng(2))[0])
    params["a"]["kernel"] = params["a"]["kernel"].at[:, :, 2].set(0)
    params["b"]["kernel"] = params["b"]["kernel"].at[:, :, 4].set(0)  # group 2 is zero
    options = {"penalty": GroupLasso(groups=(COUPLED,)), "metric": metrics.AdamMetric()}
    frozen, _ = run(
        transform.proximal(optax.adam(1e-2), 1e-2, lambda_=1e-9, projections=[FreezeZeros(0)], **options), params
    )
    assert list(np.flatnonzero(zeros(frozen))) == [2]
    held, state = run(
        transform.proximal(optax.adam(1e-2), 1e-2, lambda_=0.1, projections=[HoldNorm(".*")], **options), params
    )
    assert state.norms.shape == (3,)
    for new, old in zip(arrays_of(held), arrays_of(params), strict=True):
        assert float(jnp.linalg.norm(new)) == pytest.approx(float(jnp.linalg.norm(old)), rel=1e-5)


@pytest.mark.parametrize(
    ("limit", "left"), [({}, 1), ({"count": 3}, 3), ({"fraction": 0.5}, 4), ({"count": 9}, 7), ({"kernels": "x"}, 0)]
)
@pytest.mark.parametrize("coupled", [True, False])
def test_the_strongest_groups_stay(coupled, limit, left):
    params = tree(draw(np.random.default_rng(2))[0])
    own = ConvGroups("a/kernel", 2, 6, 36)
    penalty = GroupLasso(groups=(COUPLED if coupled else own,))
    tx = transform.proximal(
        optax.sgd(1e-3), 1e-3, lambda_=1e6, penalty=penalty, projections=[KeepStrongest(**{"kernels": ".*", **limit})]
    )
    new, _ = run(tx, params, 2)
    if coupled:
        alive, strength = ~zeros(new), [np.linalg.norm(gathered(arrays_of(params), g)) for g in range(7)]
    else:
        kernel = np.asarray(new["a"]["kernel"])
        alive, strength = kernel.any((0, 1, 3)), np.sqrt((np.asarray(params["a"]["kernel"]) ** 2).sum((0, 1, 3)))
        left = 3 if "fraction" in limit else min(left, 6)
    assert alive.sum() == left
    if left:
        assert min(np.array(strength)[alive]) >= max(np.array(strength)[~alive], default=0)


def test_limits_do_not_bring_back_more_than_they_ask_for():
    params = tree(draw(np.random.default_rng(2))[0])
    penalty = GroupLasso(groups=(COUPLED,))
    free, _ = run(transform.proximal_adam(3e-2, 0.5, penalty=penalty, fixed_norm=False), params, 20)
    kept = 7 - zeros(free).sum()
    tx = transform.proximal(
        optax.adam(3e-2),
        3e-2,
        lambda_=0.5,
        penalty=penalty,
        metric=metrics.AdamMetric(),
        projections=[KeepStrongest(".*", count=int(kept))],
    )
    limited, _ = run(tx, params, 20)
    np.testing.assert_array_equal(zeros(limited), zeros(free))


def test_limits_leave_the_shrunk_groups_as_they_are():
    """Groups 0 and 3 stay without a limit; with one of three, the strongest of the zero groups is kept as it was."""
    kernel = jnp.asarray(np.array([9.0, 1.0, 2.0, 8.0, 3.0, 0.5])[:, None] * np.ones(4), jnp.float32)[None, None]
    own = ConvGroups("a/kernel", 2, 6, 4)
    options = {"lambda_": 7.0, "penalty": GroupLasso(groups=(own,), weights="none")}
    ends = {}
    for least in (1, 3):
        tx = transform.proximal(optax.sgd(1.0), 1.0, projections=[KeepStrongest(".*", count=least)], **options)
        params = {"a": {"kernel": kernel}}
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        ends[least] = np.asarray(optax.apply_updates(params, updates)["a"]["kernel"])[0, 0, :, 0]
    np.testing.assert_allclose(ends[1], [9 - 3.5, 0, 0, 8 - 3.5, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(ends[3], [9 - 3.5, 0, 0, 8 - 3.5, 3, 0], rtol=1e-6)


@pytest.mark.parametrize("limit", [{"count": 0}, {"fraction": 1.5}, {"fraction": -0.1}])
def test_bad_limits_are_named(limit):
    with pytest.raises(ValueError, match=r"expected count >= 1 and fraction in \[0, 1\]"):
        KeepStrongest(**limit)


def test_a_target_of_any_measure():
    """The target is about a function of the parameters, here the fraction of weights that are zero in both kernels."""

    def measure(params):
        total = sum(leaf.size for leaf in jax.tree.leaves(params))
        return sum(jnp.sum(leaf == 0) for leaf in jax.tree.leaves(params)) / total

    rng, steps = np.random.default_rng(0), 600
    truth = {
        "a": {"kernel": jnp.asarray(rng.normal(size=(1, 1, 100, 2)) * 0.95 ** np.arange(100)[:, None], jnp.float32)},
        "b": {"kernel": jnp.asarray(rng.normal(size=(1, 1, 40, 9)) * 0.9 ** np.arange(40)[:, None], jnp.float32)},
    }
    rate = optax.cosine_decay_schedule(0.02, steps)
    tx = transform.proximal_adam(rate, control.TargetSparsity(0.4, steps, measure=measure), fixed_norm=False)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            noise = optax.tree.random_like(key, params, jax.random.normal)
            grads = jax.tree.map(lambda p, w, n: 0.1 * (p - w + 0.3 * n), params, truth, noise)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(jax.random.key(0), steps))[0][0]

    params = train(jax.tree.map(lambda w: 0.1 * jnp.ones_like(w), truth))
    assert float(measure(params)) == pytest.approx(0.4, abs=0.02)
    assert stats.sparsity(params).group != pytest.approx(0.4, abs=0.03)


def test_weights_by_cost():
    one = ConvGroups("a/kernel", 2, 2, 9, costs=np.array([90.0, 900.0]))
    two = ConvGroups("b/kernel", 2, 1, 36, costs=np.array([540.0]))
    mean = (90 + 900 + 540) / (9 + 9 + 36)
    for exponent in (0.0, 0.5, 1.0):
        penalty = GroupLasso(weights="macs", groups=(one, two), exponent=exponent)
        expected = 3 * (np.array([10.0, 100.0]) / mean) ** exponent
        np.testing.assert_allclose(penalty.factors(one), expected)
        np.testing.assert_allclose(penalty.factors(two), [6 * (15 / mean) ** exponent])
    x = prox.group_lasso_over(one, [jnp.ones((1, 1, 2, 9))], penalty.factors(one))[0]
    assert x[0, 0, 0].all() and not x[0, 0, 1].any()


def test_bad_groups_are_named():
    params = tree(draw(np.random.default_rng(2))[0])
    lost = ConvGroups("d/kernel", 2, 6, 4)
    with pytest.raises(ValueError, match=r"without d/kernel \(it has"):
        transform.proximal_adam(1e-2, 1.0, penalty=GroupLasso(groups=(lost,))).init(params)
    with pytest.raises(ValueError, match="a/kernel in several"):
        double = GroupLasso(groups=(COUPLED, ConvGroups("a/kernel", 2, 6, 36)))
        transform.proximal_adam(1e-2, 1.0, penalty=double).init(params)
    with pytest.raises(ValueError, match="'macs' need groups with costs"):
        GroupLasso(weights="macs")
    with pytest.raises(ValueError, match="'macs' need groups with costs"):
        GroupMCP(weights="macs", groups=(lost,), gamma=3.0)


def test_l1_over_coupled_groups_acts_on_single_weights():
    params = tree(draw(np.random.default_rng(2))[0])
    new, _ = run(transform.proximal_adam(1e-2, 0.3, penalty=L1(groups=(COUPLED,)), fixed_norm=False), params, 10)
    alone, _ = run(transform.proximal_adam(1e-2, 0.3, penalty=L1(rules={r".*": -1}), fixed_norm=False), params, 10)
    np.testing.assert_array_equal(new["a"]["kernel"], alone["a"]["kernel"])
    assert 0 < float(jnp.mean(new["a"]["kernel"] == 0)) < 1


def test_zero_groups_of_nan_are_not_zero():
    x = [jnp.full(shape, jnp.nan) for shape in SHAPES]
    assert not groups.Groups.zeros(COUPLED, x).any()
