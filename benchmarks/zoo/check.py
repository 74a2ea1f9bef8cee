"""Check one case: compact the model under every pattern of zeros and compare outputs.

`python -m benchmarks.zoo` starts this in a separate process for each case.
"""

import argparse
import collections
import json
import math
import os
import tempfile
import time
import traceback

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # halves the time, most of which is XLA's
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "zoo_cache"))
os.environ.setdefault("JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.zoo import models, table, weights
from benchmarks.zoo.precision import fast, in_float64
from benchmarks.zoo.weights import generator, is_float

PATTERNS = {"50 %": 0.5, "70 %": 0.7, "layers": 0.5}
FLOAT32 = ("50 %",)  # patterns that are compared in float32, too: at batch 3 as well
WHOLE = (0.15, 0.15, 0.08, 0.04, 0, 0, 0, 0, 0)  # fractions of kernels wholly zero, one try after the other; 0: one
GAINS = (1, 1.5, 2, 3, 4.5)  # of the kernels, one try after the other until the images matter
CLEAR_SIGNAL = 0.02
LEAST_SIGNAL = 1e-3  # against the outputs' largest value


def images_of(case, batch, seed, dtype):
    """Return random images; their colors, contrasts and gradients differ, so that their outputs do."""
    rng, channels = generator("images", seed, batch), case.shape.index(3)
    once = [batch] + [3 if axis == channels else 1 for axis in range(3)]
    places = np.meshgrid(*(np.linspace(-1, 1, size) for size in case.shape), indexing="ij")
    gradient = sum(rng.normal(size=once) * place for axis, place in enumerate(places) if axis != channels)
    noise = rng.normal(size=(batch, *case.shape))
    return jnp.asarray(np.float32(rng.normal(size=once) + rng.uniform(0.3, 2, once) * noise + gradient), dtype)


def cast(tree, dtype):
    """Return a tree whose real leaves are JAX arrays of a dtype."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype) if is_float(leaf) else leaf, tree)


def nudge(params):
    """Return weights that are each moved up or down by one unit in the last place; zeros stay zero."""
    rng = generator("nudge")

    def one(leaf):
        up = rng.integers(0, 2, np.shape(leaf)).astype(bool)
        return jnp.where(leaf == 0, leaf, jnp.nextafter(leaf, jnp.where(up, jnp.inf, -jnp.inf).astype(leaf.dtype)))

    return jax.tree.map(lambda leaf: one(leaf) if is_float(leaf) else leaf, params)


def size(tree):
    """Return how many numbers a tree holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree) if is_float(leaf))


def outputs(fn, params, *images):
    """Return the outputs as float64 vectors, one for each batch of images."""
    return [
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(fn(params, batch))])
        for batch in images
    ]


def distance(first, second):
    """Return the largest absolute difference; infinite where one is not finite."""
    if first.shape != second.shape or not (np.isfinite(first).all() and np.isfinite(second).all()):
        return math.inf
    return float(np.max(np.abs(first - second)))


def signal_of(pair):
    """Return how much the outputs of two inputs differ, absolutely and against the largest output."""
    signal, most = distance(*pair), max(float(np.max(np.abs(part))) for part in pair)
    return signal, signal / most if most and math.isfinite(signal) else 0.0


class Model:
    """A case in one precision, with its images and its compiled full function."""

    def __init__(self, case, dtype, fn, drawn):
        self.case, self.dtype, self.fn, self.drawn = case, dtype, fn, drawn
        self.images = [images_of(case, 2, seed, dtype) for seed in (1, 2)]
        self.full = self.jit(fn)
        self.outputs = {}  # the full model's, by pattern

    def jit(self, fn):
        """Return a compiled function of weights and images in this precision."""
        return jax.jit(fast(fn) if self.dtype == "float64" else fn)

    def weights(self, pattern, whole):
        """Return the weights with a pattern of zeros."""
        return cast(weights.sparsify(self.drawn, self.case.layout, PATTERNS[pattern], whole), self.dtype)

    def choose_whole(self, pattern):
        """Return paths of kernels that can be wholly zero while the output still depends on the image."""
        names = weights.kernels(self.drawn, self.case.layout)
        for attempt, fraction in enumerate(WHOLE):
            order = generator("whole", attempt).permutation(len(names))
            whole = [names[index] for index in order[: max(1, round(fraction * len(names)))]]
            if signal_of(outputs(self.full, self.weights(pattern, whole), *self.images))[1] > LEAST_SIGNAL:
                return whole
        return []


def clear(case, fn, shapes):
    """Return the Model in float32 with weights that let the images through, and the gain of the kernels."""
    best = None
    for gain in GAINS:
        model = Model(case, "float32", fn, weights.randomize(shapes, case.layout, gain))
        model.full = best[1].full if best else model.full
        found = signal_of(outputs(model.full, model.weights("50 %", []), *model.images))[1]
        best = (found, model, gain) if best is None or found > best[0] else best
        if found > CLEAR_SIGNAL:
            break
    return best[1:]


def engine(stub):
    """Return the module that compacts."""
    if stub:
        return None
    from mtl_sparse import compaction

    return compaction


def compare(model, pattern, whole, compaction, rounded=None):
    """Compact and compare the outputs.

    The engine gets NumPy arrays: cutting JAX arrays compiles a program for each shape, which takes most of the time.

    Args:
        model: the Model.
        pattern: name of the pattern of zeros.
        whole: kernels that are wholly zero.
        compaction: the engine, or None for a function that changes nothing.
        rounded: the Model in float32 if this one is in float64, to measure how far rounding takes the full model. In
            both precisions this is also measured by weights that differ in the last place.

    Returns:
        Dictionary for the record.
    """
    params = model.weights(pattern, whole)
    before = model.outputs[pattern] = outputs(model.full, params, *model.images)
    signal, relative = signal_of(before)
    dtype = str(jax.tree.leaves(jax.eval_shape(model.fn, params, model.images[0]))[0].dtype)
    arrays = jax.tree.map(np.asarray, params)
    begin = time.perf_counter()
    plan, small_fn, small_params = None, model.fn, params
    if compaction:  # the three parts of compaction.compact
        plan = compaction.plan(model.fn, arrays, model.images[0])
        small_fn, small_params = compaction.rewrite(model.fn, plan), compaction.apply_plan(plan, arrays)
    seconds = time.perf_counter() - begin
    small_params = jax.tree.map(jnp.asarray, small_params)
    small = model.jit(small_fn)
    after = outputs(small, small_params, *model.images)
    worst = max(distance(first, second) for first, second in zip(before, after, strict=True))
    result = {
        "signal": signal,
        "signal against output": relative,
        "difference": worst,
        "against signal": worst / signal if signal else math.inf,
        "after": size(small_params),
        "seconds": seconds,
        "output": dtype,
        **(report(plan) if plan else {}),
    }
    if rounded and pattern in rounded.outputs:
        worst = max(distance(first, second) for first, second in zip(before, rounded.outputs[pattern], strict=True))
        result["rounding"] = worst / signal if signal else math.inf
    moved = outputs(model.full, nudge(params), *model.images)
    worst = max(distance(first, second) for first, second in zip(before, moved, strict=True))
    result["own rounding"] = worst / signal if signal else math.inf
    if pattern in FLOAT32 and not rounded:
        images = jnp.concatenate([model.images[0], model.images[1][:1]])
        wanted = np.concatenate([before[0], before[1][: len(before[1]) // 2]])
        result["batch 3"] = distance(wanted, *outputs(small, small_params, images)) / signal if signal else math.inf
    return result


def report(plan):
    """Return what stayed and why, from a plan."""
    reasons = collections.Counter(product.because for product in plan.products if product.because)
    return {
        "products": len(plan.products),
        "zero": sum(product.zero for product in plan.products),
        "removed": sum(product.inputs - product.kept for product in plan.products),
        "reasons": dict(reasons.most_common()),
        "barriers": list(plan.barriers),
        "constant": list(plan.constant),
    }


def attempt(record, save, action):
    """Run an action that returns entries for a record; record its error instead if it fails."""
    try:
        record.update(action())
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        record["error"] = f"{type(error).__name__}: {lines[0]}"[:400]
        record["traceback"] = traceback.format_exc()[-6000:]
    save()


def check(case, save, record, stub):
    """Fill a case's record, saving it after every step."""
    compaction = engine(stub)
    fn, shapes = case.build()
    model, record["gain"] = clear(case, fn, shapes)
    record["parameters"] = size(model.drawn)
    for pattern in PATTERNS:
        entry = record["patterns"].setdefault(pattern, {})
        entry["whole"] = model.choose_whole(pattern) if pattern == "layers" else []
        if pattern == "layers" and not entry["whole"]:
            entry["skipped"] = "the output needs every kernel"
            continue
        if pattern in FLOAT32:
            attempt(
                entry.setdefault("float32", {}),
                save,
                lambda pattern=pattern, entry=entry: compare(model, pattern, entry["whole"], compaction),
            )
    closed = jax.make_jaxpr(fn)(cast(model.drawn, "float32"), model.images[0])
    jax.clear_caches()
    jax.config.update("jax_enable_x64", True)
    double = Model(case, "float64", in_float64(closed), model.drawn)
    for pattern, entry in record["patterns"].items():
        if "skipped" not in entry:
            attempt(
                entry.setdefault("float64", {}),
                save,
                lambda pattern=pattern, entry=entry: compare(double, pattern, entry["whole"], compaction, model),
            )


def main():
    """Check the case that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("record")
    parser.add_argument("--stub", action="store_true")
    arguments = parser.parse_args()
    case = next(case for case in models.cases() if case.name == arguments.case)
    record = {
        "case": case.name,
        "package": case.package,
        "model": case.model,
        "engine": table.engine_state(),
        "patterns": {},
    }
    begin = time.perf_counter()

    def save():
        record["wall"] = time.perf_counter() - begin
        with open(arguments.record + ".part", "w") as file:
            file.write(json.dumps(record) + "\n")
        os.replace(arguments.record + ".part", arguments.record)

    save()
    attempt(record, save, lambda: check(case, save, record, arguments.stub) or {"done": True})


if __name__ == "__main__":
    main()
