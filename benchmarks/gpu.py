"""Check and time this package on a GPU, in parts that each keep a record.

    python -m benchmarks.gpu [--parts checks step ...] [--seconds 540] [--small]

Each part writes <folder>/<part>.json when it ends. A part that has a record is skipped, so that the same command
continues a run that was cut. No part starts once its usual time does not fit into --seconds. --render writes
docs/gpu.md from the records. --small takes the smallest model and any backend, to test this file.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from benchmarks import compact, gpu_table, ours, peers, prox
from mtl_sparse import compaction
from mtl_sparse.compaction import multitask as multitask_compaction
from mtl_sparse.compaction import speed
from mtl_sparse.models import atrous
from mtl_sparse.runtime.timing import timed

_ROOT = pathlib.Path(__file__).parents[1]
RECORDS = _ROOT / "docs" / "benchmarks" / "gpu"
_SPAWN = multiprocessing.get_context("spawn")
# Variants of torch_peer.py, which only the processes that time PyTorch import.
_CHANNELS_LAST, _COMPILED = "PyTorch, shared, channels last", "PyTorch, shared, channels last, compiled"
_RELEASED = "PyTorch, released scheme"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the parts run at.

    Attributes:
      size: side of the images in pixels.
      batch: images in a step.
      rounds: timed calls of each function.
      steps: training steps that are compared between the GPU and the CPU.
      device: PyTorch's device.
      model: options of config.model; () is configs/nyu.py's ResNet-50.
      demo: overrides for the demo's run.
    """

    size: int = 256
    batch: int = 16
    rounds: int = 20
    steps: int = 20
    device: str = "cuda"
    model: tuple[tuple[str, Any], ...] = ()
    demo: tuple[str, ...] = ()

    @property
    def shape(self) -> dict[str, Any]:
        """Return the arguments that a step and an inference take."""
        return {"size": self.size, "batch": self.batch, **dict(self.model)}


SMALL = Sizes(
    size=32,
    batch=2,
    rounds=2,
    steps=3,
    device="cpu",
    model=(("depth", 10), ("width", 4), ("head_features", 4)),
    demo=("--config.train.epochs=1", "--config.data.embedded.frames=24", "--config.model.width=4"),
)


def _elsewhere(environment: dict[str, str], function: Callable, *arguments):
    """Return the future of a call in a new process that has these environment variables."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=_SPAWN)
        future = pool.submit(function, *arguments)
        pool.shutdown(wait=False)
        return future
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# ------------------------------------------------------------------------------------------------------- equality


def _trajectory(sizes: Sizes, precision: str):
    """Return (device, losses of the first training steps, outputs of the initial model), at a matmul precision."""
    with jax.default_matmul_precision(precision):
        step = ours.training_step(**sizes.shape | {"size": sizes.size // 2, "batch": min(sizes.batch, 4)})
        losses = [float(step()["loss"]) for _ in range(sizes.steps)]
        outputs = ours.inference(**sizes.shape | {"size": sizes.size // 2, "batch": min(sizes.batch, 4)})()
    return jax.devices()[0].device_kind, losses, {name: np.asarray(raw, np.float32) for name, raw in outputs.items()}


def _largest(found, expected) -> float:
    """Return the largest difference over all outputs, relative to the largest value of each."""
    return max(float(np.abs(found[name] - raw).max() / np.abs(raw).max()) for name, raw in expected.items())


def parity(sizes: Sizes) -> dict[str, Any]:
    """Compare training losses and outputs on the GPU with those on the CPU."""
    runs = {
        "CPU, float32": _elsewhere({"JAX_PLATFORMS": "cpu"}, _trajectory, sizes, "highest"),
        "GPU, float32": _elsewhere({}, _trajectory, sizes, "highest"),
        "GPU, TF32": _elsewhere({}, _trajectory, sizes, "default"),
    }
    found = {name: run.result() for name, run in runs.items()}
    _, losses, outputs = found["CPU, float32"]
    rows = [
        {
            "run": name,
            "device": device,
            "losses": theirs,
            "loss_difference": [abs(a - b) / abs(b) for a, b in zip(theirs, losses, strict=True)],
            "output_difference": _largest(raw, outputs),
        }
        for name, (device, theirs, raw) in found.items()
    ]
    return {"rows": rows, "size": sizes.size // 2, "batch": min(sizes.batch, 4)}


def equality(sizes: Sizes) -> dict[str, Any]:
    """Compare the outputs of both compactions with those of the model with zeros, on the GPU."""
    model, variables = compact.zero_model(0.7, **_network(sizes))
    images = peers.random_batch(sizes.size, 2)["image"]
    rows = []
    small, small_variables = multitask_compaction.compact(model, variables)
    plan = compaction.plan(model.apply, variables, images)
    parts = {
        "hand-written": (small.apply, small_variables),
        "any function": (compaction.rewrite(model.apply, plan), compaction.apply_plan(plan, variables)),
    }
    for precision in ("highest", "default"):
        with jax.default_matmul_precision(precision):
            expected = jax.device_get(jax.jit(model.apply)(variables, images))
            for name, (fn, values) in parts.items():
                difference = _largest(jax.device_get(jax.jit(fn)(values, images)), expected)
                rows.append({"compaction": name, "precision": precision, "difference": difference})
    return {"rows": rows, "zero_groups": 0.7, "size": sizes.size}


def demo(sizes: Sizes) -> dict[str, Any]:
    """Run the README's first command and return its results and its time."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "launch.py", "--config=configs/demo.py", f"--workdir={folder}/run", *sizes.demo]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f"the demo failed: {done.stderr[-2000:]}")
        results = json.loads((pathlib.Path(folder) / "run" / "results.json").read_text())
    return {"seconds": seconds, "output": done.stdout[-3000:], "results": results}


# ----------------------------------------------------------------------------------------------------------- time


def _sides(function: str, sizes: Sizes, dtype: str, *, batch: int | None = None) -> dict[str, tuple[str, str, dict]]:
    """Return what `peers.alternate` times: this package, with and without its own convolutions, and PyTorch."""
    shape = sizes.shape | {"dtype": dtype} | ({} if batch is None else {"batch": batch})
    penalty = {"penalty": False} if function == "training_step" else {}
    sides = {
        "ours": ("benchmarks.ours", function, shape | penalty),
        "ours, XLA's convolutions": ("benchmarks.ours", function, shape | penalty | {"plain": True}),
    }
    shape = {name: value for name, value in shape.items() if name != "depth"} | {"device": sizes.device}
    for variant in (_CHANNELS_LAST, _COMPILED):
        sides[variant] = ("benchmarks.torch_peer", function, shape | penalty | {"variant": variant})
    return sides


def _timed(sides, sizes: Sizes, **found) -> dict[str, Any]:
    seconds = peers.alternate(sides, sizes.rounds, together=True)
    return {"seconds": {name: values.tolist() for name, values in seconds.items()}, "size": sizes.size, **found}


def step(sizes: Sizes, dtype: str = "float32", batch: int | None = None) -> dict[str, Any]:
    """Time the training step without and, in float32, with the penalty."""
    sides = _sides("training_step", sizes, dtype, batch=batch)
    if dtype == "float32":
        shape = sizes.shape | {"penalty": True}
        sides["ours, with penalty"] = ("benchmarks.ours", "training_step", shape)
        shape = {name: value for name, value in shape.items() if name != "depth"}
        theirs = shape | {"variant": _RELEASED, "device": sizes.device}
        sides[_RELEASED + ", with penalty"] = ("benchmarks.torch_peer", "training_step", theirs)
    return _timed(sides, sizes, batch=batch or sizes.batch, dtype=dtype, macs=3 * ours.macs(**_one(sizes)))


def inference(sizes: Sizes, dtype: str = "float32") -> dict[str, Any]:
    """Time the dense model in evaluation mode."""
    sides = _sides("inference", sizes, dtype)
    return _timed(sides, sizes, batch=sizes.batch, dtype=dtype, macs=ours.macs(**_one(sizes)))


def _one(sizes):
    return {name: value for name, value in sizes.shape.items() if name != "batch"}


def _network(sizes):
    return dict(sizes.model) or {"depth": 50}


def memory(sizes: Sizes) -> dict[str, Any]:
    """Return the peak of the device's memory in a training step, in bytes, by dtype and side."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        for name, (module, _, shape) in _sides("training_step", sizes, dtype).items():
            try:
                rows.append({"side": name, "dtype": dtype, "bytes": _elsewhere({}, _peak, module, shape).result()})
            except Exception as error:  # the other sides are measured
                logging.warning("left out: %s: %s: %s", name, type(error).__name__, error)
    return {"rows": rows, "batch": sizes.batch, "size": sizes.size}


def _peak(module: str, shape: dict[str, Any]) -> int | None:
    """Take two training steps and return the peak of the device's memory in bytes, None on a CPU."""
    make = __import__(module, fromlist=["training_step"]).training_step
    call = make(**shape)
    call(), call()
    if module.endswith("ours"):
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


LAYERS = ((32, 256, 256, 2), (32, 512, 512, 4), (32, 2048, 256, 12), (32, 2048, 256, 24), (32, 2048, 256, 36))


def convolutions(sizes: Sizes) -> dict[str, Any]:
    """Time dilated convolutions as sums over taps against XLA's, forward and both gradients."""
    layers = LAYERS if sizes.size > 64 else ((8, 8, 8, 4), (8, 8, 8, 7))
    rows = []
    for dtype in ("float32", "bfloat16"):
        for side, inputs, outputs, rate in layers:
            rng = np.random.default_rng(0)
            x = jnp.asarray(rng.normal(size=(sizes.batch, side, side, inputs)), dtype)
            kernel = jnp.asarray(rng.normal(size=(3, 3, inputs, outputs)), dtype)

            def gradients(x, kernel, rate=rate, plain=False):
                with atrous.plain_convolutions() if plain else contextlib.nullcontext():
                    y, back = jax.vjp(lambda x, kernel: atrous.conv3x3(x, kernel, rate), x, kernel)
                    return y, back(y)

            functions = {
                name: functools.partial(jax.jit(functools.partial(gradients, plain=plain)), x, kernel)
                for name, plain in (("ours", False), ("XLA", True))
            }
            seconds = timed(functions, sizes.rounds)
            share = atrous.tap_share((side, side), rate)
            row = {name: float(np.median(values)) for name, values in seconds.items()}
            ratio = float(np.median(seconds["ours"] / seconds["XLA"]))
            layer = {"side": side, "inputs": inputs, "outputs": outputs, "rate": rate}
            rows.append({"dtype": dtype, **layer, "share": share, **row, "ratio": ratio})
    return {"rows": rows, "batch": sizes.batch}


def proximal(sizes: Sizes) -> dict[str, Any]:
    """Time the proximal operators over all kernels of the backbone against a copy of their memory."""
    functions = prox.operators(prox.backbone_shapes(_network(sizes)))
    return {"seconds": {name: values.tolist() for name, values in timed(functions, sizes.rounds).items()}}


def latency(sizes: Sizes) -> dict[str, Any]:
    """Time the compact backbone against the dense one."""
    model, variables = compact.zero_model(0.7, **_network(sizes))
    models = {
        "dense": (model, variables),
        "compact": multitask_compaction.compact(model, variables),
        "multiple of 8": multitask_compaction.compact(model, variables, multiple=8),
    }
    shape = (sizes.size, sizes.size)
    rows = [
        row for batch in (1, sizes.batch) for row in speed.compare(models, shape, batch, sizes.rounds, ("backbone",))
    ]
    return {"rows": rows, "zero_groups": 0.7, "size": sizes.size}


# name -> (function, seconds that it usually takes)
PARTS: dict[str, tuple[Callable[[Sizes], dict[str, Any]], int]] = {
    "parity": (parity, 90),
    "equality": (equality, 60),
    "demo": (demo, 90),
    "step": (step, 120),
    "step_bfloat16": (functools.partial(step, dtype="bfloat16"), 90),
    "inference": (inference, 60),
    "convolutions": (convolutions, 60),
    "proximal": (proximal, 30),
    "latency": (latency, 90),
    "inference_bfloat16": (functools.partial(inference, dtype="bfloat16"), 60),
    "memory": (memory, 90),
    "step_bfloat16_64": (functools.partial(step, dtype="bfloat16", batch=64), 120),
}
TOGETHER = ("parity", "equality", "demo")  # they measure no speed, so they run at the same time


def run(names: list[str], sizes: Sizes, folder: pathlib.Path, seconds: float) -> None:
    """Run parts and write their records.

    Args:
      names: keys of `PARTS`. Those with a record in the folder are skipped.
      sizes: what they run at.
      folder: folder of the records.
      seconds: start no part whose usual time does not fit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    todo = [name for name in names if not (folder / f"{name}.json").exists()]
    groups = [[name for name in todo if name in TOGETHER]] + [[name] for name in todo if name not in TOGETHER]
    for group in filter(None, groups):
        left = seconds - (time.perf_counter() - begin)
        if max(PARTS[name][1] for name in group) > left:
            logging.info("%s: left out, %.0f s are left; run the same command again", ", ".join(group), left)
            continue
        start = time.perf_counter()
        calls = {name: _elsewhere({}, _part, name, sizes) for name in group}
        for name, call in calls.items():
            _keep(name, call, start, sizes, folder)


def _part(name, sizes):
    """Run a part in its process; return its record and the device."""
    logging.set_verbosity(logging.INFO)
    found = PARTS[name][0](sizes)
    return found | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


def _keep(name, call, start, sizes, folder):
    try:
        record = call.result()
    except Exception as error:  # the other parts are run
        logging.error("%s failed: %s: %s", name, type(error).__name__, str(error)[-2000:])
        return
    seconds = time.perf_counter() - start
    record |= {"part": name, "part_seconds": seconds, "date": time.strftime("%Y-%m-%d"), "model": dict(sizes.model)}
    (folder / f"{name}.json").write_text(json.dumps(record) + "\n")
    logging.info("%s: done in %.0f s\n%s", name, seconds, gpu_table.part(record))


def main() -> None:
    """Run what the command line asks for."""
    logging.set_verbosity(logging.INFO)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help="parts to run")
    parser.add_argument("--seconds", type=float, default=540, help="time for all parts")
    parser.add_argument("--folder", type=pathlib.Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--small", action="store_true", help="the smallest sizes, on any backend")
    parser.add_argument("--render", action="store_true", help="only write docs/gpu.md from the records")
    arguments = parser.parse_args()
    if arguments.render:
        gpu_table.write(arguments.folder, list(PARTS))
        return
    # Several processes share the GPU: none may reserve most of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    run(arguments.parts, SMALL if arguments.small else Sizes(), arguments.folder, arguments.seconds)


if __name__ == "__main__":
    main()
