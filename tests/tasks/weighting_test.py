"""Weightings against their published definitions, closed forms, independent solvers and random searches."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from mtl_sparse.tasks import weighting
from mtl_sparse.tasks.weighting import by_gradients, by_losses
from tests.conftest import raises

C, ALPHA = 0.4, 2.0  # defaults of CAGrad and FairGrad


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def jacobians(count, *, tasks=(2, 3, 4, 5)):
    """Return random gradients [K, D], whose lengths differ by up to a few times 10, some of them in conflict."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(count):
        k = tasks[i % len(tasks)]
        common = rng.normal(size=30) * rng.uniform(-1, 2)
        found.append(
            (rng.normal(size=(k, 30)) + common * rng.choice([-1, 1], (k, 1))) * np.exp(rng.normal(size=(k, 1)))
        )
    return found


CASES = jacobians(12)
TWO = [case for case in CASES if len(case) == 2]


@functools.partial(jax.jit, static_argnames=("name", "fairgrad_alpha"))
def jitted(name, gramian, **options):
    return weighting.gradient_weights(name, gramian, **options)


def weights(name, jacobian, **options):
    return np.asarray(jitted(name, jnp.asarray(jacobian @ jacobian.T), **options))


def simplex(count, size):
    return np.random.default_rng(1).dirichlet(np.full(size, 0.7), count)


def test_the_names_are_those_of_the_contract():
    names = {"pcgrad", "mgda", "cagrad", "imtl_g", "nash", "aligned", "fairgrad", "upgrad"}
    assert set(weighting.GRADIENT_NAMES) == names
    assert len(set(weighting.NAMES)) == len(weighting.NAMES) == 20


@pytest.mark.parametrize("jacobian", TWO)
def test_mgda_of_two_tasks_is_the_closed_form(jacobian):
    """The minimum of |a g1 + (1 - a) g2| over a in [0, 1]."""
    g1, g2 = jacobian
    a = np.clip((g2 - g1) @ g2 / ((g1 - g2) @ (g1 - g2)), 0, 1)
    np.testing.assert_allclose(weights("mgda", jacobian), [a, 1 - a], atol=1e-7)


@pytest.mark.parametrize("jacobian", CASES)
def test_no_convex_combination_is_shorter_than_mgdas(jacobian):
    w = weights("mgda", jacobian)
    assert w.min() >= 0 and w.sum() == pytest.approx(1)
    shortest = np.linalg.norm(simplex(20000, len(w)) @ jacobian, axis=1).min()
    assert np.linalg.norm(w @ jacobian) <= shortest * (1 + 1e-9)
    # Optimality: no gradient has a smaller product with the direction than the direction itself.
    products = jacobian @ (w @ jacobian)
    assert products.min() >= (w @ products) - 1e-9 * np.abs(products).max()


@pytest.mark.parametrize("jacobian", CASES)
def test_nash_and_fairgrad_solve_their_equations(jacobian):
    gramian = jacobian @ jacobian.T
    nash, fair = weights("nash", jacobian), weights("fairgrad", jacobian)
    np.testing.assert_allclose(gramian @ nash * nash, 1, rtol=1e-9)
    np.testing.assert_allclose(gramian @ fair * fair ** (1 / ALPHA), 1, rtol=1e-9)
    three = weights("fairgrad", jacobian, fairgrad_alpha=3.0)
    np.testing.assert_allclose(gramian @ three * three ** (1 / 3), 1, rtol=1e-9)
    np.testing.assert_allclose(weights("fairgrad", jacobian, fairgrad_alpha=1.0), nash, rtol=1e-9)
    assert nash.min() > 0 and fair.min() > 0


@pytest.mark.parametrize("jacobian", CASES)
def test_nothing_near_the_mean_gradient_helps_the_worst_task_more_than_cagrad(jacobian):
    """CAGrad maximizes the smallest product with a gradient in a ball around the mean gradient."""
    mean = jacobian.mean(0)
    radius = C * np.linalg.norm(mean)
    found = weights("cagrad", jacobian) @ jacobian
    assert np.linalg.norm(found - mean) <= radius * (1 + 1e-6)
    rng = np.random.default_rng(2)
    span = rng.normal(size=(20000, len(jacobian))) @ jacobian  # other directions do not change a product
    moves = span / np.linalg.norm(span, axis=1, keepdims=True) * radius * rng.uniform(0, 1, (20000, 1)) ** 0.1
    best = (jacobian @ (mean + moves).T).min(0).max()
    scale = np.abs(jacobian @ mean).max()
    assert (jacobian @ found).min() >= best - 1e-6 * scale
    # Weak duality: the least product of any direction in the ball is at most this, for every w.
    w = simplex(20000, len(jacobian)) @ jacobian
    bound = (w @ mean + radius * np.linalg.norm(w, axis=1)).min()
    assert (jacobian @ found).min() <= bound + 1e-6 * scale


@pytest.mark.parametrize("jacobian", CASES)
def test_upgrad_is_the_mean_of_projections_and_conflicts_with_no_task(jacobian):
    """The projections by SciPy's non-negative least squares: g_i plus a non-negative combination, the shortest one."""
    projected = []
    for gradient in jacobian:
        more, _ = scipy.optimize.nnls(jacobian.T, -gradient)
        projected.append(gradient + more @ jacobian)
    found = weights("upgrad", jacobian) @ jacobian
    np.testing.assert_allclose(found, np.mean(projected, 0), atol=1e-7 * np.abs(jacobian).max())
    assert (jacobian @ found).min() >= -1e-7 * np.square(jacobian).sum(1).max()


def test_pcgrad_by_hand():
    """Gradients (1, 0) and (-1, 1): without the conflict they are (1/2, 1/2) and (0, 1)."""
    jacobian = np.array([[1.0, 0.0], [-1.0, 1.0]])
    np.testing.assert_allclose(weights("pcgrad", jacobian), [2.0, 1.5])
    np.testing.assert_allclose(weights("pcgrad", jacobian) @ jacobian, [0.5, 1.5])
    agreeing = np.array([[1.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(weights("pcgrad", agreeing), [1, 1])


def surgery(jacobian, orders):
    """Return the sum of the gradients without their conflicts, each removed in its order; by vectors."""
    total = 0
    for i, order in enumerate(orders):
        gradient = jacobian[i].copy()
        for j in order:
            if j != i and gradient @ jacobian[j] < 0:
                gradient = gradient - gradient @ jacobian[j] / (jacobian[j] @ jacobian[j]) * jacobian[j]
        total = total + gradient
    return total


def test_pcgrad_averages_over_all_orders_or_draws_one():
    jacobian = np.array([[1.0, 0.0, 0.2], [-0.6, 0.8, 0.1], [-0.5, -0.8, 0.3]])  # each two are in conflict
    every = list(itertools.permutations(range(3)))
    same = [surgery(jacobian, [order] * 3) for order in every]  # enough, as the mean is taken of each task alone
    np.testing.assert_allclose(weights("pcgrad", jacobian) @ jacobian, np.mean(same, 0), rtol=1e-7)
    possible = np.array([surgery(jacobian, orders) for orders in itertools.product(every, repeat=3)])
    assert len(np.unique(possible.round(9), axis=0)) == 8, "two orders of the others for each task"
    gramian = jnp.asarray(jacobian @ jacobian.T)
    drawn = jax.jit(jax.vmap(lambda key: weighting.gradient_weights("pcgrad", gramian, key=key)))
    found = np.asarray(drawn(jax.random.split(jax.random.key(0), 300)) @ jacobian)
    nearest = np.abs(found[:, None] - possible).max(-1)
    assert (nearest.min(1) < 1e-9).all()
    assert len(np.unique(found.round(9), axis=0)) == 8


@pytest.mark.parametrize("jacobian", CASES)
def test_imtl_g_projects_equally_on_all_gradients(jacobian):
    w = weights("imtl_g", jacobian)
    assert w.sum() == pytest.approx(1)
    projections = (jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)) @ (w @ jacobian)
    np.testing.assert_allclose(projections, projections.mean(), rtol=1e-7)


def test_imtl_g_and_aligned_by_hand():
    """At right angles with lengths 1 and 3: equal projections weigh by 1 / length, equal components by 1 / length."""
    jacobian = np.array([[1.0, 0.0], [0.0, 3.0]])
    np.testing.assert_allclose(weights("imtl_g", jacobian), [0.75, 0.25], rtol=1e-9)
    np.testing.assert_allclose(weights("aligned", jacobian), [1, 1 / 3], rtol=1e-9)


@pytest.mark.parametrize("jacobian", CASES)
def test_aligned_gives_all_principal_components_the_shortest_length(jacobian):
    """By the singular value decomposition of the gradients, which the method itself does not make."""
    left, lengths, right = np.linalg.svd(jacobian, full_matrices=False)
    aligned = lengths.min() * left @ right
    np.testing.assert_allclose(weights("aligned", jacobian) @ jacobian, aligned.sum(0), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", weighting.GRADIENT_NAMES)
def test_permuting_the_tasks_permutes_the_weights(name):
    for jacobian in CASES:
        order = np.random.default_rng(len(jacobian)).permutation(len(jacobian))
        np.testing.assert_allclose(weights(name, jacobian[order]), weights(name, jacobian)[order], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["nash", "imtl_g"])
def test_the_direction_does_not_depend_on_the_scales_of_the_losses(name):
    for jacobian in CASES:
        scales = np.exp(np.random.default_rng(len(jacobian)).normal(size=(len(jacobian), 1)) * 2)
        given, scaled = (weights(name, its) @ its for its in (jacobian, scales * jacobian))
        cosine = given @ scaled / np.linalg.norm(given) / np.linalg.norm(scaled)
        assert cosine == pytest.approx(1, abs=1e-9)
        if name == "nash":
            np.testing.assert_allclose(given, scaled, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", weighting.GRADIENT_NAMES)
def test_float32_gives_the_direction_of_float64_jitted_and_vmapped(name):
    cases = [case for case in CASES if len(case) == 3]
    gramians = np.stack([case @ case.T for case in cases])
    mapped = jax.jit(jax.vmap(lambda gramian: weighting.gradient_weights(name, gramian)))
    wide, narrow = mapped(jnp.asarray(gramians)), mapped(jnp.asarray(gramians, jnp.float32))
    assert (wide.dtype, narrow.dtype) == (jnp.float64, jnp.float32)
    for jacobian, a, b in zip(cases, wide, narrow, strict=True):
        want = np.asarray(a) @ jacobian
        assert np.linalg.norm(np.asarray(b, np.float64) @ jacobian - want) < 1e-3 * np.linalg.norm(want)
        np.testing.assert_allclose(a, weights(name, jacobian), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", weighting.GRADIENT_NAMES)
def test_tasks_without_a_gradient_get_no_weight_and_do_not_change_the_others(name):
    jacobian = CASES[1]
    padded = np.insert(jacobian, 1, 0.0, axis=0)
    found = weights(name, padded)
    assert found[1] == 0
    np.testing.assert_allclose(np.delete(found, 1), weights(name, jacobian), rtol=1e-5, atol=1e-7)
    assert not weights(name, np.zeros((3, 4))).any()
    for hard in ([[1.0, -1.0], [-1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]], [[1e-30, 0.0], [0.0, 1e-28]], [[3.0]]):
        for dtype in (jnp.float32, jnp.float64):
            assert np.isfinite(jitted(name, jnp.asarray(hard, dtype))).all(), (hard, dtype)
    for wrong in (np.nan, np.inf):
        assert np.isnan(jitted(name, jnp.array([[wrong, 0.0], [0.0, 1.0]]))).all()
        assert np.isnan(jitted(name, jnp.array([[1.0, wrong], [wrong, 1.0]]))).all()


@pytest.mark.parametrize("name", weighting.GRADIENT_NAMES)
@pytest.mark.parametrize("scale", [1e6, 1e-9])
def test_a_task_without_a_gradient_among_long_and_short_gradients(name, scale):
    jacobian = CASES[0] * scale
    for dtype in (jnp.float32, jnp.float64):
        given, padded = (
            jitted(name, jnp.asarray(its @ its.T, dtype)) for its in (jacobian, np.insert(jacobian, 1, 0.0, axis=0))
        )
        assert padded[1] == 0
        np.testing.assert_allclose(np.delete(padded, 1), given, rtol=2e-3)


def test_bad_gramians_and_names_are_refused():
    with raises("OPTION_UNKNOWN_VALUE", naming="cagrad"):
        weighting.gradient_weights("cagard", jnp.eye(2))
    for wrong in (jnp.ones((2, 3)), jnp.ones(3), jnp.zeros((0, 0))):
        with raises("GRAMIAN_INVALID", naming=str(wrong.shape)):
            weighting.gradient_weights("mgda", wrong)
    with raises("GRAMIAN_INVALID", naming="int"):
        weighting.gradient_weights("mgda", jnp.eye(2, dtype=int))
    for options in ({"cagrad_c": 1.0}, {"cagrad_c": -0.1}, {"fairgrad_alpha": 0.0}):
        with raises("OPTION_OUT_OF_RANGE", naming="{}={}".format(*next(iter(options.items())))):
            weighting.gradient_weights("mgda", jnp.eye(2), **options)
    with raises("GRAMIAN_INVALID", naming="key"):
        weighting.gradient_weights("pcgrad", jnp.eye(7))
    assert weighting.gradient_weights("pcgrad", jnp.eye(7), key=jax.random.key(0)).shape == (7,)


def test_the_gramian_of_a_tree_is_that_of_the_joined_gradients():
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(3, 4, 5)), "b": {"c": rng.normal(size=(3, 7))}}
    joined = np.concatenate([tree["a"].reshape(3, -1), tree["b"]["c"]], 1)
    np.testing.assert_allclose(weighting.gramian(jax.tree.map(jnp.asarray, tree)), joined @ joined.T)
    narrow = weighting.gramian(jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree))
    assert narrow.dtype == jnp.float32
    assert weighting.gramian(jnp.ones((2, 3))).dtype == jnp.float64
    np.testing.assert_allclose(narrow, joined @ joined.T, rtol=0.05, atol=0.2)


def test_gradnorm_balances_the_lengths_of_the_weighted_gradients():
    """With equal training rates, the weights become those that make all weighted gradients equally long."""
    options = types.SimpleNamespace(gradnorm_alpha=1.5, gradnorm_learning_rate=0.025)
    tasks, losses = ("a", "b", "c"), jnp.ones(3)
    gramian = jnp.diag(jnp.array([1.0, 4.0, 16.0]))
    state = by_gradients.gradnorm_start(tasks)
    np.testing.assert_allclose(by_gradients.gradnorm_weights(state, tasks), 1)

    @jax.jit
    def step(state, losses):
        return by_gradients.gradnorm_update(state, tasks, losses, jnp.ones(3, bool), gramian, options)

    for _ in range(600):
        state = step(state, losses)
    found = np.asarray(by_gradients.gradnorm_weights(state, tasks))
    assert found.sum() == pytest.approx(3)
    np.testing.assert_allclose(found * [1, 2, 4], np.mean(found * [1, 2, 4]), rtol=0.05)
    for _ in range(600):  # task b learns slowest: its loss is still half the first one, the others' a tenth
        state = step(state, jnp.array([0.1, 0.5, 0.1]))
    later = np.asarray(by_gradients.gradnorm_weights(state, tasks))
    assert later[1] > 1.5 * found[1] and later[0] < found[0]
    np.testing.assert_allclose(list(state["first_loss"].values()), 1)


def test_gradnorm_by_hand():
    """The gradient of one step; a task without a label and one whose first loss is 0 do not count.

    Relative to the first loss, a has 1.6 and b 0.4 of the mean, so that both weighted gradients are shorter than their
    targets, 1.6 ** 1.5 and 0.4 ** 1.5. The derivatives by the weights are -1.8, -0.2, 0 and 0; those by the logits are
    these minus their mean.
    """
    options = types.SimpleNamespace(gradnorm_alpha=1.5, gradnorm_learning_rate=0.025)
    tasks, labeled = ("a", "b", "c", "d"), jnp.array([True, True, False, True])
    start = by_gradients.gradnorm_start(tasks)
    first = by_gradients.gradnorm_update(start, tasks, jnp.array([1.0, 1.0, 7.0, 0.0]), labeled, jnp.eye(4), options)
    np.testing.assert_array_equal(list(first["first_loss"].values()), [1, 1, np.nan, 0])
    start["first_loss"] = dict(zip(tasks, jnp.array([1.0, 1.0, 1.0, 0.0]), strict=True))
    gramian = jnp.diag(jnp.array([1.8, 0.2, 1.0, 3.0]) ** 2)
    state = by_gradients.gradnorm_update(start, tasks, jnp.array([1.6, 0.4, 5.0, 2.0]), labeled, gramian, options)
    gradient = np.array(list(state["optimizer"][0].mu.values())) / 0.1  # Adam's first moment
    np.testing.assert_allclose(gradient, [-1.3, 0.3, 0.5, 0.5], rtol=1e-6)


OPTIONS = types.SimpleNamespace(
    uw_so_temperature=2.0, dwa_temperature=2.0, stch_mu=0.5, stch_warmup_epochs=1, famo_learning_rate=0.1,
    famo_weight_decay=0.0,
)  # fmt: skip
LOSSES = jnp.array([2.0, 4.0])


def context(name, *, learned=(0.0, 0.0), labeled=(True, True), state=None, epoch=0, key=0, fixed=(0.5, 0.25)):
    return by_losses.Step(
        jnp.array(labeled),
        jnp.array(learned),
        by_losses.start(name, "ab") if state is None else state,
        jnp.array(epoch),
        jax.random.key(key),
        ("a", "b"),
        OPTIONS,
        jnp.array(fixed),
    )


def value_and_weights(name, losses=LOSSES, **options):
    step = context(name, **options)
    value, found = jax.value_and_grad(by_losses.OBJECTIVES[name])(jnp.asarray(losses), step)
    return float(value), np.asarray(found)


def by_hand():
    softmax = np.exp([1 / 2 / 2, 1 / 4 / 2]) / np.exp([1 / 2 / 2, 1 / 4 / 2]).sum()
    return [
        ("equal", {}, 6, [1, 1]),
        ("fixed", {}, 2, [0.5, 0.25]),
        ("uncertainty", {"learned": (0, np.log(2))}, 2 + 2 + np.log(2), [1, 0.5]),
        ("imtl_l", {"learned": (0, np.log(2))}, 2 + 8 - np.log(2), [1, 2]),
        ("si", {}, np.log(8), [1 / 2, 1 / 4]),
        ("gls", {}, np.sqrt(8), [np.sqrt(8) / 4, np.sqrt(8) / 8]),
        ("uw_so", {}, softmax @ [2, 4], softmax),
        ("dwa", {}, 6, [1, 1]),
        ("stch", {}, np.log(8), [1 / 2, 1 / 4]),
        ("famo", {}, 8 / 3 * (np.log(2) + np.log(4)) / 2, [8 / 3 / 4, 8 / 3 / 8]),
    ]


@pytest.mark.parametrize(("name", "options", "value", "found"), by_hand())
def test_objectives_by_hand(name, options, value, found):
    """The weight of a task is the derivative by its loss."""
    got, weights = value_and_weights(name, **options)
    assert got == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(weights, found, rtol=1e-6)


@pytest.mark.parametrize("name", [*by_losses.OBJECTIVES])
def test_a_task_without_a_label_adds_nothing(name):
    """Whatever its loss is: the gradients by the other task are those of that task alone."""
    options = {"labeled": (True, False), "learned": (0.3, 0.7)}
    value, found = value_and_weights(name, (2.0, 0.0), **options)
    assert value_and_weights(name, (2.0, 9.0), **options)[0] == value
    assert np.isfinite(value) and found[1] == 0 and found[0] > 0


@pytest.mark.parametrize("name", [name for name in by_losses.OBJECTIVES if name != "rlw"])
def test_with_labels_of_one_task_the_objective_is_that_of_the_task_alone(name):
    """Not with random weights, which add up to 1 over all tasks."""
    for epoch in (0, 9):
        both = context(name, labeled=(True, False), learned=(0.3, 0.7), epoch=epoch)
        alone = both._replace(
            labeled=both.labeled[:1], learned=both.learned[:1], state=by_losses.start(name, "a"), tasks=("a",),
            weights=both.weights[:1],
        )  # fmt: skip
        objective = jax.value_and_grad(by_losses.OBJECTIVES[name])
        (value, found), (want, weight) = objective(LOSSES, both), objective(LOSSES[:1], alone)
        np.testing.assert_allclose([value, found[0]], [want, weight[0]], rtol=1e-6)


@pytest.mark.parametrize("name", [*by_losses.OBJECTIVES])
def test_a_batch_without_labels_changes_nothing(name):
    for epoch in (0, 9):
        value, found = value_and_weights(name, (0.0, 0.0), labeled=(False, False), learned=(0.3, 0.7), epoch=epoch)
        assert value == 0 and (found == 0).all()


def test_uncertainty_is_least_at_the_log_of_the_loss():
    grads = jax.grad(lambda s: by_losses.OBJECTIVES["uncertainty"](LOSSES, context("uncertainty", learned=s)))
    np.testing.assert_allclose(grads(jnp.log(LOSSES)), 0, atol=1e-6)


def test_random_weights_are_positive_add_up_to_one_and_follow_the_key():
    first, again, other = (value_and_weights("rlw", key=key)[1] for key in (0, 0, 1))
    assert first.sum() == pytest.approx(1) and first.min() > 0
    assert (first == again).all() and (first != other).all()


def steps(name, rows, state=None, spe=2):
    """Return the states after the steps with these losses (and labels), of `spe` steps an epoch."""
    state = by_losses.start(name, "ab") if state is None else state
    for i, (losses, labeled) in enumerate(rows):
        step = context(name, state=state, labeled=labeled, epoch=i // spe)
        state = by_losses.update(name, jnp.array(losses), step, None, jnp.array((i + 1) % spe == 0))
    return state


def test_dwa_weighs_by_the_ratio_of_the_last_two_epochs():
    yes, first_only = (True, True), (True, False)
    epochs = [((2.0, 8.0), yes), ((4.0, 0.0), first_only), ((1.0, 4.0), yes), ((2.0, 4.0), yes)]
    assert value_and_weights("dwa", state=steps("dwa", epochs[:3]))[1].tolist() == [1, 1]
    state = steps("dwa", epochs)
    assert {name: float(value) for name, value in state["before"].items()} == {"a": 3, "b": 8}
    assert {name: float(value) for name, value in state["last"].items()} == {"a": 1.5, "b": 4}
    later = steps("dwa", [((5.0, 0.0), first_only)] * 2, state)
    assert (float(later["last"]["a"]), float(later["last"]["b"])) == (5, 4), "b had no label in the epoch"
    np.testing.assert_allclose(value_and_weights("dwa", state=state)[1], [1, 1])
    state = {**state, "last": {"a": jnp.array(3.0), "b": jnp.array(4.0)}}
    rates = np.exp(np.array([3 / 3, 4 / 8]) / 2)
    np.testing.assert_allclose(value_and_weights("dwa", state=state)[1], 2 * rates / rates.sum(), rtol=1e-6)
    state = {
        **state,
        "before": {"a": jnp.array(3.0), "b": jnp.array(jnp.nan)},
        "last": {"a": jnp.array(9.0), "b": jnp.array(4.0)},
    }
    assert value_and_weights("dwa", state=state)[1].tolist() == [1, 1], "until all ratios are known"


def test_stch_compares_with_the_losses_of_the_epoch_after_its_warmup():
    yes = (True, True)
    rows = [((9.0, 9.0), yes)] * 2 + [((1.0, 4.0), yes), ((3.0, 4.0), yes)]  # epoch 0 warms up, epoch 1 measures
    assert not np.isfinite(list(steps("stch", rows[:2])["mean"].values())).any()
    state = steps("stch", [*rows, ((7.0, 7.0), yes), ((7.0, 7.0), yes)])
    assert {name: float(value) for name, value in state["mean"].items()} == {"a": 2, "b": 4}
    value, found = value_and_weights("stch", (3.0, 4.0), state=state, epoch=2)
    relative = np.array([3 / 2, 4 / 4]) ** (1 / 0.5)
    assert value == pytest.approx(2 * 0.5 * np.log(relative.sum()), rel=1e-6)
    np.testing.assert_allclose(found, 2 * relative / relative.sum() / [3, 4], rtol=1e-6)
    early = value_and_weights("stch", (3.0, 4.0), state=state, epoch=1)[0]
    assert early == pytest.approx(np.log(12), rel=1e-6), "the sum of logarithms until then"


def test_famo_moves_weight_to_the_task_that_improves_less():
    step = context("famo")
    state = by_losses.update("famo", LOSSES, step, jnp.array([1.0, 3.9]), jnp.array(False))
    assert float(state["logits"]["a"]) == pytest.approx(-0.1, rel=1e-4), "Adam's first step is the learning rate"
    assert float(state["logits"]["b"]) == pytest.approx(0.1, rel=1e-4)
    found = value_and_weights("famo", state=state)[1]
    shares = np.exp([-0.1, 0.1]) / np.exp([-0.1, 0.1]).sum()
    scale = 1 / (shares / [2, 4]).sum()
    np.testing.assert_allclose(found, scale * shares / [2, 4], rtol=1e-4)


def test_famos_logits_decay_and_do_not_learn_from_one_task_alone():
    start = by_losses.start("famo", "ab") | {"logits": {"a": jnp.array(1.0), "b": jnp.array(-2.0)}}
    options = types.SimpleNamespace(**{**vars(OPTIONS), "famo_weight_decay": 0.5})
    step = context("famo", state=start, labeled=(True, False))._replace(options=options)
    state = by_losses.update("famo", LOSSES, step, jnp.array([1.0, 0.1]), jnp.array(False))
    gradient = np.array(list(state["optimizer"][1][0].mu.values())) / 0.1  # Adam's first moment
    np.testing.assert_allclose(gradient, [0.5, -1.0], rtol=1e-6)


def test_states_of_fewer_tasks():
    """A compact model of some of the tasks keeps their part of the state."""
    for name in ("dwa", "stch", "famo", "gradnorm"):
        state = weighting.start(name, ("a", "b", "c"))
        some = weighting.of_tasks(name, state, ("c", "a"), ("a", "b", "c"))
        want = weighting.start(name, ("c", "a"))
        assert jax.tree.structure(some) == jax.tree.structure(want)
    assert weighting.of_tasks("gradnorm", weighting.start("gradnorm", "ab"), "a", "ab") == {}
    assert weighting.start("equal", "ab") == weighting.start("nash", "ab") == {}
    assert weighting.init("imtl_l", "ab") == {"a": 0.0, "b": 0.0} and weighting.init("nash", "ab") == {}


def loss_options(weighting_name, weights=(), gradients_of="params"):
    return types.SimpleNamespace(weighting=weighting_name, weights=weights, gradients_of=gradients_of)


def test_bad_options_are_named():
    with raises("OPTION_UNKNOWN_VALUE", naming="'gradnorm'") as caught:
        weighting.check(loss_options("gradnrom"), ["a"])
    assert "loss.weighting" in str(caught.value) and ", ".join(weighting.NAMES) in str(caught.value)
    for weights in ((1.0,), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf")), (1.0, "2")):
        with raises("OPTION_OUT_OF_RANGE", naming=f"loss.weights={weights}") as caught:
            weighting.check(loss_options("fixed", weights), ["a", "b"])
        assert "(a, b)" in str(caught.value)
    with raises("OPTION_OUT_OF_RANGE", naming="loss.weights=('layer1_0',)"):
        weighting.check(loss_options("stch", ("layer1_0",)), ["a"])
    with raises("OPTION_UNKNOWN_VALUE", naming="gradients_of='heads'"):
        weighting.check(loss_options("mgda", gradients_of="heads"), ["a", "b"])
    with raises("OPTION_CONFLICT", naming="layer1_0"):
        weighting.check(loss_options("mgda", gradients_of="features"), ["a", "b"], ("layer1_0", "layer2_0"))
    weighting.check(loss_options("mgda", gradients_of="features"), ["a", "b"], ("layer1_0", "layer1_0"))
    weighting.check(loss_options("mgda"), ["a", "b"], ("layer1_0", "layer2_0"))
