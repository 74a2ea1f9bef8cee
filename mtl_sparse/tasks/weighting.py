"""Weighting: how the losses of the tasks are combined into one objective."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_sparse.runtime.errors import UserError

Scalar = Float[Array, ""]

KINDS = ("uncertainty", "equal", "fixed")


def init(kind: str, tasks: Sequence[str]) -> dict[str, Scalar]:
    """Return the learned parameters of a weighting: s_i = 1 for each task with "uncertainty", none otherwise."""
    return {task: jnp.ones([]) for task in tasks} if kind == "uncertainty" else {}


def combine(
    kind: str,
    params: Mapping[str, Scalar],
    losses: Mapping[str, Scalar],
    weights: Sequence[float],
    counts: Mapping[str, Scalar] | None = None,
) -> Scalar:
    """Combine the losses of the tasks.

    The weightings are "uncertainty": sum_i exp(-s_i) L_i + s_i with learned s_i (Kendall et al. 2018, arXiv
    1705.07115, in the form of the reference implementation); "equal": sum_i L_i; "fixed": sum_i weights_i L_i.

    Args:
      kind: one of `KINDS`.
      params: s_i of each task, see `init`.
      losses: L_i of each task.
      weights: weights of "fixed", in the order of the losses.
      counts: labels of each task in the batch. A task without any adds nothing, so that its s_i does not change.

    Returns:
      The objective.
    """
    if kind == "uncertainty":
        terms = {task: jnp.exp(-params[task]) * loss + params[task] for task, loss in losses.items()}
        if counts is not None:
            terms = {task: jnp.where(counts[task] > 0, term, 0.0) for task, term in terms.items()}
        return cast(Scalar, sum(terms.values()))
    if kind == "equal":
        return cast(Scalar, sum(losses.values()))
    return cast(Scalar, sum(weight * loss for weight, loss in zip(weights, losses.values(), strict=True)))


def check(kind: str, weights: Sequence[float], tasks: Sequence[str]) -> None:
    """Check the options of the weighting.

    Args:
      kind: config.loss.weighting.
      weights: config.loss.weights.
      tasks: config.tasks.

    Raises:
      UserError: the kind is unknown, or the weights of "fixed" are negative or not one for each task.
    """
    if kind not in KINDS:
        raise UserError(
            "OPTION_UNKNOWN_VALUE", f"expected loss.weighting to be one of {', '.join(KINDS)}, got {kind!r}"
        )
    if kind == "fixed" and (len(weights) != len(tasks) or not all(_is_weight(weight) for weight in weights)):
        raise UserError(
            "OPTION_OUT_OF_RANGE",
            f"expected one weight >= 0 in loss.weights for each of config.tasks ({', '.join(tasks)}), got "
            f"loss.weights={tuple(weights)}; give the weights, or set loss.weighting to another value than 'fixed'",
        )


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and value >= 0
