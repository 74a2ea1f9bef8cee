"""Training step and inference of this package, ready to be timed."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import random_batch
from configs import nyu
from input_pipeline import loader
from mtl_sparse import tasks
from mtl_sparse.models import atrous, costs, multitask
from mtl_sparse.runtime import compile_cache
from mtl_sparse.tasks import weighting
from mtl_sparse.training import optimizer
from mtl_sparse.training import step as step_lib
from mtl_sparse.training.setup import AXIS
from mtl_sparse.training.state import TrainState

TASKS = ("segmentation", "depth", "normals")


def _config(names, penalty, **model):
    config = nyu.get_config()
    config.tasks = tuple(names)
    config.model.update(model)
    config.sparsity.update(lambda_=config.sparsity.lambda_ if penalty else 0.0, warmup_steps=0)
    return config


def _convolutions(plain):
    """Return the context for tracing: plain convolutions, or the ones that this package chooses."""
    return atrous.plain_convolutions() if plain else contextlib.nullcontext()


def training_step(
    *, size: int, batch: int, penalty: bool = True, names=TASKS, plain: bool = False, loss: dict | None = None, **model
):
    """Return a function () -> scalars that takes one training step of configs/nyu.py.

    Args:
      size: side of the images in pixels.
      batch: images in a step.
      penalty: whether the optimizer applies the penalty.
      names: the tasks' names.
      plain: use XLA's convolutions, no products and no sums over taps.
      loss: options of config.loss.
      **model: options of config.model.
    """
    compile_cache.enable()
    config = _config(names, penalty, **model)
    config.loss.update(loss or {})
    specs = tasks.resolve(config)
    network = multitask.build(config.model, specs, axis_name=AXIS if jax.device_count() > 1 else None)
    variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))
    params = {"model": variables["params"], "weighting": weighting.init(config.loss.weighting, names)}
    tx = optimizer.build(config, 100)
    start = weighting.start(config.loss.weighting, names)
    state = TrainState(jnp.zeros([], jnp.int32), params, variables["batch_stats"], tx.init(params), start)
    step = functools.partial(step_lib.train_step, model=network, tasks=specs, tx=tx, loss_config=config.loss)
    step = jax.pmap(step, axis_name=AXIS, in_axes=(None, 0, None), out_axes=None, donate_argnums=0)
    state = loader.replicate(jax.device_get(state))
    data = next(loader.prefetch_to_device(iter([random_batch(size, batch)])))

    def call():
        nonlocal state
        with _convolutions(plain):  # of use in the first call, which traces
            state, scalars = step(state, data, np.uint32(0))
        return jax.block_until_ready(scalars)

    return call


def inference(*, size: int, batch: int, names=TASKS, plain: bool = False, **model):
    """Return a function () -> outputs that runs the whole dense model in evaluation mode.

    Args:
      size: side of the images in pixels.
      batch: images in a call.
      names: the tasks' names.
      plain: use XLA's convolutions, no products and no sums over taps.
      **model: options of config.model.
    """
    compile_cache.enable()
    config = _config(names, False, **model)
    network = multitask.build(config.model, tasks.resolve(config))
    variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))
    images = jnp.asarray(random_batch(size, batch)["image"])
    apply = jax.jit(network.apply)

    def call():
        with _convolutions(plain):
            return jax.block_until_ready(apply(variables, images))

    return call


def macs(size: int, names=TASKS, **model) -> int:
    """Return the multiply-accumulates of the model's forward pass on one image [size, size, 3]."""
    config = _config(names, False, **model)
    network = multitask.build(config.model, tasks.resolve(config))
    return sum(layer.macs for layer in costs.layers(network, (size, size)).values())
