"""TFDS builder of multi-task NYU-Depth-v2 from the published `NYUD_MT` folder.

    images/<name>.jpg          uint8 RGB [H, W, 3]
    segmentation/<name>.png    uint8 [H, W], 0 = void, 1..40 = class
    depth/<name>.npy           float32 [H, W], meters, 0 = no measurement
    normals/<name>.npy         float32 [H, W, 3], unit vectors (x right, y down, z forward), 0 = none
    edge/<name>.npy            float32 [H, W] in [0, 1]
    gt_sets/{train,val[,test]}.txt   one sample name per line

Without a test.txt, val.txt, on which papers report, becomes the test split, and a seed chooses about a tenth of
train.txt as the validation split. `split="scenes"` holds out whole scenes, so that no scene is in both train and
validation: the samples of one video have consecutive numbers, and the official split puts each video into one list, so
a run of consecutive numbers in train.txt contains whole scenes.
"""

import hashlib
import pathlib
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

from input_pipeline import folders
from mtl_sparse.runtime import progress
from mtl_sparse.runtime.errors import UserError

CLASSES = (
    "wall floor cabinet bed chair sofa table door window bookshelf picture counter blinds desk shelves curtain "
    "dresser pillow mirror floor_mat clothes ceiling books refrigerator television paper towel shower_curtain "
    "box whiteboard person night_stand toilet sink lamp bathtub bag otherstructure otherfurniture otherprop"
).split()
LABELS = ("segmentation", "depth", "normals", "edge")
VALIDATION_FRACTION = 0.1
SPLIT_SEED = 0

_FILES = {
    "image": "images/{}.jpg",
    "segmentation": "segmentation/{}.png",
    "depth": "depth/{}.npy",
    "normals": "normals/{}.npy",
    "edge": "edge/{}.npy",
}


class NyudMt(folders.FolderBuilder):
    """Builder of multi-task NYU-Depth-v2. `manual_dir` is the `NYUD_MT` folder; for `split`, see `read_splits`."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir is the published NYUD_MT folder (images, ..., gt_sets)."

    def _info(self):
        def array(*shape):
            return tfds.features.Tensor(shape=shape, dtype=np.float32, encoding="zlib")

        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "name": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "segmentation": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                    "depth": array(None, None),
                    "normals": array(None, None, 3),
                    "edge": array(None, None),
                }
            ),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        folder = pathlib.Path(dl_manager.manual_dir)
        lists = read_splits(folder, self._split)
        self.record(lists, fingerprint(folder, self._split))
        return {split: self._generate_examples(folder, names) for split, names in lists.items()}

    def _generate_examples(self, folder, names):
        for index, name in enumerate(progress.track(names, "preparing samples")):
            frame = read_frame(folder, name)
            yield index, {**frame, "segmentation": folders.encode_png(frame["segmentation"])}


BUILDER = NyudMt


def frames(source: folders.Stored, config: Any) -> folders.Stored:
    """Return the samples of a stored split as `transforms.Transform` takes them: unchanged."""
    del config
    return source


def classes(config: Any) -> tuple[str, ...]:
    """Return the names of the 40 classes, which no option changes.

    Raises:
      UserError: config.data.classes is set.
    """
    if config.classes:
        raise UserError("OPTION_CONFLICT", f"config.data.classes={config.classes!r}: leave it empty for nyud_mt")
    return tuple(CLASSES)


def read_splits(folder: pathlib.Path, split: str = "") -> dict[str, list[str]]:
    """Return the sample names of train, validation and test.

    Args:
      folder: an `NYUD_MT` folder.
      split: without a test.txt, "" holds out single samples of train.txt for validation, and "scenes" whole scenes. Any
        other value is a JSON file of lists, see `folders.read_splits`.

    Returns:
      {split: sample names}.

    Raises:
      UserError: a missing folder or list, an empty list, a sample in two lists; as `folders.read_splits`.
    """
    lists = _read_lists(folder)
    if split not in ("", folders.SCENES):
        return folders.read_splits(split, {name for names in lists.values() for name in names})
    if "test" in lists:
        return {"train": lists["train"], "validation": lists["val"], "test": lists["test"]}
    names = lists["train"]
    if held_out(len(names)) >= len(names):
        raise UserError(
            "DATA_TOO_FEW_IMAGES",
            f"{folder}/gt_sets/train.txt: expected at least 2 samples, of which a tenth is held out, got {len(names)}",
        )
    validation = _held_out_scenes(names) if split == folders.SCENES else None
    if validation is None:
        random = np.random.default_rng(SPLIT_SEED)
        validation = {names[i] for i in random.choice(len(names), held_out(len(names)), replace=False)}
    return {
        "train": [name for name in names if name not in validation],
        "validation": [name for name in names if name in validation],
        "test": lists["val"],
    }


def _read_lists(folder: pathlib.Path) -> dict[str, list[str]]:
    """Return the sample names in gt_sets: {"train": [...], "val": [...]}, and "test" if there is a test.txt."""
    if not folder.is_dir():
        raise UserError(
            "DATA_FOLDER_MISSING", f"data folder {folder} does not exist; set config.data.folder to the NYUD_MT folder"
        )
    lists = {}
    for key in ("train", "val", "test"):
        path = folder / "gt_sets" / f"{key}.txt"
        if not path.is_file():
            if key == "test":
                continue
            raise UserError(
                "FILE_MISSING", f"{path} is missing; an NYUD_MT folder lists its samples there, one name per line"
            )
        lists[key] = path.read_text(errors="replace").replace("\0", " ").split()
        if not lists[key]:
            raise UserError("DATA_SPLIT_INVALID", f"{path} is empty; it must name at least one sample")
    seen: dict[str, str] = {}
    for key, names in lists.items():
        for name in names:
            if name in seen:
                raise UserError(
                    "DATA_SPLIT_INVALID",
                    f"sample {name} is listed in both gt_sets/{seen[name]}.txt and gt_sets/{key}.txt of {folder}; "
                    "list each sample once",
                )
            seen[name] = key
    return lists


def _held_out_scenes(names: list[str]) -> set[str] | None:
    """Choose runs of consecutive numbers until a tenth of the samples is reached.

    Returns None if the names are not numbers, or if one run is longer than a tenth: such names do not show the scenes.
    """
    if not all(name.isdecimal() for name in names):
        return None
    runs: list[list[str]] = []
    for name in sorted(names, key=int):
        if not runs or int(name) != int(runs[-1][-1]) + 1:
            runs.append([])
        runs[-1].append(name)
    if max(map(len, runs)) > held_out(len(names)):
        return None
    chosen: set[str] = set()
    for index in np.random.default_rng(SPLIT_SEED).permutation(len(runs)):
        if len(chosen) >= held_out(len(names)):
            break
        chosen.update(runs[index])
    return chosen


def held_out(frames: int) -> int:
    """Return how many of the `frames` samples in train.txt to hold out for validation, if there is no test.txt."""
    return max(1, round(VALIDATION_FRACTION * frames))


def fingerprint(folder: pathlib.Path, split: str = "") -> str:
    """Return a digest of the sample lists, and of the size and the last 4 KiB of each listed file."""
    digest = hashlib.sha256()
    for kind, names in read_splits(folder, split).items():
        for name in names:
            digest.update(f"{kind} {name}\n".encode())
            for key in _FILES:
                digest.update(folders.size_and_end(_existing(folder, key, name)))
    return digest.hexdigest()[:16]


def read_frame(folder: pathlib.Path, name: str) -> dict:
    """Read and check one sample, in the form that the builder's features take.

    Args:
      folder: an `NYUD_MT` folder.
      name: the sample's name.

    Returns:
      "name"; "image", the path of a file whose bytes are stored unchanged; the labels "segmentation" [H, W, 1],
      "depth" and "edge" [H, W], "normals" [H, W, 3].

    Raises:
      UserError: a missing or damaged file, a label of another size than the image, a class outside 0..40, an edge
        outside [0, 1].
    """
    path = _existing(folder, "image", name)
    image = folders.read_photo(path, f"remove {name} from gt_sets")
    path = _existing(folder, "segmentation", name)
    segmentation = folders.read_image(path, f"remove {name} from gt_sets", cv2.IMREAD_UNCHANGED)
    frame = {"segmentation": segmentation}
    for key in ("depth", "normals", "edge"):
        frame[key] = folders.read_array(_existing(folder, key, name))
    for key, label in frame.items():
        shape = (*image.shape[:2], 3) if key == "normals" else image.shape[:2]
        if label.shape != shape:
            raise UserError(
                "DATA_LABEL_FORMAT",
                f"label {folder / _FILES[key].format(name)}: expected shape {shape}, as its image, got {label.shape}",
            )
    if segmentation.max() > len(CLASSES):
        raise UserError(
            "DATA_LABEL_OUT_OF_RANGE",
            f"label {folder / _FILES['segmentation'].format(name)}: expected classes 0 (void) to {len(CLASSES)}, got "
            f"{segmentation.max()}",
        )
    if not ((frame["edge"] >= 0) & (frame["edge"] <= 1)).all():
        raise UserError(
            "DATA_LABEL_OUT_OF_RANGE",
            f"label {folder / _FILES['edge'].format(name)}: expected values in [0, 1]; replace the file",
        )
    # Missing measurements are stored as zero, however the folder marks them.
    depth = np.nan_to_num(frame["depth"].astype(np.float32), nan=0, posinf=0, neginf=0)
    return {
        "name": name,
        "image": str(folder / _FILES["image"].format(name)),  # the file's own bytes are stored
        "segmentation": segmentation.astype(np.uint8)[..., None],
        "depth": np.maximum(depth, 0),
        "normals": np.nan_to_num(frame["normals"].astype(np.float32), nan=0, posinf=0, neginf=0),
        "edge": frame["edge"].astype(np.float32),
    }


def _existing(folder: pathlib.Path, key: str, name: str) -> pathlib.Path:
    path = folder / _FILES[key].format(name)
    if not path.is_file():
        raise UserError(
            "FILE_MISSING",
            f"{path} is missing, but gt_sets lists sample {name}; restore the file, or remove the sample from gt_sets",
        )
    return path
