"""Cost of the proximal step, relative to a pass over its memory and to a training step.

    python -m benchmarks.prox [--rounds=9] [--step=False]

Applies each operator to all backbone kernels of a ResNet-50, in Adam's metric. The functions are timed in alternation.
The table has medians and the ratio to a copy of the three arrays (z, metric, result), with its 10th and 90th
percentiles over the rounds. "pass" reads z and the metric and writes the result once. A second table compares coupled
groups with input groups of the same kernels, among which are those of the heads that read the backbone. A third has the
full training step with and without the penalty: three tasks, 128x128, batch 4.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import ours
from configs import nyu
from mtl_sparse import tasks
from mtl_sparse.models import multitask
from mtl_sparse.runtime import environment
from mtl_sparse.runtime.timing import timed
from mtl_sparse.sparsity import groups, prox
from mtl_sparse.sparsity.groups import Groups
from mtl_sparse.training import groups as training_groups

_ROUNDS = flags.DEFINE_integer("rounds", 9, "Timed calls of each function.")
_STEP = flags.DEFINE_bool("step", True, "Whether to time the training step as well.")
_SIZE = flags.DEFINE_integer("size", 128, "Side of the images of the training step.")
_BATCH = flags.DEFINE_integer("batch", 4, "Images in a training step.")


def report(seconds: dict[str, np.ndarray], reference: str) -> None:
    """Print medians and ratios.

    Args:
      seconds: name -> seconds of each round.
      reference: name that the others are compared with.
    """
    print(f"{'':<34} {'median ms':>10} {'ratio to ' + reference:>24} {'10 to 90 %':>14}")
    for name, values in seconds.items():
        ratio = values / seconds[reference]
        low, high = np.quantile(ratio, [0.1, 0.9])
        print(f"{name:<34} {1e3 * np.median(values):>10.1f} {np.median(ratio):>24.2f} {f'{low:.2f} .. {high:.2f}':>14}")


def operators(shapes: list[tuple[int, ...]]) -> dict:
    """Return the functions to time: the copy, the pass and each operator.

    Args:
      shapes: shapes of the kernels, each [H, W, I, O]. With the thresholds, about half of the groups become zero.

    Returns:
      name -> function () -> list of arrays.
    """
    rng = np.random.default_rng(0)
    z = [jnp.asarray(0.03 * rng.normal(size=shape), jnp.float32) for shape in shapes]
    d = [jnp.asarray(np.exp(rng.normal(-8, 1.5, size=shape)), jnp.float32) for shape in shapes]
    weight = [jnp.median(jnp.sqrt(jnp.sum(jnp.square(a * b), (0, 1, 3)))) for a, b in zip(z, d, strict=True)]
    norms = [jnp.sqrt(jnp.sum(jnp.square(a), (0, 1, 3))) for a in z]
    averaged = [jnp.median(jnp.mean(b, (0, 1, 3)) * norm) for b, norm in zip(d, norms, strict=True)]
    plain = [jnp.median(norm) for norm in norms]
    single = [jnp.median(jnp.abs(a * b)) for a, b in zip(z, d, strict=True)]
    gamma = [float(2 / jnp.min(b)) for b in d]

    x = [2 * a for a in z]

    def over(operator, *arguments):
        function = jax.jit(lambda *arguments: [operator(*one) for one in zip(*arguments, strict=True)])
        return lambda: function(*arguments)

    copy = jax.jit(lambda *arrays: [[a + 1 for a in array] for array in arrays])
    return {
        "copy of the three arrays": lambda: copy(z, d, x),
        "pass over z, metric, result": over(lambda a, b: a + b, z, d),
        "group_lasso, adaptive": over(prox.group_lasso, z, weight, d),
        "group_mcp, adaptive": over(
            lambda z, weight, d, gamma: prox.group_mcp(z, weight, gamma, d),
            z,
            weight,
            d,
            [jnp.float32(g) for g in gamma],
        ),
        "group_lasso, mean of each group": over(
            lambda z, weight, d: prox.group_lasso(z, weight / jnp.mean(d, (0, 1, 3))), z, averaged, d
        ),
        "l1, adaptive": over(prox.l1, z, single, d),
        "group_lasso, plain": over(prox.group_lasso, z, plain),
    }


def backbone_shapes(options) -> list[tuple[int, ...]]:
    """Return the shapes of the kernels that the penalty acts on.

    Args:
      options: that replace those of configs/nyu.py's model.
    """
    config = nyu.get_config()
    config.model.update(options)
    model = multitask.build(config.model, tasks.resolve(config))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    leaves = groups.by_path(params)
    return [leaves[kernel.path].shape for kernel in groups.find(params)]


def coupled_operators(sets: Sequence[Groups], shapes: dict[str, tuple[int, ...]]) -> dict:
    """Return the functions to time for groups that span kernels, and for input groups of the same kernels.

    Args:
      sets: the coupled groups. With the thresholds, about half of them become zero.
      shapes: path of each kernel of the groups -> its shape, [H, W, I, O].

    Returns:
      name -> function () -> list of arrays.
    """
    rng = np.random.default_rng(0)
    z = {path: jnp.asarray(0.03 * rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}
    d = {path: jnp.asarray(np.exp(rng.normal(-8, 1.5, size=shape)), jnp.float32) for path, shape in shapes.items()}

    def norms(one):
        return one.norms([z[path] * d[path] for path in one.paths])

    weights = [jnp.median(norms(one)) for one in sets]
    single = {path: jnp.median(jnp.sqrt(jnp.sum(jnp.square(z[path] * d[path]), (0, 1, 3)))) for path in z}

    @jax.jit
    def coupled(z, d):
        parts = [
            prox.group_lasso_over(one, [z[path] for path in one.paths], weight, [d[path] for path in one.paths])
            for one, weight in zip(sets, weights, strict=True)
        ]
        return list(itertools.chain(*parts))

    @jax.jit
    def alone(z, d):
        return [prox.group_lasso(z[path], single[path], d[path]) for path in z]

    return {"group_lasso, input groups": lambda: alone(z, d), "group_lasso, coupled groups": lambda: coupled(z, d)}


def coupled_groups(options) -> tuple[Sequence[Groups], dict[str, tuple[int, ...]]]:
    """Return the coupled groups of configs/nyu.py's model with other `options`, and the shapes of their kernels."""
    config = nyu.get_config()
    config.model.update(options)
    config.sparsity.groups = "coupled"
    model = multitask.build(config.model, tasks.resolve(config))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    leaves = groups.by_path({"model": params})
    sets = training_groups.find(config) or ()
    return sets, {path: leaves[path].shape for one in sets for path in one.paths}


def training_steps() -> dict:
    """Return the training step without and with the penalty, each with its own state."""
    make = functools.partial(ours.training_step, size=_SIZE.value, batch=_BATCH.value)
    return {"without penalty (AdamW)": make(penalty=False), "with penalty": make(penalty=True)}


def main(_) -> None:
    """Print the tables."""
    shapes = backbone_shapes({})
    device = jax.devices()[0].device_kind
    print(f"{len(shapes)} kernels, {sum(map(np.prod, shapes)):,} weights; JAX {jax.__version__}, {device}")
    seconds = timed(operators(shapes), _ROUNDS.value)
    report(seconds, "copy of the three arrays")
    sets, of_sets = coupled_groups({})
    print(f"\n{len(of_sets)} kernels in {len(sets)} sets, {sum(map(np.prod, of_sets.values())):,} weights")
    report(timed(coupled_operators(sets, of_sets), _ROUNDS.value), "group_lasso, input groups")
    if _STEP.value:
        print(f"\ntraining step, {', '.join(ours.TASKS)}, {_SIZE.value}x{_SIZE.value}, batch {_BATCH.value}")
        steps = timed(training_steps(), _ROUNDS.value)
        report(steps, "without penalty (AdamW)")
        fraction = np.median(seconds["group_lasso, adaptive"]) / np.median(steps["with penalty"])
        print(f"group_lasso alone takes {100 * fraction:.1f} % of the step with the penalty")


if __name__ == "__main__":
    environment.restart_tuned()
    app.run(main)
