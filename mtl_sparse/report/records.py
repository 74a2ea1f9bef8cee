"""Read the records of a run's folder: its options, metrics and sample predictions."""

import json
import pathlib

import numpy as np

from mtl_sparse.runtime import files
from mtl_sparse.runtime.errors import UserError

# Settings that change how a run goes or where its data lie, not what comes out of it.
FREE = ("run.", "compact.", "benchmark.", "export.", "lomt.", "data.folder", "data.prepared", "data.embedded.folder")
# Options that are on by default but were not there when earlier runs were made: what those runs did.
EARLIER = {"sparsity.keep_connected": False}


def is_dense(settings: dict) -> bool:
    """Whether settings by dotted path have no penalty; the others of `sparsity` then do nothing."""
    return settings.get("sparsity.lambda_") == 0 and settings.get("sparsity.target") == 0


def is_finished(folder: pathlib.Path) -> bool:
    """Whether a run's folder has its results."""
    return (folder / "results.json").exists()


def settings(config: dict) -> dict:
    """The settings of a config.json that change what results.json says, by dotted path."""
    free = tuple(name for name in FREE if name != "compact.")  # what compaction would leave is part of it
    return {name: value for name, value in (EARLIER | flat(config)).items() if not name.startswith(free)}


def flat(tree, prefix=""):
    """Values by dotted path, without those that say none, which settings that came after a run was made do."""
    if not isinstance(tree, dict):
        return {} if tree in ("", []) else {prefix[:-1]: tree}
    return {key: value for name, branch in tree.items() for key, value in flat(branch, f"{prefix}{name}.").items()}


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
    with files.replacing(workdir / "samples.npz") as partial:
        np.savez_compressed(partial, **arrays)


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
