"""How the tasks' losses become one."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from mtl_sparse.runtime.errors import UserError

KINDS = ("uncertainty", "equal", "fixed")


def init(kind: str, tasks: Sequence[str]) -> dict:
    """Learned parameters of a weighting: s_i = 1 for each task with "uncertainty", none otherwise."""
    return {task: jnp.ones([]) for task in tasks} if kind == "uncertainty" else {}


def combine(kind: str, params: Mapping, losses: Mapping, weights: Sequence[float], counts: Mapping | None = None):
    """Combined loss.

    Args:
      counts: labels of each task in the batch; a task without any adds nothing, so that its s_i stays where it is.

    "uncertainty": sum_i exp(-s_i) L_i + s_i with learned s_i (Kendall et al. 2018, arXiv 1705.07115, in the
    released code's form); "equal": sum_i L_i; "fixed": sum_i weights_i L_i, in the order of the losses.
    """
    if kind == "uncertainty":
        terms = {task: jnp.exp(-params[task]) * loss + params[task] for task, loss in losses.items()}
        return sum(terms.values()) if counts is None else sum(jnp.where(counts[t] > 0, terms[t], 0.0) for t in terms)
    if kind == "equal":
        return sum(losses.values())
    return sum(weight * loss for weight, loss in zip(weights, losses.values(), strict=True))


def check(kind: str, weights: Sequence[float], tasks: Sequence[str]) -> None:
    """Raises UserError for an unknown kind, or fixed weights that are not one for each task, or negative."""
    if kind not in KINDS:
        raise UserError(f"unknown loss.weighting={kind!r}; the weightings are {', '.join(KINDS)}")
    if kind == "fixed" and (len(weights) != len(tasks) or not all(_is_weight(weight) for weight in weights)):
        raise UserError(
            f"loss.weights={tuple(weights)}: loss.weighting='fixed' needs one weight >= 0 for each of config.tasks "
            f"({', '.join(tasks)})"
        )


def _is_weight(value):
    return isinstance(value, int | float) and value >= 0
