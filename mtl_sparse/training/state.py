"""The state of a training run."""

import pathlib
from typing import Any

import flax
import jax
import jax.numpy as jnp

from input_pipeline.transforms import image_statistics
from mtl_sparse.models import multitask
from mtl_sparse.pretrained import imagenet
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.tasks import weighting
from mtl_sparse.training import checkpoints
from mtl_sparse.training.setup import Run


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes.

    Attributes:
      step: int32 [], steps taken.
      params: {"model": the model's parameters, "weighting": learned loss weights}.
      batch_stats: BatchNorm's running statistics.
      opt_state: state of `optimizer.build`.
      weighting: state of the weighting, such as loss histories; {} if it has none.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    weighting: Any = flax.struct.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params["model"], "batch_stats": self.batch_stats}


def check_source(config: Any) -> None:
    """Raise UserError if config.model.init_from is set and does not exist."""
    source = config.model.init_from
    if source and not pathlib.Path(source).expanduser().exists():
        raise UserError(
            "FILE_MISSING", f"model.init_from={source!r} does not exist; name a run's folder or a file of weights"
        )


def initial(run: Run) -> TrainState:
    """Return the state before the first step: a function of config.seed and the weights in config.model.init_from.

    Raises:
      UserError: model.init_from does not exist or has weights of another model.
    """
    check_source(run.config)
    # Not optimized: a hundred small random draws run once, but XLA takes long to optimize them.
    init = jax.jit(lambda key: _initial(run, key), compiler_options={"xla_backend_optimization_level": 0})
    state = init(jax.random.key(run.config.seed))
    source = run.config.model.init_from
    if not source:
        return state
    path = pathlib.Path(source).expanduser()
    if path.is_file():
        statistics = image_statistics(run.config.data.unit_range)
        given = imagenet.start(source, run.model, state.variables, statistics)
    else:
        given = checkpoints.read_variables(source, multitask.shapes(run.model))
    params = {**state.params, "model": given["params"]}
    return state.replace(params=params, batch_stats=given["batch_stats"], opt_state=run.tx.init(params))


def shapes(run: Run) -> TrainState:
    """Return `initial(run)` as jax.ShapeDtypeStruct, without computing it."""
    return jax.eval_shape(lambda key: _initial(run, key), jax.random.key(run.config.seed))


def _initial(run, key):
    height, width = run.config.data.size
    variables = run.model.init(key, jnp.zeros((1, height, width, 3)))
    name, tasks = run.config.loss.weighting, [task.name for task in run.tasks]
    params = {"model": variables["params"], "weighting": weighting.init(name, tasks)}
    return TrainState(
        jnp.zeros([], jnp.int32),
        params,
        variables.get("batch_stats", {}),
        run.tx.init(params),
        weighting.start(name, tasks),
    )
