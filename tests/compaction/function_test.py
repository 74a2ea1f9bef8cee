"""`compaction.compact` on models of several libraries, its parts, and what it refuses."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export, lax
from jax.extend import core

from mtl_sparse import compaction, proximal_adam
from mtl_sparse.compaction import multitask as multitask_compaction
from mtl_sparse.compaction.liveness import Costs
from mtl_sparse.models import atrous, costs
from tests.compaction import multitask_test
from tests.conftest import raises

RNG = np.random.default_rng(0)


def images(batch=2, side=8, channels=3, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, side, side, channels)).astype(np.float32)


def pruned(params, axis=-2, fraction=0.6, seed=0):
    """Return the parameters with random values, and zero input channels in all kernels but the first."""
    rng, first = np.random.default_rng(seed), True

    def leaf(x):
        nonlocal first
        if x.ndim < 2:
            return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
        x = rng.normal(size=x.shape) / np.sqrt(max(1, x[..., 0].size))
        if not first:
            zero = np.moveaxis(x, axis, 0)
            zero[rng.random(len(zero)) < fraction] = 0
        first = False
        return jnp.asarray(x, jnp.float32)

    return jax.tree.map(leaf, params)


def size(tree):
    return sum(np.size(x) for x in jax.tree.leaves(tree))


def assert_equal(fn, params, small_fn, small, *inputs):
    expected, got = jax.jit(fn)(params, *inputs), jax.jit(small_fn)(small, *inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=2e-6 * (1e-30 + np.abs(a).max())), expected, got)


class Net(nn.Module):
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        for features in (12, 16):
            x = nn.Conv(features, (3, 3), dtype=self.dtype)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x))
            x = nn.Dropout(0.3, deterministic=not train)(x)
        x = x + nn.silu(nn.Conv(16, (1, 1), dtype=self.dtype)(x))
        return nn.Dense(3, dtype=self.dtype)(x.mean((1, 2)))


def linen():
    variables = pruned(Net().init(jax.random.key(0), images()))
    return Net().apply, variables


def test_linen():
    fn, variables = linen()
    small_fn, small = compaction.compact(fn, variables, images())
    assert_equal(fn, variables, small_fn, small, images(5, seed=1))
    assert size(small) < 0.5 * size(variables)


def test_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Conv(3, 12, (3, 3), rngs=rngs), nnx.Conv(12, 8, (3, 3), rngs=rngs)
            self.norm, self.out = nnx.BatchNorm(12, use_running_average=True, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.second(nnx.relu(self.norm(self.first(x))))).mean((1, 2)))

    graphdef, state = nnx.split(Model(nnx.Rngs(0)))
    state = pruned(state)

    def fn(state, x):
        return nnx.merge(graphdef, state)(x)

    small_fn, small = compaction.compact(fn, state, images())
    assert_equal(fn, state, small_fn, small, images(5, seed=1))
    assert size(small) < 0.6 * size(state)


def test_equinox():
    keys = jax.random.split(jax.random.key(0), 3)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 12, 3, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(12, 8, 3, key=keys[1]),
            eqx.nn.Lambda(jax.nn.gelu),
            eqx.nn.Lambda(lambda x: x.mean((1, 2))),
            eqx.nn.Linear(8, 2, key=keys[2]),
        ]
    )
    params, static = eqx.partition(model, eqx.is_array)
    params = pruned(params, axis=1)

    def fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x.transpose(0, 3, 1, 2))

    small_fn, small = compaction.compact(fn, params, images())
    assert_equal(fn, params, small_fn, small, images(5, seed=1))
    assert size(small) < 0.6 * size(params)


def test_haiku():
    def forward(x):
        x = jax.nn.relu(hk.GroupNorm(4)(hk.Conv2D(12, 3)(x)))
        x = jax.nn.relu(hk.Conv2D(8, 3)(x))
        return hk.Linear(2)(x.mean((1, 2)))

    model = hk.without_apply_rng(hk.transform(forward))
    params = pruned(model.init(jax.random.key(0), images()))
    small_fn, small = compaction.compact(model.apply, params, images())
    assert_equal(model.apply, params, small_fn, small, images(5, seed=1))
    assert small["conv2_d"]["w"].shape[3] in (3, 6, 9), "a group norm needs all channels of the groups that are read"
    assert small["conv2_d_1"]["w"].shape[2] < 12


def test_keras():
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Conv2D(12, 3),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.DepthwiseConv2D(3),
            layers.Conv2D(8, 1, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2),
        ]
    )
    trainable = [v.value for v in model.trainable_variables]
    params = {"trainable": pruned(trainable), "state": [v.value for v in model.non_trainable_variables]}
    params["trainable"][4] = jnp.asarray(RNG.normal(size=(3, 3, 12, 1)), jnp.float32)  # the depthwise kernel

    def fn(params, x):
        return model.stateless_call(params["trainable"], params["state"], x, training=False)[0]

    small_fn, small = compaction.compact(fn, params, images())
    assert_equal(fn, params, small_fn, small, images(5, seed=1))
    assert small["trainable"][4].shape[2] == small["trainable"][0].shape[3] < 12


def test_the_plan_is_json_and_tables():
    fn, variables = linen()
    plan = compaction.plan(fn, variables, images())
    again = compaction.Plan.from_json(plan.to_json())
    assert jax.tree.map(np.shape, compaction.apply_plan(again, variables)) == jax.tree.map(
        np.shape, compaction.apply_plan(plan, variables)
    )
    assert_equal(fn, variables, compaction.rewrite(fn, again), compaction.apply_plan(again, variables), images())
    assert "params/Conv_1/kernel | 12 |" in plan.table()
    before, after = plan.parameters
    assert (before, after) == (size(variables), size(compaction.apply_plan(plan, variables)))


def test_constants_go_through_json():
    params = {
        "a": RNG.normal(size=(3, 4)),
        "bias": RNG.normal(size=4),
        "b": RNG.normal(size=(4, 2)),
        "c": np.ones((3, 2)),
    }
    params["a"][:, 1:3] = 0

    def fn(p, x):
        return (x @ p["a"] + p["bias"]) @ p["b"] + x @ p["c"]

    x = RNG.normal(size=(5, 3)).astype(np.float32)
    plan = compaction.Plan.from_json(compaction.plan(fn, params, x).to_json())
    small = compaction.apply_plan(plan, params)
    assert small["a"].shape == (3, 2) and small["b"].shape == (3, 2), "two inputs and one that reads a constant 1"
    assert_equal(fn, params, compaction.rewrite(fn, plan), small, x)
    momentum = compaction.apply_plan(plan, {"mu": params})
    np.testing.assert_array_equal(momentum["mu"]["b"][-1], 0)


def test_a_barrier_is_named_with_what_it_keeps():
    params = {"a": RNG.normal(size=(3, 6)), "b": RNG.normal(size=(6, 2)) * (np.arange(6) % 2)[:, None]}

    def fn(p, x):
        return lax.associative_scan(jnp.add, lax.cumsum(x @ p["a"], axis=1), axis=1) @ p["b"]

    def sorted_fn(p, x):
        return jnp.sort(x @ p["a"]) @ p["b"]

    x = RNG.normal(size=(5, 3)).astype(np.float32)
    for function in (fn, sorted_fn):
        small_fn, small = compaction.compact(function, params, x)
        assert small["a"].shape == (3, 6)
        assert_equal(function, params, small_fn, small, x)
    assert "| 6 | 3 | 6 | 6 |" in compaction.plan(sorted_fn, params, x).table()


def triple_p():
    """Return a primitive that triples its operand, and has no rule."""
    primitive = core.Primitive("triple")
    primitive.def_impl(lambda x: 3 * x)
    primitive.def_abstract_eval(lambda x: x)
    return primitive


def test_a_registered_rule_is_used(monkeypatch):
    from mtl_sparse.compaction import primitives

    monkeypatch.setattr(primitives, "RULES", dict(primitives.RULES))
    primitive = triple_p()
    params = {"a": RNG.normal(size=(3, 6)), "b": RNG.normal(size=(6, 2)) * (np.arange(6) % 2)[:, None]}

    def fn(p, x):
        return primitive.bind(x @ p["a"]) @ p["b"]

    x = RNG.normal(size=(5, 3)).astype(np.float32)
    plan = compaction.plan(fn, params, x)
    assert plan.barriers == ("triple",) and "triple" in plan.table()
    assert plan.leaves["a"].small == (3, 6)

    def links(node, graph):
        return [compaction.Link(0, axis, 0, axis) for axis in range(len(graph.shape(node.inputs[0])))]

    compaction.register_rule("triple", links)
    small_fn, small = compaction.compact(fn, params, x)
    assert small["a"].shape == (3, 3)
    np.testing.assert_allclose(small_fn(small, x), fn(params, x), rtol=1e-5)
    with raises("RULE_EXISTS", naming="dot_general"):
        compaction.register_rule("dot_general", links)


def test_a_reshape_that_transposes():
    params = {"a": RNG.normal(size=(3, 6)), "b": RNG.normal(size=(6, 4, 2)) * (np.arange(6) % 2)[:, None, None]}

    def fn(p, x):
        return lax.reshape((x @ p["a"])[:, :, None] * jnp.ones(4), (len(x) * 4, 6), (0, 2, 1)) @ p["b"].reshape(6, 8)

    x = RNG.normal(size=(5, 3)).astype(np.float32)
    small_fn, small = compaction.compact(fn, params, x)
    assert small["a"].shape == (3, 3)
    assert_equal(fn, params, small_fn, small, x)


def test_scan_is_unrolled_where_it_is_asked():
    kernels = RNG.normal(size=(3, 6, 6)) * (np.arange(6) % 2)[:, None]
    params = {
        "in": RNG.normal(size=(3, 6)),
        "layers": kernels,
        "out": RNG.normal(size=(6, 2)) * (np.arange(6) % 2)[:, None],
    }

    def fn(p, x):
        return lax.scan(lambda y, kernel: (jnp.tanh(y @ kernel), None), x @ p["in"], p["layers"])[0] @ p["out"]

    x = RNG.normal(size=(5, 3)).astype(np.float32)
    whole, whole_params = compaction.compact(fn, params, x)
    assert_equal(fn, params, whole, whole_params, x)
    assert whole_params["layers"].shape == (3, 6, 6)
    small_fn, small = compaction.compact(fn, params, x, unroll=True)
    assert_equal(fn, params, small_fn, small, x)
    assert small["layers"].shape == (3, 3, 3)


@pytest.mark.slow
def test_a_compact_model_trains_on_as_the_dense_one_does():
    """Train mode by the same plan: BatchNorm statistics, dropout, optimizer state and gradients."""
    fn, variables = linen()
    plan = compaction.plan(fn, variables, images())
    small = compaction.apply_plan(plan, variables)
    tx = proximal_adam(1e-3)

    def train(variables, x, key):
        return Net().apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])

    small_train = compaction.rewrite(train, plan)

    def step(apply, variables, state, x, key):
        def loss(params):
            out, new = apply({**variables, "params": params}, x, key)
            return jnp.square(out).sum(), new

        (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, state = tx.update(gradients, state, variables["params"])
        return value, {"params": optax.apply_updates(variables["params"], updates), **new}, state, gradients

    state, key = tx.init(variables["params"]), jax.random.key(7)
    value, after, state, gradients = step(train, variables, state, images(4), key)
    small_value, small_after, small_state, small_gradients = step(
        small_train, small, tx.init(small["params"]), images(4), key
    )
    np.testing.assert_allclose(small_value, value, rtol=1e-5)
    assert jax.tree.map(np.shape, small_after) == jax.tree.map(np.shape, small)
    expected = compaction.apply_plan(plan, {"params": gradients, "batch_stats": after["batch_stats"]}, constants=False)
    for name, got in (("params", small_gradients), ("batch_stats", small_after["batch_stats"])):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4), expected[name], got)
    cut = compaction.apply_plan(compaction.Plan({k.removeprefix("params/"): v for k, v in plan.leaves.items()}), state)
    assert jax.tree.map(np.shape, cut) == jax.tree.map(np.shape, small_state)


def test_derivatives_of_the_dense_function_stay():
    """A straight-through gradient, and relu's at zero."""
    sign = jax.custom_vjp(jnp.sign)
    sign.defvjp(lambda x: (jnp.sign(x), None), lambda _, g: (3 * g,))
    params = {"a": RNG.normal(size=(3, 6)), "b": RNG.normal(size=(6, 2)) * (np.arange(6) % 2)[:, None]}

    def fn(p, x):
        return (sign(x @ p["a"]) + jax.nn.relu(x @ p["a"])) @ p["b"]

    x = RNG.normal(size=(5, 3)).astype(np.float32)
    x[0] = 0  # relu's operand is zero there
    plan = compaction.plan(fn, params, x)
    small_fn, small = compaction.rewrite(fn, plan), compaction.apply_plan(plan, params)
    assert small["a"].shape == (3, 3)

    def gradient(f, p):
        return jax.grad(lambda p, x: jnp.sum(f(p, x) ** 2), (0, 1))(p, x)

    (expected, expected_x), (got, got_x) = gradient(fn, params), gradient(small_fn, small)
    np.testing.assert_allclose(got_x, expected_x, rtol=1e-4, atol=1e-5)
    cut = compaction.apply_plan(plan, expected, constants=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5), cut, got)
    tangents = jax.jvp(lambda x: jax.nn.relu(x @ params["a"]) @ params["b"], (x,), (np.ones_like(x),))

    def relu(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    small_relu, relu_params = compaction.compact(relu, params, x)
    np.testing.assert_allclose(
        jax.jvp(lambda x: small_relu(relu_params, x), (x,), (np.ones_like(x),))[1], tangents[1], rtol=1e-4, atol=1e-5
    )


def test_transformations_and_export():
    fn, variables = linen()
    small_fn, small = compaction.compact(fn, variables, images())
    stacked = np.stack([images(2, seed=i) for i in range(3)])
    expected = jax.vmap(lambda x: fn(variables, x))(stacked)
    np.testing.assert_allclose(jax.vmap(lambda x: small_fn(small, x))(stacked), expected, atol=1e-5)
    exported = export.deserialize(export.export(jax.jit(small_fn))(small, images()).serialize())
    np.testing.assert_allclose(exported.call(small, images()), fn(variables, images()), atol=1e-5)


def test_dtypes_stay():
    model = Net(dtype=jnp.bfloat16)
    _, variables = linen()
    small_fn, small = compaction.compact(model.apply, variables, images())
    assert small_fn(small, images()).dtype == model.apply(variables, images()).dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(small))


def test_larger_inputs_that_need_more_are_refused_unless_they_were_given():
    """An atrous convolution at a rate above the map's side reads its middle tap only."""
    model, variables = multitask_test.with_zeros(10, 0, 0.5)
    fn, x, larger = model.apply, images(1, 48), images(1, 128)
    small_fn, small = compaction.compact(fn, variables, x)
    assert_equal(fn, variables, small_fn, small, images(2, 48, seed=1))
    with raises("PLAN_SIZE", naming="aspp"):
        small_fn(small, larger)
    both, both_params = compaction.compact(fn, variables, x, also=[(larger,)])
    assert size(both_params) > size(small)
    for inputs in (x, larger):
        assert_equal(fn, variables, both, both_params, inputs)


@pytest.mark.parametrize("depth", [18, pytest.param(50, marks=pytest.mark.slow)])
def test_the_engine_agrees_with_the_compaction_of_our_own_models(depth):
    """Two independent implementations: equal counts of parameters, equal outputs."""
    model, variables = multitask_test.with_zeros(depth, 3, 0.6)
    height, width = multitask_test.SIZE
    exact = Costs(mac=1.0, copy=0.0, split=0.0)  # each layer gathers the inputs that it needs, and no other
    small_model, small_variables = multitask_compaction.compact(model, variables, costs=exact)
    x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    large = jax.ShapeDtypeStruct((1, 320, 320, 3), np.float32)  # each tap of the atrous convolutions meets pixels

    def plain(variables, x):
        with atrous.plain_convolutions():
            return model.apply(variables, x)

    small_fn, small = compaction.compact(plain, variables, x, also=[(large,)], costs=exact)
    assert costs.parameter_count(small) == costs.parameter_count(small_variables)
    expected, got = jax.jit(small_model.apply)(small_variables, x), jax.jit(small_fn)(small, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max()), expected, got)


def test_widths_are_multiples_where_it_is_asked():
    fn, variables = linen()
    small_fn, small = compaction.compact(fn, variables, images(), multiple=4)
    assert_equal(fn, variables, small_fn, small, images())
    assert small["params"]["Conv_0"]["kernel"].shape[3] % 4 == 0
    assert size(small) >= size(compaction.compact(fn, variables, images())[1])


def test_an_output_that_became_constant_is_named():
    params = {"a": RNG.normal(size=(3, 2)), "b": np.zeros((3, 2)), "bias": np.ones(2)}

    def fn(p, x):
        return {"alive": x @ p["a"], "dead": x @ p["b"] + p["bias"]}

    x = RNG.normal(size=(5, 3)).astype(np.float32)
    plan = compaction.plan(fn, params, x)
    assert plan.constant == ("dead",) and "dead" in plan.table().splitlines()[-1]
    assert_equal(fn, params, compaction.rewrite(fn, plan), compaction.apply_plan(plan, params), x)


def test_bad_input():
    params, x = {"a": np.ones((3, 4), np.float32), "b": np.ones((4, 2), np.float32)}, np.ones((5, 3), np.float32)

    def fn(p, x):
        return x @ p["a"] @ p["b"]

    def impure(p, x):
        jax.debug.print("{}", x.sum())
        return fn(p, x)

    with raises("FUNCTION_IMPURE", naming="debug"):
        compaction.compact(impure, params, x)
    with raises("FUNCTION_DEAD", naming="every output"):
        compaction.compact(fn, {**params, "b": np.zeros((4, 2))}, x)
    with raises("OUTPUT_CONSTANT", naming="depend on none"):
        compaction.compact(lambda p, x: p["a"] @ p["b"], params, x)
    with raises("PARAMS_ABSTRACT", naming="abstract"):
        compaction.compact(fn, jax.eval_shape(lambda: params), x)
    with raises("PARAMS_ABSTRACT", naming="traced"):
        jax.jit(lambda p: compaction.compact(fn, p, x)[1])(params)
    with raises("OPTION_OUT_OF_RANGE", naming="multiple=0"):
        compaction.compact(fn, params, x, multiple=0)
    plan = compaction.plan(fn, {**params, "b": np.ones((4, 2)) * (np.arange(4) % 2)[:, None]}, x)
    with raises("PLAN_DIFFERS", naming="a of shape"):
        compaction.rewrite(fn, plan)(params, x)
    with raises("PLAN_DIFFERS", naming="c of shape absent"):
        compaction.rewrite(fn, plan)({**compaction.apply_plan(plan, params), "c": x}, x)
    with raises("PLAN_DIFFERS", naming="a of shape"):
        compaction.apply_plan(plan, {**params, "a": np.ones((3, 5))})
    with raises("PLAN_DIFFERS", naming="other"):
        compaction.apply_plan(plan, {"other": x})
    with raises("PLAN_DIFFERS", naming="needs removed channels"):
        compaction.rewrite(lambda p, x: jnp.sort(x @ p["a"]), plan)(compaction.apply_plan(plan, params), x)
    with raises("PLAN_UNREADABLE", naming="format"):
        compaction.Plan.from_json('{"format": 9}')
