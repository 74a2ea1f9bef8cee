"""TFDS builder of NYU-Depth-v2 in its multi-task form, the published `NYUD_MT` folder.

    images/<frame>.jpg          uint8 RGB [H, W, 3]
    segmentation/<frame>.png    uint8 [H, W], 0 = void, 1..40 = class
    depth/<frame>.npy           float32 [H, W], metres, 0 = no measurement
    normals/<frame>.npy         float32 [H, W, 3], unit vectors (x right, y down, z forward), 0 = none
    edge/<frame>.npy            float32 [H, W] in [0, 1]
    gt_sets/{train,val[,test]}.txt   one frame name a line

Where there is no test.txt, the frames of val.txt are the ones that papers report on: they become the test split, and
about a tenth of train.txt is held out by a seed as the validation split. With `split="scenes"` whole scenes are held
out, so that no scene is in both: the frames of one video are numbered in a row, and the official split gives each
video to one list, so a run of consecutive numbers in train.txt holds whole scenes.
"""

import hashlib
import pathlib

import cv2
import numpy as np
import tensorflow_datasets as tfds

from input_pipeline import folders
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
    """NYU-Depth-v2, multi-task form. `manual_dir` is the `NYUD_MT` folder; `split`, see `folders.read_splits`."""

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
        for index, name in enumerate(names):
            yield index, read_frame(folder, name)


BUILDER = NyudMt


def frames(source, config):
    """The frames of a stored split, see `transforms.Transform`: as they are stored."""
    del config
    return source


def classes(config) -> tuple[str, ...]:
    """Names of the classes, whatever the config.

    Raises:
      UserError: config.data.classes is set.
    """
    if config.classes:
        raise UserError(f"config.data.classes={config.classes!r}: the classes of nyud_mt are given")
    return CLASSES


def read_splits(folder: pathlib.Path, split: str = "") -> dict[str, list[str]]:
    """Frame names of train, validation and test.

    Args:
      folder: an `NYUD_MT` folder, whose lists they come from.
      split: "" holds out single frames of train.txt for validation where there is no test.txt, "scenes" whole scenes;
        anything else is a JSON file of lists, see `folders.read_splits`.

    Raises:
      UserError: a missing folder or list, an empty list, a frame in two lists; as `folders.read_splits`.
    """
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist; set config.data.folder to the NYUD_MT folder")
    lists = {}
    for key in ("train", "val", "test"):
        path = folder / "gt_sets" / f"{key}.txt"
        if not path.is_file():
            if key == "test":
                continue
            raise UserError(f"{path} is missing; an NYUD_MT folder lists its frames there, one name a line")
        lists[key] = path.read_text(errors="replace").replace("\0", " ").split()
        if not lists[key]:
            raise UserError(f"{path} is empty; it must name at least one frame")
    seen = {}
    for key, names in lists.items():
        for name in names:
            if name in seen:
                raise UserError(
                    f"frame {name} stands twice, in gt_sets/{seen[name]}.txt and gt_sets/{key}.txt of {folder}; "
                    "a frame belongs to one split"
                )
            seen[name] = key
    if split not in ("", folders.SCENES):
        return folders.read_splits(split, seen)
    if "test" in lists:
        return {"train": lists["train"], "validation": lists["val"], "test": lists["test"]}
    names = lists["train"]
    if held_out(len(names)) >= len(names):
        raise UserError(f"{folder}/gt_sets/train.txt has {len(names)} frame: too few to hold a tenth out")
    validation = _held_out_scenes(names) if split == folders.SCENES else None
    if validation is None:
        random = np.random.default_rng(SPLIT_SEED)
        validation = {names[i] for i in random.choice(len(names), held_out(len(names)), replace=False)}
    return {
        "train": [name for name in names if name not in validation],
        "validation": [name for name in names if name in validation],
        "test": lists["val"],
    }


def _held_out_scenes(names) -> set[str] | None:
    """Choose runs of consecutive numbers until a tenth of the frames is reached.

    Returns None where the names are not numbers, or where one run is longer than a tenth: such names do not show the
    scenes.
    """
    if not all(name.isdecimal() for name in names):
        return None
    runs = []
    for name in sorted(names, key=int):
        if not runs or int(name) != int(runs[-1][-1]) + 1:
            runs.append([])
        runs[-1].append(name)
    if max(map(len, runs)) > held_out(len(names)):
        return None
    chosen = set()
    for index in np.random.default_rng(SPLIT_SEED).permutation(len(runs)):
        if len(chosen) >= held_out(len(names)):
            break
        chosen.update(runs[index])
    return chosen


def held_out(frames: int) -> int:
    """Number of the frames of train.txt to hold out for validation, where there is no test.txt."""
    return max(1, round(VALIDATION_FRACTION * frames))


def fingerprint(folder: pathlib.Path, split: str = "") -> str:
    """Digest of the frame lists, and of the size and the last 4 KiB of each listed file."""
    digest = hashlib.sha256()
    for kind, names in read_splits(folder, split).items():
        for name in names:
            digest.update(f"{kind} {name}\n".encode())
            for key in _FILES:
                with _existing(folder, key, name).open("rb") as file:
                    size = file.seek(0, 2)
                    file.seek(max(0, size - 4096))
                    digest.update(f"{size} ".encode() + file.read())
    return digest.hexdigest()[:16]


def read_frame(folder: pathlib.Path, name: str) -> dict:
    """Reads and checks one frame, in the form that the builder's features take.

    Raises:
      UserError: a missing or unreadable file, a label of another size than the image, a class outside 0..40.
    """
    path = _existing(folder, "image", name)
    image = folders.read_photo(path, f"take {name} out of gt_sets")
    path = _existing(folder, "segmentation", name)
    segmentation = folders.read_image(path, f"take {name} out of gt_sets", cv2.IMREAD_UNCHANGED)
    frame = {"segmentation": segmentation}
    for key in ("depth", "normals", "edge"):
        path = _existing(folder, key, name)
        try:
            frame[key] = np.load(path, mmap_mode="r", allow_pickle=False)  # its header may claim any size
        except Exception as error:  # NumPy reads the header as Python: it may be any error of that
            raise UserError(f"label {path} is not a readable .npy array ({error}); replace the file") from error
        if frame[key].dtype.kind not in "fiub":
            raise UserError(f"label {path} holds {frame[key].dtype}, no real numbers; replace the file")
    for key, label in frame.items():
        shape = (*image.shape[:2], 3) if key == "normals" else image.shape[:2]
        if label.shape != shape:
            raise UserError(
                f"label {folder / _FILES[key].format(name)} has shape {label.shape}, its image wants {shape}"
            )
    if segmentation.max() > len(CLASSES):
        raise UserError(
            f"label {folder / _FILES['segmentation'].format(name)} has class {segmentation.max()}; the classes "
            f"are 0 (void) to {len(CLASSES)}"
        )
    if not ((frame["edge"] >= 0) & (frame["edge"] <= 1)).all():
        raise UserError(f"label {folder / _FILES['edge'].format(name)} has values outside [0, 1]; replace the file")
    # What was not measured is stored as zero, whichever way the folder marks it.
    depth = np.nan_to_num(frame["depth"].astype(np.float32), nan=0, posinf=0, neginf=0)
    return {
        "name": name,
        "image": str(folder / _FILES["image"].format(name)),  # the file's own bytes are stored
        "segmentation": segmentation.astype(np.uint8)[..., None],
        "depth": np.maximum(depth, 0),
        "normals": np.nan_to_num(frame["normals"].astype(np.float32), nan=0, posinf=0, neginf=0),
        "edge": frame["edge"].astype(np.float32),
    }


def _existing(folder, key, name):
    path = folder / _FILES[key].format(name)
    if not path.is_file():
        raise UserError(f"{path} is missing although gt_sets lists frame {name}; restore it or unlist the frame")
    return path
