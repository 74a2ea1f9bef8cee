"""The groups of a run's weights and what they cost, from its config."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mtl_sparse.compaction import channels as channels_lib
from mtl_sparse.compaction import groups as groups_lib
from mtl_sparse.compaction import rewritten
from mtl_sparse.compaction.cost import Cost
from mtl_sparse.models import atrous, backbones, costs, resnet
from mtl_sparse.report.schema import SIZE_TARGETS
from mtl_sparse.runtime import text
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.sparsity import stats
from mtl_sparse.sparsity.groups import HWIO, CoupledGroups, Groups, by_path
from mtl_sparse.sparsity.projections import KeepStrongest
from mtl_sparse.tasks import resolve

KINDS = ("input", "coupled")
TARGETS = {option: key for option, key, _ in SIZE_TARGETS}  # option -> key of `Cost.left`
_LABELS = {option: label for option, _, label in SIZE_TARGETS}
_LEAST: dict[Any, dict[str, float]] = {}  # results of `least`, which many trials of a sweep share
_PREFIX = "model/"  # of the model's parameters in the tree that the optimizer gets


def check(config) -> None:
    """Check the options on groups, targets and limits.

    Raises:
      UserError: an option that cannot work, or a layer that the model does not have.
    """
    sparsity = config.sparsity
    if sparsity.groups not in KINDS:
        raise UserError(
            "OPTION_UNKNOWN_VALUE",
            f"unknown sparsity.groups={sparsity.groups!r}; expected one of {', '.join(KINDS)}",
        )
    given = [name for name in ("target", *TARGETS) if sparsity[name] > 0]
    if len(given) > 1:
        raise UserError(
            "OPTION_CONFLICT",
            f"expected one target, got sparsity.{' and sparsity.'.join(given)}; set all but one of them to 0",
        )
    if sparsity.penalty == "l1" and (sparsity.groups != "input" or sparsity.max_removed < 1 or sparsity.at_least > 1):
        raise UserError(
            "OPTION_CONFLICT",
            "sparsity.penalty='l1' zeroes single weights, not groups; choose penalty 'group_lasso', or leave "
            "sparsity.groups, max_removed and at_least as they are",
        )
    if sparsity.head_target > 0 and (
        not has_target(sparsity)
        or sparsity.scope != "backbone"
        or sparsity.penalty != "group_lasso"
        or sparsity.penalty_in_gradient
    ):
        raise UserError(
            "OPTION_CONFLICT",
            f"sparsity.head_target={sparsity.head_target} needs a target of the backbone, scope='backbone', "
            "penalty='group_lasso' and penalty_in_gradient=False; with scope='all' one target is for both",
        )
    find(config)  # names what cannot work
    is_compact = bool(config.model.widths)  # whose groups were counted before it was compacted
    if given and (sparsity.max_removed < 1 or sparsity.at_least > 1) and not is_compact:
        _check_limits(config)


def has_target(sparsity) -> bool:
    """Return whether lambda is adjusted while training, from a run's config.sparsity."""
    return not sparsity.prune and any(sparsity[name] > 0 for name in ("target", *TARGETS))


def aim(sparsity) -> float:
    """Return the sparsity to reach: of groups, or the fraction of MACs or parameters to remove."""
    return next((1 - sparsity[name] for name in TARGETS if sparsity[name] > 0), sparsity.target)


def measure(config) -> Callable[[Any], jax.Array] | None:
    """Return the function of the parameters that is compared with the target; None for a target in zero groups."""
    for name, key in TARGETS.items():
        if config.sparsity[name] > 0:
            left = cost(config).left
            return lambda params: 1 - left(params)[key]
    return None


def left(config, params) -> dict[str, float]:
    """Return {"macs_left", "parameters_left"}, fractions, for the tree of the optimizer; {} without such a target."""
    if not any(config.sparsity[name] > 0 for name in TARGETS):
        return {}
    return {f"{key}_left": value for key, value in _left(config, by_path(params)).items()}


def least(config) -> dict[str, float]:
    """Return what is left if each penalized kernel keeps as few groups as the limits of a run allow.

    Without limits, that is one group, the first one of each. Excluded layers keep all of theirs. The kernels inside the
    heads are penalized with sparsity.scope=all and with a sparsity.head_target.

    Returns:
      {"macs", "parameters"}: fractions of the dense model's, in [0, 1].
    """
    sparsity, names = config.sparsity, ("groups", "scope", "at_least", "max_removed")
    with_heads = sparsity.head_target > 0
    key = (*_model(config), tuple(sparsity.exclude), *(sparsity[name] for name in names), with_heads)
    if key not in _LEAST:
        leaves = {kernel.path: jnp.ones(kernel.shape) for kernel in _channels(config).kernels}
        for one, kept in _kept(config, (*_in_scope(config), *(of_heads(config) if with_heads else ()))):
            x = [leaves[path] for path in one.paths]
            masks = one.spread(jnp.arange(one.count) < kept, x)
            leaves |= {path: a * mask for path, a, mask in zip(one.paths, x, masks, strict=True)}
        _LEAST[key] = _left(config, leaves)
    return dict(_LEAST[key])


def warn_of_target(config) -> None:
    """Log a warning if a run's target in MACs or parameters can be reached only by zeroing whole kernels."""
    name = next((name for name in TARGETS if config.sparsity[name] > 0), None)
    if name is None or config.model.widths:  # a compact model has the target of the run that it was made from
        return
    found, wanted = least(config)[TARGETS[name]], config.sparsity[name]
    if wanted < found:
        advice = "" if config.sparsity.groups == "coupled" else ", or sparsity.groups=coupled"
        logging.warning(
            "sparsity.%s=%s: one group in each penalized kernel leaves %.1f %% of the %s, so the target can be reached "
            "only by zeroing whole kernels; set a larger target%s",
            name, wanted, 100 * found, _LABELS[name], advice,
        )  # fmt: skip


def cost(config) -> Cost:
    """Return the cost of a run's model for images of data.size, as a function of the tree that the optimizer gets."""
    return Cost(_channels(config))


def find(config) -> tuple[Groups, ...] | None:
    """Return the penalized groups of a run, with the paths that the optimizer has.

    None stands for the input channels of the convolutions in scope, which `sparsity.groups.find` finds by their names:
    a ResNet has no depthwise ones.

    Raises:
      UserError: sparsity.exclude names a layer that the model does not have, or leaves no group.
    """
    sparsity = config.sparsity
    is_plain = sparsity.groups == "input" and sparsity.group_weights != "macs" and not tuple(sparsity.exclude)
    if is_plain and config.model.backbone == backbones.RESNET:
        return None
    found = _in_scope(config)
    left_alone = excluded(config)
    kept = tuple(one for one in found if not left_alone.intersection(one.paths))
    if not kept:
        raise UserError(
            "OPTION_CONFLICT", f"sparsity.exclude={tuple(sparsity.exclude)} leaves no layer to penalize; name fewer"
        )
    return kept


def of_heads(config) -> tuple[Groups, ...]:
    """Return the groups inside the heads, which sparsity.head_target is about."""
    channels, coupled = _channels(config), config.sparsity.groups == "coupled"
    found = groups_lib.of(channels, coupled=coupled, kernels=f"{_PREFIX}head_.*")
    others = {path for one in find(config) or () for path in one.paths} | excluded(config)
    return tuple(one for one in found if not others.intersection(one.paths))


def count(config, params: Any) -> stats.Sparsity:
    """Count the zero groups of a run's model, see `stats.sparsity`.

    Args:
      config: the run's config.
      params: the model's parameters.
    """
    return stats.sparsity(params, config.sparsity.scope, _rules(config, params), groups=of_model(config))


def _rules(config, params) -> Mapping[str, int | None]:
    """Return the rules of `stats.sparsity`, by the paths of the model's kernels."""
    if config.model.backbone == backbones.RESNET:
        return HWIO
    axes = {path.removeprefix(_PREFIX): axis for path, axis in groups_lib.axes(_channels(config)).items()}
    return {re.escape(path): axes.get(path, HWIO[".*"]) for path, x in by_path(params).items() if x.ndim == 4}


def unavoidable(config) -> str:
    """Return a regular expression of the paths of the kernels without which a head's output is constant.

    They are those of the backbone on every path to the head, and all kernels of heads.
    """
    if config.model.backbone == backbones.RESNET:
        return f"{_PREFIX}(backbone/({'|'.join(resnet.unavoidable(config.model.attach))})|head_.*)/kernel"
    kernels = groups_lib.on_every_path(_channels(config))
    return "|".join([f"{_PREFIX}head_.*/kernel", *map(re.escape, kernels)])


def of_model(config) -> tuple[Groups, ...] | None:
    """Return coupled groups with the paths of the model's parameters, for `stats.sparsity`; None for other groups."""
    if config.sparsity.groups != "coupled":
        return None
    return tuple(
        dataclasses.replace(one, paths=tuple(path.removeprefix(_PREFIX) for path in one.paths), name=_short(one.name))
        for one in find(config) or ()
        if isinstance(one, CoupledGroups)
    )


def excluded(config) -> set[str]:
    """Return the paths of the kernels that sparsity.exclude names.

    Raises:
      UserError: a name matches no layer.
    """
    names = (
        {_short(kernel.path): kernel.path for kernel in _channels(config).kernels} if config.sparsity.exclude else {}
    )
    found = set()
    for pattern in config.sparsity.exclude:
        try:
            matching = {path for name, path in names.items() if re.fullmatch(pattern, name)}
        except re.error as error:
            raise UserError(
                "OPTION_TYPE", f"sparsity.exclude: {pattern!r} is no regular expression: {error}"
            ) from error
        if not matching:
            near = ", ".join(text.nearest(pattern, names)) or f"{min(names)}, ..., {max(names)}"
            raise UserError("OPTION_UNKNOWN_VALUE", f"sparsity.exclude: no layer is named {pattern!r}; nearest: {near}")
        found |= matching
    return found


def _short(path):
    return path.removeprefix(_PREFIX).removesuffix("/kernel")


def _channels(config) -> channels_lib.Channels:
    return _of_model(*_model(config))


def _model(config):
    return rewritten.build(config.model, resolve(config)), tuple(config.data.size)


@functools.lru_cache(maxsize=8)
def _jitted(model, size):
    return jax.jit(Cost(_of_model(model, size)).left)


@functools.lru_cache(maxsize=8)
def _of_model(model, size) -> channels_lib.Channels:
    """Return the channels of a model, with the multiply-accumulates that results.json counts."""
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *size, 3))))

    def apply(params, images):
        return model.apply({"params": params["model"], **params["others"]}, images)

    params = {"model": variables["params"], "others": {k: v for k, v in variables.items() if k != "params"}}
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    read = {kernel.path: kernel.read for kernel in channels_lib.of(apply, params, images).kernels}
    read = {path: part for path, part in read.items() if "/backbone/" not in path}  # whose taps compaction keeps
    with atrous.plain_convolutions():  # some products of few channels are written as sums else
        found = channels_lib.of(lambda *args: apply(*args), params, images)  # JAX keeps the trace of a function
    macs = {f"{_PREFIX}{path}/kernel": layer.macs for path, layer in costs.layers(model, size).items()}
    events = tuple(
        dataclasses.replace(event, macs=macs[event.path] / event.size, read=read.get(event.path, 1.0))
        if isinstance(event, channels_lib.Kernel)
        else event
        for event in found.events
    )
    statistics = {path: x for path, x in found.vectors.items() if path.startswith(_PREFIX)}
    return dataclasses.replace(found, events=events, vectors=statistics, others=0)


def _check_limits(config) -> None:
    """Check that the target can be reached within the limits.

    Raises:
      UserError: it cannot.
    """
    sparsity = config.sparsity
    if sparsity.target > 0:
        kept = _kept(config, _in_scope(config))
        most = 1 - sum(count for _, count in kept) / sum(one.count for one, _ in kept)
        reached, wanted = f"{100 * most:.1f} % of groups zero", sparsity.target <= most
    else:
        name = next(name for name in TARGETS if sparsity[name] > 0)
        found = least(config)[TARGETS[name]]
        reached, wanted = f"{100 * found:.1f} % of the {_LABELS[name]} left", sparsity[name] >= found
    if not wanted:
        name = next(name for name in ("target", *TARGETS) if sparsity[name] > 0)
        raise UserError(
            "OPTION_CONFLICT",
            f"sparsity.{name}={sparsity[name]} cannot be reached with sparsity.max_removed={sparsity.max_removed}, "
            f"at_least={sparsity.at_least} and exclude={tuple(sparsity.exclude)}, which allow {reached}; relax one of "
            "them",
        )


def _kept(config, sets: Sequence[Groups]) -> list[tuple[Groups, int]]:
    """Return the sets with the minimum number of groups that each must keep: all of those of excluded layers."""
    left_alone, at_least = excluded(config), limit(config.sparsity).at_least
    return [(one, one.count if left_alone.intersection(one.paths) else at_least(one)) for one in sets]


def _in_scope(config):
    """Return the groups in sparsity.scope, those of excluded layers among them."""
    sparsity = config.sparsity
    kernels = f"{_PREFIX}{'backbone/.*' if sparsity.scope == 'backbone' else '.*'}"
    return groups_lib.of(_channels(config), coupled=sparsity.groups == "coupled", kernels=kernels)


def _left(config, leaves: Mapping[str, Any]) -> dict[str, float]:
    """Return the result of `Cost.left` for the arrays by path, of which it reads the kernels."""
    kernels = {kernel.path: np.asarray(leaves[kernel.path]) for kernel in _channels(config).kernels}
    found = _jitted(*_model(config))(kernels)
    return {key: float(value) for key, value in found.items()}


def limit(sparsity) -> KeepStrongest:
    """Return the projection that keeps the groups which the limits of config.sparsity ask for."""
    return KeepStrongest(".*", sparsity.at_least, 1 - sparsity.max_removed)
