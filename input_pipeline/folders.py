"""Shared parts of the builders of published folders: splits from a JSON file or a seed, and checked image files."""

import contextlib
import json
import math
import pathlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeVar

import cv2
import numpy as np
import tensorflow_datasets as tfds
from PIL import ExifTags, Image

from mtl_sparse.runtime.errors import UserError

SPLITS = ("train", "validation", "test")
SCENES = "scenes"  # a value of config.data.split, see `nyud_mt`
ALL = "all"  # a value of config.data.split, see `mtan`
MAX_PIXELS = 2**26  # of an image file, 8192 x 8192: the header of a small file can claim any size

_Name = TypeVar("_Name")


class FolderBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # TFDS: untyped
    """Base class of the builders. `manual_dir` is the published folder; for `split`, see `read_splits`."""

    def __init__(self, *, split: str = "", **settings: Any) -> None:
        self._split = split
        super().__init__(**settings)

    def record(self, lists: dict[str, list[str]], fingerprint: str) -> None:
        """Store in the metadata the sample names of each split and the fingerprint of the folder."""
        self.info.metadata.update(
            splits=lists,
            given_split=bool(self._split),
            scenes=self._split == SCENES,
            all=self._split == ALL,
            fingerprint=fingerprint,
        )


class Stored:
    """A prepared split with random access to its samples. Raises UserError for a sample that cannot be read."""

    def __init__(self, source: Sequence[dict], folder: pathlib.Path) -> None:
        """Wrap `source`, which the builder opened; `folder` holds it and is named in messages."""
        self._source, self._folder = source, folder

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(index)
        with damage_as_user_error(self._folder):
            return self._source[index]


@contextlib.contextmanager
def damage_as_user_error(folder: pathlib.Path) -> Iterator[None]:
    """Convert any error that a library raises while it reads the prepared files in `folder` to a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            "DATA_PREPARED_DAMAGED",
            f"expected readable prepared data in {folder}, got {reason}; delete that folder, and set "
            "config.data.folder to prepare the data again",
        ) from error


def read_splits(path: str, known: Collection[str] | None = None) -> dict[str, list[str]]:
    """Return the sample names in a JSON file {"train": [...], "validation": [...], "test": [...]}.

    Args:
      path: the JSON file. Samples that it does not name are left out.
      known: names of all samples of the data set; None skips this check.

    Returns:
      {split: sample names}.

    Raises:
      UserError: the file is missing, is not of that form, has an empty list, or names a sample twice or one that the
        data set does not have.
    """
    try:
        lists = json.loads(pathlib.Path(path).expanduser().read_text())
    except FileNotFoundError:
        raise UserError("FILE_MISSING", f"config.data.split={path!r} does not exist") from None
    except OSError as error:
        raise UserError("FILE_DAMAGED", f"config.data.split={path!r} cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError("FILE_DAMAGED", f"config.data.split={path!r} is not a JSON file ({error})") from error
    whole = isinstance(lists, dict) and all(isinstance(lists.get(split), list) for split in SPLITS)
    if not whole or len(lists) != len(SPLITS):
        raise UserError(
            "DATA_SPLIT_INVALID",
            f"config.data.split={path!r}: expected a JSON object of three lists of sample names, {', '.join(SPLITS)}",
        )
    lists = {split: [str(name) for name in lists[split]] for split in SPLITS}
    seen = set()
    for split, names in lists.items():
        if not names:
            raise UserError("DATA_SPLIT_INVALID", f"config.data.split={path!r}: the list {split} is empty")
        for name in names:
            if name in seen:
                raise UserError("DATA_SPLIT_INVALID", f"config.data.split={path!r} names sample {name} more than once")
            if known is not None and name not in known:
                raise UserError(
                    "DATA_SPLIT_INVALID",
                    f"config.data.split={path!r}: the list {split} names sample {name}, which is not in the data set",
                )
            seen.add(name)
    return lists


def draw_splits(names: Sequence[_Name], fractions: Sequence[float], seed: int) -> list[list[_Name]]:
    """Divide names at random into parts of these fractions, rounded; the last part takes the remainder.

    Args:
      names: names to divide.
      fractions: fraction of each part.
      seed: seed of the permutation.

    Returns:
      The parts, each in the order of `names`.
    """
    order = np.random.default_rng(seed).permutation(len(names))
    ends = np.round(np.cumsum(fractions) * len(names)).astype(int)
    parts = np.split(order, ends[: len(fractions) - 1])
    return [[names[i] for i in sorted(part)] for part in parts]


def read_photo(path: pathlib.Path, way_out: str) -> np.ndarray:
    """Return the pixels of an image file whose bytes are stored, decoded as TFDS decodes them.

    Args:
      path: the image file.
      way_out: what the user can do other than replace the file, for messages.

    Returns:
      uint8 [H, W], or BGR [H, W, 3], not rotated by EXIF.

    Raises:
      UserError: as `read_image`; pixels other than 8-bit gray or RGB; an EXIF orientation.
    """
    image = read_image(path, way_out, cv2.IMREAD_UNCHANGED)
    if image.dtype != np.uint8 or (image.ndim == 3 and image.shape[-1] != 3):
        raise UserError(
            "DATA_IMAGE_FORMAT",
            f"image {path}: expected 8-bit gray or RGB pixels, got {image.dtype} {list(image.shape)}; convert it, or "
            f"{way_out}",
        )
    with Image.open(path) as header:
        turned = header.getexif().get(ExifTags.Base.Orientation, 1)
    if turned != 1:
        raise UserError(
            "DATA_IMAGE_FORMAT",
            f"image {path} has EXIF orientation {turned}, which training ignores; save the image upright",
        )
    return image


def read_array(path: pathlib.Path) -> np.ndarray:
    """Return the array of a .npy file, mapped to memory.

    Raises:
      UserError: DATA_LABEL_DAMAGED for a file that NumPy cannot read without pickle or that ends before its array does;
        DATA_LABEL_FORMAT for an array of other than real numbers.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # its header may claim any size
    except Exception as error:  # NumPy evaluates the header as Python, which may raise anything
        raise UserError(
            "DATA_LABEL_DAMAGED", f"{path} is not a readable .npy array ({error}); replace the file"
        ) from error
    if array.dtype.kind not in "fiub":
        raise UserError("DATA_LABEL_FORMAT", f"{path}: expected real numbers, got {array.dtype}; replace the file")
    return array


def size_and_end(path: pathlib.Path) -> bytes:
    """Return the size of a file and its last 4 KiB, which change with nearly any change of an array or image."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 4096))
        return f"{size} ".encode() + file.read()


def encode_png(pixels: np.ndarray) -> bytes:
    """Return a PNG file of uint8 pixels [H, W, 1] or BGR [H, W, 3].

    TFDS stores it as it is; to encode an array it needs TensorFlow.
    """
    return cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()  # 6 is TensorFlow's choice


def read_image(path: pathlib.Path, way_out: str, flags: int) -> np.ndarray:
    """Return an image file as OpenCV decodes it.

    Args:
      path: the image file.
      way_out: what the user can do other than replace the file, for messages, which end with "or <way_out>".
      flags: OpenCV's `cv2.IMREAD_*`.

    Returns:
      The pixels, [H, W] or [H, W, channels].

    Raises:
      UserError: the file cannot be read or decoded, is a truncated JPEG, or has more than `MAX_PIXELS`, which is
        checked before any pixel is decoded.
    """
    pixels: float
    try:
        with Image.open(path) as header:
            pixels = header.width * header.height
            if header.format == "JPEG" and pixels <= MAX_PIXELS:
                # OpenCV 4.10 fills the missing part of a truncated JPEG with gray. Pillow raises; decode at 1/8 size.
                header.draft("L", (1, 1))
                header.load()
    except Image.DecompressionBombError:
        pixels = math.inf
    except (OSError, ValueError, SyntaxError) as error:  # not an image that Pillow knows, or an unreadable file
        if isinstance(error, OSError) and error.errno:
            raise UserError(
                "DATA_IMAGE_DAMAGED", f"image {path} cannot be read ({error.strerror}); make it readable, or {way_out}"
            ) from error
        pixels = 0
    if pixels > MAX_PIXELS:
        raise UserError(
            "DATA_IMAGE_TOO_LARGE",
            f"image {path} has more than {MAX_PIXELS:,} pixels; replace the file, or {way_out}",
        )
    data = path.read_bytes() if pixels else b""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error:
        image = None
    if image is None:
        raise UserError("DATA_IMAGE_DAMAGED", f"image {path} cannot be decoded; replace the file, or {way_out}")
    return image
