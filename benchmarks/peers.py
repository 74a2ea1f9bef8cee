"""Functions timed in alternation, each in a process of its own: thread pools that idle in one do not slow the other.

In its turn each is called twice and the second call timed, as one training step follows another: a virtual machine may
have given the memory that a process freed back to its host while the process idled, and the first call waits for it.
All of them get the environment that launch.py gives itself.
"""

import importlib
import multiprocessing
import time

import numpy as np

from mtl_sparse.runtime import environment

_CONTEXT = multiprocessing.get_context("spawn")


def _work(pipe, module, function, settings):
    """Makes the function and calls it, then twice for each message; sends None, then the second call's seconds."""
    try:
        call = getattr(importlib.import_module(module), function)(**settings)
        call()
        pipe.send(None)
        while pipe.recv():
            call()
            start = time.perf_counter()
            call()
            pipe.send(time.perf_counter() - start)
    except Exception as error:  # told in the parent, which has the table
        pipe.send(f"{type(error).__name__}: {error}")


def alternate(peers: dict[str, tuple[str, str, dict]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each round of each peer, one after the other in every round.

    Args:
      peers: name -> (module, function, its arguments); the function makes one () -> None that blocks until it is done.

    Raises:
      RuntimeError: a peer failed, with its reason.
    """
    environment.tune()
    pipes, workers = {}, []
    try:
        for name, (module, function, settings) in peers.items():
            pipes[name], theirs = _CONTEXT.Pipe()
            workers.append(_CONTEXT.Process(target=_work, args=(theirs, module, function, settings), daemon=True))
            workers[-1].start()
            theirs.close()
            _receive(name, pipes[name])
        seconds = {name: [] for name in peers}
        for _ in range(rounds):
            for name, pipe in pipes.items():
                pipe.send(True)
                seconds[name].append(_receive(name, pipe))
        return {name: np.array(values) for name, values in seconds.items()}
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _receive(name, pipe):
    try:
        found = pipe.recv()
    except EOFError:
        found = "the process ended"
    if isinstance(found, str):
        raise RuntimeError(f"{name}: {found}")
    return found


def random_batch(size: int, batch: int) -> dict[str, np.ndarray]:
    """Images [B, size, size, 3] and labels of every pixel, without meaning, that all are timed on."""
    rng = np.random.default_rng(0)
    shape = (batch, size, size)
    normals = rng.normal(size=(*shape, 3)).astype(np.float32)
    return {
        "image": rng.normal(size=(*shape, 3)).astype(np.float32),
        "segmentation": rng.integers(0, 40, shape).astype(np.int32),
        "depth": rng.uniform(0.1, 1, shape).astype(np.float32),
        "normals": normals / np.linalg.norm(normals, axis=-1, keepdims=True),
    }
