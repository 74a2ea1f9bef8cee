"""How the tasks' losses become one."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from mtl_sparse.errors import UserError

KINDS = ("uncertainty", "equal", "fixed")


def init(kind: str, tasks: Sequence[str]) -> dict:
    """Learned parameters of a weighting: s_i = 1 for each task with "uncertainty", none otherwise."""
    return {task: jnp.ones([]) for task in tasks} if kind == "uncertainty" else {}


def combine(kind: str, params: Mapping, losses: Mapping, weights: Mapping[str, float]):
    """Combined loss.

    "uncertainty": sum_i exp(-s_i) L_i + s_i with learned s_i (Kendall et al. 2018, arXiv 1705.07115, in the
    released code's form); "equal": sum_i L_i; "fixed": sum_i weights_i L_i.
    """
    if kind == "uncertainty":
        return sum(jnp.exp(-params[task]) * loss + params[task] for task, loss in losses.items())
    if kind == "equal":
        return sum(losses.values())
    return sum(weights[task] * loss for task, loss in losses.items())


def check(kind: str, weights: Mapping[str, float], tasks: Sequence[str]) -> None:
    """Raises UserError for an unknown kind, or fixed weights that miss a task or are negative."""
    if kind not in KINDS:
        raise UserError(f"unknown loss.weighting={kind!r}; the weightings are {', '.join(KINDS)}")
    if kind == "fixed":
        for task in tasks:
            if not weights.get(task, -1.0) >= 0:
                raise UserError(f"loss.weights needs a weight >= 0 for task {task!r} with loss.weighting='fixed'")
