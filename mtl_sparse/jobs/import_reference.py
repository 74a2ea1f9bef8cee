"""`--job=import`: a run's folder from a checkpoint of the reference implementation."""

import json
import pathlib

import jax
import jax.numpy as jnp
from absl import logging

from mtl_sparse.models import costs, multitask
from mtl_sparse.pretrained import reference, state_dicts
from mtl_sparse.runtime import files
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.tasks import resolve, weighting
from mtl_sparse.training import checkpoints, optimizer
from mtl_sparse.training.state import TrainState


def run_job(config, workdir: str | pathlib.Path, checkpoint: str | pathlib.Path) -> pathlib.Path:
    """Make a run from a reference checkpoint, which can be evaluated, compacted, timed and exported.

    Args:
      config: all that the checkpoint does not contain, such as the data; its one task is that of a single-task
        checkpoint. If model.attach is set, it is of config.tasks, which then are those of the checkpoint in any order.
      workdir: the new run's folder.
      checkpoint: file of the weights, see `state_dicts.read`.

    Returns:
      The run's folder.

    Raises:
      UserError: FOLDER_IN_USE if the folder holds a run, OPTION_CONFLICT if model.attach is not of config.tasks,
        TASK_HEADS_DIFFER if the checkpoint's heads are not those of the tasks, or as `state_dicts.read` and
        `reference.from_state_dict`.
    """
    workdir = pathlib.Path(workdir).expanduser()
    if (workdir / "config.json").exists():
        raise UserError("FOLDER_IN_USE", f"{workdir} holds a run already; give another --workdir")
    task = config.tasks[0] if len(config.tasks) == 1 else None
    model, variables = reference.from_state_dict(state_dicts.read(checkpoint), task, _attach(config))
    config = config.copy_and_resolve_references()
    config.tasks = tuple(name for name, *_ in model.heads)
    config.model.update(depth=model.depth, width=model.width, head_features=model.head_features, attach=model.attach)
    config.model.classifier_features = model.classifier_features
    outputs = {name: count for name, _, count in model.heads}
    config.data.unit_range = True  # as the reference implementation trains
    config.data.num_classes = outputs.get("segmentation", config.data.num_classes)
    same = multitask.build(config.model, resolve(config))
    if same.heads != model.heads:
        raise UserError(
            "TASK_HEADS_DIFFER", f"expected a checkpoint with the heads {same.heads} of config.tasks, got {model.heads}"
        )
    params = {"model": variables["params"], "weighting": weighting.init(config.loss.weighting, config.tasks)}
    opt_state = optimizer.build(config, optimizer.LONG).init(jax.tree.map(jnp.asarray, params))
    start = weighting.start(config.loss.weighting, config.tasks)
    state = TrainState(jnp.zeros([], jnp.int32), params, variables["batch_stats"], opt_state, start)
    workdir.mkdir(parents=True, exist_ok=True)
    saved = checkpoints.Checkpoints(workdir)
    try:
        for kind in checkpoints.KINDS:  # of a run that has ended: --job=train only evaluates it
            saved.save(kind, 0, jax.device_get(state), {"stopped": True})
        saved.wait()
    finally:
        saved.close()
    files.write_json(workdir / "config.json", json.loads(config.to_json()))
    count = costs.parameter_count(variables)
    logging.info("%s holds a run of %s, with %d parameters", workdir, ", ".join(config.tasks), count)
    return workdir


def _attach(config) -> dict[str, str]:
    """Return the attachment point of each task, {} if config.model.attach does not give them."""
    points = tuple(config.model.attach)
    if points and len(points) != len(config.tasks):
        raise UserError(
            "OPTION_CONFLICT",
            f"expected one attachment point for each of config.tasks ({', '.join(config.tasks)}), in their order, got "
            f"model.attach={points}",
        )
    return dict(zip(config.tasks, points, strict=True)) if points else {}
