"""Compaction of models whose heads read convolutions before BatchNorm and ReLU."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from mtl_sparse import compaction
from mtl_sparse.compaction import groups
from mtl_sparse.compaction import multitask as multitask_compaction
from mtl_sparse.compaction.liveness import Costs
from mtl_sparse.models import atrous, costs, resnet, widths
from mtl_sparse.sparsity import stats
from tests.compaction import multitask_test
from tests.compaction.multitask_test import with_zeros

# The last convolution of a block before another block, a first one after which the network ends, and one in between.
RAW = ("layer3_1/conv2:raw", "layer4_0/conv1:raw", "layer3_0/conv1:raw")
EXACT = Costs(mac=1.0, copy=0.0, split=0.0)  # each layer gathers the inputs that it needs, and no other


def places(depth, attach):
    return [resnet.points(depth).index(point) for point in attach]


def zeroed(variables, path, rows=(), filters=()):
    """Return the variables with input channels and filters of a kernel zero."""
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    kernel = flat[f"{path}/kernel"].copy()
    kernel[:, :, list(rows)] = 0
    kernel[..., list(filters)] = 0
    return {**variables, "params": traverse_util.unflatten_dict({**flat, f"{path}/kernel": kernel}, sep="/")}


def compacted(model, variables, **options):
    """Return (widths, parameters of the backbone) of the compact model, whose outputs are checked."""
    small, small_variables = multitask_compaction.compact(model, variables, costs=EXACT, **options)
    multitask_test.assert_same_outputs(model, variables, small, small_variables, 1e-5)
    return small.widths, small_variables["params"]["backbone"]


@pytest.mark.parametrize(
    ("depth", "attach"),
    [
        (18, RAW),
        pytest.param(50, ("layer3_3/conv1:raw", "layer4_0/conv1:raw", "layer2_3/conv2:raw"), marks=pytest.mark.slow),
        pytest.param(50, ("layer4_2/conv3:raw", "layer3_4/conv3:raw", "layer3_0/conv2:raw"), marks=pytest.mark.slow),
    ],
)
def test_the_engine_agrees(depth, attach):
    """Two independent implementations: equal counts of parameters, equal outputs; and nothing zero is left."""
    model, variables = with_zeros(depth, 3, 0.6, attach=attach)
    height, width = multitask_test.SIZE
    small_model, small_variables = multitask_compaction.compact(model, variables, costs=EXACT)
    x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    large = jax.ShapeDtypeStruct((1, 320, 320, 3), np.float32)  # each tap of the atrous convolutions meets pixels

    def plain(variables, x):
        with atrous.plain_convolutions():
            return model.apply(variables, x)

    small_fn, small = compaction.compact(plain, variables, x, also=[(large,)], costs=EXACT)
    assert costs.parameter_count(small) == costs.parameter_count(small_variables) < costs.parameter_count(variables)
    assert stats.sparsity(small_variables["params"]).group == 0
    expected = jax.jit(model.apply)(variables, x)
    for found in (jax.jit(small_model.apply)(small_variables, x), jax.jit(small_fn)(small, x)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max()), expected, found)


def test_what_only_a_head_reads_enters_no_batch_norm():
    """Of a first and of a last convolution that the block needs, and of one after which nothing follows."""
    model, variables = with_zeros(18, 1, 0.5, attach=RAW)
    assert set(variables["params"]["backbone"]["layer4_0"]) == {"conv1"}
    small, backbone = compacted(model, variables)
    for block, conv, norm in (("layer3_0", "conv1", "bn1"), ("layer3_1", "conv2", "bn2")):
        outputs, entering = backbone[block][conv]["kernel"].shape[3], backbone[block][norm]["scale"].shape[0]
        assert outputs == 32 and 0 < entering < 32, "the head reads all"
    assert backbone["layer3_0"]["conv2"]["kernel"].shape[2] == backbone["layer3_0"]["bn1"]["scale"].shape[0]
    assert small.blocks[-1].normalized == (0,) and set(backbone["layer4_0"]) == {"conv1"}
    assert widths.Widths.from_json(small.to_json()) == small


def test_a_channel_that_no_reader_needs_goes_with_its_filter():
    """A zero input channel of all readers of a raw output; the head's alone where nothing follows."""
    model, variables = with_zeros(18, 1, 0.0, attach=RAW)
    for name in ("aspp0", "aspp1", "aspp2", "aspp3", "pool"):
        variables = zeroed(variables, f"head_depth/{name}", rows=range(0, 64, 4))
    variables = zeroed(variables, "head_attribute:Male/conv", rows=(0, 5))
    _, backbone = compacted(model, variables)
    assert backbone["layer4_0"]["conv1"]["kernel"].shape[3] == 48
    assert backbone["layer3_0"]["conv1"]["kernel"].shape[3] == 32, "the block reads the two"
    _, backbone = compacted(model, zeroed(variables, "backbone/layer3_0/conv2", rows=(5, 6)))
    assert backbone["layer3_0"]["conv1"]["kernel"].shape[3] == 31
    assert backbone["layer3_0"]["bn1"]["scale"].shape == (30,)


@pytest.mark.slow
def test_a_raw_output_without_weights_is_zero_and_one_after_batch_norm_is_not():
    for end, kept in ((":raw", 60), ("", 64)):
        attach = ("layer3_1", "layer4_0/conv1" + end, "layer3_0")
        model, variables = with_zeros(18, 1, 0.0, attach=attach)
        _, backbone = compacted(model, zeroed(variables, "backbone/layer4_0/conv1", filters=(0, 1, 9, 40)))
        assert backbone["layer4_0"]["conv1"]["kernel"].shape[3] == kept


@pytest.mark.slow
def test_heads_of_dead_convolutions():
    """All of a raw output is zero, or a map of a constant: its head reads nothing, or a map of ones."""
    attach = ("layer3_1/conv2:raw", "layer4_0/conv1:raw", "layer3_0/conv2:raw")
    dead = ["layer3_1/conv1", "layer3_0/conv2", "layer4_0/conv1"]
    model, variables = with_zeros(18, 2, 0.3, dead=dead, attach=attach)
    small, backbone = compacted(model, variables)
    head = small.heads[1]
    assert isinstance(head, widths.Head) and head.dead and small.heads[2] == widths.Classifier(dead=True)
    assert set(backbone) == {"layer3_1"}, "no layer is needed before the map of ones"
    assert backbone["layer3_1"]["conv2"]["kernel"].shape[2] == 1, "it reads a map of ones"
    multitask_test.check_outputs_and_idempotence(18, 2, 0.3, "backbone", dead, 4, True, places(18, attach))
    # The constant that is folded into a convolution is zero after the ReLU, and the head of its raw output is constant.
    attach = ("layer1_0/conv2:raw", "layer1_1/conv1:raw", "layer1_1/conv2:raw")
    multitask_test.check_outputs_and_idempotence(18, 5480, 0.9, "backbone", [], 1, False, places(18, attach))


@pytest.mark.slow
def test_compacting_twice_changes_nothing_and_widths_are_multiples():
    multitask_test.check_outputs_and_idempotence(18, 4, 0.7, "all", [], 4, False, places(18, RAW))
    model, variables = with_zeros(18, 4, 0.7, "all", attach=RAW)
    small, _ = compacted(model, variables, multiple=4)
    assert all(count % 4 == 0 for block in small.blocks for count in block.features)


def test_tasks_of_raw_points_are_kept_or_dropped():
    """What is left ends at a raw point, of a block that went on for another head."""
    multitask_test.check_kept_tasks({"segmentation"}, 18, 4, 0.5, "all", [], 1, False, places(18, RAW))
    model, variables = with_zeros(18, 4, 0.5, attach=RAW)
    small, backbone = compacted_tasks(model, variables, ("segmentation",))
    assert set(backbone["layer3_1"]) == {"conv1", "bn1", "conv2"} and small.blocks[-1].shortcut == "none"
    small, backbone = compacted_tasks(model, variables, ("attribute:Male",))
    assert set(backbone["layer3_0"]) == {"conv1"} and small.attach == ("layer3_0/conv1:raw",)


def compacted_tasks(model, variables, tasks):
    small, small_variables = multitask_compaction.compact(model, variables, tasks=tasks, costs=EXACT)
    return small.widths, small_variables["params"]["backbone"]


def test_widths_of_earlier_versions_are_read():
    model, variables = with_zeros(18, 1, 0.3)
    small, _ = multitask_compaction.compact(model, variables)
    before = small.widths.to_json().replace(', "normalized": []', "")
    assert "normalized" not in before and widths.Widths.from_json(before) == small.widths


def test_a_coupled_group_of_a_raw_output_spans_its_head_and_its_block():
    model, variables = with_zeros(18, 1, 0.0, attach=RAW)
    found = groups.from_function(
        model.apply, variables, np.zeros((1, *multitask_test.SIZE, 3), np.float32), coupled=True
    )
    (one,) = (group for group in found if "params/backbone/layer3_0/conv2/kernel" in group.paths)
    assert set(one.paths) == {"params/backbone/layer3_0/conv2/kernel", "params/head_attribute:Male/conv/kernel"}
    assert one.count == 32
