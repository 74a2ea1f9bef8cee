"""Time functions in alternation, each in its own process.

Separate processes keep the idle thread pool of one framework from slowing down the other. In each turn a function is
called twice, and only the second call is timed: while a process idles, a virtual machine may return the memory that the
process freed to its host, and the first call then waits for that memory. All processes get the environment variables
that launch.py sets for itself.
"""

import importlib
import multiprocessing
import os
import time
from unittest import mock

import numpy as np
from absl import logging

from mtl_sparse.runtime import environment

_CONTEXT = multiprocessing.get_context("spawn")


def _work(pipe, module, function, settings):
    """Serve the calls of one function in a worker process.

    Creates the function, calls it once and sends None. Then, for each message, calls it twice and sends the seconds of
    the second call. Sends an error as text.
    """
    try:
        call = getattr(importlib.import_module(module), function)(**settings)
        call()
        pipe.send(None)
        while pipe.recv():
            call()
            start = time.perf_counter()
            call()
            pipe.send(time.perf_counter() - start)
    except Exception as error:  # raised in the parent process
        pipe.send(f"{type(error).__name__}: {error}")


def alternate(
    peers: dict[str, tuple[str, str, dict]],
    rounds: int,
    *,
    together: bool = False,
    variables: dict[str, dict[str, str]] | None = None,
) -> dict[str, np.ndarray]:
    """Time several functions, each once in every round.

    Args:
      peers: name -> (module, function, keyword arguments). The function returns another one, which blocks until its
        work is done and is the one that is timed.
      rounds: number of rounds.
      together: start all processes at the same time, which is faster where there are many cores. A function that fails
        is then logged as a warning and left out.
      variables: environment variables of single functions' processes, by name, in place of those of launch.py.

    Returns:
      The seconds of each round, [rounds], by name.

    Raises:
      RuntimeError: a function failed, all of them with `together`; the message has its name and the error.
    """
    environment.tune()
    pipes, workers = {}, []
    try:
        for name, (module, function, settings) in peers.items():
            pipes[name], theirs = _CONTEXT.Pipe()
            workers.append(_CONTEXT.Process(target=_work, args=(theirs, module, function, settings), daemon=True))
            with mock.patch.dict(os.environ, (variables or {}).get(name, {})):
                workers[-1].start()
            theirs.close()
            if not together:
                _receive(name, pipes[name])
        if together:
            pipes = _ready(pipes)
        seconds = {name: [] for name in pipes}
        for _ in range(rounds):
            for name, pipe in pipes.items():
                pipe.send(True)
                seconds[name].append(_receive(name, pipe))
        return {name: np.array(values) for name, values in seconds.items()}
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _ready(pipes):
    """Wait for all processes; return the pipes of those that did not fail."""
    ready, begin = {}, time.perf_counter()
    for name, pipe in pipes.items():
        try:
            _receive(name, pipe)
            ready[name] = pipe
            logging.info("%s: ready within %.0f s", name, time.perf_counter() - begin)
        except RuntimeError as error:
            logging.warning("left out: %s", error)
    if not ready:
        raise RuntimeError("all functions failed; see the warnings")
    return ready


def _receive(name, pipe):
    try:
        found = pipe.recv()
    except EOFError:
        found = "the process ended"
    if isinstance(found, str):
        raise RuntimeError(f"{name}: {found}")
    return found


def random_batch(size: int, batch: int) -> dict[str, np.ndarray]:
    """Return random images [batch, size, size, 3] and random labels of every pixel, the input of all benchmarks."""
    rng = np.random.default_rng(0)
    shape = (batch, size, size)
    normals = rng.normal(size=(*shape, 3)).astype(np.float32)
    return {
        "image": rng.normal(size=(*shape, 3)).astype(np.float32),
        "segmentation": rng.integers(0, 40, shape).astype(np.int32),
        "depth": rng.uniform(0.1, 1, shape).astype(np.float32),
        "normals": normals / np.linalg.norm(normals, axis=-1, keepdims=True),
    }
