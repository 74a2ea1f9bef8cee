"""Open a data set by its config: draw embedded data, and prepare a published folder with TFDS."""

import contextlib
import dataclasses
import hashlib
import io
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from input_pipeline import celebamask_hq, folders, mtan, nyud_mt, transforms
from input_pipeline.synthetic import faces, mtan_rooms, rooms
from mtl_sparse.runtime import files, progress, text
from mtl_sparse.runtime.errors import UserError, as_os_error


@dataclasses.dataclass(frozen=True)
class Data:
    """An open data set.

    Attributes:
      train: random-access source (`len` and `[index]`) of training samples, as `transforms.Transform` takes them.
      validation: source of the validation samples.
      test: source of the test samples.
      names: {split: sample names}; by default their indices.
      fingerprint: a string that changes when the data change; a run does not resume on other data. "" computes a digest
        of the lengths of the splits and of some samples. Set one if a sample differs each time it is read.
      classes: names of the segmentation classes, for plots.
    """

    train: Sequence[dict]
    validation: Sequence[dict]
    test: Sequence[dict]
    names: dict[str, list[str]] | None = None
    fingerprint: str = ""
    classes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Published:
    """A data set that is published as a folder and prepared with TFDS.

    Attributes:
      module: a module or an object with `BUILDER`, `LABELS`, `classes`, `frames`, `read_splits` and `fingerprint`, see
        `nyud_mt` and `mtan.Layout`.
      draw: (frames, height, width, seed, folder) -> folder of embedded samples in the same layout.
      train_count: number of embedded samples -> number of training images among them.
    """

    module: Any
    draw: Callable[..., pathlib.Path]
    train_count: Callable[[int], int]

    def __call__(self, config: Any, check: Callable[[int], object] = lambda _: None) -> Data:
        """Open the data of `config.data`; for `check`, see `load`."""
        return _open_published(self, config, check)


# Data set by name: a function (config.data) -> Data. To add a data set, set `DATASETS["mine"] = ...`.
DATASETS: dict[str, Callable[..., Data]] = {
    "nyud_mt": Published(nyud_mt, rooms.draw_folder, rooms.train_count),
    "celebamask_hq": Published(celebamask_hq, faces.draw_folder, celebamask_hq.train_count),
    "nyuv2_13": Published(mtan.NYUV2_13, mtan_rooms.draw_nyuv2, mtan_rooms.train_count),
    "cityscapes_7": Published(mtan.CITYSCAPES_7, mtan_rooms.draw_cityscapes, mtan_rooms.train_count),
}


def load(config: Any, labels: Collection[str] = (), check: Callable[[int], object] = lambda _: None) -> Data:
    """Open the data of `config.data`.

    `config.embedded.frames > 0` draws embedded data first (see `synthetic/`). A published folder is prepared once
    into array_record files; after that, the folder is not needed.

    Args:
      config: `config.data` of a run.
      labels: keys of the labels that every sample must have.
      check: called with the number of training images as soon as it is known, before anything is drawn or prepared. It
        may raise, for example if a batch is too large.

    Returns:
      The open data set.

    Raises:
      UserError: an unknown data set or label; both embedded data and a folder; a folder that is missing or damaged, or
        that changed after it was prepared.
    """
    if config.name not in DATASETS:
        known = ", ".join(DATASETS)
        raise UserError(
            "OPTION_UNKNOWN_VALUE",
            f"unknown data set config.data.name={config.name!r}; known: {known}, and those of --register=FILE",
        )
    dataset = DATASETS[config.name]
    if isinstance(dataset, Published):  # before anything is prepared
        _check_labels(config, labels, dataset.module.LABELS)
        _check_classes(config, dataset.module.classes(config))
        return dataset(config, check)
    data = dataset(config)
    if not isinstance(data, Data):
        raise UserError(
            "DATA_FORMAT",
            f"DATASETS[{config.name!r}]: expected a function that returns datasets.Data, got {type(data).__name__}",
        )
    for split in folders.SPLITS:
        frames = getattr(data, split)
        if not len(frames):
            raise UserError(
                "DATA_TOO_FEW_IMAGES", f"the {split} split of config.data.name={config.name!r} has no samples"
            )
        _check_labels(config, labels, frames[0].keys() - {"image", "name"})
        _check_frame(config, labels, frames[0], f"the first {split} sample of config.data.name={config.name!r}")
    _check_classes(config, data.classes)
    numbers = {split: [str(i) for i in range(len(getattr(data, split)))] for split in folders.SPLITS}
    return dataclasses.replace(data, names=data.names or numbers, fingerprint=data.fingerprint or _digest(data))


def _digest(data: Data, frames: int = 8) -> str:
    """Return a digest of the lengths of the splits and of at most `frames` evenly spaced samples of each."""
    digest = hashlib.sha256()
    for split in folders.SPLITS:
        source = getattr(data, split)
        digest.update(f"{split} {len(source)}\n".encode())
        for index in np.linspace(0, len(source) - 1, min(frames, len(source))).round():
            for key, value in sorted(source[int(index)].items()):
                array = np.asarray(value)
                digest.update(f"{key} {array.dtype} {array.shape}\n".encode())
                digest.update(array.tobytes() if array.dtype != object else str(value).encode())
    return digest.hexdigest()[:16]


def _check_labels(config: Any, labels: Collection[str], known: Collection[str]) -> None:
    for label in labels:
        if label not in known:
            near = text.nearest(label, known)
            others = f"nearest: {', '.join(near)}" if near else f"its labels: {', '.join(sorted(known)[:6])}"
            others += ", ..." if not near and len(known) > 6 else ""
            raise UserError(
                "DATA_LABEL_MISSING",
                f"config.tasks needs the label {label!r}, which config.data.name={config.name!r} does not have; "
                f"{others}",
            )


def _check_frame(config: Any, labels: Collection[str], frame: dict, which: str) -> None:
    """Raise UserError if the image or one of the labels has another form than `Transform` takes."""
    image = np.asarray(frame.get("image"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise UserError(
            "DATA_IMAGE_FORMAT",
            f"{which}: expected 'image' of uint8 [H, W, 3], got {image.dtype} {list(image.shape)}",
        )
    for label in labels:
        value = np.asarray(frame[label])
        form, fits = _form(label, value)
        if not fits:
            raise UserError(
                "DATA_LABEL_FORMAT",
                f"{which}: expected {label!r} of {form}, got {value.dtype} {list(value.shape)}",
            )
        if value.ndim >= 2 and value.shape[0] * image.shape[1] != value.shape[1] * image.shape[0]:
            raise UserError(
                "DATA_LABEL_FORMAT",
                f"{which}: expected {label!r} with the aspect ratio of its image ({image.shape[0]}x{image.shape[1]}), "
                f"got {value.shape[0]}x{value.shape[1]}",
            )
        if label == "segmentation":
            transforms.check_segmentation(value, config.num_classes, which)


def _form(label: str, value: np.ndarray) -> tuple[str, bool]:
    """Return the form that a label must have, and whether `value` has it. Labels of a user's tasks have any form."""
    one = value.ndim == 2 or (value.ndim == 3 and value.shape[-1] == 1)
    if label == "segmentation":
        return "integers [H, W] or [H, W, 1]", one and value.dtype.kind in "iu"
    if label == "depth":
        return "numbers [H, W] or [H, W, 1], in meters", one and value.dtype.kind in "fiu"
    if label == "edge":
        numeric = one and value.dtype.kind in "fiub"
        return "numbers in [0, 1], [H, W] or [H, W, 1]", numeric and bool(((value >= 0) & (value <= 1)).all())
    if label == "normals":
        return "unit vectors [H, W, 3]", value.ndim == 3 and value.shape[-1] == 3 and value.dtype.kind == "f"
    if label.startswith("attribute:"):
        return "one number, 1, 0 or 255", value.shape == () and value in (0, 1, 255)
    return "", True


def _check_classes(config: Any, classes: Sequence[str]) -> None:
    if classes and config.num_classes != len(classes):
        raise UserError(
            "OPTION_CONFLICT",
            f"config.data.num_classes={config.num_classes}: expected {len(classes)}, the number of classes of "
            f"{config.name}",
        )


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[bool]:
    """Lock the folder, and wait for any other process that draws or prepares data in it, such as a shard of a sweep.

    Yields:
      Whether the lock is held, which it is not on a file system without locks.
    """
    alone = False
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            alone = stack.enter_context(files.locked(folder / "data.lock", wait=False)).held
        except BlockingIOError:
            logging.info("Another process writes data to %s; waiting for it", folder)
            alone = stack.enter_context(files.locked(folder / "data.lock", wait=True)).held
        except OSError:  # a read-only folder; writing to it will report that
            pass
        yield alone


def _folder(dataset: Published, config: Any, check: Callable[[int], object]) -> pathlib.Path | None:
    """Return the published folder, which is drawn if it is embedded, or None if only prepared data are given."""
    if config.embedded.frames > 0 and config.folder:
        raise UserError(
            "OPTION_CONFLICT",
            f"both config.data.folder={config.folder!r} and config.data.embedded.frames={config.embedded.frames} are "
            "set; to use the folder, add --config.data.embedded.frames=0",
        )
    if config.embedded.frames > 0:
        check(dataset.train_count(config.embedded.frames))
        with _alone(pathlib.Path(config.embedded.folder).expanduser()):
            return dataset.draw(**config.embedded)
    if config.folder:
        return pathlib.Path(config.folder).expanduser()
    if not config.prepared:
        raise UserError(
            "OPTION_MISSING", "config.data.folder is not set; set it to the folder of the published data set"
        )
    return None


def _open_published(dataset: Published, config: Any, check: Callable[[int], object]) -> Data:
    module, folder = dataset.module, _folder(dataset, config, check)
    prepared = pathlib.Path(config.prepared or f"{folder}.tfds").expanduser()
    target = prepared / config.name / str(module.BUILDER.VERSION)

    if not target.is_dir():
        if folder is not None:
            check(len(module.read_splits(folder, config.split)["train"]))
        else:
            raise UserError(
                "DATA_FOLDER_MISSING", f"no prepared data in {target}; set config.data.folder to prepare the data"
            )
        module.fingerprint(folder, config.split)  # reports missing files before anything is written
        logging.info("Preparing %s from %s into %s", config.name, folder, prepared)
        with as_os_error(prepared), _alone(prepared) as alone:
            if alone and not target.is_dir():
                for left in target.parent.glob(f"incomplete.*_{target.name}"):  # of a killed preparation
                    shutil.rmtree(left, ignore_errors=True)
            builder = module.BUILDER(data_dir=str(prepared), file_format="array_record", split=config.split)
            tfds.disable_progress_bar()  # `progress` shows it
            with progress.phase(f"preparing {config.name}"), contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(  # does nothing if another process has just prepared it
                    download_config=tfds.download.DownloadConfig(manual_dir=str(folder), compute_stats="skip")
                )
    with folders.damage_as_user_error(target):
        builder = tfds.builder_from_directory(str(target))
        metadata = dict(builder.info.metadata)
        stored = {split: folders.Stored(builder.as_data_source(split=split), target) for split in folders.SPLITS}
        lists, fingerprint = {split: list(metadata["splits"][split]) for split in stored}, metadata["fingerprint"]
    if folder is not None and folder.is_dir():
        if module.fingerprint(folder, config.split) != fingerprint:
            raise UserError(
                "DATA_CHANGED",
                f"{folder}{f' or {config.split}' if config.split else ''} has changed since {prepared} was prepared "
                f"from it; delete {prepared} to prepare it again, or set another config.data.prepared",
            )
    else:
        _check_split(config.split, metadata, lists, prepared)
    frames = {split: module.frames(source, config) for split, source in stored.items()}
    return Data(**frames, names=lists, fingerprint=fingerprint, classes=tuple(module.classes(config)))


def _check_split(split: str, metadata: dict, lists: dict[str, list[str]], prepared: pathlib.Path) -> None:
    """Raise UserError if data were prepared with another config.data.split than `split`."""
    if (
        bool(split) != metadata.get("given_split", False)
        or (split == folders.SCENES) != metadata.get("scenes", False)
        or (split == folders.ALL) != metadata.get("all", False)
        or (split not in ("", folders.SCENES, folders.ALL) and folders.read_splits(split) != lists)
    ):
        raise UserError(
            "DATA_SPLIT_DIFFERS",
            f"{prepared} was prepared with another split than config.data.split={split!r}; set that split, or another "
            "config.data.prepared",
        )
