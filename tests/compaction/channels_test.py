"""Groups and costs that are found in a function's equations: which weights they are, and what compaction leaves."""

import functools
import math
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import nnx
from jax import lax

from mtl_sparse import compaction
from mtl_sparse.compaction import channels as channels_lib
from mtl_sparse.compaction import cost as cost_lib
from mtl_sparse.compaction import groups as groups_lib
from mtl_sparse.compaction.liveness import Costs
from mtl_sparse.sparsity.groups import ConvGroups, CoupledGroups, by_path, check_fit, path_name
from tests.conftest import raises

EXACT = Costs(mac=1.0, copy=0.0, split=0.0)  # each layer gathers the channels that it needs, and no other
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
Norm = functools.partial(nn.BatchNorm, use_running_average=True)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="first")(x))
        x = nn.relu(nn.Conv(6, (1, 1), name="second")(x))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(Norm()(nn.Conv(8, (3, 3), name="stem")(x)))
        for block in ("one", "two"):
            y = nn.relu(Norm()(nn.Conv(6, (3, 3), use_bias=False, name=f"{block}_a")(x)))
            x = nn.relu(x + Norm()(nn.Conv(8, (3, 3), use_bias=False, name=f"{block}_b")(y)))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class MobileNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(Norm()(nn.Conv(8, (3, 3), name="stem")(x)))
        for block, features in (("one", 12), ("two", 16)):
            x = nn.Conv(x.shape[-1], (3, 3), feature_group_count=x.shape[-1], name=f"{block}_depthwise")(x)
            x = nn.relu(nn.Conv(features, (1, 1), name=f"{block}_pointwise")(nn.relu(Norm()(x))))
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class ResNeXt(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), name="stem")(x))
        y = nn.relu(nn.Conv(12, (1, 1), name="before")(x))
        y = nn.relu(nn.Conv(6, (3, 3), feature_group_count=3, name="grouped")(y))
        return nn.Dense(5, name="head")((x + nn.Conv(16, (1, 1), name="after")(y)).mean((1, 2)))


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), name="stem")(x)
        for name in ("one", "two"):
            x = jnp.concatenate([x, nn.Conv(4, (3, 3), name=name)(nn.relu(Norm()(x)))], -1)
        return nn.Dense(5, name="head")(nn.avg_pool(x, (2, 2), (2, 2)).mean((1, 2)))


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        skip = nn.relu(nn.Conv(6, (3, 3), name="first")(x))
        x = nn.relu(nn.Conv(8, (3, 3), name="below")(nn.max_pool(skip, (2, 2), (2, 2))))
        x = nn.ConvTranspose(5, (2, 2), (2, 2), name="up")(x)
        x = nn.relu(nn.Conv(8, (3, 3), name="last")(jnp.concatenate([skip, x], -1)))
        return nn.Conv(2, (1, 1), name="head")(x)


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (2, 2), (2, 2), name="stem")(x).reshape(x.shape[0], -1, 12)
        x = x + self.param("position", nn.initializers.normal(), x.shape[1:])
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(3, name="attention")(y, y)
        x = x + nn.Dense(12, name="down")(nn.gelu(nn.Dense(20, name="up")(nn.LayerNorm()(x))))
        return nn.Dense(5, name="head")(x.mean(1))


NETS = (ResNet, MobileNet, ResNeXt, DenseNet, UNet, ViT)


@functools.cache
def network(cls):
    """Return (function, random parameters, their channels)."""
    model = cls()
    rng = np.random.default_rng(0)

    def value(x):
        return jnp.asarray(rng.uniform(0.5, 1.5, x.shape) if x.ndim < 2 else rng.normal(size=x.shape), jnp.float32)

    params = jax.tree.map(value, jax.eval_shape(model.init, jax.random.key(0), IMAGES))
    return model.apply, params, channels_lib.of(model.apply, params, IMAGES)


def named(sets):
    """Return sets of groups by name, without what the names have in common."""
    return {one.name.removeprefix("params/").removesuffix("/kernel"): one for one in sets}


def found(fn, params, *inputs, **options):
    return named(groups_lib.from_function(fn, params, *inputs, **options))


def of_network(cls, **options):
    return named(groups_lib.of(network(cls)[2], **options))


def numbers(one, shape):
    """Return the group of each entry of a set's only kernel."""
    (out,) = one.spread(jnp.arange(one.count), [jnp.zeros(shape)])
    return np.broadcast_to(out, shape)


def with_zeros(params, sets, chosen):
    """Return the parameters with zero groups: set -> mask of its groups."""
    leaves = dict(by_path(params))
    for one in sets:
        x = [leaves[path] for path in one.paths]
        for path, zero in zip(one.paths, one.spread(jnp.asarray(chosen(one)), x), strict=True):
            leaves[path] = jnp.where(zero, 0, leaves[path])
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], params)


def at_random(fraction, seed):
    """Return a function of a set that chooses groups, but never all."""
    rng = np.random.default_rng(seed)

    def chosen(one):
        zero = rng.random(one.count) < fraction
        zero[rng.integers(one.count)] = False
        return zero

    return chosen


def size(tree):
    return sum(np.size(x) for x in jax.tree.leaves(tree))


def normal(*shape):
    return np.random.default_rng(math.prod(shape)).normal(size=shape).astype(np.float32)


# ---------------------------------------------------------------------------------------------- input channels


def test_convolutions_and_a_head_after_pooling():
    assert of_network(Plain) == {
        "first": ConvGroups("params/first/kernel", 2, 3, 3 * 3 * 4),
        "second": ConvGroups("params/second/kernel", 2, 4, 6),
        "head": ConvGroups("params/head/kernel", 0, 6, 5),
    }


def test_depthwise_kernels_have_their_channels_on_the_last_axis():
    sets = of_network(MobileNet)
    assert sets["one_depthwise"] == ConvGroups("params/one_depthwise/kernel", 3, 8, 9)
    assert sets["one_pointwise"] == ConvGroups("params/one_pointwise/kernel", 2, 8, 12)


def test_a_grouped_kernel_has_a_slice_for_each_input_channel():
    """Kernel [3, 3, 4, 6] in 3 groups: input 4 g + i is read by entries [:, :, i, 2 g : 2 g + 2]."""
    one = of_network(ResNeXt)["grouped"]
    assert isinstance(one, CoupledGroups) and one.count == 12
    np.testing.assert_array_equal(one.sizes, 3 * 3 * 2)
    group_of = numbers(one, (3, 3, 4, 6))
    for channel in range(12):
        g, i = divmod(channel, 4)
        expected = np.zeros((3, 3, 4, 6), bool)
        expected[:, :, i, 2 * g : 2 * g + 2] = True
        np.testing.assert_array_equal(group_of == group_of[0, 0, i, 2 * g], expected)


def test_rows_of_a_channel_are_one_group_after_flattening():
    """A dense kernel [2 * 2 * 3, 5] reads pixel after pixel, each with 3 channels."""
    params = {"conv": normal(3, 3, 3, 3), "dense": normal(12, 5)}

    def fn(p, x):
        y = lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y.reshape(len(y), -1) @ p["dense"]

    one = found(fn, params, IMAGES[:, :2, :2])["dense"]
    assert one.count == 3
    np.testing.assert_array_equal(one.sizes, 4 * 5)
    np.testing.assert_array_equal(numbers(one, (12, 5)), np.tile(np.arange(3), 4)[:, None].repeat(5, 1))


def test_heads_are_the_groups_of_an_attentions_output():
    linen = of_network(ViT)
    assert linen["attention/out"] == ConvGroups("params/attention/out/kernel", 0, 3, 4 * 12)
    assert linen["attention/query"] == ConvGroups("params/attention/query/kernel", 0, 12, 12)
    graphdef, state = nnx.split(nnx.MultiHeadAttention(2, 12, decode=False, rngs=nnx.Rngs(0)))
    sets = found(lambda state, x: nnx.merge(graphdef, state)(x), state, normal(2, 5, 12))
    assert sets["out"] == ConvGroups("out/kernel", 0, 2, 6 * 12)
    assert sets["value"] == ConvGroups("value/kernel", 0, 12, 12)
    check_fit(tuple(sets.values()), state)


def test_rows_of_a_head_are_one_group_where_heads_are_merged():
    """And of a kernel that is stored as (out, in), the columns."""
    params = {name: normal(4, 2, 3) for name in ("q", "k", "v")} | {"out": normal(5, 6)}

    def fn(p, x):
        q, k, v = (jnp.einsum("bnc,chd->bnhd", x, p[name]) for name in "qkv")
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k)), v)
        return y.reshape(*y.shape[:2], 6) @ p["out"].T

    one = found(fn, params, normal(2, 7, 4))["out"]
    assert one.count == 2
    np.testing.assert_array_equal(numbers(one, (5, 6)), np.repeat(np.arange(2), 3)[None].repeat(5, 0))


def test_kernels_of_other_libraries():
    """Equinox has [O, I, H, W], Haiku and Keras [H, W, I, O]; Keras has depthwise kernels [H, W, C, 1]."""
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 4, 3, key=jax.random.key(0)),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(4, 6, 1, key=jax.random.key(1)),
        ]
    )
    params, static = eqx.partition(model, eqx.is_array)
    sets = groups_lib.from_function(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, normal(2, 3, 8, 8))
    assert [(one.axis, one.count, one.size) for one in sets] == [(1, 3, 36), (1, 4, 6)]
    forward = hk.without_apply_rng(hk.transform(lambda x: hk.Conv2D(6, 1)(jax.nn.relu(hk.Conv2D(4, 3)(x)))))
    sets = groups_lib.from_function(forward.apply, forward.init(jax.random.key(0), IMAGES), IMAGES)
    assert [(one.axis, one.count, one.size) for one in sets] == [(2, 3, 36), (2, 4, 6)]
    layers = keras.layers
    keras_model = keras.Sequential(
        [layers.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.DepthwiseConv2D(3, depth_multiplier=2)]
    )

    def fn(params, x):
        return keras_model.stateless_call(params, [], x)[0]

    _, depthwise = groups_lib.from_function(fn, [v.value for v in keras_model.trainable_variables], IMAGES)
    assert (depthwise.axis, depthwise.count, depthwise.size) == (2, 4, 3 * 3 * 2)


def test_a_kernel_that_is_used_twice_has_its_groups_once():
    params = {"in": normal(3, 4), "shared": normal(4, 4), "out": normal(4, 2)}

    def fn(p, x):
        x = x @ p["in"]
        for _ in range(2):
            x = jnp.tanh(x @ p["shared"])
        return x @ p["out"]

    x = normal(5, 3)
    sets = found(fn, params, x)
    assert sets["shared"] == ConvGroups("shared", 0, 4, 4)
    np.testing.assert_array_equal(sets["shared"].costs, 2 * 5 * 4 + (5 * 3 + 2 * 5 * 4) / 2)  # made by two, read by two
    (_, shared) = groups_lib.from_function(fn, params, x, coupled=True)
    assert shared.paths == ("shared", "out") and shared.count == 4, "its inputs and its outputs are the same channels"


def test_shuffled_channels_keep_their_weights_together():
    """After a shuffle of 2 groups of 3, input i is channel 3 (i % 2) + i // 2."""
    params = {"a": normal(3, 6), "b": normal(6, 2), "c": normal(6, 2)}

    def fn(p, x):
        y = x @ p["a"]
        shuffled = y.reshape(-1, 2, 3).transpose(0, 2, 1).reshape(-1, 6)
        return shuffled @ p["b"] + y @ p["c"]

    _, one = groups_lib.from_function(fn, params, normal(5, 3), coupled=True)
    assert one.paths == ("b", "c") and one.count == 6
    b, c = (x.reshape(-1) for x in one.numbers)
    np.testing.assert_array_equal(b, np.arange(6), "the first reader's channels are in order")
    np.testing.assert_array_equal(b, c[[0, 3, 1, 4, 2, 5]])


# ---------------------------------------------------------------------------------------------- coupled groups


def test_concatenated_channels_are_groups_of_their_readers():
    """Skip connections: the first reader has the first channels, later ones those and the new ones."""
    one = of_network(DenseNet, coupled=True)["one"]
    assert one.paths == ("params/one/kernel", "params/two/kernel", "params/head/kernel")
    assert [x.size for x in one.numbers] == [6, 10, 14] and one.count == 14
    for x in one.numbers:
        np.testing.assert_array_equal(x.reshape(-1), np.arange(x.size))
    np.testing.assert_array_equal(one.sizes, [36 + 36 + 5] * 6 + [36 + 5] * 4 + [5] * 4)
    skip = of_network(UNet, coupled=True)["below"]
    assert skip.paths == ("params/below/kernel", "params/last/kernel")
    np.testing.assert_array_equal(skip.sizes, [9 * 8 * 2] * 6 + [9 * 8] * 5)
    assert of_network(UNet)["last"].count == 11


def test_a_residual_streams_readers_are_one_set():
    sets = of_network(ResNet, coupled=True)
    assert sets["one_a"].paths == ("params/one_a/kernel", "params/two_a/kernel", "params/head/kernel")
    assert sets["one_a"].count == 8
    np.testing.assert_array_equal(sets["one_a"].sizes, 9 * 6 + 9 * 6 + 5)
    assert list(sets) == ["stem", "one_a", "one_b", "two_b"]
    only = of_network(ResNet, coupled=True, kernels=".*/one_a/kernel")
    assert list(only) == ["one_a", "one_b"], "what the kernel reads, and what it makes"
    assert only["one_a"].paths == sets["one_a"].paths, "with all its readers"


def compact_shapes(sets, chosen):
    fn, params, _ = network(ResNet)
    _, small = compaction.compact(fn, with_zeros(params, sets, chosen), IMAGES, costs=EXACT)
    return {path.removeprefix("params/").removesuffix("/kernel"): x.shape for path, x in by_path(small).items()}


def test_a_zero_coupled_group_removes_a_channel_everywhere():
    shapes = compact_shapes([of_network(ResNet, coupled=True)["one_a"]], lambda one: np.arange(8) == 3)
    assert shapes["one_a"] == shapes["two_a"] == (3, 3, 7, 6) and shapes["head"] == (7, 5)
    assert shapes["stem"] == (3, 3, 3, 7) and shapes["one_b"] == shapes["two_b"] == (3, 3, 6, 7)


def test_a_channel_stays_where_another_layer_reads_it():
    shapes = compact_shapes([of_network(ResNet)["one_a"]], lambda one: np.arange(8) == 3)
    assert shapes["one_a"] == (3, 3, 7, 6)
    assert shapes["stem"] == (3, 3, 3, 8) and shapes["one_b"] == (3, 3, 6, 8) and shapes["head"] == (8, 5)


# ---------------------------------------------------------------------------------------------- sizes and costs


@pytest.mark.parametrize("cls", NETS)
@pytest.mark.parametrize("coupled", [False, True], ids=["input", "coupled"])
def test_groups_partition_the_kernels(cls, coupled):
    _, params, channels = network(cls)
    leaves, sets = by_path(params), groups_lib.of(channels, coupled=coupled)
    paths = [path for one in sets for path in one.paths]
    kernels = [path for path, leaf in leaves.items() if path.endswith("kernel")]
    assert sorted(paths) == sorted(kernels) == sorted(kernel.path for kernel in channels.kernels)
    for one in sets:
        x = [leaves[path] for path in one.paths]
        parts = one.spread(jnp.arange(one.count), x)
        counts = sum(
            np.bincount(np.broadcast_to(part, leaf.shape).reshape(-1), minlength=one.count)
            for part, leaf in zip(parts, x, strict=True)
        )
        assert len(counts) == one.count and counts.min() > 0
        np.testing.assert_array_equal(counts, np.broadcast_to(one.sizes, one.count))
        assert counts.sum() == size(x)
        ones = [jnp.ones(leaf.shape) for leaf in x]
        np.testing.assert_array_equal(one.totals(ones)[0], counts)
        assert len(one.costs) == one.count and one.costs.min() > 0


@pytest.mark.parametrize("coupled", [False, True], ids=["input", "coupled"])
def test_costs_are_what_is_read_and_what_is_made(coupled):
    """Of 2 images of 8x8: what reads a channel, and the filters that make it."""
    macs = {"first": 2 * 64 * 9 * 3 * 4, "second": 2 * 64 * 4 * 6, "head": 2 * 6 * 5}
    cost = cost_lib.Cost(network(Plain)[2])
    assert cost.macs == sum(macs.values())
    assert cost.parameters == size(network(Plain)[1])
    sets = of_network(Plain, coupled=coupled)
    np.testing.assert_array_equal(sets["first"].costs, macs["first"] / 3)
    np.testing.assert_array_equal(sets["second"].costs, (macs["second"] + macs["first"]) / 4)
    np.testing.assert_allclose(sets["head"].costs, (macs["head"] + macs["second"]) / 6)
    total = sum(one.costs.sum() for one in sets.values())
    assert total == pytest.approx(2 * cost.macs - macs["head"]), "nothing reads what the head makes"


def test_filters_of_channels_that_a_normalization_mixes_cost_nothing():
    """They stay whatever the readers' groups are."""
    np.testing.assert_array_equal(of_network(ViT)["attention/query"].costs, 2 * 16 * 12)


@pytest.mark.parametrize("cls", [MobileNet, ResNeXt, DenseNet, UNet])
def test_costs_add_up(cls):
    """Reading is all MACs; making is all of kernels whose outputs some kernel reads, except depthwise ones."""
    channels = network(cls)[2]
    cost = cost_lib.Cost(channels)
    total = cost.macs + sum(
        kernel.macs * kernel.size
        for kernel in channels.kernels
        if "head" not in kernel.path and "depthwise" not in kernel.path
    )
    for coupled in (False, True):
        assert sum(one.costs.sum() for one in groups_lib.of(channels, coupled=coupled)) == pytest.approx(total)


# ---------------------------------------------------------------------------------------------- what is left


def left(channels, params):
    return {name: float(value) for name, value in cost_lib.Cost(channels).left(params).items()}


def really_left(fn, params, *inputs):
    """Return what compaction leaves as (MACs, parameters of the function, parameters of the tree)."""
    small_fn, small = compaction.compact(fn, params, *inputs, costs=EXACT)
    before, after = cost_lib.from_function(fn, params, *inputs), cost_lib.from_function(small_fn, small, *inputs)
    assert before.parameters == size(params)
    return after.macs / before.macs, after.parameters / before.parameters, size(small) / size(params)


@pytest.mark.parametrize("cls", NETS)
@pytest.mark.parametrize("coupled", [False, True], ids=["input", "coupled"])
def test_what_is_left_is_what_compaction_leaves(cls, coupled):
    fn, params, channels = network(cls)
    sets = groups_lib.of(channels, coupled=coupled)
    if cls is MobileNet and not coupled:  # of depthwise kernels, see below
        sets = tuple(one for one in sets if "depthwise" not in one.name)
    sparse = with_zeros(params, sets, at_random(0.45, seed=7))
    expected = really_left(fn, sparse, IMAGES)
    assert 0 < expected[0] < 0.8
    found = left(channels, sparse)
    np.testing.assert_allclose([found["macs"], found["parameters"], found["parameters"]], expected, atol=1e-3)


def test_of_the_dense_function_all_is_left():
    for cls in NETS:
        _, params, channels = network(cls)
        assert left(channels, params) == pytest.approx({"macs": 1, "parameters": 1}, abs=1e-6)


def test_zero_channels_of_depthwise_kernels():
    """Their constant outputs need one more input of the pointwise kernel, which the cost leaves out."""
    fn, params, channels = network(MobileNet)
    sets = groups_lib.of(channels, kernels=".*depthwise.*")
    sparse = with_zeros(params, sets, lambda one: np.arange(one.count) % 3 == 0)
    macs, parameters, _ = really_left(fn, sparse, IMAGES)
    found = left(channels, sparse)
    assert found["macs"] == pytest.approx(macs, abs=1e-3) and macs < 0.7
    rows = 12 - 4 + 16  # of both pointwise kernels; the second depthwise kernel reads 8 of the first one's 12 outputs
    assert (parameters - found["parameters"]) * size(params) == pytest.approx(rows, abs=0.01)


def test_what_is_left_in_jit_is_the_same():
    _, params, channels = network(ResNet)
    sparse = with_zeros(params, groups_lib.of(channels), at_random(0.5, seed=3))
    jitted = jax.jit(cost_lib.Cost(channels).left)(sparse)
    assert {name: float(value) for name, value in jitted.items()} == pytest.approx(left(channels, sparse))


def test_a_function_without_effect_has_nothing_left():
    _, params, channels = network(Plain)
    sparse = with_zeros(params, groups_lib.of(channels, kernels=".*second.*"), lambda one: np.ones(one.count, bool))
    assert left(channels, sparse)["macs"] == 0


def test_each_point_of_a_stream_has_its_own_readers():
    """Two branches are one channel set: what is read of one of them is not read of the other."""
    params = {"a": normal(3, 6), "b": normal(3, 6), "bias": normal(6), "of_a": normal(6, 2), "both": normal(6, 2)}
    params["of_a"][:2] = params["both"][4:] = 0

    def fn(p, x):
        a, b = x @ p["a"], jnp.tanh(x @ p["b"] + p["bias"])
        return jnp.concatenate([a @ p["of_a"], (a + b) @ p["both"]], -1)

    x = normal(5, 3)
    (macs, parameters, _), found = really_left(fn, params, x), left(channels_lib.of(fn, params, x), params)
    assert found == pytest.approx({"macs": macs, "parameters": parameters}, abs=1e-6)
    assert macs == (3 * 6 + 3 * 4 + 4 * 2 * 2) / (3 * 6 * 2 + 6 * 2 * 2)


def test_activations_that_are_multiplied_with_themselves_are_needed_whole():
    """Of y @ y, a channel that no kernel reads as a column is a row."""
    params = {"a": normal(3, 5), "b": normal(5, 2)}
    params["b"][:2] = 0

    def fn(p, x):
        y = x @ p["a"]
        return y @ y @ p["b"]

    x = normal(5, 3)
    found = left(channels_lib.of(fn, params, x), params)
    assert found["parameters"] == pytest.approx((15 + 6) / 25)
    assert size(compaction.compact(fn, params, x, costs=EXACT)[1]) == 15 + 6


def test_shared_kernels_and_products_of_parameters():
    """A kernel is kept for all its uses; weights that are computed from parameters are not followed, and stay."""
    params = {"in": normal(3, 6), "shared": normal(6, 6), "up": normal(6, 2), "down": normal(2, 4)}
    params["shared"][:2] = 0

    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["in"]) @ p["shared"]) @ p["shared"] @ (p["up"] @ p["down"])

    x = normal(5, 3)
    cost = cost_lib.from_function(fn, params, x)
    assert cost.macs == 5 * (3 * 6 + 6 * 6 + 6 * 6 + 6 * 4)
    assert cost.channels.other_macs == 5 * 6 * 4 and cost.parameters == size(params)
    found = {name: float(value) for name, value in cost.left(params).items()}
    macs, parameters, _ = really_left(fn, params, x)
    assert found == pytest.approx({"macs": macs, "parameters": parameters})


def test_taps_that_meet_padding_alone_are_not_left():
    """An atrous convolution at a rate above the image's side reads its middle tap."""
    params = {"kernel": normal(3, 3, 3, 4), "out": normal(4, 2)}

    def taps(p, x):
        y = sum(x @ p["kernel"][1, i] for i in range(2))
        return y.mean((1, 2)) @ p["out"]

    cost = cost_lib.from_function(taps, params, IMAGES)
    assert [kernel.path for kernel in cost.channels.kernels] == ["kernel", "out"]
    kernel = cost.channels.kernels[0]
    assert kernel.read == pytest.approx(2 / 9) and kernel.macs * kernel.size == 2 * 2 * 64 * 3 * 4
    assert float(cost.left(params)["parameters"]) == pytest.approx((2 * 12 + 8) / (9 * 12 + 8))


# ---------------------------------------------------------------------------------------------- bad input


def test_bad_input():
    with raises("NO_KERNELS", naming="convolution or a matrix product"):
        groups_lib.from_function(lambda p, x: x * p["scale"], {"scale": normal(3)}, normal(2, 3))
    with raises("NO_KERNELS", naming="first argument"):
        cost_lib.from_function(lambda p, x: x @ jnp.ones((3, 2)), {"scale": normal(3)}, normal(2, 3))
    channels = network(ResNet)[2]
    for coupled in (False, True):
        with raises("NO_SUCH_KERNEL", naming="params/one_a/kernel"):
            groups_lib.of(channels, coupled=coupled, kernels="params/one_aa/kernel")
    with raises("NO_SUCH_KERNEL", naming="of 6"):
        groups_lib.of(channels, kernels="one_a")
