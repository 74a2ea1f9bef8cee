"""Access to a run's folder: one process at a time, and only with the options and data of the run in it."""

import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import logging

from mtl_sparse.report import records, schema
from mtl_sparse.runtime import files
from mtl_sparse.runtime.errors import UserError

if TYPE_CHECKING:
    from input_pipeline.datasets import Data


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
    """Lock a run's folder against other processes; a process that is killed releases it.

    Raises:
      UserError: FOLDER_IN_USE if another process holds the lock, FOLDER_NOT_A_RUN if it cannot be a folder.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            "FOLDER_NOT_A_RUN", f"expected --workdir={workdir} to be a folder, got a file, or a path below a file"
        ) from None
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(files.locked(workdir / "run.lock", wait=False))
        except BlockingIOError:
            raise UserError(
                "FOLDER_IN_USE",
                f"another process uses the run in {workdir}; wait until it has ended, or give another --workdir",
            ) from None
        if not lock.held:
            logging.warning("%s cannot be locked on this file system: do not start a second process on it", workdir)
        yield


def claim(workdir: pathlib.Path, config, data: "Data") -> None:
    """Write config.json and splits.json into a new run's folder; check those of an existing run.

    Raises:
      UserError: as `check`.
    """
    if (workdir / "splits.json").exists():
        check(workdir, config, data)
    elif (workdir / "config.json").exists():  # a sweep writes it before the run starts
        check_settings(workdir, config)
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(workdir / "splits.json", _splits(data))
    files.write_json(workdir / "config.json", json.loads(config.to_json()))


def to_open(workdir: pathlib.Path) -> str:
    """Return a list of the files of a run that a reader wants to open, if they exist."""
    files_of_run = {
        "report/index.html": "the run on one page",
        "plots/samples.png": "test images, labels and predictions",
        "plots": "all plots: losses, metrics, sparsity, groups of each layer",
        "results.json": "test metrics, sparsity and size of the best checkpoint",
        "metrics.jsonl": "losses and metrics during training",
        "log.txt": "the log of the run",
    }
    found = [(str(workdir / name), what) for name, what in files_of_run.items() if (workdir / name).exists()]
    longest = max((len(path) for path, _ in found), default=0)
    lines = [f"  {path.ljust(longest)}  {what}" for path, what in found]
    return "\n".join(["To open:", *lines])


def check(workdir: pathlib.Path, config, data: "Data") -> None:
    """Check that a run has these options and these data.

    An imported run has no data yet: it is given these. A run made before every data set had a fingerprint accepts any.

    Raises:
      UserError: DATA_CHANGED for other data, or as `check_settings`.
    """
    check_settings(workdir, config)
    if not (workdir / "splits.json").exists() and not (workdir / "metrics.jsonl").exists():
        files.write_json(workdir / "splits.json", _splits(data))
    if files.read_json(workdir / "splits.json")["fingerprint"] not in ("", data.fingerprint):
        raise UserError(
            "DATA_CHANGED",
            f"expected the data of the run in {workdir}, got other data; restore its data, or give another --workdir",
        )


def _splits(data):
    """Return the contents of splits.json; loaded data always have names."""
    return {"fingerprint": data.fingerprint, **(data.names or {})}


def check_settings(workdir: pathlib.Path, config) -> None:
    """Check that a run has these options, except `records.FREE` and, if it is dense, all of `sparsity`.

    Raises:
      UserError: RUN_DIFFERS.
    """
    theirs = records.flat(schema.migrate("config", files.read_json(workdir / "config.json")))
    ours = records.flat(json.loads(config.to_json()))
    free = (*records.FREE, "sparsity.") if records.is_dense(theirs) and records.is_dense(ours) else records.FREE
    differing = [
        f"{name}={theirs.get(name)!r} there, {ours.get(name)!r} now"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name) and not name.startswith(free) and _has_effect(name, theirs, ours)
    ]
    if differing:
        more = "; ..." if len(differing) > 3 else ""
        raise UserError(
            "RUN_DIFFERS",
            f"the run in {workdir} has other options ({'; '.join(differing[:3])}{more}); give its options, or another "
            "--workdir",
        )


def _has_effect(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Return whether an option has an effect on runs made before it existed: not with the values 0 and False."""
    return name in theirs or bool(ours[name])
