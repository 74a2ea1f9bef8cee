"""What the proximal step costs: against a pass over its memory, and as a share of a training step.

    python -m benchmarks.prox [--rounds=9] [--step=False]

All kernels of ResNet-50's backbone, Adam's metric. Every round times each function once, in turn; the table gives
medians, and the ratio to a copy of the three arrays (z, metric, result) with its spread over rounds; the pass reads z
and the metric and writes a result, once. Then the full training step, three tasks, 128x128, batch 4, with and without
the penalty.
"""

import functools

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

_ROUNDS = flags.DEFINE_integer("rounds", 9, "Times each function is timed.")
_STEP = flags.DEFINE_bool("step", True, "Whether to time the training step, too.")
_SIZE = flags.DEFINE_integer("size", 128, "Side of the training step's images.")
_BATCH = flags.DEFINE_integer("batch", 4, "Images in a training step.")


def report(seconds: dict[str, np.ndarray], reference: str) -> None:
    print(f"{'':<34} {'median ms':>10} {'ratio to ' + reference:>24} {'spread':>14}")
    for name, values in seconds.items():
        ratio = values / seconds[reference]
        low, high = np.quantile(ratio, [0.1, 0.9])
        print(f"{name:<34} {1e3 * np.median(values):>10.1f} {np.median(ratio):>24.2f} {f'{low:.2f} .. {high:.2f}':>14}")


def operators(shapes: list[tuple[int, ...]]) -> dict:
    """The copy and each operator over kernels of these shapes, about half of whose groups fall below the threshold."""
    rng = np.random.default_rng(0)
    z = [jnp.asarray(0.03 * rng.normal(size=shape), jnp.float32) for shape in shapes]
    d = [jnp.asarray(np.exp(rng.normal(-8, 1.5, size=shape)), jnp.float32) for shape in shapes]
    weight = [jnp.median(jnp.sqrt(jnp.sum(jnp.square(a * b), (0, 1, 3)))) for a, b in zip(z, d, strict=True)]
    plain = [jnp.median(jnp.sqrt(jnp.sum(jnp.square(a), (0, 1, 3)))) for a in z]
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
        "l1, adaptive": over(prox.l1, z, single, d),
        "group_lasso, plain": over(prox.group_lasso, z, plain),
    }


def training_steps() -> dict:
    """The training step with and without the penalty, each on its own state."""
    make = functools.partial(ours.training_step, size=_SIZE.value, batch=_BATCH.value)
    return {"without penalty (AdamW)": make(penalty=False), "with penalty": make(penalty=True)}


def main(_):
    config = nyu.get_config()
    model = multitask.build(config.model, tasks.resolve(config))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    leaves = groups.by_path(params)
    shapes = [leaves[kernel.path].shape for kernel in groups.find(params)]
    device = jax.devices()[0].device_kind
    print(f"{len(shapes)} kernels, {sum(map(np.prod, shapes)):,} weights; JAX {jax.__version__}, {device}")
    seconds = timed(operators(shapes), _ROUNDS.value)
    report(seconds, "copy of the three arrays")
    if _STEP.value:
        print(f"\ntraining step, {', '.join(config.tasks)}, {_SIZE.value}x{_SIZE.value}, batch {_BATCH.value}")
        steps = timed(training_steps(), _ROUNDS.value)
        report(steps, "without penalty (AdamW)")
        share = np.median(seconds["group_lasso, adaptive"]) / np.median(steps["with penalty"])
        print(f"group_lasso alone is {100 * share:.1f} % of the step with the penalty")


if __name__ == "__main__":
    environment.restart_tuned()
    app.run(main)
