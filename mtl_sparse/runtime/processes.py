"""The process of a run and how it is stopped; several processes, joined by jax.distributed, agree and the first writes.

With one process, every function here behaves as its plain counterpart.
"""

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from mtl_sparse.runtime import logs
from mtl_sparse.runtime.errors import UserError


def join(coordinator: str, count: int | None, index: int | None) -> None:
    """Join this process to the others of its run; call it before JAX computes anything.

    Args:
      coordinator: "HOST:PORT" of the first process, or "auto" under SLURM, Open MPI or on a TPU pod, which provide all
        three values.
      count: number of processes.
      index: index of this process, from 0.

    Raises:
      UserError: OPTION_OUT_OF_RANGE for values that cannot work, PROCESSES_NOT_CONNECTED if the processes do not find
        each other.
    """
    is_auto = coordinator == "auto"
    port = coordinator.rpartition(":")[2]
    if not is_auto and (not port.isdecimal() or count is None or index is None or not 0 <= index < count):
        raise UserError(
            "OPTION_OUT_OF_RANGE",
            f"--coordinator={coordinator!r}, --num_processes={count}, --process_id={index}: expected HOST:PORT of "
            "process 0, the number of processes, and the index of this process, from 0; or use --coordinator=auto "
            "under SLURM or Open MPI",
        )
    try:
        if is_auto:
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, count, index)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            "PROCESSES_NOT_CONNECTED",
            f"--coordinator={coordinator!r}: expected to find the other processes, got an error ({error}); check the "
            "address, and start every process",
        ) from error
    on_first(lambda: None)  # connect now: in a first exchange, XLA waits only 30 s for the slowest process
    if not is_first():  # one process logs the progress
        logs.show_warnings_only()


def is_first() -> bool:
    """Return whether this process is the one that writes."""
    return jax.process_index() == 0


def on_first(function: Callable[[], Any]) -> Any:
    """Call `function` in the first process and return its result, a JSON value, in all processes.

    Raises:
      UserError: `function` raised it; it is raised with the same code in all processes.
    """
    return _broadcast(function, 0)


def in_turn(function: Callable[[], Any]) -> Any:
    """Call `function` in one process after the other; return each process's own result.

    Raises:
      UserError: `function` raised it in one process; it is raised with the same code in all processes.
    """
    value = None

    def mine():
        nonlocal value
        value = function()

    for index in range(jax.process_count()):
        _broadcast(mine, index)
    return value


def _broadcast(function: Callable[[], Any], index: int) -> Any:
    """Return the JSON value that `function` returns in process `index`, in all processes."""
    if jax.process_count() == 1:
        return function()
    is_source = jax.process_index() == index
    message: dict[str, Any] = {}
    if is_source:
        try:
            message = {"value": function()}
        except UserError as error:
            message = {"error": [error.code, str(error)]}
    encoded = np.frombuffer(json.dumps(message).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(encoded)), is_source))
    received = multihost_utils.broadcast_one_to_all(encoded if is_source else np.zeros(size, np.uint8), is_source)
    message = json.loads(np.asarray(received, np.uint8).tobytes())
    if "error" in message:
        code, text = message["error"]
        raise UserError(code, text)
    return message["value"]


def from_first(tree: Any) -> Any:
    """Return the first process's tree of host arrays, bit-equal, in all processes.

    Args:
      tree: host arrays; the values of the other processes are ignored, but their shapes and dtypes must be the same.
    """
    if jax.process_count() == 1:
        return tree

    def send(x):
        x = np.asarray(x)
        bits = multihost_utils.broadcast_one_to_all(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
        return np.asarray(bits).view(x.dtype).reshape(x.shape)

    return jax.tree.map(send, tree)


def total(tree: Any) -> Any:
    """Return the sum over the processes of a tree of float64 host arrays, in float64; JAX itself would use float32."""
    if jax.process_count() == 1:
        return tree

    def add(x):
        bits = multihost_utils.process_allgather(np.ascontiguousarray(x, np.float64).reshape(-1).view(np.uint32))
        return np.asarray(bits).view(np.float64).sum(0).reshape(np.shape(x))

    return jax.tree.map(add, tree)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Handle SIGTERM and Ctrl-C as requests to stop after the current step.

    A second Ctrl-C raises KeyboardInterrupt at once. With several processes, a SIGTERM to any of them stops all of
    them after the same step.

    Yields:
      A function (step) -> whether to stop after this step; call it in every step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked: list[int] = []

    def ask(number: int, _: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        logging.warning("%s received: saving after this step, then stopping", signal.Signals(number).name)

    before = {}
    if threading.current_thread() is threading.main_thread():  # Python allows handlers in the main thread only
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda _: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
