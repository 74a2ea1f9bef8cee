"""Read the records of a run's folder: its options, metrics and sample predictions."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtl_sparse.report import schema
from mtl_sparse.runtime import files
from mtl_sparse.runtime.errors import UserError

# Options that do not change a run's results: how it is trained on this machine, and where its data are.
FREE = ("run.", "compact.", "benchmark.", "export.", "lomt.", "data.folder", "data.prepared", "data.embedded.folder")

Series = dict[str, tuple[np.ndarray, np.ndarray]]  # name of a metric -> (steps, values)


def is_dense(settings: Mapping[str, Any]) -> bool:
    """Return whether options by dotted path neither penalize nor prune; other `sparsity` options then do nothing."""
    is_pruned = bool(settings.get("sparsity.prune"))
    return settings.get("sparsity.lambda_") == 0 and settings.get("sparsity.target") == 0 and not is_pruned


def is_finished(folder: pathlib.Path) -> bool:
    """Return whether a run's folder has its results."""
    return (folder / "results.json").exists()


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a config.json that change the contents of results.json, by dotted path."""
    free = tuple(name for name in FREE if name != "compact.")  # results.json has the size of the compact model
    options = flat(schema.migrate("config", config))
    return {name: value for name, value in options.items() if not name.startswith(free)}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of nested dictionaries by dotted path.

    Leaves out "" and [], which have no effect: an option with such a value equals one that an older run lacks.
    """
    if not isinstance(tree, Mapping):
        return {} if tree in ("", []) else {prefix[:-1]: tree}
    return {key: value for name, branch in tree.items() for key, value in flat(branch, f"{prefix}{name}.").items()}


def read_metrics(workdir: pathlib.Path) -> dict[str, Series]:
    """Return the contents of metrics.jsonl as split -> name -> (steps, values); skip a line that is being written.

    Raises:
      UserError: FILE_MISSING, or FILE_DAMAGED for a line that is not JSON.
    """
    path = workdir / "metrics.jsonl"
    if not path.exists():
        raise UserError("FILE_MISSING", f"{path} is missing: {workdir} holds no training run; check the folder's name")
    series: dict[str, dict[str, list]] = {}
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        if not line.endswith("\n"):  # it is being written
            break
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                "FILE_DAMAGED", f"expected JSON in each line of {path}, got {line[:60]!r} ({error}); remove that line"
            ) from error
        for name, value in row.items():
            if name not in ("step", "split"):
                series.setdefault(row["split"], {}).setdefault(name, []).append((row["step"], value))
    return {split: {name: _columns(points) for name, points in names.items()} for split, names in series.items()}


def _columns(points):
    steps, values = np.array(points).T
    return steps, values


def write_samples(
    workdir: pathlib.Path,
    *,
    images: np.ndarray,
    names: Sequence[str],
    labels: Mapping[str, np.ndarray],
    predictions: Mapping[str, np.ndarray],
    classes: Sequence[str] = (),
    threshold: float = 0.5,
) -> None:
    """Write labels and predictions of some test images to samples.npz.

    Its arrays are "image", "name", "classes", "threshold", and "label/<task>" and "prediction/<task>" of each task.
    Class probabilities are stored as the most probable class, the prediction of an attribute as its probability.

    Args:
      workdir: the run's folder.
      images: uint8 [N, H, W, 3].
      names: the images' names.
      labels: task -> labels, [N, ...].
      predictions: task -> predictions, [N, ..., channels] or, with one value per image, [N].
      classes: names of the classes, as far as they have one.
      threshold: probability from which an attribute counts as predicted.
    """
    arrays = {"image": images, "name": np.array(names)}
    arrays |= {"classes": np.array(classes, dtype=str), "threshold": np.array(threshold)}
    for task, label in labels.items():
        prediction = predictions[task]
        if label.ndim == 1:  # one value per image
            pass
        elif np.issubdtype(label.dtype, np.integer):
            prediction = prediction.argmax(-1).astype(np.int32)
        elif prediction.shape[-1] == 1:
            prediction = prediction[..., 0]
        arrays[f"label/{task}"], arrays[f"prediction/{task}"] = label, prediction
    with files.replacing(workdir / "samples.npz") as partial:
        np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]  # NumPy takes allow_pickle for one of them


def read_samples(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the arrays that `write_samples` wrote.

    Raises:
      UserError: FILE_MISSING or FILE_DAMAGED.
    """
    path = workdir / "samples.npz"
    if not path.exists():
        raise UserError("FILE_MISSING", f"{path} is missing; run --job=evaluate on {workdir} first")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever NumPy and zlib raise for damaged files
        message = f"{path} is damaged ({error}); run --job=evaluate on {workdir} again"
        raise UserError("FILE_DAMAGED", message) from error
