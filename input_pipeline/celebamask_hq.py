"""TFDS builder of CelebAMask-HQ from its official folder.

    CelebA-HQ-img/<id>.jpg              RGB, 1024x1024
    CelebAMask-HQ-mask-anno/<id // 2000>/<id, 5 digits>_<part>.png    512x512, 255 where the part is
    CelebAMask-HQ-attribute-anno.txt    number of faces; attribute names; a line per face: <id>.jpg, then -1 or 1

A face that lacks a part has no file for it. The parts are stored as one map, painted over one another in the official
order; config.data.classes maps them to classes when a sample is read. A fixed seed divides the faces into 60% train,
20% validation and 20% test; config.data.split replaces this by lists in a file.
"""

import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

from input_pipeline import folders
from mtl_sparse.runtime import progress
from mtl_sparse.runtime.errors import UserError

# In the order of painting: hair covers skin, and a hat covers hair. A pixel of part i is 1 + i, of no part 0.
PARTS = (
    "skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r neck_l neck cloth"
).split()
ATTRIBUTES = (
    "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair "
    "Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male "
    "Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks "
    "Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace "
    "Wearing_Necktie Young"
).split()
LABELS = ("segmentation", *(f"attribute:{name}" for name in ATTRIBUTES))
FRACTIONS = (0.6, 0.2, 0.2)
SPLIT_SEED = 0
ATTRIBUTE_FILE = "CelebAMask-HQ-attribute-anno.txt"


class CelebamaskHq(folders.FolderBuilder):
    """Builder of CelebAMask-HQ. `manual_dir` is the official folder; for `split`, see `read_splits`."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir is the official CelebAMask-HQ folder (CelebA-HQ-img, ...)."

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "name": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "parts": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                    "attributes": tfds.features.Tensor(shape=(len(ATTRIBUTES),), dtype=np.uint8),
                }
            ),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        folder = pathlib.Path(dl_manager.manual_dir)
        lists = read_splits(folder, self._split)
        self.record(lists, fingerprint(folder, self._split))
        attributes = read_attributes(folder)
        return {split: self._generate_examples(folder, names, attributes) for split, names in lists.items()}

    def _generate_examples(self, folder, names, attributes):
        for index, name in enumerate(progress.track(names, "preparing samples")):
            face = read_face(folder, name)
            yield index, {**face, "parts": folders.encode_png(face["parts"]), "attributes": attributes[name]}


BUILDER = CelebamaskHq


class Faces:
    """Stored faces as `transforms.Transform` takes them: "image", "segmentation" and "attribute:<name>"."""

    def __init__(self, source: folders.Stored, classes: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Wrap `source`, which the builder opened; for `classes`, see config.data.classes."""
        self._source = source
        self._lookup = np.ones(1 + len(PARTS), np.uint8)  # part -> class + 1
        for index, (_, parts) in enumerate(classes):
            self._lookup[[1 + PARTS.index(part) for part in parts]] = 1 + index

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        if index >= len(self):
            raise IndexError(index)  # ends an iteration, which array_record's error does not
        stored = self._source[index]
        attributes = {f"attribute:{name}": value for name, value in zip(ATTRIBUTES, stored["attributes"], strict=True)}
        return {"image": stored["image"], "segmentation": self._lookup[stored["parts"]], **attributes}


def frames(source: folders.Stored, config: Any) -> Faces:
    """Return the samples of a stored split with the classes of config.data."""
    return Faces(source, config.classes)


def classes(config: Any) -> tuple[str, ...]:
    """Return the names of the classes of config.data.classes, pairs (class, its parts).

    A part of no class belongs to the first class.

    Raises:
      UserError: no classes, an unknown part, a part in two classes, or mirroring with different classes for left and
        right.
    """
    if not config.classes:
        raise UserError("OPTION_MISSING", "config.data.classes is empty; use those of configs/celebamask_hq.py")
    place: dict[str, str] = {}
    for pair in config.classes:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], tuple | list)):
            raise UserError(
                "OPTION_TYPE", f"config.data.classes: expected pairs (class, (part, part, ...)), got {pair!r}"
            )
    for name, parts in config.classes:
        for part in parts:
            if part not in PARTS:
                raise UserError(
                    "OPTION_UNKNOWN_VALUE",
                    f"config.data.classes: unknown part {part!r} of class {name}; the parts are {' '.join(PARTS)}",
                )
            if part in place:
                raise UserError(
                    "OPTION_CONFLICT",
                    f"config.data.classes: part {part!r} is in both {place[part]} and {name}; use each part once",
                )
            place[part] = name
    first = config.classes[0][0]
    for side in ("eye", "brow", "ear"):
        if config.flip and place.get(f"l_{side}", first) != place.get(f"r_{side}", first):
            raise UserError(
                "OPTION_CONFLICT",
                f"config.data.flip mirrors faces, but config.data.classes has l_{side} and r_{side} in different "
                "classes; put both into one class, or set config.data.flip=False",
            )
    return tuple(name for name, _ in config.classes)


def read_attributes(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the attributes of each face in the attribute file.

    Args:
      folder: the official folder.

    Returns:
      {id: uint8 [40], 1 if the face has the attribute}, in the order of ATTRIBUTES.

    Raises:
      UserError: a missing folder or file, another header, a truncated file, a value other than -1 and 1.
    """
    if not folder.is_dir():
        raise UserError(
            "DATA_FOLDER_MISSING",
            f"data folder {folder} does not exist; set config.data.folder to the CelebAMask-HQ folder",
        )
    path = folder / ATTRIBUTE_FILE
    if not path.is_file():
        raise UserError("FILE_MISSING", f"{path} is missing; restore it from the official CelebAMask-HQ folder")
    lines = [line.split() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    if len(lines) < 2 or len(lines[0]) != 1 or not lines[0][0].isdecimal() or set(lines[1]) != set(ATTRIBUTES):
        raise UserError(
            "FILE_DAMAGED",
            f"{path}: expected a line with the number of faces, then one of the 40 attribute names; restore the file",
        )
    count, header, rows = int(lines[0][0]), lines[1], lines[2:]
    order = [header.index(name) for name in ATTRIBUTES]
    found = {}
    for image, *values in rows:
        name = image.removesuffix(".jpg")
        if len(values) != len(header):
            raise UserError(
                "FILE_DAMAGED",
                f"{path}, line of {image}: expected {len(header)} values, got {len(values)}; restore the file",
            )
        if not set(values) <= {"-1", "1"}:
            raise UserError("FILE_DAMAGED", f"{path}, line of {image}: expected only values -1 and 1; restore the file")
        if not name.isdecimal() or name in found:
            raise UserError(
                "FILE_DAMAGED", f"{path}: expected a new <id>.jpg in each line, got {image!r}; restore the file"
            )
        found[name] = np.array([values[i] == "1" for i in order], np.uint8)
    if len(found) != count:
        raise UserError(
            "FILE_DAMAGED", f"{path}: expected {count} faces, as in its first line, got {len(found)}; restore the file"
        )
    return found


def read_splits(folder: pathlib.Path, split: str = "") -> dict[str, list[str]]:
    """Return the ids of the faces of train, validation and test.

    Args:
      folder: the official folder.
      split: "" divides the faces by the fixed seed; any other value is a JSON file, see `folders.read_splits`.

    Returns:
      {split: ids}.

    Raises:
      UserError: as `read_attributes` and `folders.read_splits`; an image without attributes; fewer than five faces.
    """
    names = sorted(read_attributes(folder), key=int)
    known = set(names)
    images = folder / "CelebA-HQ-img"
    present = {entry.name.removesuffix(".jpg") for entry in os.scandir(images)} if images.is_dir() else set()
    for without in sorted(name for name in present - known if name.isdecimal()):
        raise UserError(
            "DATA_LABEL_MISSING",
            f"{images}/{without}.jpg has no line in {ATTRIBUTE_FILE}; restore the file, or remove the image",
        )
    if split:
        return folders.read_splits(split, known)
    if len(names) < 5:
        raise UserError(
            "DATA_TOO_FEW_IMAGES",
            f"{folder}: expected at least 5 faces to divide into train, validation and test, got {len(names)}",
        )
    return dict(zip(folders.SPLITS, folders.draw_splits(names, FRACTIONS, SPLIT_SEED), strict=True))


def train_count(faces: int) -> int:
    """Return the number of training images among this number of faces, as `read_splits` divides them."""
    return len(folders.draw_splits(range(faces), FRACTIONS, SPLIT_SEED)[0])


def fingerprint(folder: pathlib.Path, split: str = "") -> str:
    """Return a digest of the lists, the attribute file, and the names and sizes of the files of each listed face.

    Raises:
      UserError: as `read_splits`; a listed face without an image or without any part.
    """
    lists = read_splits(folder, split)
    digest = hashlib.sha256((folder / ATTRIBUTE_FILE).read_bytes())
    sizes = _sizes(folder / "CelebA-HQ-img")
    masks: dict[str, list[tuple[str, int]]] = {}
    for part_folder in sorted({_mask_folder(folder, name) for names in lists.values() for name in names}):
        for file, mask_size in _sizes(part_folder).items():
            masks.setdefault(file.partition("_")[0], []).append((file, mask_size))
    for name_split, names in lists.items():
        for name in names:
            size = sizes.get(f"{name}.jpg")
            if size is None:
                raise UserError(
                    "FILE_MISSING",
                    f"{folder}/CelebA-HQ-img/{name}.jpg is missing, but {ATTRIBUTE_FILE} lists it; restore it, or "
                    "leave it out of the lists of a config.data.split",
                )
            files = sorted(masks.get(f"{int(name):05d}", []))
            if not files:
                raise UserError(
                    "DATA_LABEL_MISSING", f"{_mask_folder(folder, name)} has no part of face {name}; restore its masks"
                )
            digest.update(f"{name_split} {name} {size} {files}\n".encode())
    return digest.hexdigest()[:16]


def _sizes(folder: pathlib.Path) -> dict[str, int]:
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder)} if folder.is_dir() else {}


def _mask_folder(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / "CelebAMask-HQ-mask-anno" / str(int(name) // 2000)


def read_face(folder: pathlib.Path, name: str) -> dict:
    """Read and check one face.

    Args:
      folder: the official folder.
      name: the face's id.

    Returns:
      "name"; "image", the path of a file whose bytes are stored unchanged; "parts" uint8 [H, W, 1].

    Raises:
      UserError: an image or mask that cannot be decoded, a mask of another size or with other values.
    """
    path = folder / "CelebA-HQ-img" / f"{name}.jpg"
    image = folders.read_photo(path, f"leave {name} out of the lists of a config.data.split")
    parts: np.ndarray | None = None
    for index, part in enumerate(PARTS, 1):
        mask_path = _mask_folder(folder, name) / f"{int(name):05d}_{part}.png"
        if not mask_path.exists():
            continue
        mask = folders.read_image(mask_path, f"remove the {part} of that face", cv2.IMREAD_GRAYSCALE)
        if parts is None:
            parts = np.zeros(mask.shape, np.uint8)
        finer = image.shape[0] // mask.shape[0]
        if mask.shape != parts.shape or image.shape[:2] != tuple(finer * side for side in mask.shape):
            raise UserError(
                "DATA_LABEL_FORMAT",
                f"mask {mask_path}: expected the size of the face's other masks, of which the image's size "
                f"({image.shape[0]}x{image.shape[1]}) is a whole multiple, got {mask.shape[0]}x{mask.shape[1]}",
            )
        if 0 < mask.max() <= 127:
            raise UserError(
                "DATA_LABEL_OUT_OF_RANGE",
                f"mask {mask_path}: expected 255 where the part is and 0 elsewhere, got values up to {mask.max()}",
            )
        parts[mask > 127] = index
    if parts is None:
        raise UserError(
            "DATA_LABEL_MISSING", f"{_mask_folder(folder, name)} has no part of face {name}; restore its masks"
        )
    return {"name": name, "image": str(path), "parts": parts[..., None]}
