"""Adam with a group-lasso proximal step as its last link, as an optax transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_sparse.sparsity import groups as groups_lib
from mtl_sparse.sparsity import prox

METRICS = ("adaptive", "plain")


class ProximalAdamState(NamedTuple):
    """State of `proximal_adam`."""

    count: jax.Array  # shape=(), dtype=jnp.int32; steps taken
    adam: optax.OptState
    kernel_norms: dict[str, jax.Array]  # path -> shape=(), the Frobenius norm that a kernel is held at


def proximal_adam(
    learning_rate: optax.ScalarOrSchedule,
    lambda_: optax.ScalarOrSchedule = 0.0,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    metric: str = "adaptive",
    fixed_norm: bool = True,
    scope: str | None = None,
) -> optax.GradientTransformation:
    """AdamW followed by the proximal step of lambda * sum_g sqrt(n_g) |w_g| over conv input channels.

    After `optax.apply_updates` a pruned group is exactly zero. At `lambda_ = 0` the update is AdamW's, bit
    for bit. A pruned group keeps its Adam moments and comes back when its gradient earns it.

    Args:
      learning_rate: a number or an optax schedule; it scales the penalty as it scales the step.
      lambda_: strength of the penalty, a number >= 0 or an optax schedule of the steps taken.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      eps: Adam's epsilon, outside the square root.
      weight_decay: decoupled weight decay.
      weight_decay_mask: as in `optax.adamw`.
      metric: "adaptive" takes the prox in Adam's metric D = sqrt(v_hat) + eps, bias-corrected (Deleu &
        Bengio 2021); "plain" takes the closed-form Euclidean one (eq. 5 of "Less is More").
      fixed_norm: scale each penalised kernel without a bias beside it back to its initial Frobenius norm
        after the prox. A convolution without bias is one that a normalisation layer follows: its scale is
        free there, so without this the penalty shrinks the kernel instead of pruning its groups. A wholly
        zero kernel stays zero until a group of it comes back, and is then scaled at once.
      scope: which kernels are penalised, see `groups.find`.

    Raises:
      ValueError: a negative lambda_, an unknown metric, or (at init) a scope that matches no kernel.
    """
    if not callable(lambda_) and not lambda_ >= 0:
        raise ValueError(f"lambda_ must be a number >= 0, got {lambda_}")
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; the metrics are {', '.join(METRICS)}")
    penalizes = callable(lambda_) or lambda_ > 0
    adam = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=weight_decay_mask)

    def init_fn(params):
        norms = {}
        if penalizes:
            leaves = _by_path(params)
            for kernel in groups_lib.find(params, scope):
                if fixed_norm and _normalized(kernel.path, leaves):
                    norms[kernel.path] = jnp.linalg.norm(leaves[kernel.path].astype(jnp.float32))
        return ProximalAdamState(jnp.zeros([], jnp.int32), adam.init(params), norms)

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        updates, adam_state = adam.update(updates, state.adam, params)
        count = optax.safe_increment(state.count)
        if penalizes:
            rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
            strength = lambda_(state.count) if callable(lambda_) else lambda_
            correction = 1 - b2 ** count.astype(jnp.float32)
            moments = _by_path(optax.tree.get(adam_state, "nu"))
            kernels = {kernel.path: kernel for kernel in groups_lib.find(params, scope)}

            def proximal_update(path, update, param):
                kernel = kernels.get(groups_lib.path_name(path))
                if kernel is None:
                    return update
                d = None
                if metric == "adaptive":
                    d = jnp.sqrt(moments[kernel.path] / correction) + eps
                z = param + update
                x = prox.group_lasso(z, rate * strength * kernel.size**0.5, d, group_axis=kernel.axis)
                if kernel.path in state.kernel_norms:
                    norm = jnp.linalg.norm(x)
                    x = x * jnp.where(norm > 0, state.kernel_norms[kernel.path] / jnp.where(norm > 0, norm, 1), 1)
                # Not x - param: this form makes zeros exact and is the plain update where x equals z.
                return jnp.where(x == 0, -param, update + (x - z))

            updates = jax.tree_util.tree_map_with_path(proximal_update, updates, params)
        return updates, ProximalAdamState(count, adam_state, state.kernel_norms)

    return optax.GradientTransformation(init_fn, update_fn)


def _normalized(path, leaves):
    """Whether a normalisation layer follows the kernel at `path`: then its module has no bias of its own."""
    return path.rpartition("/")[0] + "/bias" not in leaves


def _by_path(tree):
    """Leaves of a tree by their "/"-joined path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {groups_lib.path_name(path): leaf for path, leaf in leaves}
