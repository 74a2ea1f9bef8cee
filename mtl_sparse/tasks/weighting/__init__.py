"""Weighting: how the tasks are combined, by their losses or by the gradients of the shared backbone.

A method by losses makes one objective and needs one backward pass (`by_losses`). A method by gradients weighs the
gradients of the tasks in the backbone, and each head is trained by the unweighted loss of its task (`by_gradients`).
For a training loop of your own, `gradient_weights` needs only the inner products of the gradients, see `gramian`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_sparse.runtime import text
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.tasks.weighting import by_gradients, by_losses
from mtl_sparse.tasks.weighting.by_gradients import GRADIENT_NAMES, gradient_weights
from mtl_sparse.tasks.weighting.by_losses import LEARNED, NEED_POSITIVE, OBJECTIVES

__all__ = [
    "GRADIENT_NAMES",
    "NAMES",
    "NEED_POSITIVE",
    "check",
    "gradient_weights",
    "gramian",
    "init",
    "needs_gradients",
    "of_tasks",
    "start",
]

GRADNORM = "gradnorm"  # by gradients too, but with weights that it learns
BY_GRADIENTS = (GRADNORM, *GRADIENT_NAMES)
NAMES = (*OBJECTIVES, *BY_GRADIENTS)
SOURCES = ("params", "features")


def gramian(gradients: Any) -> Float[Array, "K K"]:
    """Return the inner products of the tasks' gradients.

    Args:
      gradients: tree of arrays [K, ...], the gradients stacked over tasks.

    Returns:
      [K, K], in float32, or in float64 if that is the dtype.
    """

    def products(leaf: Array) -> Array:
        flat = leaf.reshape(leaf.shape[0], -1)
        dtype = jnp.promote_types(jnp.float32, leaf.dtype)
        return jnp.matmul(flat, flat.T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)

    return sum(map(products, jax.tree.leaves(gradients)), start=jnp.zeros([], jnp.float32))


def needs_gradients(name: str, tasks: Sequence[Any]) -> bool:
    """Return whether a method weighs gradients; False for one task, where each such method is "equal"."""
    return name in BY_GRADIENTS and len(tasks) > 1


def init(name: str, tasks: Sequence[str]) -> dict[str, Float[Array, ""]]:
    """Return the parameters of a method that the optimizer learns, by task; {} if it has none."""
    return {task: jnp.full([], LEARNED[name]) for task in tasks} if name in LEARNED else {}


def start(name: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the state of a method before the first step; {} if it has none."""
    if name == GRADNORM and len(tasks) > 1:
        return by_gradients.gradnorm_start(tasks)
    return by_losses.start(name, tasks)


def of_tasks(name: str, state: Any, tasks: Sequence[str], of: Sequence[str]) -> Any:
    """Return the state of a method for some of the tasks `of` that it was made for."""
    if not start(name, tasks):
        return {}

    def is_by_task(value: Any) -> bool:
        return isinstance(value, dict) and set(value) == set(of)

    return jax.tree.map(
        lambda value: {task: value[task] for task in tasks} if is_by_task(value) else value, state, is_leaf=is_by_task
    )


def check(options: Any, tasks: Sequence[str], attach: Sequence[str] = ()) -> None:
    """Check the options of the weighting.

    Args:
      options: config.loss.
      tasks: config.tasks.
      attach: config.model.attach.

    Raises:
      UserError: the method is unknown, the weights of "fixed" are negative or not one for each task, or the gradients
        of features are asked for where the heads read different ones.
    """
    name, weights = options.weighting, options.weights
    if name not in NAMES:
        near = text.nearest(name, NAMES)
        meant = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise UserError(
            "OPTION_UNKNOWN_VALUE",
            f"expected loss.weighting to be one of {', '.join(NAMES)}, got {name!r}; {meant}see docs/weighting.md",
        )
    if (name == "fixed" and len(weights) != len(tasks)) or not all(_is_weight(weight) for weight in weights):
        raise UserError(
            "OPTION_OUT_OF_RANGE",
            f"expected one weight >= 0 in loss.weights for each of config.tasks ({', '.join(tasks)}), got "
            f"loss.weights={tuple(weights)}; give the weights, or set loss.weights=() and another loss.weighting than "
            "'fixed'",
        )
    if options.gradients_of not in SOURCES:
        raise UserError(
            "OPTION_UNKNOWN_VALUE",
            f"expected loss.gradients_of to be one of {', '.join(SOURCES)}, got gradients_of={options.gradients_of!r}",
        )
    if needs_gradients(name, tasks) and options.gradients_of == "features" and len(set(attach)) > 1:
        raise UserError(
            "OPTION_CONFLICT",
            f"loss.gradients_of='features' compares the gradients of one layer's features, but the heads of "
            f"model.attach={tuple(attach)} read different ones; set loss.gradients_of='params'",
        )


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf
