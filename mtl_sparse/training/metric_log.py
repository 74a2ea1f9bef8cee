"""Metrics of a run during training: metrics.jsonl, TensorBoard events, and the progress in the log."""

import importlib.util
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol

from absl import logging

from mtl_sparse.runtime import files, text
from mtl_sparse.runtime.errors import UserError


class MetricLog:
    """Writer of `metrics.jsonl`, one object a line: {"step", "split", name: value, ...}.

    The same scalars are written to event files for TensorBoard: by clu if TensorFlow is installed, which clu's writer
    needs, and otherwise by `_EventFile`.
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
        self._events = _event_writer(workdir)

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
        self._events.write_scalars(step, {f"{split}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._events.close()


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
    """Return whether clu's metric writers and periodic actions can be imported: they need TensorFlow."""
    return importlib.util.find_spec("tensorflow") is not None


def progress_reporter(total_steps: int, every_secs: float) -> Callable[[int], object]:
    """Return a function (step) that logs the steps per second and the time left: clu's, if it can be imported.

    Args:
      total_steps: steps of the run.
      every_secs: seconds between two lines of the log.
    """
    if tensorflow_available():
        from clu import periodic_actions

        return periodic_actions.ReportProgress(num_train_steps=total_steps, every_secs=every_secs)
    return _Progress(total_steps, every_secs)


class _Progress:
    """`clu.periodic_actions.ReportProgress` without TensorFlow, which its module imports."""

    def __init__(self, total_steps: int, every_secs: float) -> None:
        self._total, self._every, self._last = total_steps, every_secs, (0, 0.0)
        self._eta: text.Eta | None = None

    def __call__(self, step: int) -> None:
        now = time.monotonic()
        if self._eta is None:
            self._eta, self._last = text.Eta(self._total, step), (step, now)
            return
        last_step, last_time = self._last
        if now - last_time > self._every or step == self._total:
            steps_per_second = (step - last_step) / (now - last_time)
            logging.info("%.1f steps/s, %d/%d, %s left", steps_per_second, step, self._total, self._eta.left(step))
            self._last = (step, now)
