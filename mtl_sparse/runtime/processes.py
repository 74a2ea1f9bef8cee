"""The process of a run, and how it is stopped; of several, joined by jax.distributed, the first writes and all agree.

With one process every function here is what its plain counterpart does.
"""

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from mtl_sparse.runtime.errors import UserError


def join(coordinator: str, count: int | None, index: int | None) -> None:
    """Joins this process to the others of its run; before JAX has computed anything.

    Args:
      coordinator: "HOST:PORT" of the first process, or "auto", where SLURM, Open MPI or a TPU pod tells all three.
      count, index: number of processes, and which one this is, from 0.

    Raises:
      UserError: values that cannot be, or the others were not found.
    """
    told = coordinator != "auto"
    port = coordinator.rpartition(":")[2]
    if told and (not port.isdecimal() or None in (count, index) or not 0 <= index < count):
        raise UserError(
            f"--coordinator={coordinator!r}, --num_processes={count}, --process_id={index}: HOST:PORT of process 0, "
            "the number of processes, and which of them this is, from 0; or --coordinator=auto under SLURM or Open MPI"
        )
    try:
        if told:
            jax.distributed.initialize(coordinator, count, index)
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--coordinator={coordinator!r}: the processes did not find each other ({error})") from error
    on_first(lambda: None)  # connects them: of a first exchange that not all reach at once, XLA waits 30 s only
    if not is_first():  # one that tells how the run goes is enough
        logging.set_verbosity(logging.WARNING)


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def on_first(function: Callable[[], Any]) -> Any:
    """What `function` gives in the first process, a JSON value, in all; a UserError there is raised in all."""
    return _spoken(function, 0)


def in_turn(function: Callable[[], Any]) -> Any:
    """What `function` gives, called by one process after the other; a UserError of one is raised in all."""
    value = None

    def mine():
        nonlocal value
        value = function()

    for index in range(jax.process_count()):
        _spoken(mine, index)
    return value


def _spoken(function, index):
    """The JSON value that `function` gives in that process."""
    if jax.process_count() == 1:
        return function()
    said = {}
    if jax.process_index() == index:
        try:
            said = {"value": function()}
        except UserError as error:
            said = {"error": [error.code, str(error)]}
    text = np.frombuffer(json.dumps(said).encode(), np.uint8)
    is_source = jax.process_index() == index
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text)), is_source))
    text = multihost_utils.broadcast_one_to_all(text if is_source else np.zeros(size, np.uint8), is_source)
    said = json.loads(np.asarray(text, np.uint8).tobytes())
    if "error" in said:
        raise UserError(*said["error"])
    return said["value"]


def from_first(tree: Any) -> Any:
    """The first process's tree of host arrays, bit by bit, in all; the others give one of the same shapes."""
    if jax.process_count() == 1:
        return tree

    def send(x):
        x = np.asarray(x)
        bits = multihost_utils.broadcast_one_to_all(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
        return np.asarray(bits).view(x.dtype).reshape(x.shape)

    return jax.tree.map(send, tree)


def total(tree: Any) -> Any:
    """Sum over the processes of a tree of float64 host arrays, in float64: JAX itself would add in float32."""
    if jax.process_count() == 1:
        return tree

    def add(x):
        bits = multihost_utils.process_allgather(np.ascontiguousarray(x, np.float64).reshape(-1).view(np.uint32))
        return np.asarray(bits).view(np.float64).sum(0).reshape(np.shape(x))

    return jax.tree.map(add, tree)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yields a function (step) -> whether to stop after this step, as SIGTERM or Ctrl-C asks; to be called each step.

    A second Ctrl-C ends at once. Of several processes a SIGTERM to any stops all at the same step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = []

    def ask(number, _):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)
        logging.warning("Asked to stop (%s): saving after this step", signal.Signals(number).name)

    before = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
