"""Weights of the tasks from the inner products of their gradients.

With the gradients g_i of the tasks' losses with respect to the shared parameters (or features), the Gramian is
G_ij = <g_i, g_j>, and the shared part of the model is updated along sum_i w_i g_i. All methods here need G alone.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from mtl_sparse.runtime import text
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.tasks.weighting import solvers

Gramian = Float[Array, "K K"]
Weights = Float[Array, " K"]

_ALL_ORDERS = 6  # most tasks for which PCGrad averages over all orders: 120 for each
_GRADNORM_OPTIMIZER = optax.adam  # as in the paper


def gradient_weights(
    name: str,
    gramian: Gramian,
    *,
    key: PRNGKeyArray | None = None,
    cagrad_c: float = 0.4,
    fairgrad_alpha: float = 2.0,
) -> Weights:
    """Return the weights of the tasks' gradients by a method for multi-task optimization.

    The methods, each with the sum or mean over tasks that was published:

    - "pcgrad": each gradient loses its component along each other one that it conflicts with, in random order; the
      results are added (Yu et al. 2020, arXiv 2001.06782).
    - "mgda": the shortest convex combination (Sener & Koltun 2018, arXiv 1810.04650).
    - "cagrad": the mean gradient, moved toward the worst task by at most `cagrad_c` times its length (Liu et al. 2021,
      arXiv 2110.14048), without the rescaling of its code.
    - "imtl_g": the combination with equal projections on all gradients, whose weights add up to 1 (Liu et al. 2021,
      "Towards Impartial Multi-task Learning"); weights may be negative.
    - "nash": Nash's bargaining solution, G w = 1 / w (Navon et al. 2022, arXiv 2202.01017).
    - "aligned": the principal components of the gradients get the length of the shortest one (Senushkin et al. 2023,
      arXiv 2305.19000), added over tasks.
    - "fairgrad": alpha-fairness, G w = w ** (-1 / `fairgrad_alpha`) (Ban & Ji 2024, arXiv 2402.15638).
    - "upgrad": each gradient is projected on the directions that conflict with no task, then the mean is taken
      (Quinton & Rey 2024, arXiv 2406.16232).

    A task whose gradient is zero gets the weight 0, and the others are weighted among themselves. Where gradients
    nearly cancel, "nash" and "fairgrad" are regularized by a few units of rounding.

    Args:
      name: one of `GRADIENT_NAMES`.
      gramian: [K, K], inner products of the tasks' gradients; float32 or float64.
      key: random key of PCGrad's orders. None averages over all orders, for at most six tasks.
      cagrad_c: option of "cagrad", at least 0 and below 1.
      fairgrad_alpha: option of "fairgrad", above 0.

    Returns:
      w, [K], of the Gramian's dtype. NaN if the Gramian is not finite.

    Raises:
      UserError: OPTION_UNKNOWN_VALUE, an unknown name; OPTION_OUT_OF_RANGE, an option (those that are traced are not
        checked); GRAMIAN_INVALID, not a square matrix of floats, or more than six tasks without a key for "pcgrad".
    """
    if name not in _METHODS:
        near = ", ".join(text.nearest(name, _METHODS) or _METHODS)
        raise UserError(
            "OPTION_UNKNOWN_VALUE", f"expected a gradient weighting, such as {near}, got {name!r}; see GRADIENT_NAMES"
        )
    gramian = jnp.asarray(gramian)
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or not gramian.size:
        raise UserError("GRAMIAN_INVALID", f"expected a Gramian of the shape [K, K], got {gramian.shape}")
    if gramian.dtype not in (jnp.float32, jnp.float64):
        raise UserError("GRAMIAN_INVALID", f"expected a Gramian of float32 or float64, got {gramian.dtype}")
    if name == "pcgrad" and key is None and len(gramian) > _ALL_ORDERS:
        raise UserError(
            "GRAMIAN_INVALID",
            f"expected at most {_ALL_ORDERS} tasks for PCGrad over all orders, got {len(gramian)}; give a random key",
        )
    _check_options(cagrad_c, fairgrad_alpha)
    squares = jnp.diag(gramian)
    active = squares > jnp.finfo(gramian.dtype).tiny ** 0.5 * jnp.max(squares)
    lengths = jnp.sqrt(jnp.where(active, squares, 1))
    # A task without a gradient gets one of length 1 at right angles to all others.
    cosines = jnp.where(active[:, None] & active, gramian / lengths / lengths[:, None], jnp.eye(len(gramian)))
    options = {"key": key, "cagrad_c": cagrad_c, "fairgrad_alpha": fairgrad_alpha}
    weights = _METHODS[name](cosines.astype(gramian.dtype), lengths, active, options)
    weights = jnp.where(active, weights, 0).astype(gramian.dtype)
    return jnp.where(jnp.all(jnp.isfinite(gramian)), weights, jnp.nan)


def _check_options(cagrad_c: Any, fairgrad_alpha: Any) -> None:
    if isinstance(cagrad_c, int | float) and not 0 <= cagrad_c < 1:
        raise UserError("OPTION_OUT_OF_RANGE", f"expected cagrad_c of at least 0 and below 1, got cagrad_c={cagrad_c}")
    if isinstance(fairgrad_alpha, int | float) and not fairgrad_alpha > 0:
        raise UserError("OPTION_OUT_OF_RANGE", f"expected fairgrad_alpha above 0, got fairgrad_alpha={fairgrad_alpha}")


def _pcgrad(cosines: Gramian, lengths: Weights, active: Weights, options: dict[str, Any]) -> Weights:
    count, key = len(cosines), options["key"]
    eye = jnp.eye(count, dtype=cosines.dtype)

    def projected(task: Array, order: Array) -> Weights:
        """Return one unit gradient without its conflicts, as weights of all unit gradients."""

        def remove(weights: Weights, other: Array) -> tuple[Weights, None]:
            product = weights @ cosines[:, other]
            return weights - jnp.where((product < 0) & (other != task), product, 0) * eye[other], None

        return jax.lax.scan(remove, eye[task], order)[0]

    tasks = jnp.arange(count)
    if key is not None:
        orders = jax.vmap(lambda key: jax.random.permutation(key, count))(jax.random.split(key, count))
        rows = jax.vmap(projected)(tasks, orders)
    else:
        others = [[other for other in range(count) if other != task] for task in range(count)]
        every = jnp.array([list(itertools.permutations(its)) for its in others], jnp.int32)
        rows = jax.vmap(lambda task, its: jnp.mean(jax.vmap(lambda one: projected(task, one))(its), 0))(tasks, every)
    return _sum_of_rows(rows, lengths, active)


def _sum_of_rows(rows: Gramian, lengths: Weights, active: Weights) -> Weights:
    """Return the weights of the gradients that add up to changed gradients.

    Args:
      rows: [K, K], each changed unit gradient as weights of the unit gradients.
      lengths: [K], of the gradients.
      active: [K], the tasks that count.
    """
    return jnp.sum(jnp.where(active[:, None], rows * lengths[:, None] / lengths, 0), 0)


def _mgda(cosines: Gramian, lengths: Weights, active: Weights, options: dict[str, Any]) -> Weights:
    del options
    scaled = jnp.where(active, lengths / jnp.min(jnp.where(active, lengths, jnp.inf)), 1)
    unit = _regular(cosines) * scaled * scaled[:, None]
    w = solvers.minimize(lambda w: w @ unit @ w / 2, len(unit), unit.dtype, simplex=True)
    # Without the tasks that have no gradient, which are at right angles, the others keep their proportions.
    return w / jnp.sum(jnp.where(active, w, 0))


def _regular(cosines: Gramian) -> Gramian:
    """Return the cosines with a ridge of a few units of rounding, which makes them positive definite."""
    eps = jnp.finfo(cosines.dtype).eps
    return cosines + 8 * len(cosines) * eps * jnp.eye(len(cosines), dtype=cosines.dtype)


def _cagrad(cosines: Gramian, lengths: Weights, active: Weights, options: dict[str, Any]) -> Weights:
    count = jnp.maximum(jnp.sum(active), 1)
    scaled = jnp.where(active, lengths / (jnp.sum(jnp.where(active, lengths, 0)) / count), 0)
    unit = cosines * scaled * scaled[:, None]
    mean = jnp.where(active, 1 / count, 0).astype(unit.dtype)
    radius = options["cagrad_c"] * jnp.sqrt(mean @ unit @ mean)
    unused = jnp.where(active, 0, 1 + 2 * jnp.max(unit))  # above every derivative, so that these tasks get 0

    def length(w: Weights) -> Array:
        return jnp.sqrt(w @ unit @ w + jnp.finfo(unit.dtype).eps)

    def objective(w: Weights) -> Array:
        return w @ unit @ mean + radius * length(w) + unused @ w

    w = jnp.where(active, solvers.minimize(objective, len(unit), unit.dtype, simplex=True), 0)
    return mean + radius / length(w / jnp.sum(w)) * w / jnp.sum(w)


def _imtl_g(cosines: Gramian, lengths: Weights, active: Weights, options: dict[str, Any]) -> Weights:
    del options
    # The pseudoinverse is that of the unit gradients, so that the lengths of the gradients do not decide its rank.
    eps = jnp.finfo(cosines.dtype).eps
    w = jnp.sum(jnp.linalg.pinv(cosines, rtol=8 * len(cosines) * eps, hermitian=True), 1) / lengths
    total, largest = jnp.sum(jnp.where(active, w, 0)), jnp.max(jnp.where(active, jnp.abs(w), 0))
    return jnp.where(jnp.abs(total) <= len(w) * eps * largest, 0, w / jnp.where(total == 0, 1, total))


def _nash(cosines: Gramian, lengths: Weights, active: Weights, options: dict[str, Any]) -> Weights:
    del active, options
    return solvers.balance(_regular(cosines), 1.0) / lengths


def _fairgrad(cosines: Gramian, lengths: Weights, active: Weights, options: dict[str, Any]) -> Weights:
    power = 1 / options["fairgrad_alpha"]
    scale = jnp.exp(jnp.sum(jnp.where(active, jnp.log(lengths), 0)) / jnp.maximum(jnp.sum(active), 1))
    scaled = jnp.where(active, lengths / scale, 1)
    return solvers.balance(_regular(cosines) * scaled * scaled[:, None], power) * scale ** (-2 / (1 + power))


def _aligned(cosines: Gramian, lengths: Weights, active: Weights, options: dict[str, Any]) -> Weights:
    del options
    scaled = jnp.where(active, lengths / jnp.max(jnp.where(active, lengths, 0)), 0)
    values, vectors = jnp.linalg.eigh(cosines * scaled * scaled[:, None])
    kept = values > jnp.max(values) * len(values) * jnp.finfo(values.dtype).eps
    least = jnp.sqrt(jnp.min(jnp.where(kept, values, jnp.inf)))
    ratios = jnp.where(kept, least / jnp.sqrt(jnp.where(kept, values, 1)), 0)
    return (vectors * ratios) @ jnp.sum(vectors, 0)


def _upgrad(cosines: Gramian, lengths: Weights, active: Weights, options: dict[str, Any]) -> Weights:
    del options
    count, regular = len(cosines), _regular(cosines)

    def projected(start: Weights) -> Weights:
        """Return the shortest combination with weights of at least `start`: the projection on the dual cone."""

        def objective(more: Weights) -> Array:
            return (start + more) @ regular @ (start + more) / 2

        return start + solvers.minimize(objective, count, cosines.dtype, simplex=False)

    rows = jax.vmap(projected)(jnp.eye(count, dtype=cosines.dtype))
    return _sum_of_rows(rows, lengths, active) / jnp.maximum(jnp.sum(active), 1)


_METHODS: dict[str, Callable[[Gramian, Weights, Weights, dict[str, Any]], Weights]] = {
    "pcgrad": _pcgrad,
    "mgda": _mgda,
    "cagrad": _cagrad,
    "imtl_g": _imtl_g,
    "nash": _nash,
    "aligned": _aligned,
    "fairgrad": _fairgrad,
    "upgrad": _upgrad,
}
GRADIENT_NAMES = tuple(_METHODS)


def gradnorm_start(tasks: Sequence[str]) -> dict[str, Any]:
    """Return GradNorm's state before the first step, {quantity: {task: scalar}}."""
    zero = {task: jnp.zeros([]) for task in tasks}
    return {
        "logits": zero,
        "first_loss": {task: jnp.full([], jnp.nan) for task in tasks},
        "optimizer": _GRADNORM_OPTIMIZER(0.0).init(zero),
    }


def gradnorm_weights(state: dict[str, Any], tasks: Sequence[str]) -> Weights:
    """Return GradNorm's weights, which are positive and add up to the number of tasks."""
    logits = jnp.stack([state["logits"][task] for task in tasks])
    return len(tasks) * jax.nn.softmax(logits)


def gradnorm_update(
    state: dict[str, Any], tasks: Sequence[str], losses: Weights, labeled: Array, gramian: Gramian, options: Any
) -> dict[str, Any]:
    """Return GradNorm's state after a step (Chen et al. 2018, arXiv 1711.02257).

    The weights learn to minimize sum_i |w_i |g_i| - mean_j(w_j |g_j|) r_i ** alpha|, where r_i is the loss relative to
    the first one of the task, divided by the mean of those over tasks. They are a softmax, as in LibMTL, so that they
    stay positive; the paper divides them by their sum after each step.

    Args:
      state: the state before the step; the first one is from `gradnorm_start`.
      tasks: the K tasks.
      losses: [K], losses of the step.
      labeled: [K], whether the batch has a label of the task.
      gramian: [K, K], of the tasks' gradients.
      options: loss.options of the config.
    """
    old = jnp.stack([state["first_loss"][task] for task in tasks])
    first = jnp.where(jnp.isnan(old) & labeled, losses, old)
    known = labeled & (first > 0)
    ratios = jnp.where(known, losses / jnp.where(known, first, 1), 0)
    count = jnp.maximum(jnp.sum(known), 1)
    rates = jnp.where(known, ratios / (jnp.sum(ratios) / count), 0)
    lengths = jnp.sqrt(jnp.diag(gramian))

    def imbalance(logits: dict[str, Array]) -> Array:
        weighted = gradnorm_weights({"logits": logits}, tasks) * lengths
        target = jnp.sum(jnp.where(known, weighted, 0)) / count * rates**options.gradnorm_alpha
        return jnp.sum(jnp.where(known, jnp.abs(weighted - jax.lax.stop_gradient(target)), 0))

    tx, logits = _GRADNORM_OPTIMIZER(options.gradnorm_learning_rate), state["logits"]
    updates, opt_state = tx.update(jax.grad(imbalance)(logits), state["optimizer"], logits)
    return {
        "logits": optax.apply_updates(logits, updates),
        "first_loss": {**state["first_loss"], **dict(zip(tasks, first, strict=True))},
        "optimizer": opt_state,
    }
