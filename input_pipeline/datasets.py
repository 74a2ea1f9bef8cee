"""Opens a data set by its config: draws it if it is embedded, prepares it with TFDS if it is new."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import pathlib
import shutil
from collections.abc import Callable, Collection, Sequence

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from input_pipeline import celebamask_hq, folders, nyud_mt, transforms
from input_pipeline.synthetic import faces, rooms
from mtl_sparse.runtime import files, text
from mtl_sparse.runtime.errors import UserError, as_os_error


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set that is open.

    Attributes:
      train, validation, test: random-access sources (`len` and `[index]`) of frames, as `transforms.Transform` takes
        them.
      names: of the frames of each split; by default their numbers.
      fingerprint: changes when the data do; a run is not continued on other data. "" takes the digest of the splits'
        lengths and of some of their frames: give one yourself where a frame is not the same each time it is read.
      classes: names of the segmentation's classes, for pictures.
    """

    train: Sequence[dict]
    validation: Sequence[dict]
    test: Sequence[dict]
    names: dict[str, list[str]] | None = None
    fingerprint: str = ""
    classes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Published:
    """A data set that comes as a folder, and is prepared with TFDS.

    Attributes:
      module: with its `BUILDER`, its `LABELS`, and `classes`, `frames` and `fingerprint`, see `nyud_mt`.
      draw: (frames, height, width, seed, folder) -> folder of embedded frames in the same layout.
      train_count: number of embedded frames -> number of training images among them.
    """

    module: object
    draw: Callable[..., pathlib.Path]
    train_count: Callable[[int], int]

    def __call__(self, config, check: Callable[[int], object] = lambda images: None) -> Data:
        return _open_published(self, config, check)


# Data set by name: a function (config.data) -> Data. `DATASETS["mine"] = ...` is all that one of your own takes.
DATASETS: dict[str, Callable[..., Data]] = {
    "nyud_mt": Published(nyud_mt, rooms.draw_folder, rooms.train_count),
    "celebamask_hq": Published(celebamask_hq, faces.draw_folder, celebamask_hq.train_count),
}


def load(config, labels: Collection[str] = (), check: Callable[[int], object] = lambda images: None) -> Data:
    """Opens the data of `config.data`.

    `config.embedded.frames > 0` draws embedded frames first (see `synthetic/`). A published folder is prepared once
    into array_record files; they are enough from then on, without the folder and without TensorFlow.

    Args:
      labels: keys of the labels that every frame must have.
      check: called with the number of training images as soon as that is known, before anything is drawn or prepared;
        what it raises, such as a batch that is too large, ends the call.

    Raises:
      UserError: an unknown data set or label, embedded frames and a folder at once, a folder that is missing or
        damaged, or that changed after it was prepared, no TensorFlow to prepare with.
    """
    if config.name not in DATASETS:
        known = ", ".join(DATASETS)
        raise UserError(
            f"unknown data set config.data.name={config.name!r}; known: {known}, and those of --register=FILE"
        )
    dataset = DATASETS[config.name]
    if isinstance(dataset, Published):  # before anything is prepared
        _check_labels(config, labels, dataset.module.LABELS)
        _check_classes(config, dataset.module.classes(config))
        return dataset(config, check)
    data = dataset(config)
    if not isinstance(data, Data):
        raise UserError(f"DATASETS[{config.name!r}] gives {type(data).__name__}, not a datasets.Data")
    for split in folders.SPLITS:
        frames = getattr(data, split)
        if not len(frames):
            raise UserError(f"the {split} split of config.data.name={config.name!r} has no frames")
        _check_labels(config, labels, frames[0].keys() - {"image", "name"})
        _check_frame(config, labels, frames[0], f"the first {split} frame of config.data.name={config.name!r}")
    _check_classes(config, data.classes)
    numbers = {split: [str(i) for i in range(len(getattr(data, split)))] for split in folders.SPLITS}
    return dataclasses.replace(data, names=data.names or numbers, fingerprint=data.fingerprint or _digest(data))


def _digest(data: Data, frames: int = 8) -> str:
    """Digest of the lengths of the splits and of some frames of each, evenly spaced."""
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


def _check_labels(config, labels, known):
    for label in labels:
        if label not in known:
            near = text.nearest(label, known)
            others = f"nearest: {', '.join(near)}" if near else f"its labels: {', '.join(sorted(known)[:6])}"
            others += ", ..." if not near and len(known) > 6 else ""
            raise UserError(
                f"config.tasks needs the label {label!r}, which config.data.name={config.name!r} does not have; "
                f"{others}"
            )


def _check_frame(config, labels, frame, which):
    """Raises UserError where an image, or a label that a task is given, has another form than `Transform` takes."""
    image = np.asarray(frame.get("image"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise UserError(f"{which} needs an 'image' of uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    for label in labels:
        value = np.asarray(frame[label])
        form, fits = _form(label, value)
        if not fits:
            raise UserError(f"{which} has {label!r} of {value.dtype} {list(value.shape)}; it must be {form}")
        if value.ndim >= 2 and value.shape[0] * image.shape[1] != value.shape[1] * image.shape[0]:
            raise UserError(
                f"{which} has {label!r} of {value.shape[0]}x{value.shape[1]}, its image is "
                f"{image.shape[0]}x{image.shape[1]}: their sides must have the same ratio"
            )
        if label == "segmentation":
            transforms.check_segmentation(value, config.num_classes, f"{which} has a segmentation")


def _form(label, value):
    """(what a label must be, whether this one is); the labels of tasks of one's own may be anything."""
    one = value.ndim == 2 or value.ndim == 3 and value.shape[-1] == 1
    if label == "segmentation":
        return "whole numbers [H, W] or [H, W, 1]", one and value.dtype.kind in "iu"
    if label == "depth":
        return "numbers [H, W] or [H, W, 1], in metres", one and value.dtype.kind in "fiu"
    if label == "edge":
        numeric = one and value.dtype.kind in "fiub"
        return "numbers in [0, 1], [H, W] or [H, W, 1]", numeric and bool(((value >= 0) & (value <= 1)).all())
    if label == "normals":
        return "unit vectors [H, W, 3]", value.ndim == 3 and value.shape[-1] == 3 and value.dtype.kind == "f"
    if label.startswith("attribute:"):
        return "one number, 1, 0 or 255", value.shape == () and value in (0, 1, 255)
    return "", True


def _check_classes(config, classes):
    if classes and config.num_classes != len(classes):
        raise UserError(
            f"config.data.num_classes={config.num_classes}: the labels of {config.name} have {len(classes)} classes"
        )


@contextlib.contextmanager
def _alone(folder):
    """Waits for another process that writes there, such as another shard of a sweep that draws or prepares the same.

    Gives whether no other can be at it: not so on a file system without locks.
    """
    alone = False
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            alone = stack.enter_context(files.locked(folder / "data.lock", wait=False)).held
        except BlockingIOError:
            logging.info("Another process writes data to %s: waiting for it", folder)
            alone = stack.enter_context(files.locked(folder / "data.lock", wait=True)).held
        except OSError:  # the folder is read-only: the writer reports what is wrong
            pass
        yield alone


def _open_published(dataset: Published, config, check) -> Data:
    module = dataset.module
    if config.embedded.frames > 0 and config.folder:
        raise UserError(
            f"this config draws its own data, but config.data.folder={config.folder!r} names data, too; to use those, "
            "add --config.data.embedded.frames=0"
        )
    if config.embedded.frames > 0:
        check(dataset.train_count(config.embedded.frames))
        with _alone(pathlib.Path(config.embedded.folder).expanduser()):
            folder = dataset.draw(**config.embedded)
    elif config.folder:
        folder = pathlib.Path(config.folder).expanduser()
    elif not config.prepared:
        raise UserError("config.data.folder is not set; give it the folder of the published data set")
    else:
        folder = None
    prepared = pathlib.Path(config.prepared or f"{folder}.tfds").expanduser()
    target = prepared / config.name / str(module.BUILDER.VERSION)

    if not target.is_dir():
        if folder is not None:
            check(len(module.read_splits(folder, config.split)["train"]))
        else:
            raise UserError(f"no prepared data in {target}; set config.data.folder so that it can be prepared")
        module.fingerprint(folder, config.split)  # what is missing is said before anything is written
        if importlib.util.find_spec("tensorflow") is None:
            raise UserError(
                "preparing data needs TensorFlow (training on prepared data does not): pip install "
                f"tensorflow-cpu, or run --job=prepare where it is installed and copy {prepared} here"
            )
        logging.info("Preparing %s from %s into %s", config.name, folder, prepared)
        with as_os_error(prepared), _alone(prepared) as alone:
            if alone and not target.is_dir():
                for left in target.parent.glob(f"incomplete.*_{target.name}"):  # by a preparation that was killed
                    shutil.rmtree(left, ignore_errors=True)
            builder = module.BUILDER(data_dir=str(prepared), file_format="array_record", split=config.split)
            builder.download_and_prepare(  # nothing, where another process just has
                download_config=tfds.download.DownloadConfig(manual_dir=str(folder), compute_stats="skip")
            )
    with folders.told_as_damaged(target):
        builder = tfds.builder_from_directory(str(target))
        metadata = dict(builder.info.metadata)
        stored = {split: folders.Stored(builder.as_data_source(split=split), target) for split in folders.SPLITS}
        lists, fingerprint = {split: list(metadata["splits"][split]) for split in stored}, metadata["fingerprint"]
    if folder is not None and folder.is_dir():
        if module.fingerprint(folder, config.split) != fingerprint:
            raise UserError(
                f"{folder}{f' or {config.split}' if config.split else ''} has changed since {prepared} was prepared "
                f"from it; delete {prepared} to prepare it again, or name another config.data.prepared"
            )
    elif (
        bool(config.split) != metadata.get("given_split", False)
        or (config.split == folders.SCENES) != metadata.get("scenes", False)
        or (config.split not in ("", folders.SCENES) and folders.read_splits(config.split) != lists)
    ):
        raise UserError(f"{prepared} was prepared with other lists than those of config.data.split={config.split!r}")
    frames = {split: module.frames(source, config) for split, source in stored.items()}
    return Data(**frames, names=lists, fingerprint=fingerprint, classes=tuple(module.classes(config)))
