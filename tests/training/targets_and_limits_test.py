"""Options of a run's groups, targets and limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import demo
from mtl_sparse import tasks
from mtl_sparse.compaction import multitask as compaction
from mtl_sparse.compaction.liveness import Costs
from mtl_sparse.models import costs, multitask
from mtl_sparse.sparsity import groups as groups_lib
from mtl_sparse.sparsity import stats
from mtl_sparse.training import config as config_lib
from mtl_sparse.training import groups, optimizer
from tests.conftest import raises


def settings(depth=10, **sparsity):
    config = demo.get_config()
    config.data.size = (32, 48)
    config.model.update(depth=depth, width=8, head_features=16)
    config.sparsity.update({"target": 0.0, "lambda_": 1e-4, **sparsity})
    return config


def initial(config):
    model = multitask.build(config.model, tasks.resolve(config))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *config.data.size, 3)))
    return model, variables


def tree(variables):
    return {"model": variables["params"], "weighting": {}}


def with_zeros(params, sets, fraction, seed=0):
    """Return the tree with that fraction of the groups of each set zero.

    At least one of each set stays, the first one if the fraction is 1.
    """
    rng, leaves = np.random.default_rng(seed), groups_lib.by_path(params)
    for one in sets:
        alive = rng.random(one.count) >= fraction
        alive[rng.integers(one.count) if fraction < 1 else 0] = True
        x = [leaves[path] for path in one.paths]
        masks = one.spread(jnp.asarray(alive), x)
        leaves |= {path: a * mask for path, a, mask in zip(one.paths, x, masks, strict=True)}
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[groups_lib.path_name(path)], params)


@pytest.mark.parametrize("kind", groups.KINDS)
@pytest.mark.parametrize("depth", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_what_is_left_is_what_compaction_leaves(kind, depth):
    """MACs and parameters as results.json has them, where each layer gathers its channels."""
    config = settings(depth, groups=kind, target_macs=0.25, group_weights="macs")
    params, expected = after_compaction(config, groups.find(config), 0.5)
    assert groups.left(config, params) == pytest.approx(expected, abs=0.005)
    assert expected["macs_left"] < 0.8


def after_compaction(config, sets, fraction):
    """Return (a tree with that fraction of the groups zero, what compaction leaves, named as by `groups.left`)."""
    model, variables = initial(config)
    params = with_zeros(tree(variables), sets, fraction)
    variables = {**variables, "params": params["model"]}
    size = tuple(config.data.size)
    always_gather = Costs(mac=1, copy=0, split=0)
    small = costs.total(*compaction.compact(model, variables, size=size, costs=always_gather), size)
    dense = costs.total(model, variables, size)
    return params, {f"{key}_left": small[key] / dense[key] for key in ("macs", "parameters")}


def test_coupled_groups_are_the_backbones_channels_with_all_their_readers():
    config = settings(groups="coupled")
    _, variables = initial(config)
    found = groups.find(config)
    paths = [path for one in found for path in one.paths]
    assert len(set(paths)) == len(paths)
    conv = {entry.path for entry in groups_lib.find(tree(variables), "backbone")}
    assert conv <= set(paths)
    heads = {path for path in paths if "/head_" in path}
    assert {path.rsplit("/", 2)[1] for path in heads} == {"aspp0", "aspp1", "aspp2", "aspp3", "pool"}
    last = next(one for one in found if heads.intersection(one.paths))
    assert heads <= set(last.paths) and last.count == 64
    inside = groups.of_heads(config)
    assert not {path for one in inside for path in one.paths} & set(paths)
    assert "model/head_depth/out/kernel" in {path for one in inside for path in one.paths}


def test_input_groups_are_found_by_name_as_before_and_by_the_graph_alike():
    config = settings()
    assert groups.find(config) is None and groups.of_model(config) is None
    by_graph = groups.find(settings(group_weights="macs"))
    _, variables = initial(config)
    by_name = {one.path: one for one in groups_lib.find(tree(variables), "backbone")}
    assert {one.path: one for one in by_graph} == by_name
    assert all((one.costs > 0).all() for one in by_graph)


@pytest.mark.parametrize("coupled", [pytest.param(True, marks=pytest.mark.slow), False])
def test_excluded_layers_stay(coupled):
    config = settings(groups="coupled" if coupled else "input", exclude=("backbone/stem_.*", "backbone/layer4_0/conv2"))
    paths = {path for one in groups.find(config) for path in one.paths}
    assert not any("stem" in path or "layer4_0/conv2" in path for path in paths)
    assert "model/backbone/layer4_0/conv1/kernel" in paths
    tx = optimizer.build(settings(lambda_=1e3, warmup=0.0, exclude=config.sparsity.exclude), 10)
    params = tree(initial(config)[1])
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    backbone = optax.apply_updates(params, updates)["model"]["backbone"]
    assert backbone["stem_conv2"]["kernel"].all() and not backbone["layer1_0"]["conv2"]["kernel"].any()


def test_limits_and_the_target_of_the_heads_act():
    config = settings(target=0.5, at_least=2, max_removed=0.75, head_target=0.9, lambda_=1e4, warmup=0.0)
    tx = optimizer.build(config, 20)
    params = tree(initial(config)[1])
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(4):
        grads = jax.tree.map(lambda p: 1e-3 * p, params)
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    found = stats.sparsity(params["model"], "all").layers
    for layer in found:
        alive = layer.groups - layer.zero_groups
        assert alive >= min(layer.groups, max(2, -(-layer.groups // 4))), layer
    heads = [layer for layer in found if layer.path.startswith("head_")]
    assert sum(layer.zero_groups for layer in heads) > 0
    assert float(optimizer.lambda_(state)) != float(state.inner_state.inner.lambda_)


@pytest.mark.parametrize(
    ("sparsity", "code", "naming"),
    [
        ({"groups": "channels"}, "OPTION_UNKNOWN_VALUE", "groups='channels'"),
        ({"target": 0.5, "target_macs": 0.2}, "OPTION_CONFLICT", "target and sparsity.target_macs"),
        ({"target_params": 0.5, "lambda_": 0.0}, "OPTION_CONFLICT", "target_params=0.5 needs a sparsity.lambda_"),
        ({"penalty": "l1", "groups": "coupled"}, "OPTION_CONFLICT", "single weights"),
        ({"penalty": "l1", "max_removed": 0.5}, "OPTION_CONFLICT", "single weights"),
        ({"exclude": ("backbone/stem_conv9",)}, "OPTION_UNKNOWN_VALUE", "nearest: backbone/stem_conv3"),
        ({"exclude": ("(",)}, "OPTION_TYPE", "regular expression"),
        ({"exclude": (".*",), "groups": "coupled"}, "OPTION_CONFLICT", "leaves no layer"),
        ({"target": 0.7, "max_removed": 0.5}, "OPTION_CONFLICT", "cannot be reached"),
        ({"target": 0.9, "at_least": 8}, "OPTION_CONFLICT", "at_least=8"),
        ({"target_macs": 0.1, "max_removed": 0.5}, "OPTION_CONFLICT", "% of the MACs left"),
        ({"target_params": 0.1, "max_removed": 0.5}, "OPTION_CONFLICT", "% of the parameters left"),
        ({"head_target": 0.5}, "OPTION_CONFLICT", "needs a target of the backbone"),
        ({"head_target": 0.5, "target": 0.5, "scope": "all"}, "OPTION_CONFLICT", "scope='backbone'"),
        ({"target_macs": 1.0}, "OPTION_OUT_OF_RANGE", "target_macs"),
        ({"max_removed": 1.5}, "OPTION_OUT_OF_RANGE", "max_removed"),
        ({"at_least": 0}, "OPTION_OUT_OF_RANGE", "at_least"),
        ({"exclude": (3,)}, "OPTION_TYPE", "exclude"),
    ],
)
def test_bad_options_are_named(sparsity, code, naming):
    with raises(code, naming=naming):
        config_lib.check(settings(**sparsity))


@pytest.mark.parametrize("sparsity", [{"target": 0.7, "max_removed": 0.8}, {"target_macs": 0.4, "max_removed": 0.8}])
def test_limits_that_fit_a_target_are_accepted(sparsity):
    config_lib.check(settings(**sparsity))


@pytest.mark.parametrize("kind", groups.KINDS)
def test_the_least_is_what_compaction_leaves_of_one_group_in_each_kernel(kind):
    """Of penalized kernels: excluded ones stay, and those inside the heads go with a target of their own."""
    config = settings(groups=kind, target_macs=0.5, group_weights="macs")
    penalized, inside = groups.find(config), groups.of_heads(config)
    path = penalized[0].paths[0]
    others = tuple(one for one in penalized if path not in one.paths)
    name = path.removeprefix("model/").removesuffix("/kernel")
    cases = ((penalized, {}), (others, {"exclude": (name,)}), (penalized + inside, {"head_target": 0.9}))
    found = []
    for sets, options in cases:
        config.sparsity.update({"exclude": (), "head_target": 0.0} | options)
        found.append(groups.least(config))
        expected = after_compaction(config, sets, 1.0)[1]
        assert {f"{key}_left": value for key, value in found[-1].items()} == pytest.approx(expected, abs=0.01), options
    assert found[2]["macs"] < found[0]["macs"] < found[1]["macs"]
    config.sparsity.update(head_target=0.0, at_least=3)
    assert groups.least(config)["macs"] > found[0]["macs"]


def test_a_target_that_takes_whole_kernels_is_warned_of(caplog):
    least = {kind: groups.least(settings(groups=kind))["parameters"] for kind in groups.KINDS}
    assert least["coupled"] < least["input"]
    wanted = (least["coupled"] + least["input"]) / 2
    enough = (settings(target_params=wanted, groups="coupled"), settings(target_params=least["input"] + 0.01))
    compact = settings(target_params=wanted)
    compact.model.widths = "{}"
    for config in (*enough, compact, settings(target=0.99)):
        groups.warn_of_target(config)
    assert not caplog.messages
    groups.warn_of_target(settings(target_params=wanted))
    (message,) = caplog.messages
    assert f"sparsity.target_params={wanted}" in message
    assert f"{100 * least['input']:.1f} % of the parameters" in message
    assert "groups=coupled" in message


def test_the_limits_of_a_compact_run_are_those_of_the_run_that_it_is_of():
    config = settings(target_macs=0.01, max_removed=0.5)
    with raises("OPTION_CONFLICT", naming="% of the MACs left"):
        groups.check(config)
    config.model.widths = "{}"
    groups.check(config)
