"""Solvers of the small convex problems behind the gradient weightings: jit-able, without a host round trip.

No library that the project depends on has them: optax has projections, which converge slowly where gradients are
nearly parallel, and jax.scipy has no constraints. The problems have as many unknowns as there are tasks.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Vector = Float[Array, " K"]
Matrix = Float[Array, "K K"]

_MOST_STEPS = 60
_TO_BOUNDARY = 0.95  # fraction of the way to the boundary that a step may go


def minimize(objective: Callable[[Vector], Float[Array, ""]], size: int, dtype: jnp.dtype, simplex: bool) -> Vector:
    """Minimize a convex, twice differentiable function of w >= 0 by a primal-dual interior-point method.

    The conditions are those of Karush, Kuhn and Tucker (Nocedal & Wright, "Numerical Optimization", chapter 19), solved
    by Newton's method along the central path. Where many points are optimal, the result is one in the middle of them,
    so that permuting the unknowns permutes it.

    Args:
      objective: the function; its values and second derivatives should be of the order of 1.
      size: number of unknowns K.
      dtype: float32 or float64.
      simplex: whether the unknowns must add up to 1.

    Returns:
      w; not finite where the objective is not.
    """
    gradient, hessian = jax.grad(objective), jax.hessian(objective)
    # Where w and z are both 0 at the optimum, they end at the root of this.
    tolerance = jnp.finfo(dtype).eps ** 1.5

    def unfinished(carry: Any) -> Any:
        step, w, z, _ = carry
        return (step < _MOST_STEPS) & ~(jnp.max(w * z) < tolerance)

    def newton(carry: Any) -> Any:
        step, w, z, y = carry
        dual, products = gradient(w) - z - y, w * z
        center = 0.1 * jnp.mean(products)
        # z is eliminated: (H + z / w) dw - dy = -dual + (center - w z) / w
        matrix = hessian(w) + jnp.diag(z / w)
        right = -dual + (center - products) / w
        if simplex:
            solved = jnp.linalg.solve(matrix, jnp.stack([right, jnp.ones_like(w)], -1))
            dy = (1 - jnp.sum(w) - jnp.sum(solved[:, 0])) / jnp.sum(solved[:, 1])
            dw = solved[:, 0] + dy * solved[:, 1]
        else:
            dw, dy = jnp.linalg.solve(matrix, right), jnp.zeros_like(y)
        dz = (center - products - z * dw) / w
        length = jnp.minimum(_within(w, dw), _within(z, dz))
        return step + 1, w + length * dw, z + length * dz, y + length * dy

    start = jnp.full((size,), 1 / size, dtype)
    carry = (jnp.zeros([], jnp.int32), start, jnp.ones_like(start), jnp.zeros([], dtype))
    w = jax.lax.while_loop(unfinished, newton, carry)[1]
    return w / jnp.sum(w) if simplex else w


def balance(gramian: Matrix, power: float) -> Vector:
    """Solve gramian @ w = w ** -power for w > 0.

    It is the minimum of w @ gramian @ w / 2 minus the sum of a function with the derivative w ** -power, which is
    strictly convex. Newton's method is damped as for self-concordant functions (Boyd & Vandenberghe, "Convex
    Optimization", section 9.6), so that it needs no line search, which rounding would end early.

    Args:
      gramian: positive definite, with entries of the order of 1.
      power: above 0; 1 is Nash's bargaining solution.

    Returns:
      w.
    """
    eps = jnp.finfo(gramian.dtype).eps

    def unfinished(carry: Any) -> Any:
        step, w = carry
        wrong = jnp.max(jnp.abs((gramian @ w) * w**power - 1))
        return (step < _MOST_STEPS) & ~(wrong < 8 * eps)

    def newton(carry: Any) -> Any:
        step, w = carry
        gradient = gramian @ w - w**-power
        move = -jnp.linalg.solve(gramian + jnp.diag(power * w ** (-power - 1)), gradient)
        decrement = jnp.sqrt(jnp.maximum(-gradient @ move, 0))
        curvature = (power + 1) / (2 * power**0.5) * jnp.max(w ** ((power - 1) / 2))
        damped = jnp.where(curvature * decrement > 0.25, 1 / (1 + curvature * decrement), 1.0)
        return step + 1, w + jnp.minimum(damped, _within(w, move)) * move

    start = (jnp.diag(gramian)) ** (-1 / (1 + power))  # the solution for gradients at right angles
    return jax.lax.while_loop(unfinished, newton, (jnp.zeros([], jnp.int32), start))[1]


def _within(x: Vector, move: Vector) -> Float[Array, ""]:
    """Return the largest step of at most 1 that keeps x positive with some distance to 0."""
    ratios = jnp.where(move < 0, -x / jnp.where(move < 0, move, -1), jnp.inf)
    return jnp.minimum(1.0, _TO_BOUNDARY * jnp.min(ratios))
