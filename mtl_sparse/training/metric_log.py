"""The metrics of a run while it trains: metrics.jsonl, TensorBoard events, and the progress in the log."""

import importlib.util
import json
import os
import pathlib
import time

from absl import logging

from mtl_sparse.runtime import files, text
from mtl_sparse.runtime.errors import UserError


class MetricLog:
    """Appends to `metrics.jsonl`, one object a line: {"step", "split", name: value, ...}.

    Where TensorFlow and TensorBoard are installed, the same scalars go to event files through clu, too.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int):
        """Args: workdir; start_step, the step that the run goes on from: later lines are of a lost stretch."""
        self._path = workdir / "metrics.jsonl"
        lines = self._path.read_text(errors="replace").splitlines(keepends=True) if self._path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and _step(self._path, line) <= start_step]
        if kept != lines:
            files.write_text(self._path, "".join(kept))
        self._file = self._path.open("a")
        self._writer = None
        if tensorboard_available():
            from clu import metric_writers

            self._writer = metric_writers.SummaryWriter(str(workdir))

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # before the checkpoint that says this step is done
        if self._writer is not None:
            self._writer.write_scalars(step, {f"{split}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _step(path, line):
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} has a damaged line, {line[:60]!r} ({error}); take it out, or train in another --workdir"
        ) from error


def tensorboard_available() -> bool:
    """Whether clu's metric writers can be imported: they need both packages."""
    return all(importlib.util.find_spec(name) is not None for name in ("tensorflow", "tensorboard"))


def progress_reporter(total_steps: int, every_secs: float):
    """Callable (step) that reports the rate and the time left: clu's where it can be imported."""
    if tensorboard_available():
        from clu import periodic_actions

        return periodic_actions.ReportProgress(num_train_steps=total_steps, every_secs=every_secs)
    return _Progress(total_steps, every_secs)


class _Progress:
    """`clu.periodic_actions.ReportProgress` in small, for where TensorFlow, which its module needs, is not."""

    def __init__(self, total_steps, every_secs):
        self._total, self._every, self._eta, self._last = total_steps, every_secs, None, 0.0

    def __call__(self, step):
        now = time.monotonic()
        if self._eta is None:
            self._eta, self._last = text.Eta(self._total, step), now
        elif now - self._last > self._every or step == self._total:
            rate = 1 / self._eta.seconds_per_unit(step)
            logging.info("%.1f steps/s, %d/%d, %s left", rate, step, self._total, self._eta.left(step))
            self._last = now
