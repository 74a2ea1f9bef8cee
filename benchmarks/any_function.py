"""Compaction of any function against the one written for this project's models.

    python -m benchmarks.any_function [--size=128] [--rounds=15] [--fractions=0.5,0.7] [--record=FILE]

Compacts a ResNet-50 with random zero groups, the same fraction in every layer of the backbone, by both. Prints what
each leaves and how long it takes, and times the backbones in alternation. Then it prints how long
`compaction.compact` takes on a ResNet-50 at 224x224, and times both compact models in training mode.
"""

import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.compact import zero_model
from mtl_sparse import compaction
from mtl_sparse.compaction import multitask as multitask_compaction
from mtl_sparse.compaction import speed
from mtl_sparse.models import costs
from mtl_sparse.report import tables
from mtl_sparse.runtime import environment
from mtl_sparse.runtime.timing import timed


def _backbone(part: speed.Part):
    """Return the backbone as a function of the whole model's variables."""

    def apply(variables, images):
        return part.model.apply({name: tree["backbone"] for name, tree in variables.items()}, images)

    return apply


def _count(variables) -> int:
    return costs.parameter_count({name: tree.get("backbone", tree) for name, tree in variables.items()})


def compare(fraction: float, size: int, batches: tuple[int, ...], rounds: int):
    """Compact by both and time the backbones.

    Args:
      fraction: fraction of groups that are zero.
      size: side of the images in pixels.
      batches: images in a call, each timed.
      rounds: timed calls of each.

    Returns:
      A dictionary for each model and batch size: "zero_groups", "batch", "model", "parameters", "seconds" of the
      compaction, "median_ms", and "ratio", the median over the rounds of its time over the hand-written one's.
    """
    model, variables = zero_model(fraction, depth=50)
    example = jnp.zeros((1, size, size, 3))
    start = time.perf_counter()
    small = multitask_compaction.compact(model, variables)
    middle = time.perf_counter()
    plan = compaction.plan(model.apply, variables, example)
    seconds = {"hand-written": middle - start, "any function": time.perf_counter() - middle}
    dense, hand = speed.Part.backbone(model, variables), speed.Part.backbone(*small)
    parts = {
        "dense": (dense.model.apply, dense.variables),
        "hand-written": (hand.model.apply, hand.variables),
        "any function": (compaction.rewrite(_backbone(dense), plan), compaction.apply_plan(plan, variables)),
    }
    rows = []
    for batch in batches:
        images = jnp.asarray(np.random.default_rng(0).normal(size=(batch, size, size, 3)), jnp.float32)
        programs = {}
        for name, (fn, values) in parts.items():
            values = jax.device_put(values)
            program = jax.jit(fn).lower(values, images).compile()
            programs[name] = lambda program=program, values=values, images=images: program(values, images)
        measured = timed(programs, rounds)
        for name, (_, values) in parts.items():
            rows.append(
                {
                    "zero_groups": fraction,
                    "batch": batch,
                    "model": name,
                    "parameters": _count(values),
                    "seconds": seconds.get(name),
                    "median_ms": 1e3 * float(np.median(measured[name])),
                    "ratio": float(np.median(measured[name] / measured["hand-written"])),
                }
            )
    return rows


def training(batch: int, size: int, rounds: int) -> dict[str, float]:
    """Time the loss and its gradient in training mode of a whole compact ResNet-50, by both.

    Args:
      batch: images in a call.
      size: side of the images in pixels.
      rounds: timed calls of each.

    Returns:
      "hand-written" and "any function": median milliseconds; "ratio": median of the second over the first.
    """
    model, variables = zero_model(0.7, depth=50)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(batch, size, size, 3)), jnp.float32)
    key, largest = jax.random.key(0), jax.ShapeDtypeStruct((1, 320, 320, 3), jnp.float32)

    def train(model):
        return lambda v, x, key: model.apply(v, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})

    def gradients(fn):
        def loss(params, stats, x, key):
            outputs, new = fn({"params": params, "batch_stats": stats}, x, key)
            return sum(jnp.square(leaf).mean() for leaf in jax.tree.leaves(outputs)), new

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    small, small_variables = multitask_compaction.compact(model, variables)
    plan = compaction.plan(model.apply, variables, images, also=[(largest,)])  # keeps all taps, as the hand-written one
    parts = {
        "hand-written": (train(small), small_variables),
        "any function": (compaction.rewrite(train(model), plan), compaction.apply_plan(plan, variables)),
    }
    programs = {}
    for name, (fn, values) in parts.items():
        arguments = jax.device_put((values["params"], values["batch_stats"], images, key))
        program = gradients(fn).lower(*arguments).compile()
        programs[name] = lambda program=program, arguments=arguments: program(*arguments)
    seconds = timed(programs, rounds)
    medians = {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}
    return medians | {"ratio": float(np.median(seconds["any function"] / seconds["hand-written"]))}


def compaction_seconds(size: int) -> dict[str, float]:
    """Return the seconds that each part of `compaction.compact` takes on a whole ResNet-50."""
    model, variables = zero_model(0.7, depth=50)
    images = jnp.zeros((1, size, size, 3))
    start = time.perf_counter()
    plan = compaction.plan(model.apply, variables, images)
    planned = time.perf_counter()
    small = compaction.apply_plan(plan, variables)
    applied = time.perf_counter()
    jax.jit(compaction.rewrite(model.apply, plan)).lower(small, images)
    return {"plan": planned - start, "apply": applied - planned, "trace": time.perf_counter() - applied}


def main(size: int, rounds: int, fractions: list[float], record: str) -> None:
    """Print the tables, and write them to a file if one is named."""
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}; ResNet-50 backbone, {size}x{size}, {rounds} rounds")
    rows = [row for fraction in fractions for row in compare(fraction, size, (1, 8), rounds)]
    lines = [("zero groups", "batch", "model", "parameters", "compaction", "median ms", "ratio")]
    for row in rows:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.2f} s"
        numbers = f"{row['parameters']:,}", seconds, f"{row['median_ms']:.1f}", f"{row['ratio']:.2f}"
        lines.append((f"{100 * row['zero_groups']:.0f} %", str(row["batch"]), row["model"], *numbers))
    print(tables.markdown(lines))
    seconds = compaction_seconds(224)
    print("whole ResNet-50 at 224x224: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
    step = training(4, size, rounds)
    print("training mode, batch 4: " + ", ".join(f"{name} {value:.2f}" for name, value in step.items()))
    if record:
        text = json.dumps(
            {"jax": jax.__version__, "size": size, "rounds": rounds, "rows": rows, "seconds": seconds, "training": step}
        )
        pathlib.Path(record).write_text(text + "\n")


if __name__ == "__main__":  # here, because flags of other benchmarks have the same names
    environment.restart_tuned()
    _SIZE = flags.DEFINE_integer("size", 128, "Side of the images.")
    _ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed calls of each model.")
    _FRACTIONS = flags.DEFINE_list("fractions", ["0.5", "0.7"], "Fractions of zero groups.")
    _RECORD = flags.DEFINE_string("record", "", "A JSON file to write.")
    app.run(lambda _: main(_SIZE.value, _ROUNDS.value, [float(x) for x in _FRACTIONS.value], _RECORD.value))
