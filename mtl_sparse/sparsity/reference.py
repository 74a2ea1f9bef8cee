"""What the reference implementation of "Less is More" does around Adam; for the fidelity study alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_sparse.sparsity import groups, metrics
from mtl_sparse.sparsity.penalties import GroupLasso, Penalty


def like_reference(
    adam: optax.GradientTransformation,
    *,
    l2: float = 0.0,
    l2_mask: Any | Callable[[optax.Params], Any] | None = None,
    penalty_in_gradient: Penalty | None = None,
    restart_every: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap Adam as the reference implementation does, to be the inner optimizer of `proximal`.

    Args:
      adam: an optax optimizer with Adam's state, which the wrapper keeps as its own state.
      l2: strength of l2 / 2 |p|^2 in the objective: l2 * p is added to the gradient and passes through Adam's moments,
        as in PyTorch's `Adam(weight_decay=l2)`, with which the paper trains its dense baselines.
      l2_mask: which parameters `l2` acts on; None means all.
      penalty_in_gradient: also add lambda sqrt(number of groups) w_g / |w_g| to the gradient of this penalty's kernels,
        a group lasso's subgradient. The published penalty has the number of groups where its prox has their size.
      restart_every: steps after which Adam's moments and step count start again from zero, as by the new optimizer that
        the reference implementation makes every epoch; None means never.

    Returns:
      An optax transformation that takes the extra arguments `proximal_lambda` and `proximal_step` of `proximal`.

    Raises:
      ValueError: an argument out of its range.
    """
    if not l2 >= 0:
        raise ValueError(f"l2 must be >= 0, got {l2}")
    if restart_every is not None and restart_every < 1:
        raise ValueError(f"restart_every must be >= 1, got {restart_every}")
    if penalty_in_gradient is not None and type(penalty_in_gradient) is not GroupLasso:
        raise ValueError(f"penalty_in_gradient must be a GroupLasso, got {type(penalty_in_gradient).__name__}")
    shrink = optax.add_decayed_weights(l2, l2_mask)  # stateless, or with an empty state if it is masked
    inner = optax.with_extra_args_support(adam)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        proximal_lambda: jax.Array,
        proximal_step: jax.Array,
        **extra: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if l2:
            updates, _ = shrink.update(updates, shrink.init(params), params)
        if penalty_in_gradient is not None:
            updates = _add_subgradient(updates, params, proximal_lambda, penalty_in_gradient)
        if restart_every:
            state = _restarted(state, proximal_step % restart_every != 0)
        return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _restarted(state: Any, kept: jax.Array) -> Any:
    """Return the state with Adam's moments and step count times `kept`, which is 0 or 1."""
    found = metrics.adam_state(state)
    factor = kept.astype(jnp.int32)
    new = jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), found)
    return jax.tree.map(lambda node: new if node is found else node, state, is_leaf=lambda node: node is found)


def _add_subgradient(updates: Any, params: Any, lambda_: jax.Array, penalty: Penalty) -> Any:
    leaves = groups.by_path(params)
    changed: dict[str, jax.Array] = {}
    for found in penalty.find(params):
        x = [leaves[path] for path in found.paths]
        norm = found.norms(x)
        factors = found.spread(lambda_ * found.count**0.5 / jnp.where(norm > 0, norm, 1), x)
        changed |= {path: factor * array for path, factor, array in zip(found.paths, factors, x, strict=True)}

    def add(path: Any, update: jax.Array) -> jax.Array:
        more = changed.get(groups.path_name(path))
        return update if more is None else update + more.astype(update.dtype)

    return jax.tree_util.tree_map_with_path(add, updates)
