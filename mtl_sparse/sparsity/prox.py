"""Proximal operators of the sparsity penalties, plain and in a diagonal metric.

Each returns argmin_x 1/2 (x - z)' D (x - z) + penalty(x) with D = diag(metric), D = I where metric is None.
A group is one index of `group_axis`: in an HWIO conv kernel, axis -2 is one input channel. z is float32 or float64,
and so is the result, of z's shape; pruned entries are exactly zero, zero stays zero, NaN stays NaN. The operators
that end in `_over` take groups of any form, which may span several arrays.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mtl_sparse.sparsity.groups import ConvGroups, Groups

Arrays = Sequence[jax.Array]


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
    z = jnp.asarray(z)
    diagonal = None if metric is None else [jnp.asarray(metric, z.dtype)]
    return group_lasso_over(_along(z, group_axis), [z], weight, diagonal)[0]


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
    z = jnp.asarray(z)
    diagonal = None if metric is None else [jnp.asarray(metric, z.dtype)]
    return group_mcp_over(_along(z, group_axis), [z], weight, gamma, diagonal)[0]


def group_l0(z: ArrayLike, weight: ArrayLike, metric: ArrayLike | None = None, *, group_axis: int = -2) -> jax.Array:
    """Return argmin_x 1/2 |x - z|^2_D + weight * (number of groups of x that are not zero).

    This is hard thresholding (Blumensath & Davies 2008, doi 10.1007/s00041-008-9035-z): a group is zero iff 1/2
    |z_g|^2_D <= weight, and otherwise as in z.

    Args:
      z: array, float32 or float64.
      weight: penalty weight >= 0: a scalar, or one weight a group, shape [z.shape[group_axis]].
      metric: positive array of z's shape, or None.
      group_axis: the axis whose indices are the groups.

    Returns:
      Array of z's shape and dtype.
    """
    z = jnp.asarray(z)
    diagonal = None if metric is None else [jnp.asarray(metric, z.dtype)]
    return group_l0_over(_along(z, group_axis), [z], weight, diagonal)[0]


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


def group_lasso_over(groups: Groups, z: Arrays, weight: ArrayLike, metric: Arrays | None = None) -> list[jax.Array]:
    """Return `group_lasso` over groups that may span several arrays.

    Args:
      groups: which entries of the arrays are a group.
      z: one array for each of `groups.paths`, all float32 or all float64.
      weight: penalty weight >= 0: a scalar, or one weight a group, shape [groups.count].
      metric: positive arrays of the same shapes, or None.

    Returns:
      Arrays of z's shapes and dtype.
    """
    weight = jnp.broadcast_to(jnp.asarray(weight, z[0].dtype), groups.count)
    if metric is None:
        largest = groups.largest([jnp.abs(a) for a in z])  # divided out, or squares under- and overflow
        unit = groups.spread(jnp.where(largest > 0, largest, 1), z)
        (squares,) = groups.totals([jnp.square(a / u) for a, u in zip(z, unit, strict=True)])
        norm = largest * jnp.sqrt(squares)
        factors = groups.spread(1.0 - weight / jnp.where(norm > 0, norm, 1.0), z)
        zero = groups.spread(norm <= weight, z)
        return [jnp.where(is_zero, 0.0, a * factor) for is_zero, a, factor in zip(zero, z, factors, strict=True)]
    norm, is_zero = _norm_of_solution(groups, z, [d * a for d, a in zip(metric, z, strict=True)], metric, weight)
    norms, zeros, weights = (groups.spread(values, z) for values in (norm, is_zero, weight))
    shrunk = [
        jnp.where(gone, 0.0, a * (d * r / (d * r + w)))
        for gone, a, d, r, w in zip(zeros, z, metric, norms, weights, strict=True)
    ]
    return [jnp.where(w == 0, a, x) for w, a, x in zip(weights, z, shrunk, strict=True)]


def group_mcp_over(
    groups: Groups, z: Arrays, weight: ArrayLike, gamma: ArrayLike, metric: Arrays | None = None
) -> list[jax.Array]:
    """Return `group_mcp` over groups that may span several arrays.

    Args:
      groups: which entries of the arrays are a group.
      z: one array for each of `groups.paths`, all float32 or all float64.
      weight: penalty weight >= 0: a scalar, or one weight a group, shape [groups.count].
      gamma: see `group_mcp`.
      metric: positive arrays of the same shapes, or None.

    Returns:
      Arrays of z's shapes and dtype.

    Raises:
      ValueError: see `group_mcp`.
    """
    weight = jnp.broadcast_to(jnp.asarray(weight, z[0].dtype), groups.count)
    ds = [jnp.ones_like(a) for a in z] if metric is None else metric
    convex = [d * gamma > 1 for d in ds]
    for d, ok in zip(ds, convex, strict=True):
        if not isinstance(ok, jax.core.Tracer) and not np.all(ok | jnp.isnan(d)):
            raise ValueError(
                f"gamma={gamma} is too small for the metric, whose smallest entry is {jnp.min(d):.3g}: "
                "gamma times the metric must exceed 1 everywhere"
            )
    d_left = [jnp.where(ok, d - 1 / gamma, jnp.nan) for ok, d in zip(convex, ds, strict=True)]
    dz = [jnp.where(ok, d * a, jnp.nan) for ok, d, a in zip(convex, ds, z, strict=True)]
    r, zero = _norm_of_solution(groups, [a / d for a, d in zip(dz, d_left, strict=True)], dz, d_left, weight, steps=3)
    rs, zeros, weights, whole = (
        groups.spread(values, z) for values in (r, zero, weight, (r >= gamma * weight) | (weight == 0))
    )
    shrunk = [
        jnp.where(is_zero, 0.0, a * (r / (d * r + w)))
        for is_zero, a, d, r, w in zip(zeros, dz, d_left, rs, weights, strict=True)
    ]
    return [jnp.where(keep, a, x) for keep, a, x in zip(whole, z, shrunk, strict=True)]


def group_l0_over(groups: Groups, z: Arrays, weight: ArrayLike, metric: Arrays | None = None) -> list[jax.Array]:
    """Return `group_l0` over groups that may span several arrays; for the arguments, see `group_lasso_over`."""
    weight = jnp.broadcast_to(jnp.asarray(weight, z[0].dtype), groups.count)
    score = half_squares(groups, z, metric)
    broken = (jnp.isnan(score) & (weight != 0)) | jnp.isnan(weight)
    factor = jnp.where(broken, jnp.nan, 1).astype(z[0].dtype)
    zeros, factors = (groups.spread(values, z) for values in ((score <= weight) & (weight > 0), factor))
    return [jnp.where(zero, 0, a * kept) for zero, a, kept in zip(zeros, z, factors, strict=True)]


def half_squares(groups: Groups, z: Arrays, metric: Arrays | None = None) -> jax.Array:
    """Return 1/2 |z_g|^2_D of each group: [groups.count]."""
    ds = [jnp.ones([], a.dtype) for a in z] if metric is None else metric
    return 0.5 * groups.totals([d * jnp.square(a) for d, a in zip(ds, z, strict=True)])[0]


def _along(z: jax.Array, axis: int) -> ConvGroups:
    """Return the groups along one axis of an array."""
    axis = range(z.ndim)[axis]
    return ConvGroups("", axis, z.shape[axis], z.size // max(1, z.shape[axis]))


def _norm_of_solution(
    groups: Groups, z: Arrays, dz: Arrays, d: Arrays, weight: jax.Array, steps: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return (r, zero) [groups.count]: each group's norm at the solution, whether it is zero; NaN and False for NaN.

    r is the root of g(r) = sum_i (d_i z_i / (d_i r + weight))^2 = 1. Every step stays at or below it: in
    t_i = d_i / (d_i r + weight), g(r + h) = sum_i a_i / (1 + t_i h)^2 averages a function whose even
    derivatives are positive, so the two-point Gauss quadrature with the same four moments of t lies below g,
    and so does its root (the one-point one is Jensen's inequality, and Newton's step on 1 / sqrt(g)). A pass
    over the group is what costs; each of these multiplies the correct digits by four.
    """
    tiny = jnp.finfo(weight.dtype).tiny
    weight = jnp.maximum(weight, tiny)
    weights = groups.spread(weight, z)
    # Jensen's bounds from r = 0, and from r = infinity in 1 / d. All in units of weight, or squares underflow.
    q2 = [jnp.square(a * (1 / w)) for a, w in zip(dz, weights, strict=True)]
    z2 = [a * a for a in z]
    g0, g1, n0, n1 = groups.totals(
        q2,
        [a * b for a, b in zip(q2, d, strict=True)],
        z2,
        [a * (w / jnp.maximum(b, tiny)) for a, w, b in zip(z2, weights, d, strict=True)],
    )
    zero = g0 <= 1
    from_zero = weight * (jnp.sqrt(g0) - 1) * (g0 / g1)
    lost = tiny * groups.sizes  # what n1 may lack where its terms underflow
    from_infinity = jnp.sqrt(n0) - (n1 + lost) / n0
    r = jnp.zeros_like(g0)
    for bound in (from_zero, from_infinity):
        r = jnp.where((bound > r) & jnp.isfinite(bound), bound, r)
    for _ in range(steps or (3 if weight.dtype == jnp.float64 else 2)):
        unit = jnp.where(r > 0, r, 1)  # t in units of 1 / r, so that no moment underflows
        h = _quadrature_root(*groups.totals(*_moments(groups, z, d, weights, r, unit)))
        r = r + jnp.where((h > 0) & jnp.isfinite(h), h * unit, 0)
    return jnp.where(jnp.isnan(g0), jnp.nan, r), zero


def _moments(
    groups: Groups, z: Arrays, d: Arrays, weights: Arrays, r: jax.Array, unit: jax.Array
) -> tuple[list[jax.Array], ...]:
    """Return the terms a, a t, a t^2 and a t^3 of each entry, with t in units of 1 / unit."""
    moments: tuple[list[jax.Array], ...] = ([], [], [], [])
    for a, b, w, radius, one in zip(z, d, weights, groups.spread(r, z), groups.spread(unit, z), strict=True):
        t = b * one / (b * radius + w)
        first = jnp.square(a * (1 / one) * t)  # (d z / (d r + weight))^2
        second = first * t
        third = second * t
        for terms, term in zip(moments, (first, second, third, third * t), strict=True):
            terms.append(term)
    return moments


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
