"""Opens a data set by its config: renders it if it is embedded, prepares it with TFDS if it is new."""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Sequence

import tensorflow_datasets as tfds
from absl import logging

from input_pipeline import nyud_mt, synthetic
from mtl_sparse.errors import UserError

# A data set is a module with a TFDS `BUILDER`, the `fingerprint` of a published folder, and its `CLASSES`.
DATASETS = {"nyud_mt": nyud_mt}


@dataclasses.dataclass(frozen=True)
class Data:
    """Random-access sources of stored frames, the frame names of each split, and a digest of the published folder."""

    train: Sequence
    validation: Sequence
    test: Sequence
    names: dict[str, list[str]]
    fingerprint: str


def load(config) -> Data:
    """Opens the data of `config.data`.

    `config.rooms.frames > 0` renders the embedded rooms first (see `synthetic.py`). The published folder is
    prepared once into array_record files; they are enough from then on, without the folder and without
    TensorFlow.

    Raises:
      UserError: an unknown data set, rooms and a folder at once, a folder that is missing or damaged, or that
        changed after it was prepared, no TensorFlow to prepare with.
    """
    if config.name not in DATASETS:
        raise UserError(f"unknown data set config.data.name={config.name!r}; known: {', '.join(DATASETS)}")
    dataset = DATASETS[config.name]
    if config.num_classes != len(dataset.CLASSES):
        raise UserError(
            f"config.data.num_classes={config.num_classes}: the labels of {config.name} have "
            f"{len(dataset.CLASSES)} classes"
        )
    if config.rooms.frames > 0 and (config.folder or config.prepared):
        raise UserError(
            f"this config renders embedded rooms, but config.data.folder={config.folder!r} and config.data.prepared="
            f"{config.prepared!r} name data, too; to use those, add --config.data.rooms.frames=0"
        )
    if config.rooms.frames > 0:
        folder = synthetic.render_folder(**config.rooms)
    elif config.folder:
        folder = pathlib.Path(config.folder).expanduser()
    elif not config.prepared:
        raise UserError("config.data.folder is not set; give it the folder of the published data set")
    else:
        folder = None
    prepared = pathlib.Path(config.prepared or f"{folder}.tfds").expanduser()
    target = prepared / config.name / str(dataset.BUILDER.VERSION)

    if not target.is_dir():
        if folder is None:
            raise UserError(f"no prepared data in {target}; set config.data.folder so that it can be prepared")
        dataset.fingerprint(folder)  # what is missing is said before anything is written
        if importlib.util.find_spec("tensorflow") is None:
            raise UserError(
                "preparing data needs TensorFlow (training on prepared data does not): pip install "
                f"tensorflow-cpu, or run --job=prepare where it is installed and copy {prepared} here"
            )
        logging.info("Preparing %s from %s into %s", config.name, folder, prepared)
        builder = dataset.BUILDER(data_dir=str(prepared), file_format="array_record")
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=str(folder), compute_stats="skip")
        )
    builder = tfds.builder_from_directory(str(target))
    metadata = builder.info.metadata
    if folder is not None and folder.is_dir() and dataset.fingerprint(folder) != metadata["fingerprint"]:
        raise UserError(
            f"{folder} has changed since {prepared} was prepared from it; delete {prepared} to prepare it again"
        )
    sources = {split: builder.as_data_source(split=split) for split in ("train", "validation", "test")}
    return Data(**sources, names=metadata["splits"], fingerprint=metadata["fingerprint"])
