"""A run's folder as data: who owns it, its metrics, results and sample predictions."""

import contextlib
import fcntl
import json
import os
import pathlib

import numpy as np
from absl import logging

from mtl_sparse.errors import UserError

# Settings that change how a run goes or where its data lie, not what comes out of it.
_FREE = ("run.", "compact.", "benchmark.", "export.", "lomt.", "data.folder", "data.prepared", "data.embedded.folder")
# Options that are on by default but were not there when earlier runs were made: what those runs did.
EARLIER = {"sparsity.keep_connected": False}


def write_json(path: pathlib.Path, value) -> None:
    """Writes JSON so that the file is always whole, also where several processes write it at a time."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def read_json(path: pathlib.Path):
    """Raises UserError where the file is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: {path.parent} holds no such run, or it has not come that far") from None
    except ValueError as error:  # no JSON, or no text
        raise UserError(f"{path} is damaged ({error}); run the job that writes it again") from error


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
    with (workdir / "run.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is at work in {workdir}; wait until it has ended, or give another --workdir"
            ) from None
        except OSError as error:  # a file system without locks
            logging.warning("%s cannot be locked (%s): start no second process on it", workdir, error.strerror)
        yield


def claim(workdir: pathlib.Path, config, data) -> None:
    """Writes config.json and splits.json into a new run's folder; an old one is checked instead (`check`)."""
    if (workdir / "splits.json").exists():
        check(workdir, config, data)
    elif (workdir / "config.json").exists():  # a sweep writes it before the run starts
        check_settings(workdir, config)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "splits.json", {"fingerprint": data.fingerprint, **data.names})
    write_json(workdir / "config.json", json.loads(config.to_json()))


def check(workdir: pathlib.Path, config, data) -> None:
    """Raises UserError where the run in `workdir` has other settings (`check_settings`) or other data than these.

    A run that was imported has no data yet: it takes these. So does one made before every data set had a fingerprint.
    """
    check_settings(workdir, config)
    if not (workdir / "splits.json").exists() and not (workdir / "metrics.jsonl").exists():
        write_json(workdir / "splits.json", {"fingerprint": data.fingerprint, **data.names})
    if read_json(workdir / "splits.json")["fingerprint"] not in ("", data.fingerprint):
        raise UserError(f"{workdir} holds a run on other data than these; give its data again, or another --workdir")


def check_settings(workdir: pathlib.Path, config) -> None:
    """Raises UserError where the run in `workdir` has other settings; how it goes and where its data lie may differ.

    So may, of dense runs, all of `sparsity`.
    """
    theirs, ours = EARLIER | _flat(read_json(workdir / "config.json")), _flat(json.loads(config.to_json()))
    free = (*_FREE, "sparsity.") if is_dense(theirs) and is_dense(ours) else _FREE
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


def is_dense(settings: dict) -> bool:
    """Whether settings by dotted path have no penalty; the others of `sparsity` then do nothing."""
    return settings.get("sparsity.lambda_") == 0 and settings.get("sparsity.target") == 0


def is_finished(folder: pathlib.Path) -> bool:
    """Whether a run's folder has its results."""
    return (folder / "results.json").exists()


def settings(config: dict) -> dict:
    """The settings of a config.json that change what results.json says, by dotted path."""
    free = tuple(name for name in _FREE if name != "compact.")  # what compaction would leave is part of it
    return {name: value for name, value in (EARLIER | _flat(config)).items() if not name.startswith(free)}


def _flat(tree, prefix=""):
    """Values by dotted path, without those that say none, which settings that came after a run was made do."""
    if not isinstance(tree, dict):
        return {} if tree in ("", []) else {prefix[:-1]: tree}
    return {key: value for name, branch in tree.items() for key, value in _flat(branch, f"{prefix}{name}.").items()}


def read_metrics(workdir: pathlib.Path) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """metrics.jsonl as {split: {name: (steps, values)}}."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{path} is missing: {workdir} holds no run")
    series = {}
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        if not line.endswith("\n"):  # it is being written
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} has a damaged line, {line[:60]!r} ({error}); take it out") from error
        for name, value in row.items():
            if name not in ("step", "split"):
                series.setdefault(row["split"], {}).setdefault(name, []).append((row["step"], value))
    return {
        split: {name: tuple(np.array(points).T) for name, points in names.items()} for split, names in series.items()
    }


def write_samples(workdir, *, images, names, labels, predictions, classes=(), threshold=0.5) -> None:
    """samples.npz: uint8 `image` [N, H, W, 3], `name`, and `label/<task>`, `prediction/<task>` of some test frames.

    Predictions of class probabilities are stored as classes; `classes` has the names of those that have one. An
    attribute's prediction is its probability, and `threshold` says from where on that means yes.
    """
    arrays = {"image": images, "name": np.array(names)}
    arrays |= {"classes": np.array(classes, dtype=str), "threshold": np.array(threshold)}
    for task, label in labels.items():
        prediction = predictions[task]
        if label.ndim == 1:  # one value an image
            pass
        elif np.issubdtype(label.dtype, np.integer):
            prediction = prediction.argmax(-1).astype(np.int32)
        elif prediction.shape[-1] == 1:
            prediction = prediction[..., 0]
        arrays[f"label/{task}"], arrays[f"prediction/{task}"] = label, prediction
    partial = workdir / f"samples.{os.getpid()}.partial.npz"
    np.savez_compressed(partial, **arrays)
    partial.replace(workdir / "samples.npz")


def read_samples(workdir) -> dict[str, np.ndarray]:
    """Of `write_samples`; raises UserError where the file is missing or damaged."""
    path = workdir / "samples.npz"
    if not path.exists():
        raise UserError(f"{path} is missing: run --job=evaluate on {workdir} first")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever NumPy and zlib say of damaged files
        raise UserError(f"{path} is damaged ({error}); run --job=evaluate on {workdir} again") from error
