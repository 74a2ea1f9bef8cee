"""Functions for which compaction could be wrong: it must return their outputs, or raise a UserError.

Each test is the smallest function that one fault needed. They run in float64, so that rounding hides nothing.
"""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export, lax
from jax.test_util import check_grads

from mtl_sparse import compaction
from mtl_sparse.compaction.liveness import Costs
from mtl_sparse.runtime.errors import UserError
from tests.conftest import raises

RNG = np.random.default_rng(0)
START = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def double():
    """Compute in float64, and draw the same values in each test, whatever ran before it."""
    RNG.bit_generator.state = START
    with jax.enable_x64(True):
        yield


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape))


def weights(inputs, outputs, rows=(), columns=()):
    """Return a random matrix in which these rows and columns are zero."""
    x = RNG.normal(size=(inputs, outputs))
    x[list(rows)] = 0
    x[:, list(columns)] = 0
    return jnp.asarray(x)


def convolve(x, kernel, groups=1, padding="SAME"):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=layout, feature_group_count=groups)


def assert_equal(got, expected):
    """Assert that two trees have the same structure, shapes, dtypes and, up to rounding, values."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(ours.astype(complex), theirs.astype(complex), rtol=1e-5, atol=1e-8)


def check(fn, params, *inputs, **options):
    """Compact `fn` for the first of these inputs, check it on all of them, and return it with its parameters."""
    small_fn, small = compaction.compact(fn, params, inputs[0], **options)
    for x in inputs:
        assert_equal(small_fn(small, x), fn(params, x))
    return small_fn, small


def check_gradient(fn, params, small_fn, small, x):
    """Check the gradient with respect to the input."""
    ours = jax.grad(lambda x: small_fn(small, x).sum())(x)
    assert_equal(ours, jax.grad(lambda x: fn(params, x).sum())(x))


def check_or_refuse(fn, params, x, plan):
    """Check `fn` rewritten by a plan that was made for something else; an error that the user sees is fine too."""
    small = compaction.apply_plan(plan, params)
    with contextlib.suppress(UserError):
        assert_equal(compaction.rewrite(fn, plan)(small, x), fn(params, x))


def check_moments(fn, params, x):
    """Check that Adam's moments have the shapes of the compact parameters, and that these are smaller."""
    plan = compaction.plan(fn, params, x)
    small = compaction.apply_plan(plan, params)
    state = compaction.apply_plan(plan, optax.adam(1e-3).init(params))
    assert jax.tree.map(np.shape, small) != jax.tree.map(np.shape, params)
    assert jax.tree.map(np.shape, state[0].mu) == jax.tree.map(np.shape, small)
    assert jax.tree.map(np.shape, state[0].nu) == jax.tree.map(np.shape, small)


# Other sizes and other modes than the plan was made for.


@pytest.mark.parametrize("batch", [2, 4])
def test_a_reshape_that_mixes_the_batch_with_channels_is_not_read_as_zeros_at_another_batch_size(batch):
    def fn(params, x):
        return jnp.tanh(x @ params["w"]).reshape(-1, 3) @ params["v"]

    params = {"w": weights(4, 6), "v": weights(3, 2, rows=[1])}
    check(fn, params, normal(1, 4))
    check_or_refuse(fn, params, normal(batch, 4), compaction.plan(fn, params, normal(1, 4)))


def divided(x, n):
    return x / n


def divided_early(x, n):
    x = x / n
    for _ in range(7):
        x = jnp.tanh(x) * 1.5
    return x


def zero_at_one_size(x, n):
    return jax.nn.relu(x - (3.0 if n < 5 else 0.0))


def times_a_table(x, n):
    return jnp.tanh(x * (np.arange(1.0, 7) if n < 5 else np.arange(6.0, 0, -1)))


def times_the_last_position(x, n):
    return jnp.tanh(x * jnp.arange(n).max())


@pytest.mark.parametrize(
    "activation", [divided, divided_early, zero_at_one_size, times_a_table, times_the_last_position]
)
def test_a_constant_that_depends_on_the_batch_size_is_not_reused_at_another_one(activation):
    def fn(params, x):
        return activation(x @ params["w"] + params["b"], len(x)) @ params["v"]

    bias = jnp.array([1.0, 2.0, 0.3, 0.4, 0.5, 0.1])
    params = {"w": weights(4, 6, columns=[0, 1]), "b": bias, "v": weights(6, 2)}
    check(fn, params, normal(2, 4))
    check_or_refuse(fn, params, normal(5, 4), compaction.plan(fn, params, normal(2, 4)))


def test_a_constant_behind_a_removed_product_is_not_reused_at_another_batch_size():
    def fn(params, x):
        y = ((x @ params["w"] + params["b"]) / len(x)) @ params["v"] + params["c"]
        return jnp.tanh(y) @ params["z"] + x @ params["u"]

    params = {"w": jnp.zeros((4, 6)), "b": normal(6), "v": weights(6, 5), "c": normal(5)}
    params |= {"z": weights(5, 2), "u": weights(4, 2)}
    check(fn, params, normal(2, 4))
    check_or_refuse(fn, params, normal(5, 4), compaction.plan(fn, params, normal(2, 4)))


def test_a_constant_from_the_row_of_a_table_is_not_reused_where_another_row_is_read():
    def fn(params, x):
        y = jnp.tanh(x @ params["w"] + params["table"][len(x)]) @ params["v"]
        return y, x[:, :1] * params["table"].sum(1)

    params = {"w": weights(4, 6, columns=[0, 1]), "table": normal(8, 6), "v": weights(6, 2)}
    check(fn, params, normal(2, 4))
    check_or_refuse(fn, params, normal(5, 4), compaction.plan(fn, params, normal(2, 4)))


def test_a_constant_is_not_put_where_a_convolution_pads_at_another_size():
    def fn(params, x):
        rows = x.shape[1] % 2
        x = convolve(x, params["w"]) + params["b"]
        x = convolve(x, params["k"], padding=((rows, rows), (0, 0)))
        return convolve(jnp.tanh(x), params["z"])

    kernel = normal(1, 1, 4, 4).at[..., 1, :].set(0).at[..., 2:, 0].set(0)
    params = {"w": normal(1, 1, 3, 4).at[..., :2].set(0), "b": normal(4), "k": kernel, "z": normal(1, 1, 4, 2)}
    check(fn, params, normal(2, 4, 4, 3))
    check_or_refuse(fn, params, normal(2, 5, 4, 3), compaction.plan(fn, params, normal(2, 4, 4, 3)))


def test_a_constant_is_not_put_where_a_smaller_input_is_padded_with_zeros():
    def fn(params, x):
        x = x @ params["w"] + params["b"]
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 4), (0, 0))) @ params["v"]

    params = {"w": weights(4, 6, columns=[0, 1]), "b": normal(6), "v": weights(6, 2)}
    check(fn, params, normal(2, 4, 4))
    check_or_refuse(fn, params, normal(2, 3, 4), compaction.plan(fn, params, normal(2, 4, 4)))


def test_a_constant_channel_whose_weights_are_read_at_another_size_keeps_its_constant():
    def fn(params, x):
        return jnp.tanh(x @ params["a" if len(x) < 5 else "b"] + params["c"]) @ params["v"]

    params = {"a": weights(4, 6, columns=[0, 1]), "b": weights(4, 6), "c": normal(6), "v": weights(6, 2)}
    check(fn, params, normal(2, 4), normal(6, 4), also=[(normal(6, 4),)])


def test_a_penalty_on_activations_in_training_is_not_summed_over_what_remains():
    def fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    def training(params, x):
        x = jnp.tanh(x @ params["w"])
        return x @ params["v"], (x**2).sum()

    params, x = {"w": weights(4, 6), "v": weights(6, 2, rows=[0, 1])}, normal(2, 4)
    check_or_refuse(training, params, x, compaction.plan(fn, params, x))


def test_noise_on_a_kernel_in_training_reads_the_channels_whose_weights_were_zero():
    def fn(params, x, noise=0.0):
        return jnp.tanh(x @ params["w"]) @ (params["v"] + noise if noise else params["v"])

    params, x = {"w": weights(4, 6), "v": weights(6, 2, rows=[0, 1])}, normal(2, 4)
    check_or_refuse(lambda params, x: fn(params, x, 1.0), params, x, compaction.plan(fn, params, x))


def test_the_constant_of_running_statistics_is_not_added_in_training():
    def fn(params, x, train=False):
        x = x @ params["w"]
        return (x - (x.mean(0) if train else params["mean"])) @ params["v"]

    params, x = {"w": weights(4, 6, columns=[0, 1]), "mean": normal(6), "v": weights(6, 2)}, normal(2, 4)
    check_or_refuse(lambda params, x: fn(params, x, True), params, x, compaction.plan(fn, params, x))


def test_a_channel_that_relu_makes_zero_is_not_dropped_where_training_leaks_it():
    def fn(params, x, slope=0.0):
        x = x @ params["w"] + params["b"]
        return jnp.maximum(x, slope * x) @ params["v"]

    params = {"w": weights(4, 6, columns=[0, 1]), "b": -jnp.abs(normal(6)), "v": weights(6, 2)}
    x = normal(2, 4)
    check_or_refuse(lambda params, x: fn(params, x, 0.1), params, x, compaction.plan(fn, params, x))


def test_the_precision_is_that_of_the_call():
    def fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    x = normal(2, 4)
    small_fn, small = check(fn, {"w": weights(4, 6, columns=[0, 1]), "v": weights(6, 2, rows=[3])}, x)
    assert "HIGHEST" not in str(jax.make_jaxpr(small_fn)(small, x))
    with jax.default_matmul_precision("highest"):
        assert "HIGHEST" in str(jax.make_jaxpr(small_fn)(small, x))


def test_a_function_called_with_64_bits_can_be_called_with_32():
    def fn(params, x):
        y = jnp.tanh(x @ params["w"]) @ params["v"]
        return y, jnp.argmax(y, 1)

    params = {"w": weights(4, 6, columns=[0, 1]), "v": weights(6, 2, rows=[3])}
    params, x = jax.tree.map(jnp.float32, params), normal(2, 4).astype(jnp.float32)
    small_fn, small = check(fn, params, x)
    with jax.enable_x64(False):
        assert_equal(small_fn(small, x), fn(params, x))


def test_a_function_with_a_table_longer_than_its_input_is_exported_for_any_batch_size():
    def fn(params, x):
        return jnp.tanh(x @ params["w"] + params["table"][: x.shape[1]]) @ params["v"]

    params = {"w": weights(3, 6, columns=[0, 1]), "table": normal(8, 6), "v": weights(6, 2, rows=[3])}
    small_fn, small = check(fn, params, normal(2, 5, 3))
    (batch,) = export.symbolic_shape("batch")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), small)
    exported = export.export(jax.jit(small_fn))(shapes, jax.ShapeDtypeStruct((batch, 5, 3), float))
    x = normal(7, 5, 3)
    assert_equal(exported.call(small, x), fn(params, x))


def scaled(kernel):
    return kernel * jnp.arange(1.0, 7)[:, None]


def reversed_rows(kernel):
    return kernel[::-1]


def sliced(kernel):
    return jnp.concatenate([kernel[:3], 2 * kernel[3:]])


def padded(kernel):
    return jnp.pad(kernel, ((1, 0), (0, 0)))[:-1]


@pytest.mark.parametrize("change", [scaled, reversed_rows, sliced, padded])
def test_a_kernel_with_a_folded_constant_is_not_used_in_another_function_as_if_it_were_weights(change):
    def fn(params, x, change=lambda kernel: kernel):
        return (jnp.tanh(x @ params["w"]) + params["b"]) @ change(params["v"])

    params, x = {"w": weights(4, 6, columns=[0, 1]), "b": normal(6), "v": weights(6, 2)}, normal(2, 4)
    check_or_refuse(lambda params, x: fn(params, x, change), params, x, compaction.plan(fn, params, x))


# Channels: their order, and what reads more of them than is needed.


def test_a_channel_shuffle_before_a_bias_keeps_the_order():
    def fn(params, x):
        x = (x @ params["w"]).reshape(-1, 2, 3).transpose(0, 2, 1).reshape(-1, 6)
        return x + params["b"]

    check(fn, {"w": weights(4, 6), "b": normal(6)}, normal(2, 4), normal(5, 4))


def test_a_channel_shuffle_across_a_checkpoint_and_a_custom_jvp_is_computed():
    @jax.custom_jvp
    def merged(x):
        return jnp.tanh(x.reshape(-1, 6))

    @merged.defjvp
    def merged_jvp(primals, tangents):
        y = merged(*primals)
        return y, tangents[0].reshape(-1, 6) * (1 - y**2)

    @jax.checkpoint
    def shuffled(x):
        return merged(x.reshape(-1, 2, 3).transpose(0, 2, 1))

    def fn(params, x):
        return shuffled(x @ params["w"]) @ params["v"]

    check(fn, {"w": weights(4, 6), "v": weights(6, 2, rows=[0, 1])}, normal(2, 4))


def test_a_grouped_convolution_whose_shared_kernel_has_more_rows_than_the_activations_is_no_zero():
    def fn(params, x):
        pruned, whole = (jnp.tanh(convolve(x, params[name])) for name in ("pruned", "whole"))
        return convolve(pruned, params["shared"], 2), convolve(whole, params["shared"], 2)

    pruned = normal(1, 1, 3, 4).at[..., jnp.array([1, 3])].set(0)
    check(fn, {"pruned": pruned, "whole": normal(1, 1, 3, 4), "shared": normal(3, 3, 2, 6)}, normal(2, 4, 4, 3))


def test_a_grouped_convolution_whose_constant_kernel_has_a_zero_row_is_no_zero():
    kernel = np.array(normal(3, 3, 2, 6))
    kernel[:, :, 1] = 0

    def fn(params, x):
        return convolve(jnp.tanh(convolve(x, params["w"])), kernel, 2), x.sum(1)

    check(fn, {"w": normal(1, 1, 3, 4)}, normal(2, 4, 4, 3))


def test_a_sum_that_nobody_needs_is_not_read_by_a_constant_kernel():
    positive, kernel = np.abs(RNG.normal(size=6)), RNG.normal(size=(6, 3))

    def fn(params, x):
        return jax.nn.relu((x @ params["w"] + params["a"]) + positive) @ kernel + x @ params["u"]

    check(fn, {"w": jnp.zeros((4, 6)), "a": -jnp.abs(normal(6)) - 9, "u": weights(4, 3)}, normal(2, 4))


def test_a_sum_that_nobody_needs_is_not_read_by_a_sum_over_channels():
    bias = RNG.normal(size=6)

    def fn(params, x):
        return ((x @ params["w"] + params["a"]) + -bias).sum(1, keepdims=True) + x @ params["u"]

    check(fn, {"w": jnp.zeros((4, 6)), "a": jnp.asarray(bias), "u": weights(4, 3)}, normal(2, 4))


def test_a_channel_that_is_zero_because_constants_cancel_stays_zero():
    kernel = np.array(weights(6, 3, columns=[1]))
    kernel[:2] = [[kernel[0, 0], 1, kernel[0, 2]], [0, 1, 0]]

    def fn(params, x):
        y = (x @ params["w"] + params["b"]) @ params["v"]
        return y.sum(1), jnp.tanh(x[:, :3].repeat(2, 1)) @ params["v"]

    bias = jnp.array([1.0, -1.0, 0.3, 0.2, 0.1, 0.5])
    check(fn, {"w": weights(4, 6, columns=[0, 1]), "b": bias, "v": jnp.asarray(kernel)}, normal(2, 4))


def test_the_part_of_a_split_that_nobody_reads_can_be_concatenated():
    def fn(params, x):
        left, right = jnp.split(jnp.tanh(jnp.broadcast_to(params["b"], (len(x), 8))), 2, axis=1)
        y = x @ params["u"]
        return jnp.concatenate([left, y], 1) @ params["v"] + (right * y).sum(1, keepdims=True)

    check(fn, {"b": normal(8), "v": weights(8, 2, rows=[0, 1, 2, 3]), "u": normal(3, 4)}, normal(2, 3))


def test_a_product_over_no_entries_of_zeros_is_one():
    def fn(params, x):
        x = x @ params["w"]
        return (jnp.prod(x[None][:0], 0) + x) @ params["v"]

    check(fn, {"w": weights(4, 6, columns=[0, 1]), "v": weights(6, 3)}, normal(2, 4))


def test_a_plan_with_constants_is_refused_at_another_image_size_and_one_without_is_not():
    def fn(params, x):
        x = convolve(x, params["w"]) + params["b"]
        return convolve(nn.max_pool(x, (3, 3), (2, 2), "SAME"), params["k"])

    params = {"w": normal(3, 3, 3, 6).at[..., jnp.array([0, 4])].set(0), "b": normal(6), "k": normal(3, 3, 6, 4)}
    check(fn, params, normal(2, 5, 5, 3), normal(3, 6, 4, 3), fold=False)
    small_fn, small = check(fn, params, normal(2, 5, 5, 3), normal(3, 5, 5, 3))
    with raises("PLAN_DIFFERS", naming="another size"):
        small_fn(small, normal(3, 6, 4, 3))


def test_arrays_that_one_device_put_moves_are_not_mixed():
    def fn(params, x):
        left, right = jax.device_put((jnp.tanh(x @ params["w"]), jnp.tanh(x @ params["u"])))
        return left @ params["v"] + right @ params["t"]

    params = {"w": weights(4, 8), "u": weights(4, 5), "v": weights(8, 3, rows=[0, 1, 2, 6]), "t": weights(5, 3)}
    check(fn, params, normal(2, 4))


# Values and dtypes of constants, inputs and outputs.


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float16"])
def test_a_constant_is_not_rounded_to_the_dtype_of_a_quantized_kernel(dtype):
    def fn(params, x):
        return (jnp.tanh(x @ params["w"]) + params["b"]) @ params["v"].astype(x.dtype)

    kernel = jnp.asarray(RNG.integers(-100, 100, (6, 3)), dtype)
    check(fn, {"w": weights(4, 6, columns=[0, 1, 2]), "b": normal(6) * 3, "v": kernel}, normal(2, 4))


def test_a_constant_of_a_kernel_cast_to_integers_is_that_of_the_integers():
    def fn(params, x):
        return (x @ params["w"].astype(int) + params["b"].astype(int)) @ params["v"].astype(int)

    params = {"w": jnp.round(weights(4, 6, columns=[0, 1, 2]) * 3), "b": jnp.arange(1.0, 7), "v": normal(6, 3) * 3}
    check(fn, params, jnp.ones((2, 4), int))


def test_a_constant_cast_out_of_the_range_of_its_dtype_is_that_of_xla():
    def fn(params, x):
        return (x @ params["w"] + params["b"]).astype(jnp.uint8).astype(x.dtype) @ params["v"]

    params = {"w": weights(4, 6, columns=[0, 1]), "b": -jnp.abs(normal(6)) * 100, "v": weights(6, 2)}
    check(fn, params, normal(2, 4))


def test_a_constant_may_come_from_an_equation_without_operands():
    def fn(params, x):
        return (jnp.tanh(x @ params["w"]) * lax.iota(float, 6) + params["b"]) @ params["v"]

    check(fn, {"w": weights(4, 6, columns=[0, 1]), "b": normal(6), "v": weights(6, 2)}, normal(2, 4))


def test_complex_constants_keep_their_imaginary_part():
    def fn(params, x):
        return (x @ params["w"] + params["b"]) @ params["v"]

    w = weights(4, 6, columns=[0, 1, 2]) + 1j * weights(4, 6, columns=[0, 1, 2])
    check(fn, {"w": w, "b": normal(6) + 1j * normal(6), "v": normal(6, 3) + 1j * normal(6, 3)}, normal(2, 4) + 0j)


def test_a_product_of_constants_has_the_preferred_dtype():
    def fn(params, x):
        y = (x @ params["w"] + params["b"]).astype(jnp.bfloat16)
        return jnp.matmul(y, params["v"], preferred_element_type=jnp.float32), x @ params["u"]

    params = {"w": jnp.zeros((4, 6)), "b": normal(6), "v": normal(6, 3).astype(jnp.bfloat16), "u": weights(4, 3)}
    check(fn, params, normal(2, 4))


def test_a_python_scalar_as_input_does_not_promote():
    def fn(params, inputs):
        x, temperature = inputs
        return jnp.tanh(x @ params["w"]) @ params["v"] * temperature

    params = {"w": weights(4, 6), "v": weights(6, 3, rows=[0, 1])}
    check(fn, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), (normal(2, 4).astype(jnp.bfloat16), 0.5))


def test_a_random_key_can_be_an_input():
    def fn(params, inputs):
        key, _ = jax.random.split(inputs[0])
        return jnp.tanh(inputs[1] @ params["w"] + jax.random.normal(key, (8,))) @ params["v"]

    check(fn, {"w": weights(4, 8), "v": weights(8, 3, rows=[0, 1, 2, 6])}, (jax.random.key(0), normal(2, 4)))


def test_a_random_key_can_be_a_parameter():
    def fn(params, x):
        return jnp.tanh(x @ params["w"] + jax.random.normal(params["key"], (8,))) @ params["v"]

    check(fn, {"w": weights(4, 8), "v": weights(8, 3, rows=[0, 1, 2, 6]), "key": jax.random.key(0)}, normal(2, 4))


# Derivatives that the function defines itself.


def test_a_gradient_reversal_reverses():
    @jax.custom_vjp
    def reverse(x):
        return x

    reverse.defvjp(lambda x: (x, None), lambda _, gradient: (-gradient,))

    def fn(params, x):
        return reverse(jnp.tanh(x @ params["w"])) @ params["v"]

    params, x = {"w": weights(4, 6), "v": weights(6, 2, rows=[0, 1])}, normal(2, 4)
    check_gradient(fn, params, *check(fn, params, x), x)


def test_gradient_clipping_of_an_array_with_equal_rows_clips_each_row():
    @jax.custom_vjp
    def clipped(x):
        return x * 1.0

    clipped.defvjp(lambda x: (x * 1.0, None), lambda _, gradient: (jnp.clip(gradient, -0.1, 0.1),))

    def fn(params, x):
        return (clipped(jnp.broadcast_to(params["b"], x.shape)) * x) @ params["v"]

    params, x = {"b": normal(4), "v": weights(4, 2)}, normal(8, 4)
    small_fn, small = check(fn, params, x)
    ours = jax.grad(lambda params: small_fn(params, x).sum())(small)
    assert_equal(ours["b"], jax.grad(lambda params: fn(params, x).sum())(params)["b"])


def test_a_constant_folded_into_the_kernel_of_a_custom_vjp_has_the_gradient_of_finite_differences():
    @jax.custom_vjp
    def dense(x, kernel):
        return x @ kernel

    dense.defvjp(
        lambda x, kernel: (x @ kernel, (x, kernel)),
        lambda saved, gradient: (gradient @ saved[1].T, saved[0].T @ gradient),
    )

    def fn(params, x):
        return dense(jnp.tanh(x @ params["w"]) + params["b"], params["v"])

    params, x = {"w": weights(4, 6, columns=[0, 1]), "b": normal(6), "v": weights(6, 3, rows=[2])}, normal(2, 4)
    small_fn, small = check(fn, params, x)
    check_grads(lambda params: (small_fn(params, x) ** 2).sum(), (small,), order=1, modes=["rev"])


def test_a_constant_folded_into_the_kernel_of_a_custom_jvp_has_no_tangent():
    @jax.custom_jvp
    def dense(x, kernel):
        return x @ kernel

    @dense.defjvp
    def dense_jvp(primals, tangents):
        return primals[0] @ primals[1], tangents[0] @ primals[1] + primals[0] @ tangents[1]

    def fn(params, x):
        return dense(jnp.tanh(x @ params["w"]) + params["b"], params["v"])

    params, x = {"w": weights(4, 6, columns=[0, 1]), "b": normal(6), "v": weights(6, 3, rows=[2])}, normal(2, 4)
    small_fn, small = check(fn, params, x)
    ours = jax.jvp(lambda x: small_fn(small, x), (x,), (jnp.cos(x),))
    assert_equal(ours, jax.jvp(lambda x: fn(params, x), (x,), (jnp.cos(x),)))


def test_a_tangent_summed_over_channels_is_not_summed_over_what_remains():
    @jax.custom_jvp
    def coupled(x):
        return x * 1.0

    @coupled.defjvp
    def coupled_jvp(primals, tangents):
        return primals[0] * 1.0, tangents[0] + tangents[0].sum(1, keepdims=True)

    def fn(params, x):
        return coupled(jnp.tanh(x @ params["w"])) @ params["v"]

    params, x = {"w": weights(4, 6), "v": weights(6, 3, rows=[2])}, normal(2, 4)
    small_fn, small = check(fn, params, x)
    with contextlib.suppress(UserError):
        check_gradient(fn, params, small_fn, small, x)


def test_a_custom_gradient_with_an_integer_output_is_differentiable():
    @jax.custom_vjp
    def square(x):
        return x * x, jnp.argmax(x, -1)

    square.defvjp(lambda x: (square(x), x), lambda x, gradients: (3 * x * gradients[0],))

    def fn(params, x):
        y, best = square(jnp.tanh(x @ params["w"]))
        return y @ params["v"] + best[:, None]

    params, x = {"w": weights(4, 6), "v": weights(6, 2, rows=[0, 1])}, normal(2, 4)
    check_gradient(fn, params, *check(fn, params, x), x)


# Paths of parameters.


def test_parameters_with_the_same_path_are_refused():
    def fn(params, x):
        return jnp.tanh(jnp.tanh(x @ params["a/b"]) @ params["a"]["b"]) @ params["v"]

    params = {"a/b": weights(6, 6, columns=[0]), "a": {"b": weights(6, 6, rows=[5])}, "v": weights(6, 6, rows=[2, 3])}
    with raises("PATHS_CLASH", naming="a/b"):
        compaction.compact(fn, params, normal(2, 6))


def test_the_moments_of_a_parameter_are_not_cut_as_another_whose_path_ends_like_theirs():
    def fn(params, x):
        return jnp.tanh(jnp.tanh(x @ params["w"]) @ params["mu"]["w"]) @ params["z"]

    params = {"mu": {"w": weights(6, 6, rows=[0, 1])}, "w": weights(6, 6, columns=[0, 1]), "z": weights(6, 6)}
    check_moments(fn, params, normal(2, 6))


def test_the_moments_of_a_single_array_are_cut_like_it():
    def fn(kernel, x):
        return jnp.tanh(x @ kernel) @ kernel.T

    check_moments(fn, weights(4, 6, columns=[0, 1]), normal(2, 4))


@pytest.mark.parametrize(
    "total",
    [
        lambda x: jnp.cumsum(x, 1),
        lambda x: jnp.cumprod(x, 1),
        lambda x: jnp.sum(x, 1),
        lambda x: jnp.prod(x, 1),
        lambda x: nn.avg_pool(x, (2, 2)),
        lambda x: jnp.argmax(x, 1).astype(float),
    ],
    ids="cumsum cumprod sum prod mean argmax".split(),
)
def test_a_sum_along_another_axis_of_a_constant_channel_is_not_that_constant(total):
    def fn(params, x):
        return total(convolve(x, params["w"]) + params["b"]) @ params["v"]

    bias = jnp.arange(1.0, 7)
    params = {"w": weights(3, 6, columns=[0, 4]).reshape(1, 1, 3, 6), "b": bias, "v": normal(6, 2)}
    check(fn, params, normal(2, 4, 4, 3), normal(3, 4, 4, 3))


@pytest.mark.parametrize(
    "reduce",
    [
        lambda x: jnp.max(-jnp.abs(x) - 0.0, 1),
        lambda x: jnp.min(jnp.abs(x), 1),
        lambda x: jnp.argmax(-jnp.abs(x), 1),
        lambda x: jnp.argmin(jnp.abs(x), 1),
        lambda x: jnp.prod(x, 1),
        lambda x: jnp.all(x != 0, 1),
    ],
    ids="max min argmax argmin prod all".split(),
)
def test_a_reduction_over_channels_that_is_no_sum_reads_the_channel_that_is_always_zero(reduce):
    def fn(params, x):
        return reduce(x @ params["w"]), x @ params["u"]

    params = {"w": weights(4, 6, columns=[1]), "u": weights(4, 2)}
    check(fn, params, normal(3, 4), normal(5, 4))


def test_a_sum_over_an_axis_that_is_repeated_counts_each_entry():
    def fn(params, x):
        return (jnp.broadcast_to(params["b"], (len(x), 5, 6)).sum(1) * (x @ params["w"])) @ params["v"]

    params = {"b": normal(6), "w": weights(4, 6), "v": weights(6, 2, rows=[0, 1])}
    check(fn, params, normal(3, 4), normal(5, 4))


def test_groups_with_unequal_needs_keep_what_any_of_them_needs():
    def fn(params, x):
        x = convolve(x, params["w"])
        return convolve(x, params["k"], 2) @ params["v"], convolve(x, params["k"], 2) @ params["u"]

    kernel = normal(3, 3, 3, 6).at[:, :, 1].set(0)
    params = {"w": normal(1, 1, 3, 6), "k": kernel, "v": weights(6, 2, rows=[0, 4, 5]), "u": weights(6, 2, rows=[0, 1])}
    _, small = check(fn, params, normal(2, 4, 4, 3), normal(3, 4, 4, 3))
    assert small["k"].shape[2] == 2


def test_a_blur_that_is_no_parameter_loses_the_channels_that_nothing_reads():
    blur = np.ones((3, 3, 1, 6)) / 9

    def fn(params, x):
        return jnp.tanh(convolve(convolve(x, params["w"]), blur, 6)) @ params["v"]

    params = {"w": normal(1, 1, 3, 6), "v": weights(6, 2, rows=[0, 4])}
    _, small = check(fn, params, normal(2, 4, 4, 3), normal(3, 4, 4, 3))
    assert small["w"].shape[3] == 4


@pytest.mark.parametrize("costs", [Costs(mac=0, copy=1, split=1), Costs(), Costs(mac=1, copy=0, split=0)])
def test_a_constant_channel_that_is_still_read_is_not_counted_twice(costs):
    def fn(params, x):
        x = x @ params["a"] + params["bias"]
        return x, x @ params["b"]

    params = {"a": weights(4, 6, columns=[0, 2, 4]), "bias": normal(6), "b": normal(6, 2)}
    check(fn, params, normal(3, 4), normal(5, 4), costs=costs)


def test_an_operation_that_another_batch_size_adds_is_refused_where_it_needs_removed_channels():
    def fn(params, x):
        x = x @ params["w"]
        return (jnp.sort(x, 1) if len(x) > 4 else x) @ params["v"]

    params = {"w": normal(4, 6), "v": weights(6, 2, rows=[0, 1, 5])}
    small_fn, small = check(fn, params, normal(2, 4), normal(3, 4), costs=Costs(mac=1, copy=0, split=0))
    assert small["w"].shape == (4, 3)
    with raises("PLAN_DIFFERS", naming="needs removed channels"):
        small_fn(small, normal(6, 4))


@pytest.mark.parametrize("join", [jnp.stack, jnp.concatenate])
def test_different_constants_of_one_channel_are_no_constant_where_they_are_joined(join):
    def fn(params, x):
        x = x @ params["w"]
        return join([x + params["b"], x + params["c"]]) @ params["v"]

    params = {"w": weights(4, 6, columns=[0, 4]), "b": normal(6), "c": normal(6), "v": normal(6, 2)}
    check(fn, params, normal(2, 4), normal(3, 4))


def test_an_entry_that_a_grouped_convolution_lacks_is_kept_beside_what_others_read():
    def fn(params, x):
        x, y = (jnp.tanh(convolve(x, params[name])) for name in ("w", "whole"))
        few, every = (convolve(z, params["shared"], 2) for z in (x, y))
        return few @ params["v"], every, x @ params["u"]

    shared = normal(1, 1, 3, 6).at[:, :, 1, jnp.array([0, 3])].set(0).at[:, :, 2].set(0)
    params = {"w": normal(1, 1, 3, 6), "whole": normal(1, 1, 3, 6), "shared": shared}
    params |= {"v": weights(6, 2, rows=[1, 2, 4, 5]), "u": weights(6, 2, rows=[0, 3, 4, 5])}
    check(fn, params, normal(2, 4, 4, 3), normal(3, 4, 4, 3))


def test_an_operation_that_lacks_channels_may_be_added_where_only_zero_weights_read_it():
    def fn(params, x, change=lambda x: x):
        x = x @ params["w"]
        return x @ params["v"] + jnp.tanh(change(x)) @ params["z"]

    params, x = {"w": weights(4, 6), "v": weights(6, 2, rows=[0, 1]), "z": jnp.zeros((6, 2))}, normal(2, 4)
    plan = compaction.plan(fn, params, x, costs=Costs(mac=1, copy=0, split=0))
    small = compaction.apply_plan(plan, params)
    assert small["w"].shape == (4, 4)
    assert_equal(compaction.rewrite(lambda p, x: fn(p, x, jnp.sort), plan)(small, x), fn(params, x, jnp.sort))


def test_a_constant_that_is_computed_all_the_same_is_not_added_twice():
    zeros, constant = np.zeros(4), RNG.normal(size=4)

    def fn(params, x):
        return ((x * zeros + constant) + params["b"]) * (x @ params["u"])

    check(fn, {"b": normal(4), "u": normal(4, 4)}, normal(2, 4), normal(3, 4))


def test_constants_of_two_layers_are_not_folded_into_a_kernel_that_both_read_transposed():
    def fn(params, x):
        kernel = params["v"].T
        return [(jnp.tanh(x @ params[w]) + params[b]) @ kernel for w, b in (("w", "b"), ("u", "c"))]

    params = {"w": weights(4, 6, columns=[0, 1]), "u": weights(4, 6, columns=[0, 1]), "v": normal(2, 6)}
    check(fn, params | {"b": normal(6), "c": normal(6)}, normal(2, 4), normal(3, 4))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_bias_with_rows_takes_over_no_constant(rows):
    def fn(params, x):
        return (jnp.tanh(x @ params["w"] + params["a"]) + params["b"]) * (x @ params["u"])

    params = {"w": jnp.zeros((4, 6)), "a": normal(6), "b": normal(1, 6) if rows == 1 else jnp.zeros((2, 6))}
    check(fn, params | {"u": normal(4, 6)}, normal(2, 4))


def test_a_product_that_only_another_size_has_may_leave_out_what_its_weights_do():
    def fn(params, x):
        y = jnp.tanh(x @ params["w"])
        return y @ params["v"] + (y @ params["z"] if len(x) > 4 else 0)

    params = {"w": weights(4, 6), "v": weights(6, 2, rows=[0, 1]), "z": weights(6, 2, rows=[0, 1, 2])}
    _, small = check(fn, params, normal(2, 4), normal(6, 4), also=[(normal(6, 4),)])
    assert small["w"].shape == (4, 4)


@pytest.mark.parametrize("names", [("whole", "pruned"), ("pruned", "whole")])
def test_a_shared_kernel_keeps_the_rows_that_one_of_its_readers_lacks(names):
    def fn(params, x):
        return [jnp.tanh(x @ params[name]) @ params["shared"] for name in names]

    params = {"whole": weights(4, 6), "pruned": weights(4, 6, columns=[1, 3]), "shared": normal(6, 2)}
    check(fn, params, normal(2, 4), normal(3, 4))


def test_a_tangent_that_sorts_removed_channels_is_refused():
    @jax.custom_jvp
    def mixed(x):
        return x * 1.0

    mixed.defjvp(lambda primals, tangents: (primals[0] * 1.0, jnp.sort(tangents[0], 1)))

    def fn(params, x):
        return mixed(jnp.tanh(x @ params["w"])) @ params["v"]

    params, x = {"w": weights(4, 6), "v": weights(6, 3, rows=[2])}, normal(2, 4)
    small_fn, small = check(fn, params, x, costs=Costs(mac=1, copy=0, split=0))
    with raises("GRADIENT_UNKNOWN", naming="custom_jvp"):
        jax.jvp(lambda x: small_fn(small, x), (x,), (x,))


def scaled_backward():
    """A product with 1 whose cotangent is multiplied with a second operand."""

    @jax.custom_vjp
    def fn(x, scale):
        return x * 1.0

    fn.defvjp(lambda x, scale: (x * 1.0, scale), lambda scale, g: (-scale * g, 0 * scale))
    return fn


def scaled_tangent():
    """A product with 1 whose tangent is multiplied with a second operand."""

    @jax.custom_jvp
    def fn(x, scale):
        return x * 1.0

    fn.defjvp(lambda primals, tangents: (primals[0] * 1.0, -primals[1] * tangents[0]))
    return fn


@pytest.mark.parametrize("operand", [lambda s, x: s, lambda s, x: jnp.exp(s), lambda s, x: jnp.arange(6.0)])
@pytest.mark.parametrize("layer", [scaled_backward, scaled_tangent])
def test_an_operand_that_only_the_derivative_reads_is_not_taken_as_zero(layer, operand):
    layer = layer()

    def fn(params, x):
        return layer(jnp.tanh(x @ params["w"]), operand(params["s"], x)) @ params["v"]

    params, x = {"w": normal(4, 6), "s": normal(6), "v": weights(6, 2, rows=[2])}, normal(2, 4)
    small_fn, small = check(fn, params, x)
    with raises("GRADIENT_UNKNOWN", naming="another operand"):
        jax.grad(lambda x: small_fn(small, x).sum())(x)


def test_a_plan_with_constants_serves_other_batch_sizes_where_entries_are_numbered():
    def fn(params, x):
        constant = x @ params["dead"] + params["bias"]
        return jnp.concatenate([jnp.take_along_axis(x, jnp.argsort(x, -1), -1), constant], -1) @ params["v"]

    params = {"dead": jnp.zeros((4, 3)), "bias": normal(3), "v": normal(7, 2)}
    _, small = check(fn, params, normal(2, 4), normal(3, 4))
    assert small["v"].shape == (5, 2)  # one row for all constants
