import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_sparse.sparsity import control, groups, metrics, penalties, projections, prox, reference, transform
from mtl_sparse.sparsity.penalties import L1, GroupL0, GroupLasso, GroupMCP
from mtl_sparse.sparsity.projections import FreezeZeros, HoldNorm, KeepStrongest
from mtl_sparse.sparsity.schedules import Phases, phased


def random_tree(seed, scale=1.0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "backbone": {
            "conv": {"kernel": scale * jax.random.normal(keys[0], (3, 3, 8, 16))},
            "bn": {"scale": scale * jax.random.normal(keys[1], (16,))},
        },
        "head": {"kernel": scale * jax.random.normal(keys[2], (1, 1, 16, 4))},
    }


def held(params, fixed_norm=True):
    """Paths of the kernels whose norm is held."""
    return projections.held_paths([HoldNorm(fixed_norm)], groups.find(params), params) if fixed_norm else []


def adam(rate, lambda_, *, links=(), metric="adaptive", weight_decay=0.0, **settings):
    """Adam and the proximal step from their links."""
    return transform.proximal(
        optax.adamw(rate, weight_decay=weight_decay),
        rate,
        lambda_=lambda_,
        metric=metrics.AdamMetric(kind=metric),
        projections=links,
        **settings,
    )


def run(tx, params, steps=5, scale=1.0):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(random_tree(100 + step, scale), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_l2_goes_through_adams_moments():
    params = random_tree(0)
    mask = lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: "bn" not in str(path), tree)  # noqa: E731
    for l2_mask in (None, mask):
        inner = reference.like_reference(optax.adam(1e-2), l2=0.3, l2_mask=l2_mask)
        ours, _ = run(transform.proximal(inner, 1e-2, lambda_=0.0), params)
        theirs, _ = run(optax.chain(optax.add_decayed_weights(0.3, l2_mask), optax.adam(1e-2)), params)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with pytest.raises(ValueError, match="l2 must be >= 0, got -0.1"):
        reference.like_reference(optax.adam(1e-2), l2=-0.1)


def test_without_penalty_it_is_adamw_bit_for_bit():
    params = random_tree(0)
    rate = optax.cosine_decay_schedule(1e-2, 10)
    ours, _ = run(transform.proximal_adam(rate, 0.0, weight_decay=0.1), params)
    theirs, _ = run(optax.adamw(rate, weight_decay=0.1), params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("metric", ["adaptive", "group", "plain"])
def test_first_step_is_adam_then_prox(metric):
    params, grads = random_tree(0), random_tree(1)
    rate, lambda_, eps = 0.1, 1.0, 1e-8
    tx = transform.proximal_adam(rate, lambda_, eps=eps, metric=metric, fixed_norm=False)
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    w, g = params["backbone"]["conv"]["kernel"], grads["backbone"]["conv"]["kernel"]
    z = w - rate * g / (jnp.abs(g) + eps)  # Adam's first step, bias-corrected
    d = None if metric == "plain" else jnp.abs(g) + eps
    if metric == "group":
        d = jnp.broadcast_to(d.mean((0, 1, 3), keepdims=True), d.shape)
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
    np.testing.assert_allclose(state.norms, [norm])  # the kernel in the head is not penalized


def test_a_kernel_with_a_bias_is_not_held():
    params = {
        "normed": {"kernel": jnp.ones((1, 1, 4, 2))},
        "out": {"kernel": jnp.ones((1, 1, 4, 2)), "bias": jnp.zeros(2)},
    }
    assert held(params) == ["normed/kernel"]


@pytest.mark.parametrize("lambda_", [lambda step: jnp.where(step < 3, 0.0, 1e4), phased(1e4, start_step=3)])
def test_lambda_starts_when_it_says(lambda_):
    params = random_tree(0)
    tx = transform.proximal_adam(1e-2, lambda_, fixed_norm=False)
    before, _ = run(tx, params, 3)
    plain, _ = run(optax.adamw(1e-2, weight_decay=0.0), params, 3)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)
    after, _ = run(tx, params, 4)
    assert (after["backbone"]["conv"]["kernel"] == 0).all()


def test_lambda_grows_over_the_warm_up():
    tx = transform.proximal_adam(1e-2, phased(0.8, start_step=2, warmup_steps=4))
    assert [float(run(tx, random_tree(0), steps)[1].lambda_) for steps in range(1, 9)] == pytest.approx(
        [0, 0, 0, 0.2, 0.4, 0.6, 0.8, 0.8]
    )


@pytest.mark.parametrize(
    ("settings", "operator"),
    [
        ({"penalty": "l1"}, lambda z, d: prox.l1(z, 0.1, d)),
        ({"penalty": GroupLasso(weights="none")}, lambda z, d: prox.group_lasso(z, 0.1, d)),
        ({"metric": "uncorrected"}, lambda z, d: prox.group_lasso(z, 0.1 * 12, d * 0.001**0.5)),
        ({"penalty": GroupL0()}, lambda z, d: prox.group_l0(z, 0.1 * 12, d)),
        ({"penalty": GroupL0(), "metric": "fisher"}, lambda z, d: prox.group_l0(z, 0.1 * 12, d * d)),
        (
            {"penalty": GroupMCP(gamma=5.0)},
            lambda z, d: prox.group_mcp(z, 0.1 * 12, 50.0, jnp.maximum(d, 0.04)),
        ),
    ],
    ids=["l1", "no group weights", "uncorrected metric", "group l0", "fisher metric", "group mcp"],
)
def test_first_step_of_the_other_forms(settings, operator):
    """lr 0.1, lambda 1, groups of 9 x 16 weights; v after one step is 0.001 g^2, corrected g^2."""
    params, grads = random_tree(0), random_tree(1)
    tx = transform.proximal_adam(0.1, 1.0, fixed_norm=False, **settings)
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)["backbone"]["conv"]["kernel"]
    g = grads["backbone"]["conv"]["kernel"]
    want = operator(params["backbone"]["conv"]["kernel"] - 0.1 * jnp.sign(g), jnp.abs(g))
    assert (new != params["backbone"]["conv"]["kernel"]).any()
    np.testing.assert_allclose(new, want, rtol=1e-4, atol=1e-5)


def test_the_last_phase_keeps_the_pattern_and_trains_the_rest_without_penalty():
    params = random_tree(0)
    params["backbone"]["conv"]["kernel"] = params["backbone"]["conv"]["kernel"].at[:, :, 2:5].set(0)
    tx = transform.proximal_adam(1e-2, 0.3, debias_step=0, fixed_norm=False)
    new, state = run(tx, params, 5)
    plain, _ = run(optax.adamw(1e-2, weight_decay=0.0), params, 5)
    kernel, free = new["backbone"]["conv"]["kernel"], plain["backbone"]["conv"]["kernel"]
    assert (kernel[:, :, 2:5] == 0).all() and (free[:, :, 2:5] != 0).all()
    for live in (slice(0, 2), slice(5, 8)):
        np.testing.assert_array_equal(kernel[:, :, live], free[:, :, live])
    assert state.lambda_ == 0


def test_the_last_phase_begins_when_it_says():
    tx = transform.proximal_adam(1e-2, 1.0, debias_step=6, penalty="l1", fixed_norm=False)
    zero = [np.asarray(run(tx, random_tree(0), steps)[0]["backbone"]["conv"]["kernel"]) == 0 for steps in (5, 6, 12)]
    assert 0 < zero[1].mean() < 1 and (zero[0] != zero[1]).any()
    np.testing.assert_array_equal(zero[1], zero[2])


@pytest.mark.parametrize("annealed", [True, False])
def test_coming_back_gets_harder_as_the_rate_falls(annealed):
    """|m_hat| = 10 against lambda sqrt(n) = 2: at a tenth of the peak rate the annealed threshold is 20."""
    params = {"w": jnp.zeros((1, 1, 2, 4)).at[0, 0, 0].set(1.0)}
    rate = optax.piecewise_constant_schedule(1e-2, {2: 0.1})
    tx = adam(rate, 1.0, regrowth="annealed" if annealed else "free")
    state = tx.init(params)
    for step in range(8):
        grads = {"w": jnp.full((1, 1, 2, 4), -5.0 if step >= 4 else 0.0)}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert (np.asarray(params["w"][0, 0, 1]) > 0).all() != annealed


def test_a_kernel_that_died_comes_back_at_its_norm_and_one_that_began_at_zero_is_free():
    """lambda falls from 10000, which kills both, to 0.1, which the gradient of 5 outweighs."""
    params = {"a": {"kernel": jnp.ones((1, 1, 2, 4))}, "b": {"kernel": jnp.zeros((1, 1, 2, 4))}}
    tx = transform.proximal_adam(1e-2, optax.piecewise_constant_schedule(1e4, {2: 1e-5}), fixed_norm=".*")
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(6):
        grads = jax.tree.map(lambda p: jnp.full_like(p, -5.0), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if step == 1:
            assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(jnp.linalg.norm(params["a"]["kernel"]), 8**0.5, rtol=1e-5)
    assert 0 < jnp.linalg.norm(params["b"]["kernel"]) < 0.2


def test_modules_may_be_called_as_adams_moments():
    params = {"mu": {"kernel": jnp.ones((1, 1, 4, 2))}, "nu": {"kernel": jnp.ones((1, 1, 4, 2))}}
    tx = transform.proximal_adam(1e-2, 1e-3, target=control.Target(0.5, 10), fixed_norm=False)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert state.count == 1 and all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))


def test_the_state_keeps_its_types_in_float64():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), random_tree(0))
        tx = transform.proximal_adam(optax.cosine_decay_schedule(1e-2, 9), 1e-3, target=control.Target(0.5, 10))
        state = tx.init(params)
        _, new = tx.update(params, state, params)
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == [leaf.dtype for leaf in jax.tree.leaves(new)]


def test_fixed_norm_by_name():
    params = {"a": {"kernel": jnp.ones((1, 1, 2, 2)), "bias": jnp.zeros(2)}, "b": {"kernel": jnp.ones((1, 1, 2, 2))}}
    assert held(params, "a/.*") == ["a/kernel"]
    state = transform.proximal_adam(1e-3, 1.0, fixed_norm="a/.*").init(params)
    np.testing.assert_array_equal(state.norms, [2.0])


def test_in_a_chain_and_beside_another_optimizer():
    """Clipped, scaled per parameter group, and still exact zeros in the backbone alone."""
    params = random_tree(0)
    tx = optax.chain(
        optax.clip_by_global_norm(1e6),
        optax.multi_transform(
            {"sparse": transform.proximal_adam(1e-2, 1e4, fixed_norm=False), "dense": optax.sgd(1e-2)},
            {"backbone": "sparse", "head": "dense"},
        ),
    )
    new, _ = run(tx, params, 1)
    assert (new["backbone"]["conv"]["kernel"] == 0).all()
    head = params["head"]["kernel"] - 1e-2 * random_tree(100)["head"]["kernel"]
    np.testing.assert_allclose(new["head"]["kernel"], head, rtol=1e-6)


def test_under_pmap_and_with_bfloat16_parameters():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_tree(0))
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_tree(1))
    grads["backbone"]["conv"]["kernel"] = grads["backbone"]["conv"]["kernel"].at[:, :, :4].set(0)
    tx = transform.proximal_adam(0.1, 5.0, target=control.Target(0.8, 10))

    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    replicate = lambda tree: jax.tree.map(lambda x: x[None], tree)  # noqa: E731
    new, state = jax.pmap(step, axis_name="devices")(replicate(params), replicate(tx.init(params)))
    kernel = new["backbone"]["conv"]["kernel"][0]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal((kernel == 0).all((0, 1, 3)), np.arange(8) < 4)
    assert float(state.control.gap[0]) == pytest.approx(0.8 * (1 - 0.75**3) - 0.5)


def test_a_wholly_zero_kernel_stays_finite():
    params = random_tree(0)
    params, _ = run(transform.proximal_adam(1e-2, 1e4), params, 3)
    assert (params["backbone"]["conv"]["kernel"] == 0).all()


def test_pruned_groups_come_back_when_the_data_change():
    """Regression whose inputs 0-3 matter first and inputs 4-7 later: the live groups change over."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 8)), jnp.float32)
    tx = transform.proximal_adam(1e-2, 0.3, fixed_norm=False)

    @jax.jit
    def update(params, state, y):
        loss = lambda params: jnp.mean(jnp.square(x @ params["w"][0, 0] - y))  # noqa: E731
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = {"w": jnp.asarray(rng.normal(size=(1, 1, 8, 3)), jnp.float32)}
    state = tx.init(params)
    for used in (slice(0, 4), slice(4, 8)):
        y = x[:, used] @ np.ones((4, 3), np.float32)
        for _ in range(600):
            params, state = update(params, state, y)
        live = np.flatnonzero((np.asarray(params["w"][0, 0]) != 0).any(1))
        np.testing.assert_array_equal(live, np.arange(8)[used])


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


@pytest.mark.parametrize(("bias_correction", "lambda_"), [(True, 14.0), (False, 0.6)])
def test_a_restart_is_a_new_optimizer(bias_correction, lambda_):
    params = random_tree(0)
    metric = metrics.AdamMetric(kind="adaptive" if bias_correction else "uncorrected")

    def make(restart_every=None):
        inner = reference.like_reference(optax.adamw(1e-2, weight_decay=0.1), restart_every=restart_every)
        return transform.proximal(inner, 1e-2, lambda_=lambda_, metric=metric)

    whole, _ = run(make(restart_every=3), params, steps=6)
    parts = params
    for start in (0, 3):
        tx = make()
        state = tx.init(parts)
        for step in range(start, start + 3):
            updates, state = tx.update(random_tree(100 + step), state, parts)
            parts = optax.apply_updates(parts, updates)
    kernel = whole["backbone"]["conv"]["kernel"]
    assert 0 < int((kernel == 0).all((0, 1, 3)).sum()) < 8, "the penalty acts"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)
    without, _ = run(make(), params, steps=6)
    assert float(jnp.abs(without["head"]["kernel"] - whole["head"]["kernel"]).max()) > 1e-3


def test_the_penalty_in_the_gradient_is_the_group_lassos_derivative():
    params = random_tree(0)
    params["backbone"]["conv"]["kernel"] = params["backbone"]["conv"]["kernel"].at[:, :, 2].set(0)
    lambda_ = 0.05
    inner = reference.like_reference(optax.adamw(1e-2, weight_decay=0.0), penalty_in_gradient=GroupLasso())
    tx = transform.proximal(inner, 1e-2, lambda_=lambda_, metric=metrics.AdamMetric())
    plain = transform.proximal_adam(1e-2, lambda_, fixed_norm=False)

    def penalty(kernel):
        squares = jnp.sum(kernel**2, (0, 1, 3))
        norms = jnp.where(squares > 0, jnp.sqrt(jnp.maximum(squares, 1e-30)), 0)
        return lambda_ * len(norms) ** 0.5 * jnp.sum(norms)

    state, plain_state, expected = tx.init(params), plain.init(params), params
    for step in range(3):
        grads = random_tree(100 + step)
        updates, state = tx.update(grads, state, params)
        grads["backbone"]["conv"]["kernel"] += jax.grad(penalty)(expected["backbone"]["conv"]["kernel"])
        plain_updates, plain_state = plain.update(grads, plain_state, expected)
        params, expected = optax.apply_updates(params, updates), optax.apply_updates(expected, plain_updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, expected)


def test_kernels_with_a_bias_are_free_in_boxes_and_alone():
    """Parameters of Flax NNX, and those with metadata, lie in boxes; a convolution's own tree has no path above it."""
    kernel, bias = jnp.ones((3, 3, 4, 8)), jnp.zeros(8)
    box = lambda value: nn.LogicallyPartitioned(value, (None,) * value.ndim)  # noqa: E731
    trees = {
        "boxed, bias": ({"conv": {"kernel": box(kernel), "bias": box(bias)}}, set()),
        "boxed": ({"conv": {"kernel": box(kernel)}, "bn": {"scale": box(bias)}}, {"conv/kernel"}),
        "alone, bias": ({"kernel": kernel, "bias": bias}, set()),
        "haiku, bias": ({"conv": {"w": kernel, "b": bias}, "bn": {"scale": bias}}, set()),
        "haiku": ({"conv": {"w": kernel}, "bn": {"scale": bias}}, {"conv/w"}),
    }
    for name, (params, expected) in trees.items():
        assert set(held(params)) == expected, name
        assert len(transform.proximal_adam(1e-2, 1e-3).init(params).norms) == len(expected), name


BIASED = {
    "biased": {"kernel": jnp.ones((1, 1, 4, 2)), "bias": jnp.ones(2)},
    "normed": {"kernel": 3 * jnp.ones((1, 1, 4, 2))},
    "bn": {"scale": jnp.ones(2)},
}
ONLY_KERNELS = {name: {key: key == "kernel" for key in leaves} for name, leaves in BIASED.items()}


@pytest.mark.parametrize("wrap", ["masked", "multi_transform"])
def test_a_bias_that_another_optimizer_has_still_frees_its_kernel(wrap):
    tx = transform.proximal_adam(1e-2, 1e-3)
    if wrap == "masked":
        state = optax.masked(tx, ONLY_KERNELS).init(BIASED).inner_state
    else:
        labels = jax.tree.map(lambda sparse: "sparse" if sparse else "dense", ONLY_KERNELS)
        state = optax.multi_transform({"sparse": tx, "dense": optax.adam(1e-2)}, labels).init(BIASED)
        state = state.inner_states["sparse"].inner_state
    np.testing.assert_allclose(state.norms, [jnp.linalg.norm(BIASED["normed"]["kernel"])])


def test_where_biases_may_be_filtered_out_kernels_are_asked_for_by_name():
    """NNX's `wrt=` hands over the chosen parameters alone."""
    params = {"biased": {"kernel": jnp.ones((1, 1, 4, 2))}, "head": {"kernel": jnp.ones((4, 2))}}
    with pytest.raises(ValueError, match="no parameter besides its kernels.*fixed_norm=False"):
        transform.proximal_adam(1e-2, 1e-3).init(params)
    assert transform.proximal_adam(1e-2, 1e-3, fixed_norm=False).init(params).norms.shape == (0,)
    assert held(params, ".*") == ["biased/kernel"]


def test_the_unpenalized_norm_is_what_the_step_has_without_the_penalty():
    """So weight decay acts on a fixed-norm kernel as on a free one; with the initial norm it does nothing."""
    params = random_tree(0)
    settings = {"weight_decay": 2.0, "eps": 1.0}  # so large that Adam's step depends on the scale of the gradient
    norms = {}
    for norm in ("initial", "unpenalized"):
        tx = transform.proximal(
            optax.adamw(1e-2, **settings),
            1e-2,
            lambda_=0.02,
            metric=metrics.AdamMetric(eps=1.0),
            projections=[HoldNorm(norm=norm)],
        )
        new, _ = run(tx, params, 1)
        norms[norm] = float(jnp.linalg.norm(new["backbone"]["conv"]["kernel"]))
    plain, _ = run(optax.adamw(1e-2, **settings), params, 1)
    before = float(jnp.linalg.norm(params["backbone"]["conv"]["kernel"]))
    dense = float(jnp.linalg.norm(plain["backbone"]["conv"]["kernel"]))
    assert abs(dense / before - 1) > 0.01
    assert norms == {"initial": pytest.approx(before, rel=1e-5), "unpenalized": pytest.approx(dense, rel=1e-5)}


def test_the_rms_norm_holds_the_size_of_the_weights_that_are_left():
    """Also of a kernel some of whose groups are zero at init, and of weights alone (l1)."""
    params = random_tree(0)
    kernel = params["backbone"]["conv"]["kernel"].at[:, :, 0].set(0)
    params["backbone"]["conv"]["kernel"] = kernel
    before = float(jnp.sqrt(jnp.mean(kernel[kernel != 0] ** 2)))
    for penalty, lambda_ in (("group_lasso", 0.6), ("l1", 1.2)):
        tx = adam(1e-2, lambda_, penalty=penalty, links=[HoldNorm(norm="rms")])
        new, _ = run(tx, params, 6)
        left = new["backbone"]["conv"]["kernel"]
        assert 0.1 < float(jnp.mean(left == 0)) < 0.9
        assert float(jnp.sqrt(jnp.mean(left[left != 0] ** 2))) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("penalty", ["group_lasso", "l1"])
@pytest.mark.parametrize("fixed_norm", [".*", False])
def test_the_strongest_group_is_kept(fixed_norm, penalty):
    """A lambda that zeroes every kernel leaves one group of each that `keep_one` names; the prox does not shrink it."""
    kernel = jnp.ones((1, 1, 4, 2)).at[:, :, 2].set(3.0)
    params = {"a": {"kernel": kernel}, "b": {"kernel": kernel}, "bn": {"scale": jnp.ones(2)}}
    links = [KeepStrongest("a/.*"), *([HoldNorm(fixed_norm)] if fixed_norm else [])]
    tx = adam(1e-2, 1e4, penalty=penalty, links=links)
    new = params
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state, new)
        new = optax.apply_updates(new, updates)
    np.testing.assert_array_equal((new["a"]["kernel"] != 0).all((0, 1, 3)), [False, False, True, False])
    wanted = jnp.linalg.norm(kernel) if fixed_norm else (3 - 0.03) * 2**0.5
    assert float(jnp.linalg.norm(new["a"]["kernel"])) == pytest.approx(float(wanted), rel=1e-4)
    assert not new["b"]["kernel"].any()


@pytest.mark.parametrize(("target", "left"), [(0.99, 1), (None, 0)])
def test_a_group_is_kept_with_a_target(target, left):
    found = None if target is None else control.Target(target, 10)
    tx = transform.proximal_adam(10.0, 1e4, fixed_norm=False, target=found)
    new, _ = run(tx, random_tree(0), 1)
    assert int((new["backbone"]["conv"]["kernel"] != 0).any((0, 1, 3)).sum()) == left


@pytest.mark.parametrize(
    ("metric", "slopes"),
    [
        ("adaptive", lambda grad: jnp.sqrt(jnp.mean(jnp.square(grad), (0, 1, 3)))),
        ("uncorrected", lambda grad: jnp.sqrt(0.001 * jnp.mean(jnp.square(grad), (0, 1, 3)))),
        ("group", lambda grad: jnp.mean(jnp.abs(grad), (0, 1, 3))),
        ("plain", lambda grad: jnp.ones(8)),
    ],
)
@pytest.mark.parametrize("start", [1e6, 1e-12])
def test_a_targets_first_lambda_is_near_what_keeps_half_of_the_groups_zero(start, metric, slopes):
    """Within a factor of 30, already in the first penalized step, wherever it starts.

    Adam's first step over the rate is the sign of g. D is |g|, uncorrected sqrt(0.001) |g|, in the plain metric 1.
    """
    tx = transform.proximal_adam(1e-3, start, target=control.Target(0.5, 100), metric=metric)
    _, state = run(tx, random_tree(0), 1)
    grad = random_tree(100)["backbone"]["conv"]["kernel"]
    wanted = float(jnp.median(slopes(grad))) * (30 if start > 1 else 1 / 30)
    assert float(state.lambda_) == pytest.approx(wanted, rel=1e-4)


def test_the_first_lambda_of_group_l0_is_just_below_what_zeroes_a_group():
    """A group is zero if half of |z|^2 in the metric is at most the rate times lambda; D is |g| in the first step."""
    tx = transform.proximal_adam(1e-3, 1e9, target=control.Target(0.5, 100), penalty=GroupL0(weights="none"))
    new, state = run(tx, random_tree(0), 1)
    w, grad = (random_tree(seed)["backbone"]["conv"]["kernel"] for seed in (0, 100))
    lambdas = 0.5 * jnp.sum(jnp.abs(grad) * (w - 1e-3 * jnp.sign(grad)) ** 2, (0, 1, 3)) / 1e-3
    assert float(state.lambda_) == pytest.approx(0.999 * float(jnp.min(lambdas)), rel=1e-4)
    assert (new["backbone"]["conv"]["kernel"] != 0).any((0, 1, 3)).all()


def test_group_l0_follows_the_schedule_step_by_step_and_zeroes_nothing_after_it():
    """Each step zeroes what the step before lacked, rounded down, whether or not lambda has a warm-up."""
    target = control.Target(0.75, 40, ramp=0.5, freeze=0.6, phases=Phases(warmup_steps=9))
    tx = transform.proximal_adam(1e-3, target=target, penalty=GroupL0(weights="none"), fixed_norm=False)
    params = random_tree(0)
    state, update, counts = tx.init(params), jax.jit(tx.update), []
    for step in range(1, 41):
        updates, state = update(random_tree(100 + step), state, params)
        params = optax.apply_updates(params, updates)
        counts.append(int((params["backbone"]["conv"]["kernel"] == 0).all((0, 1, 3)).sum()))
    scheduled = [0, *(8 * float(target.scheduled(step)) for step in range(1, 25)), *[6] * 15]
    assert counts == [int(one + 1e-5) for one in scheduled] and counts[-1] == 6


@pytest.mark.parametrize("metric", ["adaptive", "fisher"])
@pytest.mark.parametrize("slope", [1e-3, 1e-6])
def test_group_l0_reaches_its_target_beside_weak_groups_that_are_kept(metric, slope):
    """Two kernels of 32 groups, of which 8 each stay, with gradients of one far below the other's; none regrows."""
    target = control.Target(0.7, 100)
    keep = KeepStrongest(".*", 8)
    tx = transform.proximal(
        optax.adam(1e-3), 1e-3, lambda_=target, penalty=GroupL0(weights="none"), metric=metrics.AdamMetric(kind=metric),
        projections=[keep],
    )  # fmt: skip
    params = {name: {"kernel": jax.random.normal(jax.random.key(i), (1, 1, 32, 4))} for i, name in enumerate("ab")}
    state, update, counts = tx.init(params), jax.jit(tx.update), []
    for step in range(100):
        keys = jax.random.split(jax.random.key(step))
        grads = {
            "a": {"kernel": jax.random.normal(keys[0], (1, 1, 32, 4))},
            "b": {"kernel": slope * jax.random.normal(keys[1], (1, 1, 32, 4))},
        }
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        counts.append([int((params[name]["kernel"] == 0).all((0, 1, 3)).sum()) for name in "ab"])
    assert sum(counts[-1]) == 44 and counts[-1] == counts[75] and max(counts[-1]) <= 24


@pytest.mark.parametrize("metric", ["adaptive", "fisher"])
def test_group_l0_can_zero_all_groups_but_the_strongest(metric):
    """With one group kept, the other two are zeroed for a target of 0.7; the weights of the middle one matter most."""
    target = control.Target(0.7, 60, ramp=0.5, freeze=0.75)
    tx = transform.proximal_adam(1e-4, target=target, penalty=GroupL0(weights="none"), metric=metric, fixed_norm=False)
    params = {"kernel": jnp.array([0.5, 2.0, 1.0]).reshape(1, 1, 3, 1) * jnp.ones((1, 1, 3, 2))}
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(60):
        grads = {"kernel": (1.0 - 2 * (step % 2)) * jnp.ones((1, 1, 3, 2))}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert list(np.asarray(params["kernel"] != 0).any((0, 1, 3))) == [False, True, False]


def test_a_start_that_is_far_too_large_does_not_zero_the_network():
    """Two layers, a penalty that starts late and without a warm-up, lambda 10000 times too large."""
    params = {"a": {"kernel": random_tree(0)["backbone"]["conv"]["kernel"]}, "bn": {"scale": jnp.ones(16)}}
    target = control.TargetSparsity(0.5, 100, initial=1e4, phases=Phases(start_step=5))
    tx = adam(1e-3, target, links=[HoldNorm()])
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(12):
        grads = {"a": {"kernel": random_tree(step)["backbone"]["conv"]["kernel"]}, "bn": {"scale": jnp.zeros(16)}}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert (params["a"]["kernel"] != 0).any((0, 1, 3)).all(), step


def test_a_targets_schedule_counts_from_the_first_penalized_step():
    target = control.Target(0.8, 10, phases=Phases(start_step=4))
    tx = transform.proximal_adam(1e-3, 1e-9, target=target)
    for steps, penalized in ((4, 0), (5, 1), (7, 3)):
        _, state = run(tx, random_tree(0), steps)
        assert float(state.control.gap) == pytest.approx(float(target.scheduled(penalized))), steps
        if not penalized:
            assert float(state.control.log_lambda) == pytest.approx(np.log(1e-9)), "lambda waits for the penalty"


BAD_ARGUMENTS = {
    "lambda": (lambda: transform.proximal_adam(1e-3, -1.0), "lambda_ must be a number >= 0, got -1"),
    "metric": (lambda: transform.proximal_adam(1e-3, 1.0, metric="euclid"), "metric 'euclid'.*adaptive.*plain"),
    "fisher metric": (
        lambda: transform.proximal_adam(1e-3, 1.0, metric="fisher"),
        "metric 'fisher' needs penalty 'group_l0'",
    ),
    "metric of groups": (
        lambda: transform.proximal_adam(1e-3, 1.0, penalty=GroupMCP(gamma=3.0), metric="group"),
        "metric 'group' needs the group lasso",
    ),
    "penalty": (
        lambda: transform.proximal_adam(1e-3, 1.0, penalty="ridge"),
        "'ridge'.*group_lasso, group_mcp, group_l0, l1",
    ),
    "group weights": (lambda: GroupLasso(weights="size"), "'size'.*sqrt_size, none"),
    "norm": (lambda: HoldNorm(norm="final"), "norm 'final'.*initial, rms, unpenalized"),
    "scope": (lambda: L1("neck"), "scope 'neck'.*backbone, all"),
    "regrowth": (lambda: adam(1e-3, 1.0, regrowth="never"), "regrowth 'never'.*annealed, free"),
    "no gamma": (lambda: penalties.make("group_mcp"), "group_mcp needs gamma > 0, got None"),
    "small gamma": (
        lambda: transform.proximal_adam(1e-3, 1.0, penalty=GroupMCP(gamma=1e-4), metric="plain"),
        "gamma=0.0001 is too small",
    ),
    "start": (lambda: phased(1.0, start_step=-1), "start_step must be >= 0, got -1"),
    "freeze": (lambda: FreezeZeros(-1), "from_step must be >= 0, got -1"),
    "target of negative lambda": (
        lambda: transform.proximal_adam(1e-3, -1.0, target=control.Target(0.5, 9)),
        "> 0 to start from, got -1.0",
    ),
    "two targets": (
        lambda: transform.proximal_adam(1e-3, control.Target(0.5, 9), target=control.Target(0.5, 9)),
        "lambda_ must be the number",
    ),
    "negative lambda before debiasing": (lambda: transform.proximal_adam(1e-3, -1.0, debias_step=9), ">= 0, got -1"),
    "negative array": (lambda: transform.proximal_adam(1e-3, jnp.float32(-1)), ">= 0, got -1"),
    "lambda that is not a number": (lambda: phased(float("nan")), ">= 0, got nan"),
    "two fixed norms": (lambda: adam(1e-3, 1.0, links=[HoldNorm("a"), HoldNorm("b")]), "one HoldNorm"),
    "gradient of l1": (
        lambda: reference.like_reference(optax.adam(1.0), penalty_in_gradient=L1()),
        "must be a GroupLasso, got L1",
    ),
    "target with a schedule": (
        lambda: transform.proximal_adam(1e-3, lambda step: 1.0, target=control.Target(0.5, 9)),
        "lambda_ must be the number",
    ),
    "restart": (lambda: reference.like_reference(optax.adam(1.0), restart_every=0), "restart_every must be >= 1"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_named(case):
    make, message = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_tree_without_conv_kernels_is_refused():
    with pytest.raises(ValueError, match="no conv kernel"):
        transform.proximal_adam(1e-3, 1e-4).init({"bias": jnp.zeros(3)})
