"""Adam with a proximal step of a sparsity penalty as its last link, as an optax transformation."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_sparse.sparsity import control, prox, stats
from mtl_sparse.sparsity import groups as groups_lib

PENALTIES = ("group_lasso", "group_mcp", "l1")
METRICS = ("adaptive", "plain")
GROUP_WEIGHTS = ("sqrt_size", "none")
NORMS = ("initial", "unpenalized")


class ProximalAdamState(NamedTuple):
    """State of `proximal_adam`."""

    count: jax.Array  # shape=(), dtype=jnp.int32; steps taken
    adam: optax.OptState
    kernel_norms: dict[str, jax.Array]  # path -> shape=(), the Frobenius norm that a kernel is held at
    lambda_: jax.Array  # shape=(), dtype=jnp.float32; the penalty's strength in the last step
    peak_rate: jax.Array  # shape=(), dtype=jnp.float32; the highest learning rate so far
    control: control.ControlState | tuple[()]  # () without a target


def proximal_adam(
    learning_rate: optax.ScalarOrSchedule,
    lambda_: optax.ScalarOrSchedule = 0.0,
    *,
    penalty: str = "group_lasso",
    gamma: float | None = None,
    group_weights: str = "sqrt_size",
    target: control.Target | None = None,
    start_step: int = 0,
    warmup_steps: int = 0,
    debias_step: int | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    l2: float = 0.0,
    l2_mask: Any | Callable[[optax.Params], Any] | None = None,
    metric: str = "adaptive",
    bias_correction: bool = True,
    fixed_norm: bool | str = True,
    norm: str = "initial",
    keep_one: bool | str | None = None,
    anneal_revival: bool = True,
    penalty_in_gradient: bool = False,
    restart_every: int | None = None,
    scope: str | None = None,
    rules: Mapping[str, int | None] = groups_lib.HWIO,
) -> optax.GradientTransformation:
    """AdamW followed by the proximal step of lambda * penalty over the groups of the conv kernels.

    After `optax.apply_updates` a pruned group is exactly zero. At `lambda_ = 0` the update is AdamW's, bit
    for bit. A pruned group keeps its Adam moments and comes back when its gradient earns it.

    Args:
      learning_rate: a number or an optax schedule; it scales the penalty as it scales the step. Of all numbers here it
        is the one that `optax.inject_hyperparams` may inject; the others go into its `static_args`.
      lambda_: strength of the penalty, a number >= 0 or an optax schedule of the steps taken. With a target
        it is the number that the search starts from.
      penalty: "group_lasso", sum_g c_g |w_g|; "group_mcp", sum_g MCP(|w_g|) of slope lambda c_g at zero and
        flat beyond |w_g| = gamma lambda c_g; "l1", sum_i |w_i|, which zeroes single weights.
      gamma: of "group_mcp"; the larger, the nearer to the group lasso. Where gamma * D <= 2 * learning_rate,
        D is raised to equality: below it the step has no unique solution.
      group_weights: c_g, "sqrt_size" (the square root of the group's size, as in the paper) or "none" (1).
      target: finds lambda while training, see `control.Target`.
      start_step: steps without a penalty before it starts; kernel norms are held from the first step on.
      warmup_steps: steps over which the penalty then grows linearly from 0.
      debias_step: from this step on, the zero pattern stays and the rest trains without the penalty, which
        removes the shrinkage that the lasso leaves on it. None is never.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      eps: Adam's epsilon, outside the square root.
      weight_decay: decoupled weight decay.
      weight_decay_mask: as in `optax.adamw`.
      l2: strength of l2 / 2 |p|^2 in the objective: l2 * p is added to the gradient and goes through Adam's moments, as
        by PyTorch's `Adam(weight_decay=l2)`, with which the paper trains its dense baselines.
      l2_mask: which parameters `l2` acts on, as weight_decay_mask; None is all.
      metric: "adaptive" takes the prox in Adam's metric D = sqrt(v) + eps (Deleu & Bengio 2021); "plain"
        takes the closed-form Euclidean one (eq. 5 of "Less is More").
      bias_correction: whether v in D is the bias-corrected one. False is the published form, which prunes
        harder in the first steps (31 times in the very first, at b2 = 0.999).
      fixed_norm: scale penalized kernels back to the norm that `norm` names after the prox. True does so for kernels
        that have no other parameter beside them: a convolution without a bias is one that a normalization layer
        follows. Its scale is free there, so without this the penalty shrinks the kernel instead of pruning its
        groups. A regular expression of whole paths names the kernels instead. A wholly zero kernel stays zero until
        one of its groups regrows, and is then scaled at once; one that is zero at init is free.
      norm: "initial", the kernel's Frobenius norm at init, which voids its weight decay; or "unpenalized", the norm
        that the step has without the penalty, so that weight decay and Adam change it as in a dense training.
      keep_one: kernels that keep their strongest group where the prox would zero the last one, so that a large penalty
        cannot cut the network in two. True is every penalized kernel, a regular expression of whole paths names some,
        False is none; None is True with a target and False without.
      anneal_revival: groups that are zero have the highest learning rate so far, not the current one, in their
        threshold: one comes back when |m_g| > lambda c_g * highest / current rate. As the rate falls the zero
        pattern comes to rest as the weights do; otherwise groups near the threshold come and go with the noise
        of single batches until the end. False is published.
      penalty_in_gradient: also add a group lasso's subgradient, lambda sqrt(number of groups) w_g / |w_g|, to the
        gradient, so that it goes through Adam's moments, as the released code of "Less is More" does (its penalty has
        the number of groups where its prox has their size). The method's is the prox alone.
      restart_every: steps after which Adam's moments and step count start again from zero, as in the released code,
        which makes a new optimizer every epoch. None is never.
      scope: which kernels are penalised, see `groups.find`.
      rules: their groups, see `groups.find`.

    Raises:
      ValueError: an argument out of its range or unknown; at init, a scope that matches no kernel, rules that do not
        fit, or `fixed_norm=True` for a tree that does not show which kernels have a bias.
    """
    _check(learning_rate, lambda_, penalty, gamma, group_weights, target, metric, scope, norm)
    for name, value in (("start_step", start_step), ("warmup_steps", warmup_steps), ("debias_step", debias_step or 0)):
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if restart_every is not None and restart_every < 1:
        raise ValueError(f"restart_every must be >= 1, got {restart_every}")
    if penalty_in_gradient and penalty != "group_lasso":
        raise ValueError(f"penalty_in_gradient goes with penalty 'group_lasso', not {penalty!r}")
    penalizes = target is not None or callable(lambda_) or lambda_ > 0
    if not l2 >= 0:
        raise ValueError(f"l2 must be >= 0, got {l2}")
    adam = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=weight_decay_mask)
    shrink = optax.add_decayed_weights(l2, l2_mask)  # stateless, or with an empty state where it is masked

    def init_fn(params):
        norms, controller = {}, ()
        if penalizes:
            leaves, kernels = groups_lib.by_path(params), groups_lib.find(params, scope, rules)
            for path in _fixed_norm_kernels(fixed_norm, [kernel.path for kernel in kernels], params):
                norms[path] = jnp.linalg.norm(leaves[path].astype(jnp.float32))
        if target is not None:
            controller = control.init(lambda_)
        return ProximalAdamState(
            jnp.zeros([], jnp.int32),
            adam.init(params),
            norms,
            jnp.zeros([], jnp.float32),
            jnp.zeros([], jnp.float32),
            controller,
        )

    def strength_at(count, controller):
        if target is not None:
            strength = jnp.exp(controller.log_lambda)
        else:
            strength = jnp.asarray(lambda_(count) if callable(lambda_) else lambda_, jnp.float32)
        if start_step or warmup_steps:
            strength *= jnp.clip((count + (not warmup_steps) - start_step) / max(warmup_steps, 1), 0, 1)
        return strength if debias_step is None else jnp.where(count >= debias_step, 0, strength)

    def add_subgradient(updates, params, strength):
        kernels = {kernel.path: kernel for kernel in groups_lib.find(params, scope, rules)}

        def add(path, update, param):
            kernel = kernels.get(groups_lib.path_name(path))
            if kernel is None:
                return update
            norm = jnp.sqrt(jnp.sum(jnp.square(param), _other_axes(kernel, param.ndim), keepdims=True))
            weight = strength * kernel.count**0.5
            return update + (weight * param / jnp.where(norm > 0, norm, 1)).astype(update.dtype)

        return jax.tree_util.tree_map_with_path(add, updates, params)

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        if l2:
            updates, _ = shrink.update(updates, shrink.init(params), params)
        strength = strength_at(state.count, state.control)
        if penalizes and penalty_in_gradient:
            updates = add_subgradient(updates, params, strength)
        adam_state = state.adam
        if restart_every:
            moments = adam_state[0]  # of optax.scale_by_adam, the first link of optax.adamw
            kept = (state.count % restart_every != 0).astype(jnp.int32)
            adam_state = (jax.tree.map(lambda leaf: leaf * kept.astype(leaf.dtype), moments), *adam_state[1:])
        updates, adam_state = adam.update(updates, adam_state, params)
        count = optax.safe_increment(state.count)
        if not penalizes:
            return updates, state._replace(count=count, adam=adam_state)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        peak_rate = jnp.maximum(state.peak_rate, rate).astype(jnp.float32)
        kernels = {kernel.path: kernel for kernel in groups_lib.find(params, scope, rules)}
        moments = adam_state[0]
        m, v = groups_lib.by_path(moments.mu), groups_lib.by_path(moments.nu)
        m_correction, v_correction = (1 - b ** moments.count.astype(jnp.float32) for b in (b1, b2))
        zeros, controller = [], state.control

        def metric_of(kernel):
            if metric == "plain":
                return None
            return jnp.sqrt(v[kernel.path] / (v_correction if bias_correction else 1)) + eps

        def zeroing_lambda(kernel):
            """Return, for each group, the lambda above which it stays zero: |D times Adam's step| / (rate c_g)."""
            step, d = m[kernel.path] / m_correction, metric_of(kernel)
            if metric == "plain" or not bias_correction:
                step /= jnp.sqrt(v[kernel.path] / v_correction) + eps
                step *= 1 if d is None else d
            norm = jnp.sqrt(jnp.sum(jnp.square(step), _other_axes(kernel, step.ndim)))
            return norm / (kernel.size**0.5 if penalty == "l1" else _group_weight(group_weights, kernel))

        if target is not None:
            lambdas = jnp.concatenate([zeroing_lambda(kernel) for kernel in kernels.values()])
            scale = jnp.nanmedian(jnp.where(lambdas > 0, lambdas, jnp.nan)).astype(jnp.float32)
            controller = control.clamp(target, controller, scale, count - start_step)
            strength = strength_at(state.count, controller)

        def proximal_update(path, update, param):
            kernel = kernels.get(groups_lib.path_name(path))
            if kernel is None:
                return update
            z = (param + update).astype(jnp.promote_types(param.dtype, jnp.float32))
            d = metric_of(kernel)
            dead = param == 0 if penalty == "l1" else stats.zero_groups(param, kernel.axis)
            weight = jnp.where(dead & anneal_revival, peak_rate, rate) * strength
            if penalty != "l1":
                weight *= _group_weight(group_weights, kernel)
            x = _prox(penalty, z, weight, gamma, rate, d, kernel.axis)
            if debias_step is not None:
                dead = dead if penalty == "l1" else jnp.expand_dims(dead, _other_axes(kernel, param.ndim))
                x = jnp.where((state.count >= debias_step) & dead, 0, x)
            if _names(keep_one if keep_one is not None else target is not None, kernel.path):
                x = _keep_strongest(x, z, d, kernel)
            if kernel.path in state.kernel_norms:
                wanted = state.kernel_norms[kernel.path] if norm == "initial" else jnp.linalg.norm(z)
                length = jnp.linalg.norm(x)
                x = x * jnp.where((length > 0) & (wanted > 0), wanted / jnp.where(length > 0, length, 1), 1)
            if target is not None:
                zeros.append(jnp.ravel(x == 0) if penalty == "l1" else stats.zero_groups(x, kernel.axis))
            # Not x - param: this form makes zeros exact and is the plain update where x equals z.
            return jnp.where(x == 0, -param, update + (x - z).astype(update.dtype))

        updates = jax.tree_util.tree_map_with_path(proximal_update, updates, params)
        if target is not None:
            measured = (sum(jnp.sum(z) for z in zeros) / sum(z.size for z in zeros)).astype(jnp.float32)
            controller = control.update(target, controller, measured, count - start_step)
        return updates, ProximalAdamState(count, adam_state, state.kernel_norms, strength, peak_rate, controller)

    return optax.GradientTransformation(init_fn, update_fn)


def _check(learning_rate, lambda_, penalty, gamma, group_weights, target, metric, scope, norm):
    if not callable(lambda_) and not lambda_ >= 0:
        raise ValueError(f"lambda_ must be a number >= 0, got {lambda_}")
    if target is not None and (callable(lambda_) or not lambda_ > 0):
        raise ValueError(f"with a target, lambda_ must be the number > 0 that the search starts from, got {lambda_}")
    for name, value, known in (
        ("penalty", penalty, PENALTIES),
        ("metric", metric, METRICS),
        ("group_weights", group_weights, GROUP_WEIGHTS),
        ("scope", scope, (*groups_lib.SCOPES, None)),
        ("norm", norm, NORMS),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; it is one of {', '.join(map(str, known))}")
    if penalty == "group_mcp" and not (gamma is not None and gamma > 0):
        raise ValueError(f"group_mcp needs gamma > 0, got {gamma}")
    at_most = learning_rate if isinstance(learning_rate, int | float) else 0
    if penalty == "group_mcp" and metric == "plain" and gamma <= at_most:
        raise ValueError(f"gamma={gamma} is too small for the plain metric: it must exceed the learning rate {at_most}")


def _prox(penalty, z, weight, gamma, rate, d, axis):
    if penalty == "l1":
        return prox.l1(z, weight, d)
    if penalty == "group_lasso":
        return prox.group_lasso(z, weight, d, group_axis=axis)
    d = jnp.maximum(jnp.ones_like(z) if d is None else d, 2 * rate / gamma)
    return prox.group_mcp(z, weight, gamma / rate, d, group_axis=axis)


def _group_weight(group_weights, kernel):
    return kernel.size**0.5 if group_weights == "sqrt_size" else 1.0


def _other_axes(kernel, ndim):
    return tuple(axis for axis in range(ndim) if axis != kernel.axis)


def _names(choice, path):
    """Whether a choice of kernels, all (True), none (False) or a regular expression of whole paths, has `path`."""
    return re.fullmatch(choice, path) is not None if isinstance(choice, str) else choice


def _keep_strongest(x, z, d, kernel):
    """Return x or, where all of it is zero, the group of z that would be zeroed last."""
    scores = jnp.sum(jnp.square(z if d is None else d * z), _other_axes(kernel, z.ndim), keepdims=True)
    strongest = jnp.arange(scores.size).reshape(scores.shape) == jnp.argmax(scores)
    return jnp.where(jnp.any(x != 0), x, jnp.where(strongest, z, 0))


def _fixed_norm_kernels(fixed_norm, paths, params):
    """Return those of `paths` whose norm is fixed: by name, or because their module has no other parameter.

    Raises:
      ValueError: with `fixed_norm=True`, a tree of kernels alone: biases that belong to them may have been left out.
    """
    if not fixed_norm or isinstance(fixed_norm, str):
        return [path for path in paths if _names(fixed_norm, path)]
    # `optax.masked` leaves a node without leaves in the place of a parameter that is another optimizer's.
    hidden = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=hidden)[0]
    ndims = {groups_lib.path_name(path): 0 if hidden(leaf) else leaf.ndim for path, leaf in flat}
    if min(ndims.values()) > 1:
        raise ValueError(
            "fixed_norm=True fixes kernels without a bias, but this tree holds no parameter beside its kernels, so "
            "biases may have been filtered out of it: pass fixed_norm as a regular expression of the kernels that a "
            "normalization layer follows ('.*' for all), or fixed_norm=False"
        )
    modules = {path.rpartition("/")[0] for path, ndim in ndims.items() if ndim < 4}
    return [path for path in paths if path.rpartition("/")[0] not in modules]
