"""What optax asks of the optimizers in optax.contrib, asked of `proximal` around other optimizers."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from mtl_sparse.sparsity import (
    AdamMetric,
    FreezeZeros,
    GroupL0,
    GroupMCP,
    HoldNorm,
    TargetSparsity,
    freeze_zeros,
    hold_norm,
    metrics,
    prox,
    proximal,
    proximal_adam,
)

SCHEDULE = optax.cosine_decay_schedule(1e-2, 100)
INNER = {
    "sgd": (optax.sgd, None),
    "momentum": (functools.partial(optax.sgd, momentum=0.9), None),
    "adamw": (optax.adamw, AdamMetric()),
    "nadam": (optax.nadam, AdamMetric()),
    "lion": (optax.lion, None),
    "rmsprop": (optax.rmsprop, None),
    "muon": (contrib.muon, None),
    "schedule_free": (contrib.schedule_free_adamw, None),
}


def around(name, learning_rate=1e-2, lambda_=1e-4, **settings):
    make, metric = INNER[name]
    return proximal(make(learning_rate), learning_rate, lambda_=lambda_, metric=metric, **settings)


def tree(seed, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "conv": {"kernel": jax.random.normal(keys[0], (3, 3, 8, 16), dtype)},
        "bn": {"scale": jax.random.normal(keys[1], (16,), dtype)},
        "dense": {"kernel": jax.random.normal(keys[2], (16, 4), dtype)},
    }


def run(tx, params, steps=4):
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(tree(100 + step, params["bn"]["scale"].dtype), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", INNER)
def test_without_penalty_it_is_the_inner_optimizer_bit_for_bit(name):
    ours, _ = run(around(name, lambda_=0.0), tree(0))
    theirs, _ = run(INNER[name][0](1e-2), tree(0))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    # A schedule that is zero takes the proximal step, which changes nothing but how XLA fuses and rounds.
    zero, _ = run(around(name, lambda_=lambda count: 0.0), tree(0))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), zero, theirs)


@pytest.mark.parametrize("name", INNER)
def test_pruned_groups_are_exactly_zero_and_the_rest_trains(name):
    params, state = run(around(name, lambda_=1e4), tree(0))
    assert (params["conv"]["kernel"] == 0).all() and float(state.lambda_) == 1e4
    plain, _ = run(INNER[name][0](1e-2), tree(0))
    for leaf in ("bn", "dense"):
        jax.tree.map(np.testing.assert_array_equal, params[leaf], plain[leaf])


def kernel_of(values):
    """Parameters with the values as a convolution's kernel of one output."""
    return {"conv": {"kernel": jnp.reshape(values, (1, 1, -1, 1))}}


# Initial values, solution, loss: the targets of optax's own tests.
TARGETS = {
    "parabola": ([-1.0, 10.0, 1.0], [1.0, -1.0, 1.0], lambda w: jnp.sum((w - jnp.array([1.0, -1.0, 1.0])) ** 2)),
    "rosenbrock": ([0.0, 0.0], [1.0, 1.0], lambda w: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2),
    "matrix parabola": (
        np.zeros((2, 2)),
        [[3.0, -2.0], [1.0, 4.0]],
        lambda w: jnp.sum((w.reshape(2, 2) - jnp.array([[3.0, -2.0], [1.0, 4.0]])) ** 2),
    ),
    "mixed scales": (
        np.zeros(6),
        [1.0, -1.0, 10.0, -10.0, 0.5, 2.0],
        lambda w: jnp.sum(jnp.array([1.0, 10.0, 0.1, 0.1, 5.0, 1.0]) * (w - jnp.array([1, -1, 10, -10, 0.5, 2])) ** 2),
    ),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_converges(name, target):
    start, solution, loss = TARGETS[target]
    rate = optax.cosine_decay_schedule(1e-3 if (name, target) == ("momentum", "rosenbrock") else 2e-2, 6000)
    tx = around(name, rate, 1e-6)
    params = kernel_of(np.asarray(start, np.float32))
    state = optax.tree.map_params(tx, lambda v: v, tx.init(params))  # changes nothing

    @jax.jit
    def train(params, state):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: loss(p["conv"]["kernel"].ravel()))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=6000)[0][0]

    found = train(params, state)["conv"]["kernel"].ravel()
    np.testing.assert_allclose(found, np.ravel(solution), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("name", INNER)
def test_extra_arguments_are_accepted_and_passed_on(name):
    params = tree(0)
    tx = around(name)
    tx.update(tree(1), tx.init(params), params, something=1.0)
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = proximal(inner, 1.0, lambda_=0.5)
    tx.update(tree(1), tx.init(params), params, value=3.0)
    assert seen["value"] == 3.0 and float(seen["proximal_lambda"]) == 0.5 and int(seen["proximal_step"]) == 0


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("lambda_", [1e-3, TargetSparsity(0.5, 10)])
def test_the_second_update_does_not_compile_again(name, lambda_):
    params = tree(0)
    tx = around(name, SCHEDULE, lambda_, projections=[FreezeZeros(3), HoldNorm()])
    traced = 0

    @jax.jit
    def step(params, state):
        nonlocal traced
        traced += 1
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert traced == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "options", [{"metric": "group"}, {"penalty": GroupL0(weights="none")}], ids=["mean metric", "group l0"]
)
def test_dtypes_are_kept_in_other_forms(dtype, options):
    params = tree(0, dtype)
    tx = proximal_adam(SCHEDULE, TargetSparsity(0.5, 10), fixed_norm=False, **options)
    new, state = run(tx, params, steps=10)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(dtype)}
    before = [leaf.dtype for leaf in jax.tree.leaves(tx.init(params))]
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == before
    zero = int((new["conv"]["kernel"] == 0).all((0, 1, 3)).sum())
    assert "metric" in options or zero == new["conv"]["kernel"].shape[2] // 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", ["sgd", "adamw", "lion"])
def test_dtypes_are_kept(name, dtype):
    params = tree(0, dtype)
    tx = around(name, SCHEDULE, TargetSparsity(0.5, 10), projections=[HoldNorm()])
    new, state = run(tx, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype(dtype)}
    before = [leaf.dtype for leaf in jax.tree.leaves(tx.init(params))]
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == before


@pytest.mark.parametrize("metric", ["adaptive", "group", "plain"])
def test_hyperparameters_can_be_injected(metric):
    """Numbers become arrays in the state: learning rate, lambda and Adam's own."""
    params = tree(0)
    arguments = {"learning_rate": 1e-2, "lambda_": 0.3, "weight_decay": 0.1, "metric": metric}
    injected = optax.inject_hyperparams(proximal_adam)(**arguments)
    ours, state = run(injected, params)
    theirs, plain_state = run(proximal_adam(**arguments), params)
    assert {"learning_rate", "lambda_", "b1", "b2", "eps", "weight_decay"} <= state.hyperparams.keys()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, theirs)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), state.inner_state, plain_state)
    raised = state._replace(hyperparams={**state.hyperparams, "lambda_": jnp.float32(1e4)})
    updates, _ = injected.update(tree(1), raised, ours)
    assert (optax.apply_updates(ours, updates)["conv"]["kernel"] == 0).all(), "and be changed there"


def test_the_parameters_in_its_state_can_be_mapped():
    """So that shardings can be given to a state: moments are like parameters, norms and numbers are not."""
    params = tree(0)
    tx = proximal_adam(1e-2, 0.3, target=TargetSparsity(0.5, 10))
    state = tx.init(params)
    mapped = optax.tree.map_params(
        tx, lambda leaf: f"param {leaf.shape}", state, transform_non_params=lambda leaf: f"other {leaf.shape}"
    )
    moments = mapped.inner[0].mu
    assert moments == jax.tree.map(lambda leaf: f"param {leaf.shape}", params)
    assert mapped.norms == "other (1,)" and mapped.lambda_ == mapped.control.log_lambda == "other ()"


def test_gradients_can_be_accumulated():
    """Two half batches are one step on their mean."""
    params = tree(0)
    tx = proximal_adam(1e-2, 0.3)
    steps = optax.MultiSteps(tx, 2)
    state, new = steps.init(params), params
    for seed in (1, 2, 3, 4):
        updates, state = jax.jit(steps.update)(tree(seed), state, new)
        new = optax.apply_updates(new, updates)
    expected, plain = params, tx.init(params)
    for one, other in ((1, 2), (3, 4)):
        mean = jax.tree.map(lambda a, b: (a + b) / 2, tree(one), tree(other))
        updates, plain = tx.update(mean, plain, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), new, expected)


SHARDED = """
import jax, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mtl_sparse.sparsity import TargetSparsity, proximal_adam
from tests.sparsity.optax_test import run, tree
mesh = Mesh(np.array(jax.devices()), ("model",))
assert len(jax.devices()) == 4
spread = NamedSharding(mesh, PartitionSpec(None, None, None, "model"))
whole = tree(0)
params = {**whole, "conv": {"kernel": jax.device_put(whole["conv"]["kernel"], spread)}}
tx = proximal_adam(1e-2, 0.3, target=TargetSparsity(0.5, 10))
(new, state), (expected, _) = run(tx, params), run(tx, whole)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), new, expected)
assert new["conv"]["kernel"].sharding.is_equivalent_to(spread, 4), new["conv"]["kernel"].sharding
assert state.inner[0].mu["conv"]["kernel"].sharding.is_equivalent_to(spread, 4)
"""


def test_sharded_parameters_stay_sharded(monkeypatch):
    """Over four devices, by output channels, so that groups are spread; in a separate process."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_around_sgd_it_is_proximal_gradient_descent():
    """ISTA: x <- prox(x - rate * grad) in the Euclidean metric."""
    params, grads = tree(0), tree(1)
    tx = proximal(optax.sgd(0.1), 0.1, lambda_=2.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)["conv"]["kernel"]
    z = params["conv"]["kernel"] - 0.1 * grads["conv"]["kernel"]
    np.testing.assert_allclose(new, prox.group_lasso(z, 0.1 * 2.0 * (9 * 16) ** 0.5), rtol=1e-5, atol=1e-6)


def test_the_metric_can_be_a_function_of_the_inner_state():
    params, grads = tree(0), tree(1)
    inner = optax.rmsprop(0.1, decay=0.5, eps=1e-8)
    metric = metrics.from_state(lambda state: jax.tree.map(lambda v: jnp.sqrt(v) + 1e-8, state[0].nu))
    tx = proximal(inner, 0.1, lambda_=0.5, metric=metric)
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)["conv"]["kernel"]
    plain, state = inner.update(grads, inner.init(params), params)
    z = params["conv"]["kernel"] + plain["conv"]["kernel"]
    d = jnp.sqrt(state[0].nu["conv"]["kernel"]) + 1e-8
    np.testing.assert_allclose(new, prox.group_lasso(z, 0.1 * 0.5 * 12, d), rtol=1e-4, atol=1e-6)


def test_adams_metric_needs_adams_state_of_all_kernels():
    params = tree(0)
    tx = proximal(optax.sgd(0.1), 0.1, lambda_=0.5, metric=AdamMetric())
    with pytest.raises(ValueError, match="one optax.ScaleByAdamState.*found 0"):
        tx.init(params)
    parts = optax.multi_transform(
        {"adam": optax.adam(0.1), "sgd": optax.sgd(0.1)}, {"conv": "sgd", "bn": "adam", "dense": "adam"}
    )
    with pytest.raises(ValueError, match="no entry for the penalized kernels conv/kernel"):
        proximal(parts, 0.1, lambda_=0.5, metric=AdamMetric()).init(params)


@pytest.mark.parametrize(
    ("inner", "first"),
    [
        (optax.apply_if_finite(optax.adamw(1e-2), 5), jnp.nan),
        (optax.MultiSteps(optax.adamw(1e-2), 2).gradient_transformation(), 1.0),
    ],
    ids=["apply_if_finite", "MultiSteps"],
)
def test_steps_that_a_wrapper_inside_skips_keep_the_parameters_finite(inner, first):
    """Before Adam's first step its moments say nothing of the metric. `first` scales the first gradient."""
    params = tree(0)
    tx = proximal(inner, 1e-2, lambda_=1e-2, metric=AdamMetric())
    state = tx.init(params)
    for scale, seed in ((first, 1), (1.0, 2), (1.0, 3)):
        grads = jax.tree.map(functools.partial(jnp.multiply, scale), tree(seed))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params)), seed
        assert (params["conv"]["kernel"] != 0).all(), seed


@pytest.mark.parametrize("zero", [0, np.float32(0), jnp.float32(0)], ids=["int", "numpy", "jax"])
def test_zero_of_any_type_is_no_penalty(zero):
    ours, _ = run(proximal_adam(1e-2, zero, debias_step=2), tree(0))
    theirs, _ = run(optax.adamw(1e-2, weight_decay=0.0), tree(0))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_target_can_be_given_as_lambda():
    ours, state = run(proximal_adam(1e-2, TargetSparsity(0.5, 10, initial=1e-3), debias_step=3), tree(0))
    theirs, _ = run(proximal_adam(1e-2, target=TargetSparsity(0.5, 10, initial=1e-3), debias_step=3), tree(0))
    other, _ = run(proximal_adam(1e-2, 1e-3, target=TargetSparsity(0.5, 10), debias_step=3), tree(0))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, other)
    assert state.control != ()


def test_an_optimizer_that_gets_no_parameters_does_nothing():
    params = tree(0)
    target = proximal_adam(1e-2, 1e-3, target=TargetSparsity(0.5, 10))
    tx = optax.multi_transform({"sparse": target, "dense": optax.sgd(0.1)}, jax.tree.map(lambda _: "dense", params))
    updates, _ = tx.update(params, tx.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -0.1 * b, rtol=1e-6), updates, params)


def test_a_learning_rate_of_zero_changes_nothing():
    params = tree(0)
    for penalty in ("group_lasso", "l1", GroupMCP(gamma=5.0)):
        tx = proximal(optax.adamw(0.0), 0.0, lambda_=0.5, penalty=penalty, metric=AdamMetric())
        updates, _ = tx.update(tree(1), tx.init(params), params)
        jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), updates)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_target_is_reached_around_any_optimizer(name):
    """Linear regression on 40 groups; half of them do not matter."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 40)), jnp.float32)
    y = x @ np.concatenate([rng.normal(size=(20, 3)), 0.02 * rng.normal(size=(20, 3))])
    steps = 800
    rate = optax.cosine_decay_schedule(0.05, steps)
    tx = around(name, rate, TargetSparsity(0.5, steps))
    params = {"w": jnp.asarray(0.1 * rng.normal(size=(1, 1, 40, 3)), jnp.float32)}

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: 0.5 * jnp.mean((x @ p["w"][0, 0] - y) ** 2))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0][0]

    zero = np.asarray((train(params)["w"][0, 0] == 0).all(1))
    assert zero.mean() == pytest.approx(0.5, abs=0.05) and zero[20:].mean() > 0.9


@pytest.mark.parametrize("norm", ["initial", "rms"])
def test_links_of_a_chain_do_what_projections_do(norm):
    """`hold_norm` and `freeze_zeros` after `proximal`, up to rounding; frozen zeros are exact in both."""
    params = tree(0)
    params["conv"]["kernel"] = params["conv"]["kernel"].at[:, :, 2:5].set(0)
    inner = proximal(optax.adamw(1e-2), 1e-2, lambda_=0.3, metric=AdamMetric())
    chained, _ = run(optax.chain(inner, freeze_zeros(2), hold_norm(norm=norm)), params, 6)
    projected = proximal(
        optax.adamw(1e-2), 1e-2, lambda_=0.3, metric=AdamMetric(), projections=[FreezeZeros(2), HoldNorm(norm=norm)]
    )
    expected, _ = run(projected, params, 6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), chained, expected)
    zero = np.asarray((chained["conv"]["kernel"] == 0).all((0, 1, 3)))
    np.testing.assert_array_equal(zero, (expected["conv"]["kernel"] == 0).all((0, 1, 3)))
    grown = np.sqrt((chained["conv"]["kernel"] != 0).mean() / (params["conv"]["kernel"] != 0).mean())
    assert abs(grown - 1) > 0.05
    np.testing.assert_allclose(
        jnp.linalg.norm(chained["conv"]["kernel"]) / jnp.linalg.norm(params["conv"]["kernel"]),
        grown if norm == "rms" else 1,
        rtol=1e-5,
    )


def test_a_link_of_a_chain_cannot_hold_the_unpenalized_norm():
    with pytest.raises(ValueError, match="projections"):
        hold_norm(norm="unpenalized")
