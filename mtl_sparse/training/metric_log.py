"""Metrics of a run during training: metrics.jsonl, TensorBoard events, and the progress."""

import collections
import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any, Protocol

from absl import logging

from mtl_sparse.runtime import files, processes, progress
from mtl_sparse.runtime.errors import UserError
from mtl_sparse.training import groups
from mtl_sparse.training.setup import Run


class MetricLog:
    """Writer of `metrics.jsonl`, one object a line: {"step", "split", name: value, ...}.

    The same scalars are written to event files for TensorBoard: by clu if TensorFlow is installed, which clu's writer
    needs, and otherwise by `_EventFile`. Another thread writes them, as importing TensorFlow takes seconds in which
    the first steps can run.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int) -> None:
        """Open the log of a run to append to it.

        Args:
          workdir: the run's folder.
          start_step: the step from which the run resumes; later lines are removed, as their steps are run again.

        Raises:
          UserError: FILE_DAMAGED, if a line is not an object with a step.
        """
        self._path = workdir / "metrics.jsonl"
        lines = self._path.read_text(errors="replace").splitlines(keepends=True) if self._path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and _step(self._path, line) <= start_step]
        if kept != lines:
            files.write_text(self._path, "".join(kept))
        self._file = self._path.open("a")
        self._thread = futures.ThreadPoolExecutor(1, "events")
        self._events = functools.cache(lambda: _event_writer(workdir))
        self._pending: collections.deque[futures.Future[None]] = collections.deque()
        self._has_events = False

    def __enter__(self) -> "MetricLog":
        """Return the log."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the log; if the block raised an error, one of the event file is only logged."""
        try:
            self.close()
        except OSError as error:
            if kind is None:
                raise
            logging.warning("The events for TensorBoard could not be written (%s)", error)

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Append a line, and wait until it is on the disk.

        Args:
          step: the step the values are of.
          split: "train" or "validation".
          values: name -> value.
        """
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # before the checkpoint that marks this step as done
        scalars = {f"{split}/{name}": value for name, value in values.items()}
        self._has_events = True
        self._pending.append(self._thread.submit(lambda: self._events().write_scalars(step, scalars)))
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()  # raises the error of a write

    def close(self) -> None:
        """Close the files, after all is written."""
        if self._has_events:
            self._pending.append(self._thread.submit(lambda: self._events().close()))
        self._thread.shutdown()
        self._file.close()
        while self._pending:
            self._pending.popleft().result()


class _Events(Protocol):
    """What `MetricLog` uses of `clu.metric_writers.MetricWriter`."""

    def write_scalars(self, step: int, scalars: dict[str, float], /) -> None: ...

    def close(self) -> None: ...


class _EventFile:
    """`clu.metric_writers.SummaryWriter` for scalars, written with TensorBoard's package instead of TensorFlow."""

    def __init__(self, folder: pathlib.Path) -> None:
        from tensorboard.summary.writer import record_writer

        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._records = record_writer.RecordWriter(self._file)
        self._add(file_version="brain.Event:2")

    def write_scalars(self, step: int, scalars: dict[str, float], /) -> None:
        self._add(step=step, summary={"value": [{"tag": tag, "simple_value": x} for tag, x in scalars.items()]})

    def close(self) -> None:
        self._file.close()

    def _add(self, **fields: Any) -> None:
        from tensorboard.compat.proto import event_pb2

        self._records.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()


def _event_writer(folder: pathlib.Path) -> _Events:
    if not tensorflow_available():
        return _EventFile(folder)
    from clu import metric_writers

    return metric_writers.SummaryWriter(str(folder))


def _step(path: pathlib.Path, line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            "FILE_DAMAGED",
            f"expected an object with a step in each line of {path}, got {line[:60]!r} ({error}); remove that line, or "
            "train in another --workdir",
        ) from error


def tensorflow_available() -> bool:
    """Return whether clu's metric writers can be imported: they need TensorFlow."""
    return importlib.util.find_spec("tensorflow") is not None


class Report:
    """What a training run reports: lines of `metrics.jsonl`, the live display of a terminal, and progress lines."""

    def __init__(self, run: Run, log: MetricLog | None, phase: progress.Phase) -> None:
        """Report a run's training.

        Args:
          run: the result of `setup`.
          log: where metrics are written; None in processes other than the first.
          phase: the training; its total is the number of steps.
        """
        self._run, self._log, self._phase = run, log, phase
        phase.rows = dict.fromkeys(("losses", "validation", "sparsity", "lambda"), "")  # in this order
        self._last = time.monotonic()

    def step(self, step: int) -> None:
        """Report a step, of which nothing but the number is known yet."""
        epoch = -(-step // self._run.steps_per_epoch)
        self._phase.name = f"training, epoch {epoch}/{self._run.config.train.epochs}"
        self._phase.update(step)
        now = time.monotonic()
        if not self._phase.rate:  # the first step, which compiles
            self._last = now
        elif now - self._last > self._run.config.run.progress_every_secs or step == self._phase.total:
            self._phase.log()
            self._last = now

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Report values, see `MetricLog.write`."""
        if self._log:
            self._log.write(step, split, values)
        if split == "train":
            losses = {task.name: values.get(f"{task.name}/loss") for task in self._run.tasks}
            shown = ", ".join(f"{name} {loss:.4g}" for name, loss in losses.items() if loss is not None)
            self._phase.set_row("losses", shown)
            self._phase.set_row("lambda", f"{values['lambda']:.2g}" if "lambda" in values else "")
        else:
            epoch = step // self._run.steps_per_epoch
            self._phase.set_row("validation", f"epoch {epoch}: {headlines(self._run, values)}")
            self._phase.set_row("sparsity", zero_groups(self._run, values))


@contextlib.contextmanager
def reporting(run: Run, workdir: pathlib.Path, start_step: int) -> Iterator[Report]:
    """Report a training run while the block executes; of several processes, the first one writes.

    Args:
      run: the result of `setup`.
      workdir: the run's folder.
      start_step: see `MetricLog`.

    Yields:
      The report.

    Raises:
      UserError: as `MetricLog`.
    """
    with contextlib.ExitStack() as stack:
        phase = stack.enter_context(progress.phase("training", run.total_steps, "step"))
        opened: list[MetricLog] = []
        processes.on_first(lambda: opened.append(stack.enter_context(MetricLog(workdir, start_step))))
        yield Report(run, next(iter(opened), None), phase)


def headlines(run: Run, values: dict[str, float]) -> str:
    """Return each task's main metric as text."""
    named = ((task.name, task.headline) for task in run.tasks)
    return ", ".join(f"{name} {metric} {values[f'{name}/{metric}']:.4f}" for name, metric in named)


def zero_groups(run: Run, values: dict[str, float]) -> str:
    """Return the sparsity of a validation as text, by what the options penalize or set a target for."""
    zero = f"{100 * values['sparsity/group']:.1f} % of groups zero"
    if run.config.sparsity.penalty == "l1":
        zero = f"{100 * values['sparsity/weight']:.1f} % of weights, {zero}"
    for name, key in groups.TARGETS.items():
        if run.config.sparsity[name] > 0:
            zero += f", {100 * values[f'sparsity/{key}_left']:.1f} % of {key} left"
    return zero
