import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtl_sparse.models import multitask
from mtl_sparse.sparsity.compact import compact

SIZE = (32, 48)
HEADS = (("segmentation", "deeplab", 5), ("depth", "deeplab", 1))


@functools.cache
def dense(depth, dtype="float32"):
    """A small dense model with BatchNorm statistics like a trained one's: (model, flat parameters, statistics)."""
    model = multitask.MultiTaskModel(HEADS, depth=depth, width=8, head_features=6, dtype=jnp.dtype(dtype))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SIZE, 3)))
    rng = np.random.default_rng(1)
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    stats = traverse_util.flatten_dict(variables["batch_stats"], sep="/")
    for path, leaf in params.items():
        new = np.array(leaf, dtype)
        if path.endswith("scale"):
            new = rng.uniform(0.5, 1.5, leaf.shape)
        elif path.endswith("bias"):
            new = rng.normal(0, 0.3, leaf.shape)
        params[path] = new.astype(dtype)
    for path, leaf in stats.items():
        new = rng.uniform(0.5, 2, leaf.shape) if path.endswith("var") else rng.normal(0, 0.3, leaf.shape)
        stats[path] = new.astype(dtype)
    return model, params, stats


def with_zeros(depth, seed, share, scope="backbone", dead=(), dtype="float32"):
    """The model with groups of each kernel zero at random: a `share`, or everything where `dead` matches its path."""
    model, params, statistics = dense(depth, dtype)
    rng = np.random.default_rng(seed)
    params = dict(params)
    for path, kernel in params.items():
        if kernel.ndim != 4 or not (scope == "all" or path.startswith("backbone")):
            continue
        zero = rng.random(kernel.shape[2]) < (share if share is not None else rng.choice([0, 0.3, 0.7, 0.95, 1]))
        if any(part in path for part in dead):
            zero[:] = True
        params[path] = np.where(zero[:, None], 0, kernel).astype(kernel.dtype)
    nest = functools.partial(traverse_util.unflatten_dict, sep="/")
    return model, {"params": nest(params), "batch_stats": nest(statistics)}


def outputs(model, variables, size=SIZE, dtype=np.float32):
    images = np.random.default_rng(2).normal(size=(2, *size, 3)).astype(dtype)
    return jax.jit(model.apply)(variables, images)


def assert_same_outputs(model, variables, new_model, new_variables, tolerance, size=SIZE, dtype=np.float32):
    expected = outputs(model, variables, size, dtype)
    actual = outputs(new_model, new_variables, size, dtype)
    assert {raw.dtype for raw in actual.values()} == {np.dtype(dtype)}
    for task, raw in expected.items():
        np.testing.assert_allclose(actual[task], raw, atol=tolerance * float(np.abs(raw).max()), rtol=0, err_msg=task)


def count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


DEAD = st.lists(
    st.sampled_from(
        ["stem_conv1", "stem_conv2", "stem_conv3", "layer1_0/", "layer2_0/conv1", "layer2_0/downsample", "layer3"]
        + ["layer3_1/conv2", "layer4", "layer4_0/downsample", "layer4_1/conv1", "head_depth/aspp", "head_depth/pool"]
        + ["head_depth/project", "head_depth/conv", "head_depth/out", "aspp2", "layer", "backbone", "head", ""]
    ),
    max_size=3,
)


@pytest.mark.parametrize("depth", [18, 50])
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**16),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.7, 0.9, 1.0, None]),
    scope=st.sampled_from(["backbone", "all"]),
    dead=DEAD,
    multiple=st.sampled_from([1, 4]),
    taps=st.booleans(),
)
def test_the_outputs_stay(depth, seed, share, scope, dead, multiple, taps):
    model, variables = with_zeros(depth, seed, share, scope, dead)
    settings = {"multiple": multiple, "size": SIZE if taps else None}
    small, small_variables = compact(model, variables, **settings)
    assert_same_outputs(model, variables, small, small_variables, 1e-5)
    again, again_variables = compact(small, small_variables, **settings)
    assert again.widths == small.widths
    jax.tree.map(np.testing.assert_array_equal, again_variables, small_variables)
