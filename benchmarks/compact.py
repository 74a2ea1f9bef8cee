"""Speed-up by compaction at several fractions of zero groups, and the numbers of its cost model.

    python -m benchmarks.compact [--size=128] [--batch=8] [--rounds=9] [--costs]

Times the backbone of a ResNet-50 with random zero groups, the same fraction in every layer. The dense and the compact
models are timed in alternation. The compact ones have exact widths, widths padded to a multiple of 4 (the default of
--job=compact), and widths padded to a multiple of 4 without any gather. With --costs, only the three numbers of
`liveness.Costs` are measured. To time a trained run, use `launch.py --job=benchmark`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import traverse_util

from mtl_sparse.compaction import liveness, speed
from mtl_sparse.models import multitask, widths
from mtl_sparse.report import tables
from mtl_sparse.runtime import environment
from mtl_sparse.runtime.timing import timed
from mtl_sparse.sparsity import compact

_FRACTIONS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


def with_zeros(variables, fraction: float, seed: int = 0):
    """Return the variables with random zero groups in every backbone kernel except the one that reads the image.

    Args:
      variables: variables of a `MultiTaskModel`.
      fraction: probability that a group is set to zero.
      seed: seed of the random choice.
    """
    rng = np.random.default_rng(seed)
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    for path, kernel in params.items():
        if path.startswith("backbone/") and kernel.ndim == 4 and "stem_conv1" not in path:
            params[path] = np.where((rng.random(kernel.shape[2]) < fraction)[:, None], 0, kernel)
    return {**variables, "params": traverse_util.unflatten_dict(params, sep="/")}


def zero_model(fraction: float, **options):
    """Return a ResNet with a small head, and variables with zero groups, as NumPy arrays.

    Args:
      fraction: probability that a group is set to zero.
      **options: options of `MultiTaskModel`, such as depth=50.
    """
    model = multitask.MultiTaskModel((("depth", "deeplab", 1),), **{"head_features": 16, **options})
    init = jax.jit(model.init, compiler_options={"xla_backend_optimization_level": 0})
    return model, with_zeros(jax.device_get(init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))), fraction)


def patterns(size: int, batch: int, rounds: int, fractions=_FRACTIONS, depth: int = 50, width: int = 64) -> str:
    """Time the backbone for each fraction of zero groups.

    Args:
      size: side of the images in pixels.
      batch: images in a call.
      rounds: timed calls of each model.
      fractions: fractions of groups to set to zero.
      depth: depth of the ResNet.
      width: channels of its first stage.

    Returns:
      A Markdown table of `speed.compare`, with one row for each fraction and model.
    """
    model, variables = zero_model(0.0, depth=depth, width=width)
    lines = [("zero groups", "model", "median ms", "speed-up", "MAC ratio", "speed-up / MAC ratio")]
    never = liveness.Costs(mac=0.0)  # reading all channels then costs nothing, so no layer gathers
    for fraction in fractions:
        zeros = with_zeros(variables, fraction)
        models = {
            "dense": (model, zeros),
            "compact": compact.compact(model, zeros),
            "multiple of 4": compact.compact(model, zeros, multiple=4),
            "4, no gather": compact.compact(model, zeros, multiple=4, costs=never),
        }
        rows = speed.compare(models, (size, size), batch, rounds, parts=("backbone",))
        for row in rows:
            ratio = rows[0]["macs"] / row["macs"]
            numbers = f"{row['speedup']:.2f}x", f"{ratio:.2f}x", f"{row['speedup'] / ratio:.2f}"
            lines.append((f"{100 * fraction:.0f} %", row["model"], f"{row['median_ms']:.1f}", *numbers))
    return tables.markdown(lines)


def costs(rounds: int) -> liveness.Costs:
    """Measure `liveness.Costs` on this machine.

    Times a matrix product, and gathers of 512 of 1024 channels in 2 and in 32 ranges, on 8x16x16 pixels.

    Args:
      rounds: timed calls of each function.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 16, 16, 1024)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(1024, 256)), jnp.float32)
    few, many = (tuple((i, i + 512 // n) for i in range(0, 1024, 1024 // n)) for n in (2, 32))
    gather = {n: jax.jit(functools.partial(widths.select, ranges=ranges)) for n, ranges in ((2, few), (32, many))}
    product = jax.jit(jnp.matmul)
    functions = {
        "product": lambda: product(x, kernel),
        "2 ranges": lambda: gather[2](x),
        "32 ranges": lambda: gather[32](x),
    }
    pixels = x.size // 1024
    ns = {name: 1e9 * np.median(values) / pixels for name, values in timed(functions, rounds).items()}
    split = (ns["32 ranges"] - ns["2 ranges"]) / 30
    copy = (ns["2 ranges"] - 2 * split) / 512
    return liveness.Costs(*(round(float(value), 4) for value in (ns["product"] / kernel.size, copy, split)))


def main(size: int, batch: int, rounds: int, only_costs: bool) -> None:
    """Print the table of `patterns`, or the measured `costs` if `only_costs`."""
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}")
    if only_costs:
        print(f"measured {costs(10 * rounds)}\ndefault  {liveness.Costs()}")
    else:
        print(f"ResNet-50 backbone, {size}x{size}, batch {batch}, {rounds} rounds")
        print(patterns(size, batch, rounds))


if __name__ == "__main__":  # here, because flags of other benchmarks have the same names
    environment.restart_tuned()
    _SIZE = flags.DEFINE_integer("size", 128, "Side of the images.")
    _BATCH = flags.DEFINE_integer("batch", 8, "Images in a call.")
    _ROUNDS = flags.DEFINE_integer("rounds", 9, "Timed calls of each model.")
    _COSTS = flags.DEFINE_bool("costs", False, "Measure only the numbers of the cost model.")
    app.run(lambda _: main(_SIZE.value, _BATCH.value, _ROUNDS.value, _COSTS.value))
