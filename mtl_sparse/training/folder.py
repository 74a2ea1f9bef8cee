"""Who may write a run's folder, and whether a config and data are those of the run in it."""

import contextlib
import json
import pathlib

from absl import logging

from mtl_sparse.report import records
from mtl_sparse.runtime import files
from mtl_sparse.runtime.errors import UserError


@contextlib.contextmanager
def held(workdir: pathlib.Path):
    """While it is open no other process can hold this run's folder; a process that is killed lets go of it.

    Raises:
      UserError: another process holds it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{workdir} cannot be a run's folder: it is a file, or lies below one") from None
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(files.locked(workdir / "run.lock", wait=False))
        except BlockingIOError:
            raise UserError(
                f"another process is at work in {workdir}; wait until it has ended, or give another --workdir"
            ) from None
        if not lock.held:
            logging.warning("%s cannot be locked on this file system: do not start a second process on it", workdir)
        yield


def claim(workdir: pathlib.Path, config, data) -> None:
    """Writes config.json and splits.json into a new run's folder; an old one is checked instead (`check`)."""
    if (workdir / "splits.json").exists():
        check(workdir, config, data)
    elif (workdir / "config.json").exists():  # a sweep writes it before the run starts
        check_settings(workdir, config)
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(workdir / "splits.json", {"fingerprint": data.fingerprint, **data.names})
    files.write_json(workdir / "config.json", json.loads(config.to_json()))


def check(workdir: pathlib.Path, config, data) -> None:
    """Raises UserError where the run in `workdir` has other settings (`check_settings`) or other data than these.

    A run that was imported has no data yet: it takes these. So does one made before every data set had a fingerprint.
    """
    check_settings(workdir, config)
    if not (workdir / "splits.json").exists() and not (workdir / "metrics.jsonl").exists():
        files.write_json(workdir / "splits.json", {"fingerprint": data.fingerprint, **data.names})
    if files.read_json(workdir / "splits.json")["fingerprint"] not in ("", data.fingerprint):
        raise UserError(f"{workdir} holds a run on other data than these; give its data again, or another --workdir")


def check_settings(workdir: pathlib.Path, config) -> None:
    """Raises UserError where the run in `workdir` has other settings; how it goes and where its data lie may differ.

    So may, of dense runs, all of `sparsity`.
    """
    theirs, ours = (
        records.EARLIER | records.flat(files.read_json(workdir / "config.json")),
        records.flat(json.loads(config.to_json())),
    )
    free = (*records.FREE, "sparsity.") if records.is_dense(theirs) and records.is_dense(ours) else records.FREE
    differing = [
        f"{name}={theirs.get(name)!r} there, {ours.get(name)!r} now"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
        and not name.startswith(free)
        and (name in theirs or ours[name])  # settings that came later do nothing by 0 and False
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a run with other settings ({'; '.join(differing[:3])}"
            f"{'; ...' if len(differing) > 3 else ''}); give these settings again, or another --workdir"
        )
