"""TFDS builder of CelebAMask-HQ, from its official folder.

    CelebA-HQ-img/<id>.jpg              RGB, 1024x1024
    CelebAMask-HQ-mask-anno/<id // 2000>/<id, 5 digits>_<part>.png    512x512, 255 where the part is
    CelebAMask-HQ-attribute-anno.txt    number of faces; names of the attributes; a line a face: <id>.jpg, then -1 or 1

A face without some part has no file for it. The parts are stored as one map, painted over one another in the official
order, and become classes only when they are read (config.data.classes). The faces are divided at random, 60 % train,
20 % validation, 20 % test, by a fixed seed, or as config.data.split says.
"""

import hashlib
import os
import pathlib

import cv2
import numpy as np
import tensorflow_datasets as tfds

from input_pipeline import folders
from mtl_sparse.runtime.errors import UserError

# In the order in which they are painted: hair lies over skin, a hat over hair. 0 is none of them.
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
    """CelebAMask-HQ. `manual_dir` is the official folder; `split`, see `folders.read_splits`."""

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
        for index, name in enumerate(names):
            yield index, {**read_face(folder, name), "attributes": attributes[name]}


BUILDER = CelebamaskHq


class Faces:
    """Stored faces as the frames of `transforms.Transform`: "image", "segmentation" and "attribute:<name>"."""

    def __init__(self, source, classes):
        """Args: source, of the builder; classes, as in config.data.classes."""
        self._source = source
        self._lookup = np.ones(1 + len(PARTS), np.uint8)  # part -> class + 1
        for index, (_, parts) in enumerate(classes):
            self._lookup[[1 + PARTS.index(part) for part in parts]] = 1 + index

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)  # array_record's own error would not end an iteration
        stored = self._source[index]
        attributes = {f"attribute:{name}": value for name, value in zip(ATTRIBUTES, stored["attributes"], strict=True)}
        return {"image": stored["image"], "segmentation": self._lookup[stored["parts"]], **attributes}


def frames(source, config) -> Faces:
    """The frames of a stored split, by config.data."""
    return Faces(source, config.classes)


def classes(config) -> tuple[str, ...]:
    """Names of the classes of config.data.classes: pairs (class, its parts); a part of no class is of the first.

    Raises:
      UserError: no classes, an unknown part or one in two classes, mirroring where left and right are told apart.
    """
    if not config.classes:
        raise UserError("config.data.classes is empty; configs/celebamask_hq.py has the paper's three")
    place = {}
    for pair in config.classes:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], tuple | list)):
            raise UserError(f"config.data.classes holds {pair!r}; it takes pairs (class, (part, part, ...))")
    for name, parts in config.classes:
        for part in parts:
            if part not in PARTS:
                raise UserError(
                    f"config.data.classes: unknown part {part!r} of {name}; the parts are {' '.join(PARTS)}"
                )
            if part in place:
                raise UserError(f"config.data.classes: part {part!r} stands in {place[part]} and in {name}")
            place[part] = name
    first = config.classes[0][0]
    for side in ("eye", "brow", "ear"):
        if config.flip and place.get(f"l_{side}", first) != place.get(f"r_{side}", first):
            raise UserError(f"config.data.flip mirrors faces, but config.data.classes tells l_{side} from r_{side}")
    return tuple(name for name, _ in config.classes)


def read_attributes(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """{id: uint8 [40], 1 where the face has the attribute} in the order of ATTRIBUTES, from the attribute file.

    Raises:
      UserError: a missing folder or file, another header, a file cut short, a value other than -1 and 1.
    """
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist; set config.data.folder to the CelebAMask-HQ folder")
    path = folder / ATTRIBUTE_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing; an official CelebAMask-HQ folder has it")
    lines = [line.split() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    if len(lines) < 2 or len(lines[0]) != 1 or not lines[0][0].isdecimal() or set(lines[1]) != set(ATTRIBUTES):
        raise UserError(f"{path} must begin with the number of faces and a line of the 40 attributes' names")
    count, header, rows = int(lines[0][0]), lines[1], lines[2:]
    order = [header.index(name) for name in ATTRIBUTES]
    found = {}
    for image, *values in rows:
        name = image.removesuffix(".jpg")
        if len(values) != len(header):
            raise UserError(f"{path}: the row of {image} has {len(values)} of {len(header)} values; restore the file")
        if not set(values) <= {"-1", "1"}:
            raise UserError(f"{path}: the row of {image} has values other than -1 and 1; restore the file")
        if not name.isdecimal() or name in found:
            raise UserError(f"{path}: {image!r} is no face's number, or stands in it twice")
        found[name] = np.array([values[i] == "1" for i in order], np.uint8)
    if len(found) != count:
        raise UserError(f"{path} has the rows of {len(found)} faces, its first line says {count}; restore the file")
    return found


def read_splits(folder: pathlib.Path, split: str = "") -> dict[str, list[str]]:
    """Ids of the faces of train, validation and test: drawn by the seed, or from the JSON file `split`.

    Raises:
      UserError: as `read_attributes` and `folders.read_splits`; an image without a row, fewer than five faces.
    """
    names = sorted(read_attributes(folder), key=int)
    known = set(names)
    images = folder / "CelebA-HQ-img"
    present = {entry.name.removesuffix(".jpg") for entry in os.scandir(images)} if images.is_dir() else set()
    for without in sorted(name for name in present - known if name.isdecimal()):
        raise UserError(f"{images}/{without}.jpg has no row in {ATTRIBUTE_FILE}; restore the file, or remove the image")
    if split:
        return folders.read_splits(split, known)
    if len(names) < 5:
        raise UserError(f"{folder} has {len(names)} faces: too few to divide into train, validation and test")
    return dict(zip(folders.SPLITS, folders.draw_splits(names, FRACTIONS, SPLIT_SEED), strict=True))


def train_count(faces: int) -> int:
    """Number of training images among so many faces, as `read_splits` divides them."""
    return len(folders.draw_splits(range(faces), FRACTIONS, SPLIT_SEED)[0])


def fingerprint(folder: pathlib.Path, split: str = "") -> str:
    """Digest of the lists, the attribute file, and the name and size of each listed face's files.

    Raises:
      UserError: as `read_splits`, or a listed face without an image or without any part.
    """
    lists = read_splits(folder, split)
    digest = hashlib.sha256((folder / ATTRIBUTE_FILE).read_bytes())
    sizes = _sizes(folder / "CelebA-HQ-img")
    masks = {}
    for part_folder in sorted({_mask_folder(folder, name) for names in lists.values() for name in names}):
        for file, size in _sizes(part_folder).items():
            masks.setdefault(file.partition("_")[0], []).append((file, size))
    for name_split, names in lists.items():
        for name in names:
            size = sizes.get(f"{name}.jpg")
            if size is None:
                raise UserError(
                    f"{folder}/CelebA-HQ-img/{name}.jpg is missing although {ATTRIBUTE_FILE} lists it; restore it, or "
                    "leave it out by a config.data.split of your own"
                )
            files = sorted(masks.get(f"{int(name):05d}", []))
            if not files:
                raise UserError(f"{_mask_folder(folder, name)} has no part of face {name}; restore its masks")
            digest.update(f"{name_split} {name} {size} {files}\n".encode())
    return digest.hexdigest()[:16]


def _sizes(folder) -> dict[str, int]:
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder)} if folder.is_dir() else {}


def _mask_folder(folder, name):
    return folder / "CelebAMask-HQ-mask-anno" / str(int(name) // 2000)


def read_face(folder: pathlib.Path, name: str) -> dict:
    """Reads and checks one face: "name", "image" (its path: the file's own bytes are stored), "parts" [H, W, 1].

    Raises:
      UserError: an image or mask that does not decode, a mask of another size or with other values.
    """
    path = folder / "CelebA-HQ-img" / f"{name}.jpg"
    image = folders.read_photo(path, f"leave {name} out by a config.data.split of your own")
    parts = None
    for index, part in enumerate(PARTS, 1):
        mask_path = _mask_folder(folder, name) / f"{int(name):05d}_{part}.png"
        if not mask_path.exists():
            continue
        mask = folders.read_image(mask_path, f"take {part} of that face away", cv2.IMREAD_GRAYSCALE)
        if parts is None:
            parts = np.zeros(mask.shape, np.uint8)
        finer = image.shape[0] // mask.shape[0]
        if mask.shape != parts.shape or image.shape[:2] != tuple(finer * side for side in mask.shape):
            raise UserError(
                f"mask {mask_path} has size {mask.shape[0]}x{mask.shape[1]}: it must be as large as the face's other "
                f"masks, and its image ({image.shape[0]}x{image.shape[1]}) a whole number of times as large"
            )
        if 0 < mask.max() <= 127:
            raise UserError(f"mask {mask_path} has no value above {mask.max()}; a part's pixels are 255, others 0")
        parts[mask > 127] = index
    if parts is None:
        raise UserError(f"{_mask_folder(folder, name)} has no part of face {name}; restore its masks")
    return {"name": name, "image": str(path), "parts": parts[..., None]}
