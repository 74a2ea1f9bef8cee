import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_sparse.sparsity import control, stats, transform
from mtl_sparse.sparsity.penalties import GroupL0, GroupLasso, GroupMCP
from mtl_sparse.sparsity.schedules import Phases

TARGET = control.Target(0.8, total_steps=100, ramp=0.5, freeze=0.8, gain=20.0, damping=0.5, slew=20.0)


def test_the_schedule_by_hand():
    assert [float(TARGET.scheduled(step)) for step in (0, 25, 50, 100)] == pytest.approx([0, 0.8 * 0.875, 0.8, 0.8])


@pytest.mark.parametrize(
    ("last_gap", "moved"), [(0.1, 20 * 0.5 * 25 / 50**2 + 0.5 * 0.4), (-0.9, 20 / 50)], ids=["free", "at its limit"]
)
def test_a_step_by_hand(last_gap, moved):
    state = control.ControlState(jnp.log(1e-4), jnp.float32(last_gap))
    new = control.update(TARGET, state, measured=0.2, step=jnp.int32(25))
    assert float(new.gap) == pytest.approx(0.5)
    assert float(new.log_lambda - state.log_lambda) == pytest.approx(moved, rel=1e-5)


def test_lambda_falls_where_too_much_is_zero():
    state = control.update(TARGET, control.init(1e-4), measured=0.9, step=jnp.int32(60))
    assert float(state.log_lambda) < np.log(1e-4)


def test_lambda_stays_near_what_prunes_half_of_the_groups():
    for start, reached in ((1e-8, 1e-4 / 30), (1e-1, 1e-4 * 30)):
        state = control.clamp(TARGET, control.init(start), scale=1e-4, step=jnp.int32(1))
        assert float(jnp.exp(state.log_lambda)) == pytest.approx(reached, rel=1e-3)


def test_the_upper_limit_of_lambda_rises_with_the_steps():
    """By 20 = slew, for as many steps as the ramp has, which are 50. The lower limit stays."""
    for step, risen in ((1, 0), (26, 20 * 25 / 50), (51, 20)):
        state = control.clamp(TARGET, control.init(1e9), scale=1e-6, step=jnp.int32(step))
        assert float(state.log_lambda) == pytest.approx(np.log(30e-6) + risen, rel=1e-5)
        state = control.clamp(TARGET, control.init(1e-12), scale=1e-6, step=jnp.int32(step))
        assert float(state.log_lambda) == pytest.approx(np.log(1e-6 / 30), rel=1e-5)


def test_a_lambda_far_above_that_of_half_of_the_groups_is_reached_while_the_schedule_rises():
    """Where the sparsity is log(lambda / scale) / log(3000), 75 % take 405 times the scale, beyond the first limit."""
    target, scale = control.Target(0.75, total_steps=300, damping=1.0), 1e-6
    state, measured = control.init(1e-5), []
    for step in range(1, 121):
        state = control.clamp(target, state, scale, jnp.int32(step))
        measured.append(float((state.log_lambda - np.log(scale)) / np.log(3000)))
        state = control.update(target, state, measured[-1], jnp.int32(step))
    assert measured[0] <= np.log(30.1) / np.log(3000) and measured[-1] == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("step", [0, 81])
def test_nothing_moves_before_the_start_and_after_the_freeze(step):
    state = control.init(1e-4)
    assert control.update(TARGET, state, 0.0, jnp.int32(step)) == state
    assert control.clamp(TARGET, state, 1e-9, jnp.int32(step)) == state


@pytest.mark.parametrize(
    ("step", "of_nonzero", "of_zero"), [(0, 0, 7), (1, 2.997, 2.997), (2, 2.997, 7), (80, 2.997, 7), (81, 0, 7)]
)
def test_by_rank_zeroes_the_groups_that_the_last_step_lacked(step, of_nonzero, of_zero):
    """Five groups, one of them zero, and a gap of 0.5: two more, the least important ones, while lambda is adjusted."""
    state = control.ControlState(jnp.log(jnp.float32(7)), jnp.float32(0.5))
    critical, zero = jnp.array([4.0, 9.0, 1.0, 2.0, 3.0]), jnp.arange(5) == 1
    found, lambda_ = control.by_rank(TARGET, state, critical, zero, jnp.int32(step))
    assert float(lambda_) == pytest.approx(of_nonzero) and found.gap == state.gap
    assert float(jnp.exp(found.log_lambda)) == pytest.approx(of_zero), "the largest so far"


def test_by_rank_leaves_the_groups_that_are_kept():
    state = control.ControlState(jnp.float32(0), jnp.float32(2))
    critical = jnp.array([1.0, jnp.inf, 2.0, jnp.inf])
    _, lambda_ = control.by_rank(TARGET, state, critical, jnp.zeros(4, bool), jnp.int32(1))
    assert float(lambda_) == pytest.approx(2 / 0.999), "and zeroes the others"
    _, lambda_ = control.by_rank(TARGET, state, jnp.array([1.0, 3.0, 2.0]), jnp.zeros(3, bool), jnp.int32(1))
    assert float(lambda_) == pytest.approx(3 * 0.999), "without limits, it leaves one group"
    _, lambda_ = control.by_rank(TARGET, state, jnp.full(4, jnp.inf), jnp.zeros(4, bool), jnp.int32(1))
    assert float(lambda_) == 0


def reach(start=1e-5, target=0.7, steps=1500, loss_scale=1.0, idle=0, size=4, phases=Phases(), **settings):  # noqa: B008
    """Noisy regression on 60 groups whose true weights fall off smoothly: every sparsity has its lambda.

    The inputs of `idle` of the groups are always zero. Returns the statistics at the end and lambda of each step.
    """
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(60, size)) * 0.9 ** np.arange(60)[:, None]
    alive = np.repeat(np.arange(60) % 60 >= idle, size)

    def loss(params, key):
        x = jax.random.normal(key, (64, 60 * size)) * alive
        y = x @ truth.ravel() + 0.3 * jax.random.normal(jax.random.fold_in(key, 1), (64,))
        return loss_scale * 0.5 * jnp.mean(jnp.square(x @ params["w"].ravel() - y))

    tx = transform.proximal_adam(
        optax.cosine_decay_schedule(0.02, steps),
        start,
        target=control.Target(target, steps - phases.start_step, phases=phases),
        fixed_norm=False,
        **settings,
    )
    params = {"w": jnp.asarray(0.1 * rng.normal(size=(1, 1, 60, size)), jnp.float32)}

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, key), state, params)
            return (optax.apply_updates(params, updates), state), state.lambda_

        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)

    (params, _), lambdas = train(params)
    return stats.sparsity(params), np.asarray(lambdas)


@pytest.mark.parametrize("penalty", ["group_lasso", "l1"])
@pytest.mark.parametrize("start", [1e-8, pytest.param(1e-5, marks=pytest.mark.slow), 1e-3])
def test_reaches_the_target_from_any_start(start, penalty):
    found, lambdas = reach(start, penalty=penalty)
    assert (found.weight if penalty == "l1" else found.group) == pytest.approx(0.7, abs=0.02)
    assert len(set(lambdas[int(0.75 * len(lambdas)) + 1 :].tolist())) == 1, "frozen for the last part"
    assert len(set(lambdas[: len(lambdas) // 4].tolist())) > 100, "moving before"


@pytest.mark.parametrize(
    "settings",
    [
        {"metric": "plain", "loss_scale": 1e-4},
        {"metric": "group"},
        {"penalty": GroupLasso(weights="none")},
        {"penalty": GroupMCP(gamma=10.0)},
        {"penalty": GroupL0(weights="none")},
        {"penalty": GroupL0(weights="none"), "loss_scale": 1e-4},
        {"phases": Phases(300, 50)},
        {"idle": 36, "target": 0.8},
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in ({"metric": "plain"}, {"loss_scale": 1e-4}, {"metric": "uncorrected"})
        ),
    ],
    ids=str,
)
def test_reaches_the_target_in_every_form(settings):
    found, lambdas = reach(**settings)
    assert found.group == pytest.approx(settings.get("target", 0.7), abs=0.02)
    if "phases" in settings:
        assert not lambdas[:301].any() and lambdas[301:].all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"in \[0, 1\), got -0.1"),
        ({"ramp": 0.9}, "ramp=0.9, freeze=0.75"),
        ({"total_steps": 0}, "total_steps > 0, got 0"),
        ({"initial": 0.0}, "> 0 to start from, got 0.0"),
    ],
)
def test_bad_targets_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        control.Target(**{"sparsity": 0.5, "total_steps": 10, **settings})
