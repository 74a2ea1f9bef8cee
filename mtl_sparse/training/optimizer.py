"""The optimizer of a run, from its config."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_sparse.report.schema import IMPORTANCES
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.sparsity import metrics, penalties, reference, transform
from mtl_sparse.sparsity.control import TargetSparsity
from mtl_sparse.sparsity.groups import path_name
from mtl_sparse.sparsity.projections import NORMS, FreezeZeros, HoldNorm, KeepStrongest, Projection, freeze_zeros
from mtl_sparse.sparsity.schedules import Phases, phased
from mtl_sparse.training import groups

SCHEDULES = ("constant", "cosine", "plateau", "step")
LONG = 10**9  # steps of a run of unknown length, which leave room for every phase


def check(config) -> None:
    """Check the options of the optimizer and the penalty.

    Raises:
      UserError: an option that cannot work.
    """
    options, sparsity = config.optimizer, config.sparsity
    if options.schedule not in SCHEDULES:
        raise UserError(
            "OPTION_UNKNOWN_VALUE",
            f"unknown optimizer.schedule={options.schedule!r}; expected one of {', '.join(SCHEDULES)}",
        )
    if options.min_learning_rate > options.learning_rate:
        raise UserError(
            "OPTION_CONFLICT",
            f"optimizer.min_learning_rate={options.min_learning_rate} is above "
            f"optimizer.learning_rate={options.learning_rate}",
        )
    if not options.learning_rate > 0:
        raise UserError("OPTION_OUT_OF_RANGE", f"optimizer.learning_rate={options.learning_rate}: expected > 0")
    for fraction, steps in (("start_at", "start_step"), ("warmup", "warmup_steps")):
        if sparsity[fraction] and sparsity[steps]:
            raise UserError(
                "OPTION_CONFLICT",
                f"sparsity.{fraction}={sparsity[fraction]} and sparsity.{steps}={sparsity[steps]} are two values for "
                "one thing: set one of them to 0",
            )
    _check_prune(sparsity)
    if groups.has_target(sparsity) and not sparsity.lambda_ > 0:
        name = next(name for name in ("target", *groups.TARGETS) if sparsity[name] > 0)
        raise UserError(
            "OPTION_CONFLICT",
            f"sparsity.{name}={sparsity[name]} needs a sparsity.lambda_ above 0 to start from; for a dense run set "
            "the target to 0, too",
        )
    groups.check(config)
    build(config, LONG)


def _check_prune(sparsity) -> None:
    if not sparsity.prune:
        return
    by_importance = sparsity.prune in IMPORTANCES
    # A path is read where a run starts: the other run may be gone when this one is resumed or evaluated.
    if not by_importance and "/" not in sparsity.prune and not pathlib.Path(sparsity.prune).is_dir():
        raise UserError(
            "OPTION_UNKNOWN_VALUE",
            f"unknown sparsity.prune={sparsity.prune!r}; expected '', {', '.join(IMPORTANCES)} or the folder of a run",
        )
    targets = [name for name in ("target", *groups.TARGETS) if sparsity[name] > 0]
    if targets and not by_importance:
        raise UserError(
            "OPTION_CONFLICT",
            f"sparsity.prune={sparsity.prune!r} zeroes what is zero in that run, whatever the target; set "
            f"sparsity.{targets[0]}=0",
        )
    if by_importance and not targets:
        raise UserError(
            "OPTION_CONFLICT",
            f"sparsity.prune={sparsity.prune!r} needs a target: set sparsity.target, target_macs or target_params",
        )
    if (by_importance and sparsity.penalty != "group_lasso") or sparsity.head_target > 0:
        raise UserError(
            "OPTION_CONFLICT",
            f"sparsity.prune={sparsity.prune!r} removes groups without a penalty, and none inside the heads; set "
            "sparsity.penalty='group_lasso' and sparsity.head_target=0",
        )


def build(config, total_steps: int) -> optax.GradientTransformation:
    """Build proximal Adam with the run's learning rate schedule.

    The learning rate is a hyperparameter in the state (`state.hyperparams["learning_rate"]`): logs read it there, and
    the plateau schedule changes it there.

    Raises:
      UserError: an option that `proximal` refuses.
    """
    check_steps(config, total_steps)
    learning_rate = config.optimizer.learning_rate
    if config.optimizer.schedule == "cosine":
        alpha = config.optimizer.min_learning_rate / learning_rate
        learning_rate = optax.cosine_decay_schedule(learning_rate, total_steps, alpha=alpha)
    elif config.optimizer.schedule == "step":
        learning_rate = optax.exponential_decay(
            learning_rate,
            transition_steps=config.optimizer.step_epochs * max(1, total_steps // config.train.epochs),
            decay_rate=config.optimizer.step_factor,
            staircase=True,
            end_value=config.optimizer.min_learning_rate,
        )

    def make(learning_rate: Any) -> optax.GradientTransformationExtraArgs:
        return links(config, total_steps, learning_rate)

    try:
        make(config.optimizer.learning_rate)  # inject_hyperparams calls it late
    except ValueError as error:
        raise UserError("OPTION_SPARSITY", f"config.sparsity: {error}") from error
    return optax.inject_hyperparams(make)(learning_rate=learning_rate)


def links(config, total_steps: int, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    """Return Adam, the proximal step and the projections after it, as the config asks for them.

    Raises:
      ValueError: an argument of one of them is out of its range.
    """
    options, sparsity = config.optimizer, config.sparsity
    penalty = _penalty(config)
    if sparsity.norm not in NORMS:
        raise ValueError(f"unknown norm {sparsity.norm!r}; expected one of {', '.join(NORMS)}")
    if sparsity.norm != "initial" and not sparsity.fixed_norm:
        raise ValueError(f"norm {sparsity.norm!r} needs fixed_norm=True, which chooses the kernels whose norm is held")
    if sparsity.penalty_in_gradient and sparsity.penalty != "group_lasso":
        raise ValueError(f"penalty_in_gradient requires penalty 'group_lasso', not {sparsity.penalty!r}")
    inner = optax.adamw(
        learning_rate, options.b1, options.b2, options.eps, weight_decay=options.weight_decay, mask=_kernels
    )
    restart_every = max(1, total_steps // config.train.epochs) if options.restart_each_epoch else None
    if options.l2 or sparsity.penalty_in_gradient or restart_every:
        inner = reference.like_reference(
            inner,
            l2=options.l2,
            l2_mask=_model,
            penalty_in_gradient=penalty if sparsity.penalty_in_gradient and _penalizes(sparsity) else None,
            restart_every=restart_every,
        )
    proximal = functools.partial(
        transform.proximal,
        metric=metrics.AdamMetric(options.b1, options.b2, options.eps, _metric(sparsity)),
        regrowth="annealed" if sparsity.anneal_revival else "free",
        projections=_projections(config, total_steps),
    )
    pruned_at = prune_step(config, total_steps)
    if pruned_at is not None:
        pruned = penalties.GroupLasso(sparsity.scope, groups=groups.find(config))
        inner = optax.chain(inner, freeze_zeros(pruned_at, pruned))
    if sparsity.head_target > 0:
        heads = penalties.GroupLasso(groups=groups.of_heads(config))
        target = _target(config, total_steps, sparsity.head_target)
        inner = proximal(inner, learning_rate, lambda_=target, penalty=heads)
    return proximal(inner, learning_rate, lambda_=_lambda(config, total_steps), penalty=penalty)


def _penalizes(sparsity):
    return not sparsity.prune and (sparsity.lambda_ > 0 or groups.has_target(sparsity))


def _penalty(config):
    sparsity = config.sparsity
    if sparsity.penalty not in penalties.PENALTIES:
        known = ", ".join(penalties.PENALTIES)
        raise ValueError(f"unknown penalty {sparsity.penalty!r}; expected one of {known}")
    if sparsity.penalty == "l1":
        return penalties.L1(sparsity.scope)
    options = {"groups": groups.find(config) if _penalizes(sparsity) else None, "exponent": sparsity.macs_exponent}
    weights = sparsity.group_weights if _penalizes(sparsity) else "sqrt_size"
    if sparsity.penalty == "group_mcp":
        return penalties.GroupMCP(sparsity.scope, weights, sparsity.gamma, **options)
    kind = penalties.GroupL0 if sparsity.penalty == "group_l0" else penalties.GroupLasso
    return kind(sparsity.scope, weights, **options)


def _metric(sparsity):
    """Return the kind of `AdamMetric`."""
    if sparsity.metric in ("group", "fisher") and not sparsity.bias_correction:
        raise ValueError(f"metric {sparsity.metric!r} needs bias_correction=True")
    is_uncorrected = sparsity.metric == "adaptive" and not sparsity.bias_correction
    return "uncorrected" if is_uncorrected else sparsity.metric


def _lambda(config, total_steps):
    """Return the penalty's lambda: 0, a schedule, or a target."""
    sparsity = config.sparsity
    start, debias = start_step(config, total_steps), debias_step(config, total_steps)
    phases = Phases(start, warmup_steps(config, total_steps), debias)
    if groups.has_target(sparsity):
        return _target(config, total_steps, groups.aim(sparsity), groups.measure(config))
    if sparsity.prune:
        return 0.0
    if not sparsity.lambda_ > 0:
        return sparsity.lambda_
    return phased(sparsity.lambda_, phases.start_step, phases.warmup_steps, phases.end_step)


def _target(config, total_steps, aim, measure=None):
    """Return the target of a component of the model."""
    sparsity, start = config.sparsity, start_step(config, total_steps)
    return TargetSparsity(
        aim,
        total_steps - start,
        sparsity.target_ramp,
        sparsity.target_freeze,
        initial=sparsity.lambda_,
        phases=Phases(start, warmup_steps(config, total_steps), debias_step(config, total_steps)),
        measure=measure,
    )


def _projections(config, total_steps):
    sparsity, debias = config.sparsity, debias_step(config, total_steps)
    found: list[Projection] = [] if debias is None else [FreezeZeros(debias)]
    if groups.has_target(sparsity) and sparsity.keep_connected:
        found.append(KeepStrongest(groups.unavoidable(config)))
    if sparsity.at_least > 1 or sparsity.max_removed < 1:
        found.append(groups.limit(sparsity))
    if sparsity.fixed_norm:
        found.append(HoldNorm(sparsity.fixed_norm, sparsity.norm))
    return found


def start_step(config, total_steps: int) -> int:
    """Return the number of steps before the penalty starts."""
    return config.sparsity.start_step or round(config.sparsity.start_at * total_steps)


def prune_step(config, total_steps: int) -> int | None:
    """Return the steps after which a run with sparsity.prune is pruned; None for other runs.

    By importance, this is the end of an epoch; with the zeros of another run, it is 0.
    """
    if config.sparsity.prune not in IMPORTANCES:
        return 0 if config.sparsity.prune else None
    epochs = config.train.epochs
    return max(1, round(config.sparsity.prune_at * epochs)) * max(1, total_steps // epochs)


def debias_step(config, total_steps: int) -> int | None:
    """Return the first step of the debiasing phase, None if there is none."""
    sparsity = config.sparsity
    return round(sparsity.debias_at * total_steps) if _penalizes(sparsity) and sparsity.debias_at > 0 else None


def warmup_steps(config, total_steps: int) -> int:
    """Return the steps of the penalty's warm-up, which ends before lambda must have its full value.

    That is where a target's lambda is frozen, or where the run or its penalized part ends.
    """
    if groups.has_target(config.sparsity):
        end = _freeze_step(config, total_steps)
    else:
        end = debias_step(config, total_steps) or total_steps
    wanted = config.sparsity.warmup_steps or round(config.sparsity.warmup * total_steps)
    return max(0, min(wanted, end - start_step(config, total_steps) - 1))


def settled_step(config, total_steps: int) -> int:
    """Return the number of steps after which lambda is final, so that a checkpoint may be chosen as the best.

    If there is a debiasing phase, it has run for one step by then.
    """
    pruned = prune_step(config, total_steps)
    if pruned is not None:
        return pruned + 1
    debias = debias_step(config, total_steps)
    return _penalized_step(config, total_steps) if debias is None else min(debias + 1, total_steps)


def _penalized_step(config, total_steps):
    """Return `settled_step` without a debiasing phase: with a fixed lambda, one step at its full value."""
    sparsity = config.sparsity
    if groups.has_target(sparsity):
        return _freeze_step(config, total_steps)
    waits = start_step(config, total_steps) + warmup_steps(config, total_steps)
    return waits + 1 if sparsity.lambda_ > 0 and waits > 0 else 0


def _freeze_step(config, total_steps):
    """Return the first step with a target's last lambda."""
    start = start_step(config, total_steps)
    return start + round(config.sparsity.target_freeze * (total_steps - start))


def check_steps(config, total_steps: int) -> None:
    """Check that the phases of a run of that many steps follow one another.

    Raises:
      UserError: they do not.
    """
    sparsity, start = config.sparsity, start_step(config, total_steps)
    pruned = prune_step(config, total_steps)
    if pruned is not None and pruned >= total_steps:
        raise UserError(
            "RUN_TOO_SHORT",
            f"sparsity.prune_at={sparsity.prune_at}: no epoch of {config.train.epochs} is left after it; train longer, "
            "or prune earlier",
        )
    name = "start_step" if sparsity.start_step else "start_at"
    if sparsity.lambda_ > 0 and start >= total_steps:
        raise UserError(
            "RUN_TOO_SHORT",
            f"sparsity.{name}={sparsity[name]}: the run has only {total_steps} steps; train longer, or set "
            "sparsity.start_step=0 and sparsity.start_at to a fraction of the run",
        )
    debias = debias_step(config, total_steps)
    if debias is not None and debias >= total_steps:
        raise UserError(
            "RUN_TOO_SHORT", f"sparsity.debias_at={sparsity.debias_at}: no step of {total_steps} is left for it"
        )
    if debias is not None and (debias < _penalized_step(config, total_steps) or debias <= start):
        raise UserError(
            "OPTION_CONFLICT",
            f"sparsity.debias_at={sparsity.debias_at} lies before sparsity."
            f"{'target_freeze' if groups.has_target(sparsity) else name}: the zero pattern would be frozen before the "
            "penalty has made it",
        )


def _kernels(params):
    """Return a mask of the parameters with weight decay: kernels, not biases, BatchNorm or loss weights."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).endswith("kernel"), params)


def _model(params):
    """Return a mask of the model's parameters, all but the loss weights."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not path_name(path).startswith("weighting/"), params)


def learning_rate(opt_state) -> jax.Array:
    """Return the learning rate of the last step."""
    return opt_state.hyperparams["learning_rate"]


def lambda_(opt_state) -> jax.Array:
    """Return the penalty's lambda in the last step."""
    return opt_state.inner_state.lambda_


def settled_lambda(config, opt_state) -> float:
    """Return the lambda of the final zero pattern: the one found for the target, or the config's."""
    controller = opt_state.inner_state.control
    if controller:
        return float(jnp.exp(controller.log_lambda))
    return config.sparsity.lambda_ if _penalizes(config.sparsity) else 0.0


def scale_learning_rate(opt_state, factor: float, minimum: float) -> Any:
    """Return `opt_state` with its learning rate times `factor`, but not below `minimum`."""
    value = jnp.maximum(learning_rate(opt_state) * factor, minimum)
    return opt_state._replace(hyperparams={**opt_state.hyperparams, "learning_rate": value})
