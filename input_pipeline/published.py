"""What the builders of published folders share: lists of frames by JSON file or by seed, and checked images."""

import json
import pathlib
from collections.abc import Collection, Sequence

import cv2
import numpy as np
import tensorflow_datasets as tfds

from mtl_sparse.errors import UserError

SPLITS = ("train", "validation", "test")


class FolderBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of the builders: `manual_dir` is the published folder itself; `split`, see `read_splits`."""

    def __init__(self, *, split: str = "", **settings):
        self._split = split
        super().__init__(**settings)

    def record(self, lists: dict[str, list[str]], fingerprint: str) -> None:
        """Keeps in the metadata which frames are in which split, and of which state of the folder."""
        self.info.metadata.update(splits=lists, given_split=bool(self._split), fingerprint=fingerprint)


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


def read_image(path: pathlib.Path, way_out: str) -> np.ndarray:
    """An image file as uint8 BGR [H, W, 3].

    Raises:
      UserError: it does not decode, or is a JPEG that was cut short; the message ends with "or <way_out>".
    """
    data = path.read_bytes()
    # OpenCV fills what a cut JPEG lacks with grey; its end-of-image marker tells.
    whole = b"\xff\xd9" in data[-4096:] or not data.startswith(b"\xff\xd8")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data and whole else None
    if image is None:
        raise UserError(f"image {path} cannot be decoded; replace the file, or {way_out}")
    return image
