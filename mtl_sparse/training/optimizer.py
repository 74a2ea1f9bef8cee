"""The optimizer of a run, from its config."""

import jax
import optax

from mtl_sparse.models import resnet
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.sparsity import control, groups, transform

SCHEDULES = ("constant", "cosine", "plateau")
LONG = 10**9  # steps of a run of unknown length, which leave every phase its room


def check(config) -> None:
    """Raises UserError for an optimizer or sparsity setting that cannot work."""
    if config.optimizer.schedule not in SCHEDULES:
        raise UserError(
            f"unknown optimizer.schedule={config.optimizer.schedule!r}; the schedules are {', '.join(SCHEDULES)}"
        )
    if config.optimizer.min_learning_rate > config.optimizer.learning_rate:
        raise UserError(
            f"optimizer.min_learning_rate={config.optimizer.min_learning_rate} is above "
            f"optimizer.learning_rate={config.optimizer.learning_rate}"
        )
    if not config.optimizer.learning_rate > 0:
        raise UserError(f"optimizer.learning_rate={config.optimizer.learning_rate}: it must be > 0")
    for name in ("target", "target_freeze", "start_at", "warmup", "debias_at"):
        value = config.sparsity[name]
        if not 0 <= value < 1:
            raise UserError(f"sparsity.{name}={value}: expected a fraction, at least 0 and below 1")
    for fraction, steps in (("start_at", "start_step"), ("warmup", "warmup_steps")):
        if config.sparsity[fraction] and config.sparsity[steps]:
            raise UserError(
                f"sparsity.{fraction}={config.sparsity[fraction]} and sparsity.{steps}={config.sparsity[steps]} are "
                "two values for one thing: set one of them to 0"
            )
    if config.sparsity.target > 0 and not config.sparsity.lambda_ > 0:
        raise UserError(
            f"sparsity.target={config.sparsity.target} needs a sparsity.lambda_ above 0 to start from; "
            "for a dense run set the target to 0, too"
        )
    build(config, LONG)


def build(config, total_steps: int) -> optax.GradientTransformation:
    """Proximal Adam with the run's schedule.

    The learning rate is a hyperparameter in the state (`state.hyperparams["learning_rate"]`): logs read it
    there, and the plateau schedule changes it there.

    Raises:
      UserError: a setting that `proximal_adam` refuses.
    """
    check_steps(config, total_steps)
    rate = config.optimizer.learning_rate
    if config.optimizer.schedule == "cosine":
        rate = optax.cosine_decay_schedule(rate, total_steps, alpha=config.optimizer.min_learning_rate / rate)
    sparsity = config.sparsity
    try:
        settings = {
            "lambda_": sparsity.lambda_,
            "penalty": sparsity.penalty,
            "gamma": sparsity.gamma,
            "group_weights": sparsity.group_weights,
            "target": _target(config, total_steps),
            "start_step": start_step(config, total_steps),
            "warmup_steps": warmup_steps(config, total_steps),
            "debias_step": debias_step(config, total_steps),
            "b1": config.optimizer.b1,
            "b2": config.optimizer.b2,
            "eps": config.optimizer.eps,
            "weight_decay": config.optimizer.weight_decay,
            "weight_decay_mask": _kernels,
            "l2": config.optimizer.l2,
            "l2_mask": _model,
            "metric": sparsity.metric,
            "bias_correction": sparsity.bias_correction,
            "fixed_norm": sparsity.fixed_norm,
            "norm": "unpenalized" if sparsity.norm_decays else "initial",
            "keep_one": _keep_one(config),
            "anneal_revival": sparsity.anneal_revival,
            "penalty_in_gradient": sparsity.penalty_in_gradient,
            "restart_every": _restart_every(config, total_steps),
            "scope": sparsity.scope,
        }
        transform.proximal_adam(config.optimizer.learning_rate, **settings)  # inject_hyperparams calls it late
    except ValueError as error:
        raise UserError(f"config.sparsity: {error}") from error
    return optax.inject_hyperparams(transform.proximal_adam, static_args=tuple(settings))(rate, **settings)


def _restart_every(config, total_steps):
    return max(1, total_steps // config.train.epochs) if config.optimizer.restart_each_epoch else None


def _target(config, total_steps):
    sparsity = config.sparsity
    if sparsity.target == 0:
        return None
    steps = total_steps - start_step(config, total_steps)
    return control.Target(sparsity.target, steps, sparsity.target_ramp, sparsity.target_freeze)


def _keep_one(config):
    """Regular expression of the kernels that keep at least one group, or False."""
    if not (config.sparsity.target > 0 and config.sparsity.keep_connected):
        return False
    backbone = "|".join(resnet.unavoidable(config.model.attach))
    return f"model/(backbone/({backbone})|head_.*)/kernel"


def start_step(config, total_steps: int) -> int:
    """Steps without a penalty before it starts."""
    return config.sparsity.start_step or round(config.sparsity.start_at * total_steps)


def debias_step(config, total_steps: int) -> int | None:
    """First step of the phase without a penalty, None where there is none."""
    sparsity = config.sparsity
    penalizes = sparsity.lambda_ > 0 or sparsity.target > 0
    return round(sparsity.debias_at * total_steps) if penalizes and sparsity.debias_at > 0 else None


def warmup_steps(config, total_steps: int) -> int:
    """Steps of the penalty's warm-up, which ends before lambda has to have its full value.

    That is where a target's lambda is frozen, or where the run or its penalized part ends.
    """
    if config.sparsity.target > 0:
        end = _freeze_step(config, total_steps)
    else:
        end = debias_step(config, total_steps) or total_steps
    wanted = config.sparsity.warmup_steps or round(config.sparsity.warmup * total_steps)
    return max(0, min(wanted, end - start_step(config, total_steps) - 1))


def settled_step(config, total_steps: int) -> int:
    """Steps after which the sparsity is what the settings ask for, so that a checkpoint may be the best one.

    A phase that begins late has had a step by then.
    """
    debias = debias_step(config, total_steps)
    return _penalised_step(config, total_steps) if debias is None else min(debias + 1, total_steps)


def _penalised_step(config, total_steps):
    """`settled_step` before a last phase without a penalty: with a fixed lambda, a step at its full strength."""
    sparsity = config.sparsity
    if sparsity.target > 0:
        return _freeze_step(config, total_steps)
    waits = start_step(config, total_steps) + warmup_steps(config, total_steps)
    return waits + 1 if sparsity.lambda_ > 0 and waits > 0 else 0


def _freeze_step(config, total_steps):
    """First step with a target's last lambda."""
    start = start_step(config, total_steps)
    return start + round(config.sparsity.target_freeze * (total_steps - start))


def check_steps(config, total_steps: int) -> None:
    """Raise UserError where the phases of a run of so many steps do not follow one another."""
    sparsity, start = config.sparsity, start_step(config, total_steps)
    name = "start_step" if sparsity.start_step else "start_at"
    if sparsity.lambda_ > 0 and start >= total_steps:
        raise UserError(
            f"sparsity.{name}={sparsity[name]}: the run has only {total_steps} steps; train longer, or set "
            "sparsity.start_step=0 and sparsity.start_at to a fraction of the run"
        )
    debias = debias_step(config, total_steps)
    if debias is not None and debias >= total_steps:
        raise UserError(f"sparsity.debias_at={sparsity.debias_at}: of {total_steps} steps it leaves none")
    if debias is not None and (debias < _penalised_step(config, total_steps) or debias <= start):
        raise UserError(
            f"sparsity.debias_at={sparsity.debias_at} lies before "
            f"sparsity.{'target_freeze' if sparsity.target > 0 else name}: the zero pattern would "
            "stay before the penalty has made it"
        )


def _kernels(params):
    """Mask of the parameters that weight decay acts on: kernels, not biases, BatchNorm or loss weights."""
    return jax.tree_util.tree_map_with_path(lambda path, _: groups.path_name(path).endswith("kernel"), params)


def _model(params):
    """Mask of the model's parameters, all but the loss weights."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not groups.path_name(path).startswith("weighting/"), params)


def learning_rate(opt_state):
    """The learning rate of the last step."""
    return opt_state.hyperparams["learning_rate"]


def lambda_(opt_state):
    """The penalty's strength in the last step."""
    return opt_state.inner_state.lambda_


def settled_lambda(config, opt_state) -> float:
    """The penalty's strength that made the zero pattern: what the target found, or the config's."""
    controller = opt_state.inner_state.control
    return float(jax.numpy.exp(controller.log_lambda)) if controller else config.sparsity.lambda_


def scale_learning_rate(opt_state, factor: float, minimum: float):
    """`opt_state` with its learning rate times `factor`, but not below `minimum`."""
    rate = jax.numpy.maximum(learning_rate(opt_state) * factor, minimum)
    return opt_state._replace(hyperparams={**opt_state.hyperparams, "learning_rate": rate})
