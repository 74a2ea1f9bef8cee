"""The optimizer of a run, from its config."""

import jax
import optax

from mtl_sparse.errors import UserError
from mtl_sparse.sparsity import groups, transform

SCHEDULES = ("constant", "cosine", "plateau")


def check(config) -> None:
    """Raises UserError for an optimizer or sparsity setting that cannot work."""
    if config.optimizer.schedule not in SCHEDULES:
        raise UserError(
            f"unknown optimizer.schedule={config.optimizer.schedule!r}; the schedules are {', '.join(SCHEDULES)}"
        )
    if not config.sparsity.lambda_ >= 0:
        raise UserError(f"sparsity.lambda_={config.sparsity.lambda_}: it must be >= 0 (0 is dense)")
    if config.sparsity.warmup_steps < 0:
        raise UserError(f"sparsity.warmup_steps={config.sparsity.warmup_steps}: it must be >= 0 (0 is none)")
    if config.sparsity.metric not in transform.METRICS:
        raise UserError(
            f"unknown sparsity.metric={config.sparsity.metric!r}; the metrics are {', '.join(transform.METRICS)}"
        )
    if config.sparsity.scope not in groups.SCOPES:
        raise UserError(f"unknown sparsity.scope={config.sparsity.scope!r}; the scopes are {', '.join(groups.SCOPES)}")
    if config.optimizer.min_learning_rate > config.optimizer.learning_rate:
        raise UserError(
            f"optimizer.min_learning_rate={config.optimizer.min_learning_rate} is above "
            f"optimizer.learning_rate={config.optimizer.learning_rate}"
        )
    if not config.optimizer.learning_rate > 0:
        raise UserError(f"optimizer.learning_rate={config.optimizer.learning_rate}: it must be > 0")


def build(config, total_steps: int) -> optax.GradientTransformation:
    """Proximal Adam with the run's schedule.

    The learning rate is a hyperparameter in the state (`state.hyperparams["learning_rate"]`): logs read it
    there, and the plateau schedule changes it there.
    """
    rate = config.optimizer.learning_rate
    if config.optimizer.schedule == "cosine":
        rate = optax.cosine_decay_schedule(rate, total_steps)
    lambda_ = config.sparsity.lambda_
    if lambda_ > 0 and config.sparsity.warmup_steps > 0:
        lambda_ = optax.linear_schedule(0.0, lambda_, config.sparsity.warmup_steps)
    settings = {
        "lambda_": lambda_,
        "b1": config.optimizer.b1,
        "b2": config.optimizer.b2,
        "eps": config.optimizer.eps,
        "weight_decay": config.optimizer.weight_decay,
        "weight_decay_mask": _kernels,
        "metric": config.sparsity.metric,
        "fixed_norm": config.sparsity.fixed_norm,
        "scope": config.sparsity.scope,
    }
    return optax.inject_hyperparams(transform.proximal_adam, static_args=tuple(settings))(rate, **settings)


def _kernels(params):
    """Mask of the parameters that weight decay acts on: kernels, not biases, BatchNorm or loss weights."""
    return jax.tree_util.tree_map_with_path(lambda path, _: groups.path_name(path).endswith("kernel"), params)


def learning_rate(opt_state):
    """The learning rate of the last step."""
    return opt_state.hyperparams["learning_rate"]


def scale_learning_rate(opt_state, factor: float, minimum: float):
    """`opt_state` with its learning rate times `factor`, but not below `minimum`."""
    rate = jax.numpy.maximum(learning_rate(opt_state) * factor, minimum)
    return opt_state._replace(hyperparams={**opt_state.hyperparams, "learning_rate": rate})
