import dataclasses

import jax.numpy as jnp
import pytest

from mtl_sparse.sparsity import groups, stats

PARAMS = {
    "backbone": {
        # 2 of 4 input channels are zero; 9 * 2 weights each.
        "a": {"kernel": jnp.ones((3, 3, 4, 2)).at[:, :, 1:3].set(0)},
        # 1 of 2 is zero, 1 * 3 weights each; a single zero weight does not make a group.
        "b": {"kernel": jnp.ones((1, 1, 2, 3)).at[:, :, 0].set(0).at[0, 0, 1, 0].set(0)},
        "bn": {"scale": jnp.zeros(3)},
    },
    "head": {"kernel": jnp.zeros((1, 1, 5, 1))},
}


def test_counts_by_hand():
    found = stats.sparsity(PARAMS)
    assert [dataclasses.astuple(layer) for layer in found.layers] == [
        ("backbone/a/kernel", 4, 2, 18, 36),
        ("backbone/b/kernel", 2, 1, 3, 4),
    ]
    assert found.weight == pytest.approx((36 + 4) / (4 * 18 + 2 * 3))
    assert found.group == pytest.approx(3 / 6)
    assert found.parameter == pytest.approx((2 * 18 + 3) / (4 * 18 + 2 * 3))


def test_scope_all_takes_the_heads_too():
    assert stats.sparsity(PARAMS, "all").group == pytest.approx((2 + 1 + 5) / (4 + 2 + 5))


def test_a_tree_without_a_backbone_is_taken_whole():
    assert [found.path for found in groups.find(PARAMS["backbone"])] == ["a/kernel", "b/kernel"]
    with pytest.raises(ValueError, match="matches no conv kernel"):
        groups.find(PARAMS["head"], "backbone")


def test_what_died():
    zero, one = {"kernel": jnp.zeros((1, 1, 2, 2))}, {"kernel": jnp.ones((1, 1, 2, 2))}
    params = {
        "stem": zero,
        "layer1_0": {"conv1": zero, "conv2": zero, "downsample_conv": one},
        "layer1_1": {"conv1": zero, "conv2": one},
        "layer1_2": {"conv1": one, "conv2": one, "downsample_conv": zero},
    }
    found = stats.sparsity(params)
    assert found.dead_layers == (
        "layer1_0/conv1/kernel",
        "layer1_0/conv2/kernel",
        "layer1_1/conv1/kernel",
        "layer1_2/downsample_conv/kernel",
        "stem/kernel",
    )
    assert found.dead_blocks == ("layer1_0", "layer1_1"), "a dead layer makes its branch a constant"
    assert stats.sparsity({"params": {"conv1": zero, "conv2": zero}}).dead_blocks == (), "no block to be dropped"


def test_rules_name_the_axis_of_a_group():
    params = {"depthwise": {"kernel": jnp.ones((3, 3, 1, 6))}, "conv": {"kernel": jnp.ones((3, 3, 4, 6))}}
    rules = {r".*depthwise/kernel": -1, r"conv/kernel": -2}
    found = {kernel.path: (kernel.axis, kernel.count, kernel.size) for kernel in groups.find(params, rules=rules)}
    assert found == {"depthwise/kernel": (3, 6, 9), "conv/kernel": (2, 4, 54)}
    params["depthwise"]["kernel"] = params["depthwise"]["kernel"].at[..., 2].set(0)
    assert stats.sparsity(params, rules=rules).group == pytest.approx(1 / 10)
    assert [kernel.path for kernel in groups.find(params, rules={**rules, r"conv/kernel": None})] == [
        "depthwise/kernel"
    ]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({r"conv/kernel": -2}, "depthwise/kernel matches no rule; .* exactly one of conv/kernel"),
        ({r".*": -2, r"conv/.*": -1}, "conv/kernel matches the rules .* and conv/"),
        ({r".*": None}, "matches no conv kernel"),
    ],
)
def test_rules_that_do_not_fit_are_named(rules, message):
    params = {"depthwise": {"kernel": jnp.ones((3, 3, 1, 6))}, "conv": {"kernel": jnp.ones((3, 3, 4, 6))}}
    with pytest.raises(ValueError, match=message):
        groups.find(params, rules=rules)
