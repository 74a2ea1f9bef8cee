"""One-shot pruning, a baseline: zero the least important groups, or those that are zero in another run, for good."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from input_pipeline import loader
from mtl_sparse.models import multitask
from mtl_sparse.report import schema
from mtl_sparse.report.schema import IMPORTANCES
from mtl_sparse.runtime import files, processes
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.sparsity import groups as sparsity_groups
from mtl_sparse.sparsity.groups import Groups
from mtl_sparse.sparsity.projections import KeepStrongest
from mtl_sparse.training import checkpoints, groups
from mtl_sparse.training import step as step_lib
from mtl_sparse.training.setup import AXIS, Run
from mtl_sparse.training.state import TrainState

_BATCHES = 16  # of Taylor importance


def prune(run: Run, state: TrainState) -> TrainState:
    """Zero the least important groups until the run's target is reached, or those that are zero in another run.

    The groups of all kernels are ranked together. Importance "norm" is the Euclidean norm of a group, divided by the
    mean norm in its set of groups, as in DepGraph (Fang et al. 2023, arXiv 2301.12900). "taylor" is the square of the
    sum of weight times gradient, the first-order change of the loss without the group, averaged over batches (Molchanov
    et al. 2019, arXiv 1906.10771). The limits of config.sparsity hold, and a target leaves no layer without a group
    that all paths to a head pass.

    Args:
      run: a run with sparsity.prune, and a target if this is an importance.
      state: the training state, on the host or on the devices.

    Returns:
      The state on the devices, with zeros.

    Raises:
      UserError: sparsity.prune is a folder without a best checkpoint, of another model or without a zero group.
    """
    config, host = run.config, jax.device_get(state)
    sets = penalized(config, host.params)
    if config.sparsity.prune not in IMPORTANCES:
        scores = [np.ones(one.count) for one in sets]

        def read():  # in one process, and an error in all of them
            scores[:] = _nonzero(run)

        processes.on_first(read)
        scores = processes.from_first(scores)
        logging.info(
            "Zeroed the %d of %d groups that are zero in %s; they stay zero from here on",
            sum(int((score == 0).sum()) for score in scores), sum(one.count for one in sets), config.sparsity.prune,
        )  # fmt: skip
        return loader.replicate(host.replace(params=jax.device_get(_zeroed(sets, scores, host.params, 0.0))))
    gradients = _gradients(run, state) if config.sparsity.prune == "taylor" else []
    scores = processes.from_first(_scores(sets, host.params, gradients))
    params, zeroed, reached = zero_lowest(config, sets, scores, host.params)
    logging.info(
        "Pruned by %s: %d of %d groups zeroed, sparsity %.3f (target %.3f); they stay zero from here on",
        config.sparsity.prune, zeroed, sum(one.count for one in sets), reached, groups.aim(config.sparsity),
    )  # fmt: skip
    return loader.replicate(host.replace(params=jax.device_get(params)))


def check_source(run: Run) -> None:
    """Check the run whose zeros a new run reuses, before the new run's config.json is written.

    Raises:
      UserError: sparsity.prune is a folder without a best checkpoint, of another model or without a zero group; it is
        raised in all processes.
    """
    config = run.config
    if not config.sparsity.prune or config.sparsity.prune in IMPORTANCES:
        return

    def check():
        _nonzero(run)
        path = pathlib.Path(config.sparsity.prune).expanduser() / "config.json"
        theirs = schema.migrate("config", files.read_json(path))["sparsity"]
        for name in ("groups", "scope"):
            if theirs[name] != config.sparsity[name]:
                logging.warning(
                    "sparsity.prune=%s was trained with sparsity.%s=%s, but this run uses %s: only groups that are "
                    "wholly zero under this run's options are reused",
                    config.sparsity.prune, name, theirs[name], config.sparsity[name],
                )  # fmt: skip

    processes.on_first(check)


def penalized(config, params: Any) -> Sequence[Groups]:
    """Return the groups that a run's target is about, for the tree of the optimizer."""
    return groups.find(config) or sparsity_groups.find(params, config.sparsity.scope)


def zero_lowest(config, sets: Sequence[Groups], scores: Sequence[np.ndarray], params: Any) -> tuple[Any, int, float]:
    """Zero the groups of the lowest scores until the target is reached, within the limits of config.sparsity.

    Args:
      config: the config of a run with a target.
      sets: its groups.
      scores: float [groups] of each set, not negative and not infinite.
      params: the tree of the optimizer.

    Returns:
      (the parameters with zeros, number of groups that were zeroed, sparsity reached: less than the target if no group
      is left that may be zeroed).
    """
    scores = [score.copy() for score in scores]
    for one, score in zip(sets, scores, strict=True):
        score[np.argsort(-score, kind="stable")[: _kept(config, one)]] = np.inf
    highest, reached = _threshold(config, sets, scores, params)
    return _zeroed(sets, scores, params, highest), sum(int((s <= highest).sum()) for s in scores), reached


def _kept(config, one: Groups) -> int:
    """Return how many groups of a set stay in any case."""
    limits = [groups.limit(config.sparsity)]
    if config.sparsity.keep_connected:
        limits.append(KeepStrongest(groups.unavoidable(config)))
    return max(limit.at_least(one) for limit in limits)


def _gradients(run: Run, state: TrainState) -> list[Any]:
    """Return the gradients of some training batches, on the host, without an update of the parameters."""

    def of_batch(state, batch, seed):
        return step_lib.gradients(
            state, batch, seed, model=run.model, tasks=run.tasks, loss_config=run.config.loss,
            steps_per_epoch=run.steps_per_epoch,
        ).grads  # fmt: skip

    mapped = jax.pmap(of_batch, axis_name=AXIS, in_axes=(None, 0, None), out_axes=None)
    batches = loader.prefetch_to_device(run.batches.train(int(state.step)))
    count = min(_BATCHES, run.steps_per_epoch)
    return [jax.device_get(mapped(state, next(batches), np.uint32(run.config.seed))) for _ in range(count)]


def _scores(sets: Sequence[Groups], params: Any, gradients: Sequence[Any]) -> list[np.ndarray]:
    """Return the importance of each group of each set: by the gradients if there are any, otherwise by norm."""
    leaves = sparsity_groups.by_path(params)
    slopes = [sparsity_groups.by_path(one) for one in gradients]
    found = []
    for one in sets:
        x = [jnp.asarray(leaves[path]) for path in one.paths]
        if not slopes:
            norms = np.array(one.norms(x))
            found.append(norms / max(norms.mean(), np.finfo(np.float32).tiny))
            continue
        changes = [one.totals([a * grads[path] for a, path in zip(x, one.paths, strict=True)])[0] for grads in slopes]
        found.append(np.mean(np.square(np.array(changes, np.float64)), 0))
    return found


def _nonzero(run) -> list[np.ndarray]:
    """Return 0 for each group that is zero in the best checkpoint of the run that sparsity.prune names, otherwise 1."""
    folder = run.config.sparsity.prune
    try:
        variables = checkpoints.read_variables(pathlib.Path(folder).expanduser(), multitask.shapes(run.model))
    except UserError as error:
        raise UserError(error.code, f"sparsity.prune={folder!r}: {error}") from error
    tree = {"model": variables["params"]}
    sets, leaves = penalized(run.config, tree), sparsity_groups.by_path(tree)
    found = [1.0 - np.asarray(one.zeros([jnp.asarray(leaves[path]) for path in one.paths])) for one in sets]
    if all(score.all() for score in found):
        raise UserError(
            "OPTION_CONFLICT",
            f"sparsity.prune={folder!r}: no group is zero in this run; name a pruned one, and set sparsity.groups as "
            "it does",
        )
    return found


def _threshold(config, sets, scores, params) -> tuple[float, float]:
    """Return (largest pruned score, sparsity reached) for the fewest groups that reach the target."""
    of_params = groups.measure(config)
    every = np.sort(np.concatenate(scores))
    every = every[np.isfinite(every)]
    aim, low, high = groups.aim(config.sparsity), 0, len(every)  # number of groups that are pruned

    @jax.jit
    def reached(params, threshold):
        if of_params is not None:
            return of_params(_zeroed(sets, scores, params, threshold))
        return jnp.mean(jnp.concatenate([jnp.asarray(score) for score in scores]) <= threshold)

    def threshold(count):
        return float(every[count - 1]) if count else -1.0

    while low < high:
        middle = (low + high) // 2
        if float(reached(params, threshold(middle))) < aim:
            low = middle + 1
        else:
            high = middle
    return threshold(low), float(reached(params, threshold(low)))


def _zeroed(sets, scores, params, threshold) -> Any:
    """Return the parameters with zero groups where the score is at most the threshold."""
    leaves = sparsity_groups.by_path(params)
    changed: dict[str, jax.Array] = {}
    for one, score in zip(sets, scores, strict=True):
        x = [leaves[path] for path in one.paths]
        keep = one.spread(jnp.asarray(score) > threshold, x)
        changed |= {path: jnp.where(k, a, 0) for path, a, k in zip(one.paths, x, keep, strict=True)}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: changed.get(sparsity_groups.path_name(path), leaf), params
    )
