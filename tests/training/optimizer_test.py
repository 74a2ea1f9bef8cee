"""The optimizer that a config stands for: how the phases of its penalty follow one another, and what it hands on."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from configs import nyu
from mtl_sparse import tasks
from mtl_sparse.models import multitask, resnet
from mtl_sparse.sparsity import penalties, reference, transform
from mtl_sparse.sparsity.projections import FreezeZeros, HoldNorm, KeepStrongest
from mtl_sparse.training import optimizer
from tests.conftest import raises

STEPS = 40
PARAMS = {"backbone": {"conv": {"kernel": jnp.ones((1, 1, 4, 3))}, "bn": {"scale": jnp.ones(3)}}}


def settings(**sparsity):
    config = nyu.get_config()
    config.optimizer.schedule = "constant"
    config.sparsity.update(sparsity)
    return config


def strengths(config):
    """The penalty's strength in each step of a run of STEPS."""
    tx = optimizer.build(config, STEPS)
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    grads, found = jax.tree.map(lambda x: 0.1 * x, PARAMS), []
    for _ in range(STEPS):
        _, state = step(grads, state, PARAMS)
        found.append(float(optimizer.lambda_(state)))
    return np.array(found), state


@pytest.mark.parametrize(
    ("sparsity", "settled", "full"),
    [
        ({"warmup_steps": 0}, 0, range(STEPS)),
        ({"warmup_steps": 10}, 11, range(10, STEPS)),
        ({"warmup_steps": 100}, 40, range(39, STEPS)),
        ({"warmup_steps": 10, "start_step": 20}, 31, range(30, STEPS)),
        ({"warmup_steps": 0, "start_step": 20}, 21, range(20, STEPS)),
        ({"warmup_steps": 100, "debias_at": 0.5}, 21, range(19, 20)),
        ({"warmup_steps": 100, "start_step": 18, "debias_at": 0.5}, 21, range(19, 20)),
        ({"warmup_steps": 0, "warmup": 0.25}, 11, range(10, STEPS)),
        ({"warmup_steps": 0, "warmup": 0.25, "start_at": 0.5}, 31, range(30, STEPS)),
    ],
)
def test_a_fixed_lambda_has_its_full_strength_before_a_checkpoint_can_be_the_best(sparsity, settled, full):
    config = settings(lambda_=1e-2, **sparsity)
    found, _ = strengths(config)
    np.testing.assert_array_equal(np.flatnonzero(np.isclose(found, 1e-2, rtol=1e-5)), list(full))
    assert optimizer.settled_step(config, STEPS) == settled
    if settled and not sparsity.get("debias_at"):
        assert full[0] < settled


def test_a_targets_lambda_is_the_one_that_is_told_once_it_is_frozen():
    """Though the warm-up were longer than the run."""
    config = settings(lambda_=1e-3, target=0.5, target_freeze=0.75, warmup_steps=100)
    found, state = strengths(config)
    assert (found[30:] == found[-1]).all() and found[-1] == pytest.approx(
        optimizer.settled_lambda(config, state), rel=1e-5
    )


def test_a_dense_run_has_no_last_phase():
    config = settings(lambda_=0.0, target=0.0, debias_at=0.85)
    assert optimizer.debias_step(config, STEPS) is None and optimizer.settled_step(config, STEPS) == 0


@pytest.mark.parametrize("debias_at", [0.01, 0.25, 0.99])
def test_phases_of_no_steps_are_named(debias_at):
    config = settings(lambda_=1e-2, start_step=10, debias_at=debias_at)
    code = "RUN_TOO_SHORT" if debias_at == 0.99 else "OPTION_CONFLICT"
    with raises(code, naming=f"debias_at={debias_at}"):
        optimizer.build(config, STEPS)


@pytest.fixture
def given(monkeypatch):
    """The arguments of each call of `optax.adamw`, `reference.like_reference` and `transform.proximal`, together."""
    calls = []

    def note(module, name):
        make = getattr(module, name)
        signature = inspect.signature(make)

        @functools.wraps(make)
        def noting(*args, **arguments):
            found = dict(signature.bind(*args, **arguments).arguments)
            calls[-1:] = [{**calls[-1], **found}] if calls and module is not optax else [*calls[-1:], found]
            return make(*args, **arguments)

        monkeypatch.setattr(module, name, noting)

    note(optax, "adamw")
    note(reference, "like_reference")
    note(transform, "proximal")
    return calls


def projection(arguments, kind):
    """The one projection of a kind, None if there is none."""
    return next((one for one in arguments["projections"] if isinstance(one, kind)), None)


# Option -> (its value, what the links get of it, that as a value).
HANDED_ON = {
    "sparsity.penalty": ("group_l0", lambda found: type(found["penalty"]), penalties.GroupL0),
    "sparsity.norm": ("unpenalized", lambda found: projection(found, HoldNorm).norm, "unpenalized"),
    "sparsity.start_at": (0.25, lambda found: [float(found["lambda_"](count)) > 0 for count in (9, 10)], [False, True]),
    "sparsity.group_weights": ("none", lambda found: found["penalty"].weights, "none"),
    "sparsity.start_step": (3, lambda found: [float(found["lambda_"](count)) > 0 for count in (2, 3)], [False, True]),
    "sparsity.metric": ("group", lambda found: found["metric"].kind, "group"),
    "sparsity.bias_correction": (False, lambda found: found["metric"].kind, "uncorrected"),
    "sparsity.fixed_norm": (False, lambda found: projection(found, HoldNorm), None),
    "sparsity.anneal_revival": (False, lambda found: found["regrowth"], "free"),
    "sparsity.penalty_in_gradient": (True, lambda found: type(found.get("penalty_in_gradient")), penalties.GroupLasso),
    "sparsity.scope": ("all", lambda found: found["penalty"].scope, "all"),
    "sparsity.lambda_": (0.25, lambda found: float(found["lambda_"](39)), 0.25),
    "sparsity.debias_at": (0.5, lambda found: projection(found, FreezeZeros), FreezeZeros(20)),
    "optimizer.b1": (0.5, lambda found: (found["b1"], found["metric"].b1), (0.5, 0.5)),
    "optimizer.b2": (0.5, lambda found: (found["b2"], found["metric"].b2), (0.5, 0.5)),
    "optimizer.eps": (0.5, lambda found: (found["eps"], found["metric"].eps), (0.5, 0.5)),
    "optimizer.weight_decay": (0.5, lambda found: found["weight_decay"], 0.5),
    "optimizer.l2": (0.5, lambda found: found.get("l2"), 0.5),
}


@pytest.mark.parametrize("name", HANDED_ON)
def test_every_option_reaches_the_optimizer(name, given):
    value, read, expected = HANDED_ON[name]
    config = settings(lambda_=1e-3, warmup_steps=0)
    optimizer.build(config, STEPS)
    assert read(given[-1]) != expected, "another value than the config's own"
    config.update_from_flattened_dict({name: value})
    optimizer.build(config, STEPS)
    assert read(given[-1]) == expected


def test_gamma_reaches_the_optimizer(given):
    optimizer.build(settings(penalty="group_mcp", gamma=7.0), STEPS)
    assert given[-1]["penalty"].gamma == 7.0


def test_a_target_counts_its_steps_from_the_start_of_the_penalty(given):
    optimizer.build(settings(target=0.5, start_step=10, lambda_=3e-4), STEPS)
    target = given[-1]["lambda_"]
    assert (target.total_steps, target.phases.start_step, target.initial) == (30, 10, 3e-4)


@pytest.mark.parametrize("steps", [8, 40, 4000])
def test_phases_by_fractions_follow_the_length_of_the_run(steps):
    config = settings(lambda_=1e-2, start_at=0.25, warmup=0.125, warmup_steps=0, debias_at=0.75)
    assert optimizer.start_step(config, steps) == steps // 4
    assert optimizer.warmup_steps(config, steps) == steps // 8
    assert optimizer.debias_step(config, steps) == 3 * steps // 4
    optimizer.build(config, steps)


def test_the_step_schedule_lowers_the_learning_rate_every_so_many_epochs():
    """LibMTL's: by half after 100 epochs. Here 3 steps an epoch, and two epochs between decreases."""
    config = settings(lambda_=0.0)
    assert (config.optimizer.step_epochs, config.optimizer.step_factor) == (100, 0.5)
    config.optimizer.update(schedule="step", learning_rate=1e-3, step_epochs=2, min_learning_rate=2e-4)
    config.train.epochs = 7
    tx = optimizer.build(config, 21)
    state, rates = tx.init(PARAMS), []
    for _ in range(21):
        _, state = jax.jit(tx.update)(PARAMS, state, PARAMS)
        rates.append(float(optimizer.learning_rate(state)))
    assert rates == pytest.approx([1e-3] * 6 + [5e-4] * 6 + [2.5e-4] * 6 + [2e-4] * 3)


def test_the_cosine_ends_at_the_smallest_learning_rate():
    config = settings(lambda_=0.0)
    config.optimizer.update(schedule="cosine", learning_rate=1e-3, min_learning_rate=1e-4)
    tx = optimizer.build(config, STEPS)
    state, rates = tx.init(PARAMS), []
    for _ in range(STEPS + 1):
        _, state = jax.jit(tx.update)(PARAMS, state, PARAMS)
        rates.append(float(optimizer.learning_rate(state)))
    assert rates[0] == pytest.approx(1e-3) and rates[STEPS // 2] == pytest.approx(5.5e-4)
    assert min(rates) == rates[-1] == pytest.approx(1e-4)


def kept(model, expression):
    """Layers of the model that the expression names, without "/kernel"."""
    paths = [path.removeprefix("params/") for path in multitask.shapes(model) if path.endswith("/kernel")]
    return {path.removesuffix("/kernel") for path in paths if re.fullmatch(expression, f"model/{path}")}


def test_layers_that_every_path_passes_keep_a_group_with_a_target(given):
    config = settings(target=0.5)
    config.model.update(depth=18, width=4, head_features=4, attach=("layer4_0/conv1",) * 3)
    optimizer.build(config, STEPS)
    model = multitask.build(config.model, tasks.resolve(config))
    backbone = {
        layer for layer in kept(model, projection(given[-1], KeepStrongest).kernels) if layer.startswith("backbone")
    }
    assert backbone == {f"backbone/{layer}" for layer in (
        "stem_conv1", "stem_conv2", "stem_conv3", "layer1_0/downsample_conv", "layer2_0/downsample_conv",
        "layer3_0/downsample_conv", "layer4_0/conv1",
    )}  # fmt: skip
    for change in ({"target": 0.0}, {"keep_connected": False}):
        config = settings(**{"target": 0.5, **change})
        optimizer.build(config, STEPS)
        assert projection(given[-1], KeepStrongest) is None


def test_without_one_of_those_layers_the_features_do_not_depend_on_the_image():
    """And without any one other layer they do."""
    model = resnet.ResNet(depth=10, width=4)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    apply = jax.jit(lambda params: model.apply({**variables, "params": params}, images))
    expression = "|".join(resnet.unavoidable())
    for layer, params in traverse_util.flatten_dict(variables["params"], sep="/").items():
        if layer.endswith("/kernel"):
            flat = traverse_util.flatten_dict(variables["params"], sep="/")
            features = apply(traverse_util.unflatten_dict(flat | {layer: 0 * params}, sep="/"))
            blind = bool(jnp.allclose(features[0], features[1], atol=1e-6))
            is_shortcut = "downsample" in layer
            if not is_shortcut:  # a shortcut's branch beside it still passes the image on
                assert blind == bool(re.fullmatch(expression, layer.removesuffix("/kernel"))), layer


def test_a_restart_comes_with_every_epoch_and_decay_acts_on_kernels(given):
    config = settings()
    config.train.epochs = 4
    optimizer.build(config, STEPS)
    assert given[-1].get("restart_every") is None
    config.optimizer.update(restart_each_epoch=True, l2=0.1)
    optimizer.build(config, STEPS)
    assert given[-1]["restart_every"] == 10
    params = {"model": {"backbone": {"conv": {"kernel": 1}, "bn": {"scale": 1, "bias": 1}}}, "weighting": {"depth": 1}}
    assert jax.tree.leaves(given[-1]["mask"](params)) == [False, False, True, False]
    assert jax.tree.leaves(given[-1]["l2_mask"](params)) == [True, True, True, False]
