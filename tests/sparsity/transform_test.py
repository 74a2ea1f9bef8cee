import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_sparse.sparsity import prox, transform


def random_tree(seed, scale=1.0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "backbone": {
            "conv": {"kernel": scale * jax.random.normal(keys[0], (3, 3, 8, 16))},
            "bn": {"scale": scale * jax.random.normal(keys[1], (16,))},
        },
        "head": {"kernel": scale * jax.random.normal(keys[2], (1, 1, 16, 4))},
    }


def run(tx, params, steps=5, scale=1.0):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(random_tree(100 + step, scale), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_without_penalty_it_is_adamw_bit_for_bit():
    params = random_tree(0)
    rate = optax.cosine_decay_schedule(1e-2, 10)
    ours, _ = run(transform.proximal_adam(rate, 0.0, weight_decay=0.1), params)
    theirs, _ = run(optax.adamw(rate, weight_decay=0.1), params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("metric", transform.METRICS)
def test_first_step_is_adam_then_prox(metric):
    params, grads = random_tree(0), random_tree(1)
    rate, lambda_, eps = 0.1, 1.0, 1e-8
    tx = transform.proximal_adam(rate, lambda_, eps=eps, metric=metric, fixed_norm=False)
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    w, g = params["backbone"]["conv"]["kernel"], grads["backbone"]["conv"]["kernel"]
    z = w - rate * g / (jnp.abs(g) + eps)  # Adam's first step, bias-corrected
    d = jnp.abs(g) + eps if metric == "adaptive" else None
    want = prox.group_lasso(z, rate * lambda_ * (3 * 3 * 16) ** 0.5, d)
    np.testing.assert_allclose(new["backbone"]["conv"]["kernel"], want, rtol=1e-4, atol=1e-6)
    head = params["head"]["kernel"] - rate * jnp.sign(grads["head"]["kernel"])
    np.testing.assert_allclose(new["head"]["kernel"], head, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fixed_norm", [True, False])
def test_pruned_groups_are_exactly_zero(fixed_norm):
    params = random_tree(0)
    # The gradient reaches only every second input channel.
    mask = (jnp.arange(8) % 2 == 0)[None, None, :, None]

    def grads(step):
        tree = random_tree(step)
        tree["backbone"]["conv"]["kernel"] *= mask
        return tree

    tx = transform.proximal_adam(1e-2, 0.5, fixed_norm=fixed_norm)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(20):
        updates, state = update(grads(step), state, params)
        params = optax.apply_updates(params, updates)
    zero = np.asarray((params["backbone"]["conv"]["kernel"] == 0).all((0, 1, 3)))
    assert zero[1::2].all() and not zero[::2].all()
    assert (params["head"]["kernel"] != 0).all(), "heads are not penalised"


def test_fixed_norm_holds_the_kernels_norm_and_off_lets_it_shrink():
    params = random_tree(0)
    norm = jnp.linalg.norm(params["backbone"]["conv"]["kernel"])
    held, state = run(transform.proximal_adam(1e-3, 1.0), params, 30)
    free, _ = run(transform.proximal_adam(1e-3, 1.0, fixed_norm=False), params, 30)
    np.testing.assert_allclose(jnp.linalg.norm(held["backbone"]["conv"]["kernel"]), norm, rtol=1e-5)
    assert jnp.linalg.norm(free["backbone"]["conv"]["kernel"]) < 0.99 * norm
    assert list(state.kernel_norms) == ["backbone/conv/kernel"]


def test_a_kernel_with_a_bias_is_not_held():
    params = {
        "normed": {"kernel": jnp.ones((1, 1, 4, 2))},
        "out": {"kernel": jnp.ones((1, 1, 4, 2)), "bias": jnp.zeros(2)},
    }
    state = transform.proximal_adam(1e-3, 1.0).init(params)
    assert list(state.kernel_norms) == ["normed/kernel"]


def test_lambda_on_a_schedule_starts_when_it_says():
    params = random_tree(0)
    starts_late = lambda step: jnp.where(step < 3, 0.0, 1e4)  # noqa: E731
    tx = transform.proximal_adam(1e-2, starts_late, fixed_norm=False)
    before, _ = run(tx, params, 3)
    plain, _ = run(optax.adamw(1e-2, weight_decay=0.0), params, 3)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)
    after, _ = run(tx, params, 4)
    assert (after["backbone"]["conv"]["kernel"] == 0).all()


def test_a_wholly_zero_kernel_stays_finite():
    params = random_tree(0)
    params, _ = run(transform.proximal_adam(1e-2, 1e4), params, 3)
    assert (params["backbone"]["conv"]["kernel"] == 0).all()


def test_pruned_group_comes_back_when_its_gradient_earns_it():
    params = {"w": jnp.zeros((1, 1, 2, 4)).at[0, 0, 0].set(1.0)}
    tx = transform.proximal_adam(1e-2, 0.1, fixed_norm=False)
    state = tx.init(params)
    for _ in range(3):
        grads = {"w": jnp.full((1, 1, 2, 4), -5.0)}  # |m_hat| = 10 > lambda sqrt(n) = 0.2
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert (params["w"][0, 0, 1] > 0).all()


def test_reaches_the_group_lasso_optimum_without_recompiling():
    """min 1/2 |A w - b|^2 / m + lambda sum sqrt(n) |w_g|, against proximal gradient descent in numpy."""
    rng = np.random.default_rng(0)
    groups, size, m, lambda_ = 10, 3, 60, 0.08
    design = rng.normal(size=(m, groups * size))
    truth = np.zeros((groups, size))
    truth[:3] = rng.normal(size=(3, size))
    target = design @ truth.ravel() + 0.1 * rng.normal(size=m)

    step = m / np.linalg.norm(design, 2) ** 2
    best = np.zeros((groups, size))
    for _ in range(20000):
        z = best - step * (design.T @ (design @ best.ravel() - target) / m).reshape(groups, size)
        norms = np.linalg.norm(z, axis=1, keepdims=True)
        best = z * np.maximum(0, 1 - step * lambda_ * size**0.5 / np.maximum(norms, 1e-12))
    zero = (best == 0).all(1)
    assert 0 < zero.sum() < groups

    def loss(params):
        return 0.5 * jnp.mean(jnp.square(design @ params["w"].ravel() - target))

    tx = transform.proximal_adam(optax.cosine_decay_schedule(0.02, 4000), lambda_, fixed_norm=False)
    params = {"w": jnp.asarray(rng.normal(size=(1, 1, groups, size)), jnp.float32)}
    compiled = 0

    @jax.jit
    def update(params, state):
        nonlocal compiled
        compiled += 1
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(4000):
        params, state = update(params, state)
    found = np.asarray(params["w"])[0, 0]
    assert compiled == 1
    np.testing.assert_array_equal((found == 0).all(1), zero)
    np.testing.assert_allclose(found, best, atol=2e-3)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="lambda_.*-1"):
        transform.proximal_adam(1e-3, -1.0)
    with pytest.raises(ValueError, match="metric 'euclid'.*adaptive, plain"):
        transform.proximal_adam(1e-3, metric="euclid")
    with pytest.raises(ValueError, match="scope 'neck'.*backbone, all"):
        transform.proximal_adam(1e-3, 1e-4, scope="neck").init(random_tree(0))
    with pytest.raises(ValueError, match="no conv kernel"):
        transform.proximal_adam(1e-3, 1e-4).init({"bias": jnp.zeros(3)})
