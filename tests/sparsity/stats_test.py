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
    assert [(layer.path, layer.groups, layer.zero_groups, layer.group_size) for layer in found.layers] == [
        ("backbone/a/kernel", 4, 2, 18),
        ("backbone/b/kernel", 2, 1, 3),
    ]
    assert found.group == pytest.approx(3 / 6)
    assert found.parameter == pytest.approx((2 * 18 + 3) / (4 * 18 + 2 * 3))


def test_scope_all_takes_the_heads_too():
    assert stats.sparsity(PARAMS, "all").group == pytest.approx((2 + 1 + 5) / (4 + 2 + 5))


def test_a_tree_without_a_backbone_is_taken_whole():
    assert [found.path for found in groups.find(PARAMS["backbone"])] == ["a/kernel", "b/kernel"]
    with pytest.raises(ValueError, match="matches no conv kernel"):
        groups.find(PARAMS["head"], "backbone")
