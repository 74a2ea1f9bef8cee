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
    """`--job=import`: makes a run of a released checkpoint, which can be evaluated, compacted, timed and exported.

    Args:
      config: all that the checkpoint does not say, such as the data; its tasks are those of a single-task checkpoint.
      workdir: the new run's folder.
      checkpoint: file of the weights, see `state_dicts.read`.

    Returns:
      The folder.

    Raises:
      UserError: as `state_dicts.read` and `from_state_dict`, or a folder that holds a run.
    """
    workdir = pathlib.Path(workdir).expanduser()
    if (workdir / "config.json").exists():
        raise UserError(f"{workdir} holds a run already: give another --workdir")
    task = config.tasks[0] if len(config.tasks) == 1 else None
    model, variables = reference.from_state_dict(state_dicts.read(checkpoint), task)
    config = config.copy_and_resolve_references()
    config.tasks = tuple(name for name, *_ in model.heads)
    config.model.update(depth=model.depth, width=model.width, head_features=model.head_features)
    config.model.classifier_features = model.classifier_features
    outputs = {name: count for name, _, count in model.heads}
    config.data.unit_range = True  # what the released code trains on
    config.data.num_classes = outputs.get("segmentation", config.data.num_classes)
    same = multitask.build(config.model, resolve(config))
    if same.heads != model.heads:
        raise UserError(f"the checkpoint's heads {model.heads} are not those of config.tasks here, {same.heads}")
    params = {"model": variables["params"], "weighting": weighting.init(config.loss.weighting, config.tasks)}
    opt_state = optimizer.build(config, optimizer.LONG).init(jax.tree.map(jnp.asarray, params))
    state = TrainState(jnp.zeros([], jnp.int32), params, variables["batch_stats"], opt_state)
    workdir.mkdir(parents=True, exist_ok=True)
    saved = checkpoints.Checkpoints(workdir)
    try:
        for kind in checkpoints.KINDS:  # a run that has ended: --job=train would only evaluate it
            saved.save(kind, 0, jax.device_get(state), {"stopped": True})
        saved.wait()
    finally:
        saved.close()
    files.write_json(workdir / "config.json", json.loads(config.to_json()))
    count = costs.parameter_count(variables)
    logging.info("%s holds a run of %s now, with %d parameters", workdir, ", ".join(config.tasks), count)
    return workdir
