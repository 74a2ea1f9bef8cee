"""Compaction of random networks: equal outputs and gradients, and nothing left that has no influence.

The networks are those of `networks.py`. Errors are relative to the signal, which is how much the outputs of two images
differ: of a deep network with random weights, the largest part of the outputs may not depend on the image at all.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from mtl_sparse import compaction
from mtl_sparse.compaction.liveness import Costs
from mtl_sparse.runtime.errors import UserError
from tests.compaction import networks
from tests.compaction.networks import Network, Zeros, layer
from tests.conftest import raises

ALWAYS_GATHER, NEVER_GATHER = Costs(mac=1, copy=0, split=0), Costs(mac=0, copy=1, split=1)


def fixed(examples):
    """Settings of a test that draws the same examples in each run, and whose failures hypothesis minimizes."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def function(network):
    return functools.partial(networks.apply, network)


def compact(network, dtype=np.float64):
    """Return (fn, params, small_fn, small_params)."""
    fn, params = function(network), networks.init(network, dtype)
    return fn, params, *compaction.compact(fn, params, networks.images(2, dtype), costs=ALWAYS_GATHER)


def plan_unless_dead(fn, params, images, **options):
    """Return the plan; None if the function is rejected because its outputs do not depend on the images."""
    try:
        return compaction.plan(fn, params, images, **options)
    except UserError as error:
        assert error.code == "FUNCTION_DEAD", error
    outputs = jax.jit(fn)(params, networks.images(2))
    for leaf, signal in zip(jax.tree.leaves(outputs), jax.tree.leaves(signal_of(outputs)), strict=True):
        assert np.abs(signal).max() <= 1e-12 * np.abs(leaf).max()
    return None


def kept_entries(plan, params):
    """Return a tree like the compact parameters, of the entries' numbers in the dense ones from 1 on; 0 if in none."""
    numbers = jax.tree.map(lambda leaf: np.arange(1.0, np.size(leaf) + 1).reshape(np.shape(leaf)), params)
    return compaction.apply_plan(plan, numbers, constants=False)


def size(params):
    return sum(np.size(leaf) for leaf in jax.tree.leaves(params))


def shapes(params):
    """Return the shapes of the leaves, and one and the same for all that are empty."""
    return [np.shape(leaf) if np.size(leaf) else (0,) for leaf in jax.tree.leaves(params)]


def assert_close(actual, expected, signal=None, tolerance=1e-10):
    """Compare trees: structure, shapes, types, and values relative to the signal (default: the largest value)."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    signals = jax.tree.leaves(expected if signal is None else signal)
    for new, old, signal in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), signals, strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        new, old = np.asarray(new, np.float64), np.asarray(old, np.float64)
        assert np.isfinite(old).all()
        if old.size:
            allowed = tolerance * np.abs(np.asarray(signal, np.float64)).max() + 1e-3 * tolerance * np.abs(old).max()
            allowed += 1e-3 * tolerance  # rounding of values of about 1, where all that is left of them is rounding
            np.testing.assert_allclose(new, old, rtol=0, atol=allowed)


def signal_of(outputs):
    """Return how much the outputs of the first and the last image differ."""
    return jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64) - np.asarray(leaf[-1], np.float64), outputs)


def assert_equal_outputs(fn, params, small_fn, small_params, dtype=np.float64, tolerance=1e-10, batches=(2, 3)):
    for batch in batches:
        images = networks.images(batch, dtype, seed=batch)
        expected = jax.jit(fn)(params, images)
        assert_close(jax.jit(small_fn)(small_params, images), expected, signal_of(expected), tolerance)


# ---------------------------------------------------------------------------------------------- random networks


OPTIONS = st.fixed_dictionaries(
    {"costs": st.sampled_from([ALWAYS_GATHER, Costs(), NEVER_GATHER])}, optional={"multiple": st.just(4)}
)


def check(network, options, twice=True):
    """Compare the outputs; with `twice`, also check that a second compaction finds nothing more to remove."""
    note(repr(network))
    fn, params = function(network), networks.init(network)
    if "batch_norm_training" in repr(network) or "loop=True" in repr(network):
        # A mean over the batch divides by its size, and a loop has its shape: such constants serve no other batch size.
        options = {**options, "fold": False}
    plan = plan_unless_dead(fn, params, networks.images(), **options)
    if plan is None:
        return
    small_fn, small_params = compaction.rewrite(fn, plan), compaction.apply_plan(plan, params)
    assert_equal_outputs(fn, params, small_fn, small_params)
    assert size(small_params) <= size(params)
    again = plan_unless_dead(small_fn, small_params, networks.images(), **options)
    if again is None:  # not every function that is zero as a whole is rejected at first
        return
    again_fn, again_params = compaction.rewrite(small_fn, again), compaction.apply_plan(again, small_params)
    assert size(again_params) <= size(small_params)
    if twice and options.get("multiple", 1) == 1 and network.zeros == Zeros(network.zeros.inputs):
        assert shapes(again_params) == shapes(small_params)
    assert_equal_outputs(small_fn, small_params, again_fn, again_params, batches=(2,))


@fixed(24)
@given(networks.networks(), OPTIONS)
def test_outputs_are_equal_and_compacting_again_changes_nothing(network, options):
    check(network, options)


@pytest.mark.slow
@fixed(1500)
@given(networks.networks(most=8), OPTIONS)
def test_outputs_of_many_networks_are_equal(network, options):
    check(network, options, twice=False)  # a second compaction may remove more, see docs/compaction.md


@fixed(15)
@given(networks.networks())
def test_the_plan_does_not_depend_on_the_batch(network):
    note(repr(network))
    fn, params = function(network), networks.init(network)
    plans = [plan_unless_dead(fn, params, networks.images(batch)) for batch in (1, 3)]
    if plans[0] is not None:
        jax.tree.map(np.testing.assert_array_equal, *(kept_entries(plan, params) for plan in plans))


def gradients(fn, params, images, cotangents):
    return jax.vjp(fn, params, images)[1](cotangents)  # not jitted: XLA rounds twice, and max's gradient compares


def check_gradients(network, zeros=False):
    """Compare the gradients without folding; those of entries that are zero only if asked.

    Where a channel is always zero, what reads it was removed; the entries that make it zero, if they are kept because
    something else needs the zero, have lost this part of their gradient. With folding, so have the entries that make a
    channel constant, if one reader keeps it and another one has the constant folded in.
    """
    fn, params, images = function(network), networks.init(network), networks.images()
    plan = plan_unless_dead(fn, params, images, fold=False)
    if plan is None:
        return
    small_fn, small_params = compaction.rewrite(fn, plan), compaction.apply_plan(plan, params)
    rng = np.random.default_rng(0)
    cotangents = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), jax.eval_shape(fn, params, images))
    of_params, of_images = gradients(fn, params, images, cotangents)
    of_small_params, of_small_images = gradients(small_fn, small_params, images, cotangents)
    assert_close(of_small_images, of_images)
    expected = compaction.apply_plan(plan, jax.tree.map(np.asarray, of_params), constants=False)
    if not zeros:
        compared = jax.tree.map(lambda x, number: (x != 0) & (number > 0), small_params, kept_entries(plan, params))
        expected, of_small_params = (jax.tree.map(np.multiply, tree, compared) for tree in (expected, of_small_params))
    scale = max([1e-30, *(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(of_params) if leaf.size)])
    assert_close(of_small_params, expected, jax.tree.map(lambda leaf: scale, expected))


@fixed(10)
@given(networks.networks())
@pytest.mark.slow
def test_gradients_are_equal(network):
    note(repr(network))
    check_gradients(network)


@pytest.mark.slow
@fixed(500)
@given(networks.networks(most=8))
def test_gradients_of_many_networks_are_equal(network):
    note(repr(network))
    check_gradients(network)


# ---------------------------------------------------------------------------------------------- what is removed

CHAINS = st.builds(
    lambda blocks, zeros, seed: Network(
        tuple(one for block in blocks for one in block) + (layer("dense", features=2, bias=True),), zeros, seed
    ),
    st.lists(
        st.tuples(
            st.builds(
                lambda features, options: layer(features=features, **options),
                st.integers(4, 12),
                st.sampled_from(
                    [
                        {"kind": "conv"},
                        {"kind": "dense", "bias": True},
                        {"kind": "conv", "kernel": 1},
                        {"kind": "conv", "stride": 2},
                        {"kind": "conv", "dilation": 2, "bias": True},
                        {"kind": "conv", "padding": ((1, 0), (0, 2))},
                    ]
                ),
            ),
            st.just(layer("batch_norm")),
            st.sampled_from(["relu", "silu", "hard_swish"]).map(lambda name: layer("activation", name=name)),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([Zeros(0.4), Zeros(0.6), Zeros(0.0, pairs=0.5), Zeros(0.3, pairs=0.3, taps=0.4)]),
    st.integers(0, 1000),
)


def needed_parameters(params):
    """Count the parameters of a chain: backwards, each kernel keeps what the filters that are needed read."""
    total, needed = 0, None
    for name in sorted(params, key=lambda name: int(name.split("_")[0]), reverse=True):
        for vector in ("scale", "bias", "mean", "var"):
            if vector in params[name]:
                total += params[name][vector].size if needed is None else len(needed)
        if "kernel" in params[name]:
            kernel = params[name]["kernel"].reshape(-1, *params[name]["kernel"].shape[-2:])
            kernel = kernel if needed is None else kernel[..., needed]
            needed = np.flatnonzero((kernel != 0).any((0, 2)))
            total += kernel[:, needed].size
    return total


@fixed(15)
@given(CHAINS)
def test_chains_keep_exactly_the_parameters_that_are_needed(network):
    note(repr(network))
    fn, params, small_fn, small_params = compact(network)
    kernels = [leaf.reshape(-1, leaf.shape[-1]) for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    if all(kernel.any(0).all() for kernel in kernels):
        assert size(small_params) == needed_parameters(params)
    else:  # filters with constant outputs are removed, too
        assert size(small_params) < needed_parameters(params)
    assert_equal_outputs(fn, params, small_fn, small_params, batches=(2,))


_RELU, _NORM = layer("activation", name="relu"), layer("batch_norm")
# Each layer is put between two 1x1 convolutions, the second of which does not read some of its inputs.
BETWEEN = [
    layer("conv", features=8),
    layer("conv", features=8, groups=2, bias=True),
    layer("conv", features=9, groups=3, stride=2),
    layer("conv", features=8, stride=2, dilation=2, padding="VALID"),
    layer("conv", features=8, padding=((1, 0), (0, 2))),
    layer("depthwise"),
    layer("depthwise", multiplier=2, stride=2),
    layer("depthwise", multiplier=2, bias=True),
    layer("channels_first", features=8, bias=True),
    layer("conv_1d", features=8),
    layer("batch_grouped", features=8),
    layer("conv_transpose", features=8, bias=True),
    layer("conv_transpose", features=8, padding="VALID", transpose_kernel=True),
    layer("weight_standardized", features=8),
    layer("weight_standardized", features=8, each=True),
    layer("shared_conv"),
    layer("patches", features=8),
    layer("dense", features=8, bias=True),
    layer("dense_transposed", features=8, bias=True),
    layer("autoencoder", features=8),
    layer("low_rank", features=8),
    layer("low_rank", features=8, base=False),
    layer("masked", features=8),
    layer("bilinear", features=8),
    layer("dynamic_kernel", features=8),
    layer("dynamic_kernel", features=8, loop=True),
    layer("quantized", features=8),
    layer("barrier", features=8),
    layer("flatten_dense", features=8),
    layer("unflatten", features=8),
    layer("attention", features=8),
    layer("attention", features=8, fused=False, causal=True),
    layer("attention", features=8, fused=False, merged=False),
    layer("attention", features=8, fused=False, merged=False, zero_axis=1),
    layer("attention", features=8, merged=False, heads=3),
    layer("dot_product_attention", features=8),
    layer("batch_norm"),
    layer("batch_norm_training"),
    layer("layer_norm", bias=True),
    layer("rms_norm"),
    layer("group_norm", bias=True, groups=4),
    layer("unit_length"),
    layer("layer_scale"),
    layer("position"),
    *(layer("activation", name=name) for name in networks.ACTIVATIONS),
    layer("sign"),
    layer("prelu"),
    layer("channel_mask"),
    layer("channel_where"),
    layer("softmax"),
    layer("cumsum"),
    layer("sort"),
    layer("embedding"),
    layer("largest"),
    layer("ranks"),
    layer("one_hot"),
    layer("statistics"),
    layer("dropout"),
    layer("pixels_updated"),
    layer("best_pixel"),
    layer("running"),
    layer("fourier"),
    layer("pool", name="max"),
    layer("pool", name="max", window=3, stride=1, padding="SAME"),
    layer("pool", name="mean", window=3, padding="SAME"),
    layer("global_mean"),
    layer("global_max"),
    layer("resize", method="linear"),
    layer("resize", method="nearest"),
    layer("crop"),
    layer("mean_subtracted"),
    layer("mean_map"),
    layer("jitted", [layer("mean_map"), layer("conv", features=8)]),
    layer("jitted", [layer("mean_map"), layer("conv", features=8, padding="VALID")]),
    layer("jitted", [layer("mean_map"), layer("conv", features=8, kernel=1, stride=2)]),
    layer("jitted", [layer("mean_map"), layer("conv", features=8, kernel=1, padding=((1, 0), (0, 2)))]),
    layer("channel_slice"),
    layer("channel_slice", start=0, step=3),
    layer("dynamic_slice"),
    layer("take"),
    layer("channel_update"),
    layer("roll"),
    layer("reverse"),
    layer("channel_pad"),
    layer("channel_pad", pad=(-1, 2, 1)),
    layer("channel_pad", pad=(2, -3, 2)),
    layer("shuffle"),
    layer("shuffle", groups=3),
    layer("repeat"),
    layer("repeat", each=False),
    layer("maxout"),
    layer("space_to_depth"),
    layer("depth_to_space"),
    layer("constant_channels"),
    layer("concat", [layer("dense", features=4)], [layer("conv", features=3)]),
    layer("concat", [layer("dense", features=4)], dense=True),
    layer("residual", [layer("conv", features=12), layer("batch_norm")]),
    layer("residual", [layer("dense", features=15)]),
    layer("residual", [layer("conv", features=8)], project=True),
    layer("split", [layer("activation", name="relu")], [layer("depthwise"), layer("dense", features=5)], join="concat"),
    layer("split", [layer("activation", name="relu")], [layer("depthwise")], join="add"),
    layer("gate", [layer("dense", features=6)], [layer("dense", features=6)]),
    layer("gate", [layer("batch_norm")], [layer("layer_scale")], sigmoid=False),
    layer("glu"),
    layer("stack", [layer("depthwise")], [layer("batch_norm")], sum=True),
    layer("stack", [layer("depthwise")], [layer("batch_norm")], sum=False),
    layer("stack", [layer("depthwise")], [layer("dense", features=8)], sum=True),
    layer("upper_lower", [layer("depthwise")], [layer("dense", features=8)]),
    layer("overwritten", [layer("dense", features=12)], [_RELU]),
    layer("overwritten", [_RELU], [layer("dense", features=8)]),
    layer("squeeze_excite"),
    layer("checkpoint", [layer("dense", features=9), layer("batch_norm"), layer("activation", name="relu")]),
    layer("jitted", [layer("dense", features=9), layer("batch_norm"), layer("activation", name="relu")]),
    layer("scan"),
    layer("loop"),
    layer("cond", features=8),
]


# What these let pass depends on values, or they work on several channels at once: all that they read is kept.
NOT_LOOKED_INTO = {
    "scan",
    "loop",
    "cond",
    "fourier",
    "batch_grouped",
    "ranks",
    "largest",
    "channel_where",
    "channel_update",
    "dynamic_slice",
    "take",
}


def between(one, zeros):
    return Network((layer("conv", features=12, kernel=1), one, layer("conv", features=2, kernel=1)), zeros)


def with_influence(network, params):
    """Return the channels of the first layer whose change changes the outputs."""
    params = jax.tree.map(jnp.asarray, params)
    rng = np.random.default_rng(0)
    first = rng.normal(size=(2, *networks.SIZE, 12))
    changes = np.eye(12)[:, None, None, None] * rng.normal(size=first.shape)
    run = jax.jit(lambda first: networks.apply_from(1, network, params, first))
    expected = run(first)
    changed = [np.abs(run(first + change) - expected).max() for change in changes]
    return set(np.flatnonzero(np.asarray(changed) > 1e-13 * np.abs(expected).max()))


WEIGHTS = "conv channels_first conv_1d conv_transpose dense dense_transposed patches flatten_dense".split()


@pytest.mark.parametrize(
    ("one", "zeros"),
    [(one, Zeros(0.6)) for one in BETWEEN]
    + [(one, Zeros(0.3, pairs=0.5, taps=0.3)) for one in BETWEEN if one.kind in WEIGHTS and not one.get("groups", 0)],
    ids=repr,
)
def test_channels_are_kept_if_and_only_if_they_have_an_influence(one, zeros):
    network = between(one, zeros)
    fn, params = function(network), networks.init(network)
    params["0_conv"]["kernel"] = np.random.default_rng(0).normal(size=(1, 1, 3, 12))
    plan = compaction.plan(fn, params, networks.images(), costs=ALWAYS_GATHER)
    assert_equal_outputs(fn, params, compaction.rewrite(fn, plan), compaction.apply_plan(plan, params), batches=(3,))
    kept = set((kept_entries(plan, params)["0_conv"]["kernel"][0, 0, 0] - 1).astype(int) % 12)
    needed = with_influence(network, params)
    if one.kind in NOT_LOOKED_INTO or one == layer("depthwise", multiplier=2, bias=True):
        assert kept >= needed
    else:
        assert kept == needed


def test_the_grammar_has_a_layer_of_each_kind():
    assert {one.kind for one in BETWEEN} == set(networks.KINDS)


def test_random_networks_depend_on_their_input():
    """The grammar alone: without kernels that are zero as a whole, hardly any is constant, and all are finite."""
    constant = []

    @fixed(24)
    @given(networks.networks())
    def run(network):
        params = networks.init(network)
        outputs = jax.jit(function(network))(params, networks.images())
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outputs))
        signal = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(signal_of(outputs)))
        constant.append(signal < 1e-6 and not network.zeros.whole)

    run()
    assert np.mean(constant) < 0.2


# ---------------------------------------------------------------------------------------------- fixed networks

_STEM = (layer("conv", features=10), _NORM, _RELU)
_HEAD = (layer("global_mean"), layer("dense", features=3, bias=True))
EXAMPLES = {
    "residual": (
        *_STEM,
        layer("residual", [layer("conv", features=8), _NORM, _RELU, layer("conv", features=10), _NORM]),
        _RELU,
        layer(
            "residual", [layer("conv", features=8, stride=1), _NORM, _RELU, layer("conv", features=12)], project=True
        ),
        *_HEAD,
    ),
    "inverted bottleneck": (
        layer("dense", features=12),
        _NORM,
        layer("activation", name="hard_swish"),
        layer("depthwise", stride=2),
        layer("squeeze_excite"),
        layer("dense", features=6),
        layer("residual", [layer("dense", features=12), _RELU, layer("depthwise"), layer("dense", features=6)]),
        *_HEAD,
    ),
    "encoder and decoder": (
        *_STEM,
        layer("pool"),
        layer("conv", features=8),
        layer("group_norm"),
        layer("activation", name="silu"),
        layer("conv_transpose", features=6),
        layer("concat", [layer("conv", features=5)], dense=True),
        layer("conv", features=2),
    ),
    "transformer": (
        layer("dense", features=9),
        layer("position"),
        layer("residual", [layer("layer_norm"), layer("attention", features=9)]),
        layer("residual", [layer("layer_norm"), layer("dense", features=12), layer("activation", name="gelu")]),
        *_HEAD,
    ),
    "shuffle": (
        *_STEM,
        layer("split", [layer("conv", features=6, groups=2), _NORM], [_RELU], join="concat"),
        layer("shuffle"),
        layer("checkpoint", [layer("conv", features=8, kernel=1), _NORM, _RELU]),
        layer("flatten_dense", features=4),
    ),
}
by_name = pytest.mark.parametrize("name", EXAMPLES)


def example(name, **options):
    return Network(EXAMPLES[name], Zeros(0.6, **options), seed=3)


@by_name
def test_networks_are_smaller_and_equal_under_vmap(name):
    fn, params, small_fn, small_params = compact(example(name, filters=0.3))
    assert size(small_params) < 0.8 * size(params)
    images = networks.images(3)[:, None]
    mapped = [jax.jit(jax.vmap(one, (None, 0)))(tree, images) for one, tree in ((fn, params), (small_fn, small_params))]
    assert_close(mapped[1], mapped[0], signal_of(mapped[0]))


@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_gradients_are_equal_at_zeros_that_are_kept(name):
    check_gradients(example(name), zeros=True)


@by_name
def test_networks_can_be_exported(name):
    fn, params, small_fn, small_params = compact(example(name))
    images = networks.images(3)
    exported = jax.export.export(jax.jit(functools.partial(small_fn, small_params)))(images)
    loaded = jax.export.deserialize(exported.serialize())
    expected = fn(params, images)
    assert_close(loaded.call(images), expected, signal_of(expected))


@by_name
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
def test_types_are_kept(name, dtype):
    fn, params, small_fn, small_params = compact(example(name), dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(small_params)} == {np.dtype(dtype)}
    tolerance = 0.1 if dtype == jnp.bfloat16 else 1e-4
    assert_equal_outputs(fn, params, small_fn, small_params, dtype, tolerance, batches=(2,))


@pytest.mark.parametrize("dead", [("first",), ("second",), ("first", "projected"), ("second", "project"), ("scale",)])
def test_branches_that_are_zero_as_a_whole_are_removed(dead):
    network = example("residual")
    fn, params = function(network), networks.init(network)
    kernels = {
        "first": params["3_residual"]["branch0"]["0_conv"]["kernel"],
        "second": params["3_residual"]["branch0"]["3_conv"]["kernel"],
        "scale": params["3_residual"]["branch0"]["4_batch_norm"]["scale"],
        "projected": params["5_residual"]["branch0"]["3_conv"]["kernel"],
        "project": params["5_residual"]["project"],
    }
    for name in dead:
        kernels[name][:] = 0
    small_fn, small_params = compaction.compact(fn, params, networks.images(), costs=ALWAYS_GATHER)
    assert_equal_outputs(fn, params, small_fn, small_params)
    assert small_params["3_residual"]["branch0"]["0_conv"]["kernel"].size == 0
    if "projected" in dead:
        assert small_params["5_residual"]["branch0"]["0_conv"]["kernel"].size == 0
    assert (small_params["5_residual"]["project"].size == 0) == ("project" in dead)


def test_constants_are_folded_into_what_reads_them():
    """Zero filters have constant outputs, and so have layers that read only these; one row replaces them."""
    rng = np.random.default_rng(0)
    params = {
        "a": rng.normal(size=(5, 8)) * (np.arange(8) < 4),
        "a_bias": rng.normal(size=8),
        "b": rng.normal(size=(8, 6)) * ((np.arange(8) >= 4)[:, None] | (np.arange(6) < 3)),
        "b_bias": rng.normal(size=6) + 2,
        "c": rng.normal(size=(2, 6)),
    }
    x = rng.normal(size=(4, 5))

    def fn(params, x):
        x = jax.nn.silu(x @ params["a"] + params["a_bias"])
        x = jax.nn.silu(x @ params["b"] + params["b_bias"])
        return jnp.einsum("nc,fc->nf", x, params["c"])

    small_fn, small_params = compaction.compact(fn, params, x, costs=ALWAYS_GATHER)
    assert jax.tree.map(np.shape, small_params) == {
        "a": (5, 4),
        "a_bias": (4,),
        "b": (5, 3),
        "b_bias": (3,),
        "c": (2, 4),
    }
    assert_close(small_fn(small_params, x), fn(params, x))


def test_sums_do_not_need_zeros():
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(5, 8)) * (np.arange(8) % 2)}
    x = rng.normal(size=(4, 5))
    small_fn, small_params = compaction.compact(lambda params, x: (x @ params["a"]).sum(-1), params, x)
    assert small_params["a"].shape == (5, 4)
    assert_close(small_fn(small_params, x), (x @ params["a"]).sum(-1))


def test_functions_that_are_zero_as_a_whole_are_rejected():
    network = example("residual")
    params = networks.init(network)
    params["0_conv"]["kernel"][:] = 0
    with raises("FUNCTION_DEAD", naming="constant"):
        compaction.compact(function(network), params, networks.images())


def read_half(rng, inputs, filters):
    """Return a kernel of which every second input is zero."""
    return rng.normal(size=(inputs, filters)) * (np.arange(inputs) % 2)[:, None]


def vjp_of(fn, params, x, cotangent):
    return jax.vjp(fn, params, x)[1](cotangent)


@pytest.mark.parametrize(
    "how", ["custom_vjp", "custom_jvp", "custom_vjp with parameters", "under jit", "under checkpoint"]
)
def test_gradients_written_by_hand_are_kept(how):
    """The gradient is three times the true one, and the identity's where the function is a sign."""

    @jax.custom_vjp
    def by_vjp(x, factor):
        return jnp.sign(x) * factor

    by_vjp.defvjp(lambda x, factor: (by_vjp(x, factor), factor), lambda factor, g: (3 * g, jnp.ones_like(factor)))

    @jax.custom_jvp
    def by_jvp(x):
        return jnp.sign(x)

    by_jvp.defjvp(lambda primals, tangents: (by_jvp(*primals), 3 * tangents[0]))
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(5, 8)), "factor": rng.uniform(1, 2, 8), "b": read_half(rng, 8, 4)}

    def fn(params, x):
        x = x @ params["a"]
        if how == "custom_jvp":
            x = by_jvp(x) * params["factor"]
        elif how == "custom_vjp with parameters":
            x = by_vjp(x, params["factor"])
        elif how == "custom_vjp":
            x = by_vjp(x, 1.0) * params["factor"]
        else:
            wrapper = jax.jit if how == "under jit" else jax.checkpoint
            x = wrapper(lambda x: by_vjp(x, 1.0))(x) * params["factor"]
        return x @ params["b"]

    x, cotangent = rng.normal(size=(6, 5)), rng.normal(size=(6, 4))
    plan = compaction.plan(fn, params, x)
    small_fn, small_params = compaction.rewrite(fn, plan), compaction.apply_plan(plan, params)
    assert small_params["b"].shape == (4, 4)
    assert_close(small_fn(small_params, x), fn(params, x))
    expected, of_x = vjp_of(fn, params, x, cotangent)
    actual, of_small_x = vjp_of(small_fn, small_params, x, cotangent)
    assert np.abs(of_x).max() > 0
    assert_close(of_small_x, of_x)
    assert_close(actual, compaction.apply_plan(plan, jax.tree.map(np.asarray, expected), constants=False))


def test_the_derivative_of_relu_at_zero_is_kept():
    """That of jax.nn.relu is 0; of the maximum that it is made of, 1/2."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(5, 8)), "b": read_half(rng, 8, 4)}

    def fn(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    x = np.zeros((2, 5))
    small_fn, small_params = compaction.compact(fn, params, x)
    assert small_params["b"].shape == (4, 4)
    assert not np.any(jax.jacobian(fn, 1)(params, x))
    assert not np.any(jax.jacobian(small_fn, 1)(small_params, x))


def test_params_and_inputs_and_outputs_are_any_trees():
    """Tuples, lists, None, scalars, integers, unused leaves; several inputs, one of them of integers; names at will."""
    rng = np.random.default_rng(0)
    params = (
        {"kernel": rng.normal(size=(4, 6)), "unused": np.ones(3)},
        [read_half(rng, 6, 3), None, np.float64(0.5), np.asarray(2)],
        rng.normal(size=(7, 4)),
    )

    def fn(params, inputs, shift):
        first, (second, _, factor, power), table = params
        x = table[inputs["tokens"]] + inputs["x"]
        x = jax.nn.relu(x @ first["kernel"] + shift) ** power
        return {"y": [x @ second * factor, None], "tokens": inputs["tokens"]}, (shift,)

    inputs = {"tokens": np.asarray([[1, 2], [6, 0]]), "x": rng.normal(size=(2, 2, 4))}
    shift = rng.normal(size=6)
    small_fn, small_params = compaction.compact(fn, params, inputs, shift)
    assert size(small_params) < size(params)
    assert small_params[1][0].shape == (3, 3)
    assert_close(jax.jit(small_fn)(small_params, inputs, shift), jax.jit(fn)(params, inputs, shift))


def test_no_parameters_and_no_zeros_change_nothing():
    params = {"kernel": np.random.default_rng(0).normal(size=(3, 5))}
    x = networks.images()
    _small_fn, small_params = compaction.compact(lambda params, x: x @ params["kernel"], params, x)
    assert_close(small_params, params)
    plan = compaction.plan(lambda params, x: jnp.sin(x), {}, x)
    assert_close(compaction.rewrite(lambda params, x: jnp.sin(x), plan)({}, x), np.sin(x))


def test_a_plan_follows_parameters_that_train():
    """The small function of other values at the kept entries is the function of these values."""
    network = example("residual")
    fn, params = function(network), networks.init(network)
    plan = compaction.plan(fn, params, networks.images())
    rng = np.random.default_rng(1)
    trained = jax.tree.map(lambda leaf: np.where(leaf == 0, 0, leaf * rng.uniform(0.5, 1.5, leaf.shape)), params)
    small_fn = compaction.rewrite(fn, plan)
    assert_equal_outputs(fn, trained, small_fn, compaction.apply_plan(plan, trained))
