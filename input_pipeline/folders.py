"""What the builders of published folders share: lists of frames by JSON file or by seed, and checked images."""

import contextlib
import json
import math
import pathlib
from collections.abc import Collection, Sequence

import cv2
import numpy as np
import tensorflow_datasets as tfds
from PIL import ExifTags, Image

from mtl_sparse.runtime.errors import UserError

SPLITS = ("train", "validation", "test")
SCENES = "scenes"  # a value of config.data.split, see `nyud_mt`
MAX_PIXELS = 2**26  # of an image file, 8192 x 8192: a small file can claim any number


class FolderBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of the builders: `manual_dir` is the published folder itself; `split`, see `read_splits`."""

    def __init__(self, *, split: str = "", **settings):
        self._split = split
        super().__init__(**settings)

    def record(self, lists: dict[str, list[str]], fingerprint: str) -> None:
        """Keeps in the metadata which frames are in which split, and of which state of the folder."""
        self.info.metadata.update(
            splits=lists, given_split=bool(self._split), scenes=self._split == SCENES, fingerprint=fingerprint
        )


class Stored:
    """A split as it was prepared: random access to frames, that tells of one which cannot be read."""

    def __init__(self, source: Sequence[dict], folder: pathlib.Path):
        """Args: source, of the builder; folder, that holds it, for messages."""
        self._source, self._folder = source, folder

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        with told_as_damaged(self._folder):
            return self._source[index]


@contextlib.contextmanager
def told_as_damaged(folder: pathlib.Path):
    """Raises what libraries say of files that TFDS has written, and that are no longer what they were, as UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"the prepared data in {folder} cannot be read ({reason}); delete that folder, and with config.data.folder "
            "set they are prepared again"
        ) from error


def read_splits(path: str, known: Collection[str] | None = None) -> dict[str, list[str]]:
    """The frame names of a JSON file {"train": [...], "validation": [...], "test": [...]}.

    Args:
      path: of the file; frames that it does not name are left out.
      known: the data set's frames; None checks nothing against them.

    Raises:
      UserError: no such file, another form, an empty list, a frame twice, a frame that the data set does not have.
    """
    try:
        lists = json.loads(pathlib.Path(path).expanduser().read_text())
    except FileNotFoundError:
        raise UserError(f"config.data.split={path!r} does not exist") from None
    except OSError as error:
        raise UserError(f"config.data.split={path!r} cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config.data.split={path!r} is not JSON ({error})") from error
    whole = isinstance(lists, dict) and all(isinstance(lists.get(split), list) for split in SPLITS)
    if not whole or len(lists) != len(SPLITS):
        raise UserError(f"config.data.split={path!r} must hold the three lists {', '.join(SPLITS)} of frame names")
    lists = {split: [str(name) for name in lists[split]] for split in SPLITS}
    seen = set()
    for split, names in lists.items():
        if not names:
            raise UserError(f"config.data.split={path!r}: its list {split} is empty")
        for name in names:
            if name in seen:
                raise UserError(f"config.data.split={path!r}: frame {name} stands in it twice")
            if known is not None and name not in known:
                raise UserError(f"config.data.split={path!r}: {split} names frame {name}, which the data set lacks")
            seen.add(name)
    return lists


def draw_splits(names: Sequence[str], fractions: Sequence[float], seed: int) -> list[list[str]]:
    """Divides names at random into parts of these fractions of them, rounded; the last part is what is left."""
    order = np.random.default_rng(seed).permutation(len(names))
    ends = np.round(np.cumsum(fractions) * len(names)).astype(int)
    parts = np.split(order, ends[: len(fractions) - 1])
    return [[names[i] for i in sorted(part)] for part in parts]


def read_photo(path: pathlib.Path, way_out: str) -> np.ndarray:
    """An image file whose bytes are stored, as TFDS decodes them: uint8 [H, W] or BGR [H, W, 3], not turned by EXIF.

    Raises:
      UserError: as `read_image`; other pixels than 8 bits of grey or RGB; an EXIF orientation.
    """
    image = read_image(path, way_out, cv2.IMREAD_UNCHANGED)
    if image.dtype != np.uint8 or image.ndim == 3 and image.shape[-1] != 3:
        raise UserError(f"image {path} has no 8-bit grey or RGB pixels; save it as such, or {way_out}")
    with Image.open(path) as header:
        turned = header.getexif().get(ExifTags.Base.Orientation, 1)
    if turned != 1:
        raise UserError(f"image {path} has EXIF orientation {turned}, which training would not see; save it upright")
    return image


def read_image(path: pathlib.Path, way_out: str, flags: int) -> np.ndarray:
    """An image file as OpenCV decodes it with these flags.

    Raises:
      UserError: it does not decode, is a JPEG that was cut short, or has more than `MAX_PIXELS`, which is found before
        any of them is decoded; the message ends with "or <way_out>".
    """
    try:
        with Image.open(path) as header:
            pixels = header.width * header.height
            if header.format == "JPEG" and pixels <= MAX_PIXELS:
                # OpenCV 4.10 fills what a cut JPEG lacks with gray; Pillow raises, here at an eighth of the size.
                header.draft("L", (1, 1))
                header.load()
    except Image.DecompressionBombError:
        pixels = math.inf
    except (OSError, ValueError, SyntaxError) as error:  # not an image that Pillow knows, or no file that can be read
        if getattr(error, "errno", None):
            raise UserError(f"image {path} cannot be read ({error.strerror}); {way_out}, or put it right") from error
        pixels = 0
    if pixels > MAX_PIXELS:
        raise UserError(f"image {path} has more than {MAX_PIXELS:,} pixels; replace the file, or {way_out}")
    data = path.read_bytes() if pixels else b""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error:
        image = None
    if image is None:
        raise UserError(f"image {path} cannot be decoded; replace the file, or {way_out}")
    return image
