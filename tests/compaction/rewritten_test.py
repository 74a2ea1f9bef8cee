"""Compaction of multi-task models whose backbone is not a ResNet."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from input_pipeline.transforms import image_statistics
from mtl_sparse.compaction import exactness, explain, rewritten
from mtl_sparse.compaction import multitask as multitask_compaction
from mtl_sparse.models import backbones, costs, multitask
from mtl_sparse.pretrained import imagenet
from tests.conftest import raises
from tests.models.backbones_test import HEADS, config_of
from tests.own_backbone import ROWS

SIZE = (32, 48)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, row in ROWS.items():
        monkeypatch.setitem(backbones.BACKBONES, name, row)


@pytest.fixture(scope="module")
def sparse():
    """Return (model, variables) with a third of the groups zero, and every kind of statistics drawn."""
    patch = pytest.MonkeyPatch()
    patch.setitem(backbones.BACKBONES, "narrow", ROWS["narrow"])
    model = multitask.MultiTaskModel(HEADS, backbone="narrow", head_features=4, attach=("block3_1", "block2_1"))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *SIZE, 3))))
    random, flat = np.random.default_rng(0), {}
    for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        value = random.uniform(0.5, 1.5, leaf.shape)
        if path.endswith(("bias", "mean")):
            value = random.normal(0, 0.3, leaf.shape)
        if path.endswith("kernel"):
            value = random.normal(0, (2 / np.prod(leaf.shape[:3])) ** 0.5, leaf.shape)
            if "backbone/" in path and "stem" not in path:
                axis = 3 if "depthwise" in path else 2
                zero = random.permutation(leaf.shape[axis])[: leaf.shape[axis] // 3]
                value[(slice(None),) * axis + (zero,)] = 0
        flat[path] = value.astype(np.float32)
    yield model, traverse_util.unflatten_dict(flat, sep="/")
    patch.undo()


@pytest.fixture(scope="module")
def small(sparse):
    return rewritten.compact(*sparse, SIZE)


def test_outputs_stay_and_channels_go(sparse, small):
    model, variables = sparse
    before, after = (costs.parameter_count(v) for v in (variables, small[1]))
    assert exactness.difference(*sparse, *small, SIZE) < 1e-5
    assert after < 0.6 * before
    assert small[0].heads == model.heads and small[0].points() == ("block3_1", "block2_1")
    assert multitask.shapes(small[0]) == {
        path: leaf.shape for path, leaf in traverse_util.flatten_dict(small[1], sep="/").items()
    }


def test_a_zero_channel_of_a_depthwise_kernel_takes_its_filter_and_its_reader_s_row_along(sparse, small):
    variables = sparse[1]["params"]["backbone"]["block3_1"]
    zero = np.all(variables["depthwise"]["kernel"] == 0, (0, 1, 2)) | np.all(
        variables["project"]["kernel"] == 0, (0, 1, 3)
    )
    left = np.sum(~zero)
    found = small[1]["params"]["backbone"]["block3_1"]
    assert 0 < left < 24 and found["depthwise"]["kernel"].shape == (3, 3, 1, left)
    assert found["expand"]["kernel"].shape[3] == left
    assert found["project"]["kernel"].shape[2] in (left, left + 1), "one more row holds the constants"


def test_the_config_holds_the_plan(sparse, small):
    config = config_of("narrow").model
    config.update(attach=("block3_1", "block2_1"), widths=rewritten.encoded(small[0]))
    tasks = [_Spec(name, outputs) for name, _, outputs in HEADS]
    again = rewritten.build(config, tasks)
    assert multitask.shapes(again) == multitask.shapes(small[0])
    images = np.random.default_rng(1).normal(size=(3, *SIZE, 3)).astype(np.float32)
    expected, found = (jax.jit(one.apply)(v, images) for one, v in (sparse, (again, small[1])))
    assert exactness.largest_difference(expected, found) < 1e-5
    config.widths = "{}"
    with raises("MODEL_WIDTHS_INVALID", naming="config.model.widths"):
        rewritten.build(config, tasks)
    config.update(attach=(), widths=small[0].widths)
    with raises("OPTION_CONFLICT", naming="restore them"):
        rewritten.build(config, tasks)


class _Spec:
    head = "deeplab"

    def __init__(self, name, outputs):
        self.name, self.outputs = name, outputs


def test_fewer_tasks_end_the_backbone_earlier(sparse):
    fewer, variables = multitask_compaction.with_tasks(*sparse, ("depth",))
    one = rewritten.compact(fewer, variables, SIZE)
    assert "block3_0" not in one[1]["params"]["backbone"] and "head_segmentation" not in one[1]["params"]
    assert exactness.difference(*one, *sparse, SIZE) < 1e-5
    with raises("MODEL_UNSUPPORTED", naming="original run"):
        multitask_compaction.with_tasks(*one, ("depth",))


def test_the_batch_may_be_a_symbol(small):
    from jax import export

    model, variables = small
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *SIZE, 3), jnp.float32)
    exported = export.export(jax.jit(lambda x: model.apply(variables, x)))(images)
    for count in (1, 3):
        x = np.random.default_rng(count).normal(size=(count, *SIZE, 3)).astype(np.float32)
        expected = jax.jit(model.apply)(variables, x)
        found = exported.call(x)
        assert {name: raw.shape for name, raw in found.items()} == {name: raw.shape for name, raw in expected.items()}
        assert exactness.largest_difference(expected, found) < 1e-5


def test_what_a_compact_model_refuses(small):
    model, variables = small
    images = np.zeros((2, *SIZE, 3), np.float32)
    with raises("MODEL_COMPACT", naming="model.backbone=narrow"):
        model.apply(variables, images, True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
    with raises("MODEL_COMPACT", naming="compact it again"):
        model.apply(variables, images, only_features=True)
    with raises("OPTION_CONFLICT", naming="compact one"):
        imagenet.start("file.npz", model, {}, image_statistics(unit_range=False))


def test_all_sizes(sparse):
    """Without drop_taps, the atrous taps stay that only larger images meet."""
    model = rewritten.compact(*sparse, SIZE, drop_taps=False)
    assert model[1]["params"]["head_depth"]["aspp1"]["kernel"].shape[:2] == (3, 3)
    assert exactness.difference(*sparse, *model, SIZE) < 1e-5
    assert exactness.difference(*sparse, *model, (320, 320)) < 1e-5


def test_bfloat16(sparse):
    half = rewritten.compact(sparse[0].clone(dtype=jnp.bfloat16), sparse[1], SIZE)
    assert not json.loads(half[0].widths)["fingerprint"]
    assert exactness.difference(*sparse, *half, SIZE) < 1e-5
    assert costs.parameter_count(half[1]) < 0.75 * costs.parameter_count(sparse[1])
    assert half[0].clone(widths=None) == sparse[0].clone(dtype=jnp.bfloat16)


def test_costs_and_reasons_of_each_layer(sparse, small):
    rows = {row["layer"]: row for row in explain.explain(*sparse, *small, SIZE)}
    kernels = {
        path: leaf for path, leaf in traverse_util.flatten_dict(small[1]["params"], sep="/").items() if "kernel" in path
    }
    for layer, row in rows.items():
        assert row["parameters_after"] == (kernels[f"{layer}/kernel"].size if f"{layer}/kernel" in kernels else 0)
        assert row["macs_after"] <= row["macs"]
    row = rows["backbone/block3_1/depthwise"]
    assert (row["groups"], row["zero"]) == (24, 8) and row["groups_after"] < 24
    assert row["macs_after"] * row["parameters"] == row["macs"] * row["parameters_after"]
    row = rows["head_segmentation/aspp1"]
    assert row["why"] == "taps 1x1 of 3x3" and row["macs_after"] == 4 * 6 * row["parameters_after"]
    macs = costs.total(*small, SIZE)["macs"]
    assert macs == sum(row["macs_after"] for row in rows.values())
