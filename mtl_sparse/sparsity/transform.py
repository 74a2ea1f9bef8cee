"""Any optax optimizer followed by the proximal step of a sparsity penalty, and Adam's preset."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_sparse.sparsity import control, metrics, penalties, projections
from mtl_sparse.sparsity import groups as groups_lib
from mtl_sparse.sparsity.control import TargetSparsity
from mtl_sparse.sparsity.groups import Groups
from mtl_sparse.sparsity.projections import FreezeZeros, HoldNorm, KeepStrongest, Projection, Step
from mtl_sparse.sparsity.schedules import concrete, phased

REGROWTH = ("annealed", "free")


class ProximalState(NamedTuple):
    """State of `proximal` and `proximal_adam`."""

    count: jax.Array  # type: ignore[assignment]  # tuple.count is hidden, as in optax; shape=(), int32, steps taken
    inner: optax.OptState  # of the inner optimizer
    norms: jax.Array  # shape=(kernels,), dtype=jnp.float32; from `projections.initial_norms`
    lambda_: jax.Array  # shape=(), dtype=jnp.float32; lambda of the last step
    peak_learning_rate: jax.Array  # shape=(), dtype=jnp.float32; the highest learning rate so far
    control: control.ControlState | tuple[()]  # () without a target


def proximal(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    lambda_: optax.ScalarOrSchedule | TargetSparsity,
    penalty: str | penalties.Penalty = "group_lasso",
    metric: metrics.MetricFn | None = None,
    regrowth: str = "annealed",
    projections: Sequence[Projection] = (),
) -> optax.GradientTransformationExtraArgs:
    """Follow each step of an optimizer with the proximal step of lambda times a sparsity penalty.

    With z the parameters after the inner optimizer's step, the new parameters are argmin_x 1/2 |x - z|^2_D +
    learning_rate * lambda * penalty(x). After `optax.apply_updates` a pruned group is exactly zero; at `lambda_=0` the
    update is the inner optimizer's, bit for bit. Pruned groups keep the inner optimizer's state, and regrow when their
    gradient exceeds the threshold.

    Example:
      tx = proximal(optax.adamw(1e-3), 1e-3, lambda_=1e-5, metric=AdamMetric(), projections=[HoldNorm()])

    Args:
      inner: any optax optimizer; its updates include the learning rate. Extra arguments of `update` are passed on to
        it, with "proximal_lambda" and "proximal_step" (steps taken before) added. To accumulate gradients, wrap
        `proximal`: `optax.MultiSteps(proximal(...), k)`.
      learning_rate: learning rate of the inner optimizer: a number or an optax schedule. It scales the penalty as it
        scales the step.
      lambda_: strength of the penalty: a number >= 0, an optax schedule (see `schedules.phased`), or a
        `TargetSparsity`, which finds it while training.
      penalty: "group_lasso", "group_l0", "l1", or a `Penalty` such as GroupLasso(scope="all") or GroupMCP(gamma=3.0).
      metric: diagonal metric D; None means the Euclidean metric. `metrics.AdamMetric(b1, b2, eps)` with the inner
        optimizer's numbers for optimizers with Adam's state, or `metrics.from_state(function of the inner state)`.
      regrowth: "annealed" takes the highest learning rate so far in the threshold of zero groups, so that the zero
        pattern settles as the learning rate falls; "free" takes the current one.
      projections: links after the proximal step, in order: `FreezeZeros`, `KeepStrongest`, `HoldNorm`.

    Returns:
      An optax transformation whose update needs `params`.

    Raises:
      ValueError: an argument out of its range or unknown, or two `HoldNorm`; at init, unless lambda_ is 0, a penalty
        whose scope matches no kernel, or a metric or projection that does not fit the inner optimizer or the tree.
    """
    lambda_ = concrete(lambda_)
    if regrowth not in REGROWTH:
        raise ValueError(f"unknown regrowth {regrowth!r}; expected one of {', '.join(REGROWTH)}")
    if sum(isinstance(projection, HoldNorm) for projection in projections) > 1:
        raise ValueError("expected one HoldNorm; name all its kernels in one regular expression")
    if isinstance(lambda_, float) and not lambda_ >= 0:
        raise ValueError(f"lambda_ must be a number >= 0, got {lambda_}")
    _check_gamma(penalties.make(penalty), metric, learning_rate)
    if getattr(metric, "kind", "") == "group" and type(penalties.make(penalty)) is not penalties.GroupLasso:
        raise ValueError("metric 'group' needs the group lasso; choose metric 'adaptive', or penalty 'group_lasso'")
    if getattr(metric, "kind", "") == "fisher" and not isinstance(penalties.make(penalty), penalties.GroupL0):
        raise ValueError("metric 'fisher' needs penalty 'group_l0'; choose that penalty, or metric 'adaptive'")
    made = _Proximal(
        optax.with_extra_args_support(inner),
        learning_rate,
        lambda_,
        penalties.make(penalty),
        metric or metrics.plain,
        regrowth == "annealed",
        tuple(projections),
    )
    return optax.GradientTransformationExtraArgs(made.init, made.update)


def _check_gamma(penalty: penalties.Penalty, metric: Any, learning_rate: Any) -> None:
    is_plain = metric is None or getattr(metric, "kind", "") == "plain"
    rate = concrete(learning_rate)
    is_number = isinstance(rate, float)
    if isinstance(penalty, penalties.GroupMCP) and is_plain and is_number and (penalty.gamma or 0) <= rate:
        raise ValueError(
            f"gamma={penalty.gamma} is too small for the plain metric: it must exceed the learning rate {rate}"
        )


def _check_metric(metric: metrics.Metric | None, sets: Sequence[Groups]) -> None:
    if metric is None:
        return
    known = set(groups_lib.by_path(metric.gradient))
    if metric.diagonal is not None:
        known &= set(groups_lib.by_path(metric.diagonal))
    missing = [path for groups in sets for path in groups.paths if path not in known]
    if missing:
        raise ValueError(
            f"the metric has no entry for the penalized kernels {', '.join(missing[:3])}: choose an inner optimizer "
            "that has its state for all of them, or another scope of the penalty"
        )


def _mean(groups: Groups, x: Sequence[jax.Array]) -> jax.Array:
    """Return the mean of the entries of each group: [count]."""
    return groups.totals([_wide(a) for a in x])[0] / groups.sizes


def _wide(x: jax.Array) -> jax.Array:
    """Return an array in float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class _Now(NamedTuple):
    """Numbers of one step.

    Attributes:
      steps: steps taken before.
      learning_rate: the learning rate.
      peak: the highest learning rate so far.
      lambda_: lambda, of zero groups where there are two.
      of_nonzero: lambda of the groups that are not zero.
    """

    steps: jax.Array
    learning_rate: Any
    peak: jax.Array
    lambda_: jax.Array
    of_nonzero: jax.Array


@dataclasses.dataclass(frozen=True)
class _Proximal:
    """The two functions of `proximal`, and what they share."""

    inner: optax.GradientTransformationExtraArgs
    learning_rate: optax.ScalarOrSchedule
    lambda_: optax.ScalarOrSchedule | TargetSparsity
    penalty: penalties.Penalty
    metric: metrics.MetricFn
    annealed: bool
    projections: tuple[Projection, ...]

    @property
    def target(self) -> TargetSparsity | None:
        return self.lambda_ if isinstance(self.lambda_, TargetSparsity) else None

    @property
    def penalizes(self) -> bool:
        return not (isinstance(self.lambda_, float) and self.lambda_ == 0)

    def init(self, params: optax.Params) -> ProximalState:
        norms, inner = jnp.zeros([0], jnp.float32), self.inner.init(params)
        if self.penalizes:
            sets = self.penalty.find(params)
            norms = projections.initial_norms(self.projections, self._held(sets, params), params)
            _check_metric(jax.eval_shape(lambda: self.metric(inner, params, 1.0)) if sets else None, sets)
        return ProximalState(
            jnp.zeros([], jnp.int32),
            inner,
            norms,
            jnp.zeros([], jnp.float32),
            jnp.zeros([], jnp.float32),
            control.init(self.target.initial) if self.target else (),
        )

    def update(
        self, updates: optax.Updates, state: ProximalState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, ProximalState]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        extra |= {"proximal_lambda": self._lambda(state.count, state.control), "proximal_step": state.count}
        updates, inner = self.inner.update(updates, state.inner, params, **extra)
        count = optax.safe_increment(state.count)
        sets = self.penalty.find(params) if self.penalizes else ()
        if not sets:  # no penalty, or another optimizer has all parameters (`optax.multi_transform`)
            return updates, state._replace(count=count, inner=inner)
        rate = self.learning_rate(state.count) if callable(self.learning_rate) else self.learning_rate
        peak = jnp.maximum(state.peak_learning_rate, rate).astype(jnp.float32)
        metric = self.metric(inner, updates, rate)
        controller: Any = state.control
        penalized, of_nonzero = count, None
        if self.target:
            penalized = count - self.target.phases.start_step
            critical, zero = self._critical(sets, params, updates, metric, rate)
            if self.penalty.shrinks:
                typical = jnp.nanmedian(jnp.where(critical > 0, critical, jnp.nan)).astype(jnp.float32)
                controller = control.clamp(self.target, controller, typical, penalized)
            else:
                controller, of_nonzero = control.by_rank(self.target, controller, critical, zero, penalized)
        lambda_ = self._lambda(state.count, controller)
        acts = lambda_ > 0  # not before the penalty starts, nor after it ends
        now = _Now(state.count, rate, peak, lambda_, lambda_ if of_nonzero is None else acts * of_nonzero)
        updates, zeros = self._project(sets, updates, params, state.norms, metric, now)
        if self.target:
            measured = self._measured(zeros, optax.apply_updates(params, updates))
            after = control.update if self.penalty.shrinks else control.after_rank
            controller = after(self.target, controller, measured, penalized)
        return updates, ProximalState(count, inner, state.norms, now.lambda_, peak, controller)

    def _measured(self, zeros: Sequence[jax.Array], params: optax.Params) -> jax.Array:
        """Return the sparsity that the target is about: float32 []."""
        if self.target is not None and self.target.measure is not None:
            return jnp.asarray(self.target.measure(params), jnp.float32)
        count_zero: Any = sum(jnp.sum(part) for part in zeros)
        return (count_zero / sum(part.size for part in zeros)).astype(jnp.float32)

    def _lambda(self, count: jax.Array, controller: Any) -> jax.Array:
        """Return lambda of the step after `count` steps."""
        if self.target:
            factor = self.target.phases.factor(count)
            return jnp.exp(controller.log_lambda) * (factor if self.penalty.shrinks else jnp.sign(factor))
        return jnp.asarray(self.lambda_(count) if callable(self.lambda_) else self.lambda_, jnp.float32)

    def _critical(
        self, sets: Sequence[Groups], params: optax.Params, updates: optax.Updates, metric: metrics.Metric, rate: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Return (lambda that decides whether each group of all sets is zero, whether it is): [groups].

        See `Penalty.critical`. If the penalty does not shrink, it is infinite for groups that `KeepStrongest` keeps.
        """
        x, slope, moved = (groups_lib.by_path(tree) for tree in (params, metric.gradient, updates))
        diagonal = groups_lib.by_path(metric.diagonal) if metric.diagonal is not None else None

        def of_set(groups: Groups) -> tuple[jax.Array, jax.Array]:
            before, step, slopes = ([_wide(tree[path]) for path in groups.paths] for tree in (x, moved, slope))
            d = None if diagonal is None else [_wide(diagonal[path]) for path in groups.paths]
            if metric.averaged and d is not None:
                means = groups.spread(_mean(groups, d), d)
                slopes = [mean * one / a for mean, one, a in zip(means, slopes, d, strict=True)]
                d = means
            z = [a + b for a, b in zip(before, step, strict=True)]
            found, zero = self.penalty.critical(z, slopes, d, rate, groups), groups.zeros(before)
            least = max((one.at_least(groups) for one in self.projections if isinstance(one, KeepStrongest)), default=0)
            if least and not self.penalty.shrinks:
                ranks = jnp.argsort(jnp.argsort(-jnp.where(zero, -1, found), stable=True))
                found = jnp.where((ranks < least) & ~zero, jnp.inf, found)
            return found, zero

        found = [of_set(groups) for groups in sets]
        return jnp.concatenate([one for one, _ in found]), jnp.concatenate([zero for _, zero in found])

    def _held(self, sets: Sequence[Groups], params: Any) -> list[str]:
        return projections.held_paths(self.projections, sets, params)

    def _project(
        self,
        sets: Sequence[Groups],
        updates: optax.Updates,
        params: optax.Params,
        norms: jax.Array,
        metric: metrics.Metric,
        now: _Now,
    ) -> tuple[optax.Updates, list[jax.Array]]:
        """Return the updates after the proximal step and the projections, and which parts are zero."""
        diagonal = groups_lib.by_path(metric.diagonal) if metric.diagonal is not None else None
        held = dict(zip(self._held(sets, params), norms, strict=True))
        zeros: list[jax.Array] = []

        def change(groups: Groups, before: list[jax.Array], z: list[jax.Array]) -> list[jax.Array]:
            d = None if diagonal is None else [diagonal[path] for path in groups.paths]
            mean = _mean(groups, d) if metric.averaged and d is not None else None
            if mean is not None:
                d = groups.spread(mean, before)
            step = Step(groups, self.penalty, now.steps, before, z, d, [held.get(path) for path in groups.paths])
            x = self._prox(step, now, mean)
            for projection in self.projections:
                x = projection(x, step)
            zeros.extend(jax.tree.leaves(self.penalty.zeros(x, groups)))
            return x

        return projections.apply(sets, updates, params, change), zeros

    def _prox(self, step: Step, now: _Now, mean: jax.Array | None) -> list[jax.Array]:
        """Return the result of the proximal step; `mean` is the metric of each group if it is averaged."""

        def threshold(dead: jax.Array) -> jax.Array:
            rate = jnp.where(dead & self.annealed, now.peak, now.learning_rate)
            return rate * (now.lambda_ if self.penalty.shrinks else jnp.where(dead, now.lambda_, now.of_nonzero))

        thresholds = jax.tree.map(threshold, self.penalty.zeros(step.params, step.groups))
        if mean is not None:  # the Euclidean step with a threshold for each group
            return self.penalty.prox(step.z, thresholds / mean, now.learning_rate, None, step.groups)
        return self.penalty.prox(step.z, thresholds, now.learning_rate, step.metric, step.groups)


def proximal_adam(  # noqa: PLR0913  # a preset: Adam's own arguments are among them
    learning_rate: optax.ScalarOrSchedule,
    lambda_: optax.ScalarOrSchedule | TargetSparsity = 0.0,
    *,
    penalty: str | penalties.Penalty = "group_lasso",
    target: TargetSparsity | None = None,
    metric: str = "adaptive",
    fixed_norm: bool | str = True,
    debias_step: int | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW followed by the proximal step of lambda times a penalty over the groups of the conv kernels.

    The preset of `proximal` for Adam, with annealed regrowth. After `optax.apply_updates` a pruned group is exactly
    zero. At `lambda_=0` the update is AdamW's, bit for bit.

    Args:
      learning_rate: a number or an optax schedule.
      lambda_: strength of the penalty: a number >= 0, an optax schedule (see `schedules.phased`), or a
        `TargetSparsity`. With a target, the number that the search starts from; 0 takes the target's `initial`.
      penalty: "group_lasso", "group_l0", "l1", or a `Penalty` such as GroupLasso(scope="all") or GroupMCP(gamma=3.0).
      target: target for which lambda is found while training, see `TargetSparsity`. Each kernel then keeps its
        strongest group. With `optax.inject_hyperparams`, put "lambda_", "debias_step" and "weight_decay_mask" into its
        `static_args`.
      metric: "adaptive" takes the proximal step in Adam's metric, "group" in the mean of this metric over each group,
        "plain" the closed-form Euclidean one (eq. 5 of "Less is More"); "fisher" and "uncorrected", see
        `metrics.AdamMetric`.
      fixed_norm: which kernels keep their norm, see `HoldNorm`; False is none, which is better for "group_l0": it does
        not shrink what it does not zero.
      debias_step: step from which the zero pattern stays and the rest trains without the penalty, which removes the
        shrinkage that it leaves; None is never.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      eps: Adam's epsilon, outside the square root.
      weight_decay: decoupled weight decay.
      weight_decay_mask: `mask` of `optax.adamw`.

    Returns:
      An optax transformation whose update needs `params`.

    Raises:
      ValueError: as `proximal`; a target with a lambda_ that is not a number >= 0, or with another target.
    """
    links: list[Projection] = [] if debias_step is None else [FreezeZeros(debias_step)]
    strength: Any = concrete(lambda_)
    if isinstance(strength, TargetSparsity) and target is None:
        target, strength = strength, strength.initial
    if target is not None:
        if callable(strength) or isinstance(strength, TargetSparsity):
            raise ValueError("with a target, lambda_ must be the number that the search starts from")
        phases = target.phases if debias_step is None else dataclasses.replace(target.phases, end_step=debias_step)
        initial = target.initial if isinstance(strength, float) and strength == 0 else strength
        strength = dataclasses.replace(target, initial=initial, phases=phases)
        links.append(KeepStrongest())
    elif debias_step is not None and not (isinstance(strength, float) and strength == 0):
        strength = phased(strength, end_step=debias_step)
    if fixed_norm:
        links.append(HoldNorm(fixed_norm))
    return proximal(
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=weight_decay_mask),
        learning_rate,
        lambda_=strength,
        penalty=penalty,
        metric=metrics.AdamMetric(b1, b2, eps, metric),
        projections=links,
    )
