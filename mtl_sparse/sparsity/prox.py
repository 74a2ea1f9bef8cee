"""Proximal operators of the sparsity penalties, plain and in a diagonal metric.

Each returns argmin_x 1/2 (x - z)' D (x - z) + penalty(x) with D = diag(metric), D = I where metric is None.
A group is one index of `group_axis`: in an HWIO conv kernel, axis -2 is one input channel. z is float32 or float64,
and so is the result, of z's shape; pruned entries are exactly zero, zero stays zero, NaN stays NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def group_lasso(z: ArrayLike, weight: ArrayLike, metric: ArrayLike | None = None, *, group_axis: int = -2) -> jax.Array:
    """Return argmin_x 1/2 |x - z|^2_D + weight * sum_g |x_g|_2.

    Without a metric this is block soft-thresholding, max(0, 1 - weight / |z_g|) z_g (eq. 5 of "Less is
    More"). With one, a group is zero iff |D z_g| <= weight; otherwise x = z d r / (d r + weight), where
    r = |x_g| > 0 solves sum_i (d_i z_i / (d_i r + weight))^2 = 1 (Deleu & Bengio 2021, arXiv 2102.03869).

    Args:
      z: array, float32 or float64.
      weight: penalty weight >= 0: a scalar, or one weight a group, shape [z.shape[group_axis]].
      metric: positive array of z's shape, or None.
      group_axis: the axis whose indices are the groups.

    Returns:
      Array of z's shape and dtype.
    """
    z, weight, axes = _prepare(z, weight, group_axis)
    if metric is None:
        largest = jnp.max(jnp.abs(z), axes, keepdims=True)  # divided out, or squares under- and overflow
        norm = largest * jnp.sqrt(jnp.sum(jnp.square(z / jnp.where(largest > 0, largest, 1)), axes, keepdims=True))
        return jnp.where(norm <= weight, 0.0, z * (1.0 - weight / jnp.where(norm > 0, norm, 1.0)))
    d = jnp.asarray(metric, z.dtype)
    r, zero = _norm_of_solution(z, d * z, d, weight, axes)
    shrunk = jnp.where(zero, 0.0, z * (d * r / (d * r + weight)))
    return jnp.where(weight == 0, z, shrunk)


def group_mcp(
    z: ArrayLike, weight: ArrayLike, gamma: ArrayLike, metric: ArrayLike | None = None, *, group_axis: int = -2
) -> jax.Array:
    """Return argmin_x 1/2 |x - z|^2_D + sum_g MCP(|x_g|).

    MCP(r) = weight r - r^2 / (2 gamma) up to r = gamma weight, and constant beyond.

    The group minimax concave penalty (Breheny & Huang 2009, after Zhang 2010): a group is zero iff
    |D z_g| <= weight, as for the lasso, but one whose norm exceeds gamma * weight is not shrunk at all. It
    tends to the group lasso as gamma grows, and to hard thresholding as gamma d falls to 1. Where the penalty
    is not flat, the problem is the group lasso's with D - 1 / gamma in place of D and the same D z.

    Args:
      z: array, float32 or float64.
      weight: penalty weight >= 0: a scalar, or one weight a group, shape [z.shape[group_axis]].
      gamma: > 1 / d for every entry d of the metric (> 1 without one), or the problem is not convex.
      metric: positive array of z's shape, or None.
      group_axis: the axis whose indices are the groups.

    Returns:
      Array of z's shape and dtype.

    Raises:
      ValueError: gamma is too small for the metric. Under `jit`, where values are not known, the groups
        concerned are NaN instead.
    """
    z, weight, axes = _prepare(z, weight, group_axis)
    d = jnp.ones_like(z) if metric is None else jnp.asarray(metric, z.dtype)
    convex = d * gamma > 1
    if not isinstance(convex, jax.core.Tracer) and not np.all(convex | jnp.isnan(d)):
        raise ValueError(
            f"gamma={gamma} is too small for the metric, whose smallest entry is {jnp.min(d):.3g}: "
            "gamma times the metric must exceed 1 everywhere"
        )
    d_left = jnp.where(convex, d - 1 / gamma, jnp.nan)
    dz = jnp.where(convex, d * z, jnp.nan)
    r, zero = _norm_of_solution(dz / d_left, dz, d_left, weight, axes, steps=3)
    shrunk = jnp.where(zero, 0.0, dz * (r / (d_left * r + weight)))
    return jnp.where((r >= gamma * weight) | (weight == 0), z, shrunk)


def l1(z: ArrayLike, weight: ArrayLike, metric: ArrayLike | None = None) -> jax.Array:
    """Return argmin_x 1/2 |x - z|^2_D + weight * sum_i |x_i|: soft-thresholding, entry by entry.

    Args:
      z: array, float32 or float64.
      weight: penalty weight >= 0: a scalar, or one that broadcasts against z.
      metric: positive array of z's shape, or None.

    Returns:
      Array of z's shape and dtype: zero where d |z| <= weight, otherwise z shrunk by weight / d.
    """
    z = jnp.asarray(z)
    weight = jnp.asarray(weight, z.dtype)
    d = 1.0 if metric is None else jnp.asarray(metric, z.dtype)
    return jnp.where(d * jnp.abs(z) <= weight, 0.0, z - jnp.sign(z) * (weight / d))


def _prepare(z: ArrayLike, weight: ArrayLike, group_axis: int) -> tuple[jax.Array, jax.Array, tuple[int, ...]]:
    """Return z, a weight that broadcasts against it, and the axes within a group."""
    z = jnp.asarray(z)
    group_axis = range(z.ndim)[group_axis]
    axes = tuple(axis for axis in range(z.ndim) if axis != group_axis)
    weight = jnp.asarray(weight, z.dtype)
    if weight.ndim == 1:
        weight = jnp.expand_dims(weight, axes)
    return z, weight, axes


def _norm_of_solution(
    z: jax.Array,
    dz: jax.Array,
    d: jax.Array,
    weight: jax.Array,
    axes: tuple[int, ...],
    steps: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return (r, zero): each group's norm at the solution, and whether it is zero; NaN and False for NaN.

    r is the root of g(r) = sum_i (d_i z_i / (d_i r + weight))^2 = 1. Every step stays at or below it: in
    t_i = d_i / (d_i r + weight), g(r + h) = sum_i a_i / (1 + t_i h)^2 averages a function whose even
    derivatives are positive, so the two-point Gauss quadrature with the same four moments of t lies below g,
    and so does its root (the one-point one is Jensen's inequality, and Newton's step on 1 / sqrt(g)). A pass
    over the group is what costs; each of these multiplies the correct digits by four.
    """
    tiny = jnp.finfo(z.dtype).tiny
    weight = jnp.maximum(weight, tiny)
    # Jensen's bounds from r = 0, and from r = infinity in 1 / d. All in units of weight, or squares underflow.
    q2 = jnp.square(dz * (1 / weight))
    z2 = z * z
    g0, g1, n0, n1 = _sums(axes, q2, q2 * d, z2, z2 * (weight / jnp.maximum(d, tiny)))
    zero = g0 <= 1
    from_zero = weight * (jnp.sqrt(g0) - 1) * (g0 / g1)
    lost = tiny * (z.size // g0.size)  # what n1 may lack where its terms underflow
    from_infinity = jnp.sqrt(n0) - (n1 + lost) / n0
    r = jnp.zeros_like(g0)
    for bound in (from_zero, from_infinity):
        r = jnp.where((bound > r) & jnp.isfinite(bound), bound, r)
    for _ in range(steps or (3 if z.dtype == jnp.float64 else 2)):
        unit = jnp.where(r > 0, r, 1)  # t in units of 1 / r, so that no moment underflows
        t = d * unit / (d * r + weight)
        a = jnp.square(z * (1 / unit) * t)  # (d z / (d r + weight))^2
        at = a * t
        att = at * t
        h = _quadrature_root(*_sums(axes, a, at, att, att * t))
        r = r + jnp.where((h > 0) & jnp.isfinite(h), h * unit, 0)
    return jnp.where(jnp.isnan(g0), jnp.nan, r), zero


def _quadrature_root(m0: jax.Array, m1: jax.Array, m2: jax.Array, m3: jax.Array) -> jax.Array:
    """Return the root h of sum_k p_k / (1 + t_k h)^2 = 1, with the two-point Gauss quadrature of these moments."""
    determinant = m0 * m2 - m1 * m1
    # Below rounding all mass is at one point, and Jensen's step is exact.
    two = determinant > 4 * jnp.finfo(m0.dtype).eps * m0 * m2
    half = jnp.where(two, (m0 * m3 - m1 * m2) / (2 * determinant), m1 / m0)
    product = jnp.where(two, (m1 * m3 - m2 * m2) / determinant, half * half)
    offset = jnp.sqrt(jnp.maximum(half * half - product, 0))
    t1, t2 = half + offset, jnp.maximum(half - offset, 0)
    p1 = jnp.where(t1 > t2, jnp.clip((m1 - m0 * t2) / (t1 - t2), 0, m0), m0)
    p2 = m0 - p1
    h = (jnp.sqrt(m0) - 1) * m0 / m1
    for _ in range(3):  # Newton on 1 / sqrt - 1, on one number a group
        i1, i2 = 1 / (1 + t1 * h), 1 / (1 + t2 * h)
        g = p1 * i1**2 + p2 * i2**2
        slope = p1 * t1 * i1**3 + p2 * t2 * i2**3
        h = h + g * (jnp.sqrt(g) - 1) / slope
    return h


def _sums(axes: tuple[int, ...], *terms: jax.Array) -> tuple[jax.Array, ...]:
    """Return sums of several terms in one pass over their inputs; the summed axes keep length 1."""
    zero = jnp.zeros([], terms[0].dtype)
    add = lambda left, right: tuple(a + b for a, b in zip(left, right, strict=True))  # noqa: E731
    totals = jax.lax.reduce(terms, (zero,) * len(terms), add, axes)
    return tuple(jnp.expand_dims(total, axes) for total in totals)
