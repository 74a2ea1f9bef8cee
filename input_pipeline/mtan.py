"""TFDS builders of MTAN's folders: NYU-v2 with 13 classes, and Cityscapes with 7 classes and disparity.

    {train,val}/image/<n>.npy     numbers in [0, 1], RGB [H, W, 3]
    {train,val}/label/<n>.npy     [H, W], -1 = void, 0.. = class; Cityscapes: label_7, or label
    {train,val}/depth/<n>.npy     [H, W] or [H, W, 1], 0 = no measurement; meters, or disparity with Cityscapes
    {train,val}/normal/<n>.npy    [H, W, 3], unit vectors (x horizontal), 0 = none; NYU-v2 only

n counts from 0 in each part. The folders are those that Liu et al. (2019, arXiv 1803.10704) published with MTAN:
NYU-v2 has 795 + 654 samples of 288x384, Cityscapes 2975 + 500 of 128x256. Images are stored with 8 bits.

Papers report on val, and have no validation split; some choose the best epoch on val. Here val is the test split and
chooses nothing. By default, a tenth of train is the validation split: blocks of consecutive numbers, since neighbors
may show one scene. `split="all"` trains on all of train; the validation split is then the same tenth, which is also
trained on, so that the best checkpoint is one of the last.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from input_pipeline import folders
from mtl_sparse.runtime import progress
from mtl_sparse.runtime.errors import UserError

PARTS = ("train", "val")
VALIDATION_FRACTION = 0.1
SPLIT_SEED = 0
_LONGEST_BLOCK = 20  # consecutive samples that are held out together

# In the order of SceneNet's and of nyuv2-meta-data's 13 classes.
NYUV2_13_CLASSES = "bed books ceiling chair floor furniture objects picture sofa table television wall window".split()
CITYSCAPES_7_CLASSES = "flat construction object nature sky human vehicle".split()


@dataclasses.dataclass(frozen=True)
class Layout:
    """One of the two data sets, as `datasets.Published` takes it.

    Attributes:
      name: its name in config.data.name.
      class_names: names of the segmentation classes.
      files: key of a sample -> names that its folder may have.
    """

    name: str
    class_names: tuple[str, ...]
    files: Mapping[str, Sequence[str]]

    @property
    def BUILDER(self) -> type["_Builder"]:
        """The TFDS builder."""
        return next(builder for builder in (Nyuv213, Cityscapes7) if builder.layout is self)

    @property
    def LABELS(self) -> tuple[str, ...]:
        """Keys of the labels of a sample."""
        return tuple(key for key in self.files if key != "image")

    def frames(self, source: folders.Stored, config: Any) -> folders.Stored:
        """Return the samples of a stored split as `transforms.Transform` takes them: unchanged."""
        del config
        return source

    def classes(self, config: Any) -> tuple[str, ...]:
        """Return the names of the classes, which no option changes.

        Raises:
          UserError: config.data.classes is set.
        """
        if config.classes:
            raise UserError("OPTION_CONFLICT", f"config.data.classes={config.classes!r}: expected () for {self.name}")
        return self.class_names

    def read_splits(self, folder: pathlib.Path, split: str = "") -> dict[str, list[str]]:
        """Return the sample names of train, validation and test, such as "train/0".

        Args:
          folder: the folder with train and val.
          split: "" holds out a tenth of train for validation; "all" trains on it, too. Any other value is a JSON file
            of lists, see `folders.read_splits`.

        Raises:
          UserError: the folder, one of its parts, or a sample is missing; as `folders.read_splits`.
        """
        if not folder.is_dir():
            raise UserError(
                "DATA_FOLDER_MISSING",
                f"data folder {folder} does not exist; set config.data.folder to the folder of {self.name}, with train "
                "and val",
            )
        names = {part: [f"{part}/{n}" for n in range(_count(folder / part / "image"))] for part in PARTS}
        if split not in ("", folders.ALL):
            return folders.read_splits(split, {*names["train"], *names["val"]})
        chosen = held_out(len(names["train"]))
        if len(chosen) >= len(names["train"]):
            raise UserError("DATA_TOO_FEW_IMAGES", f"{folder / 'train'}: expected at least 2 samples, got 1; add some")
        validation = [name for n, name in enumerate(names["train"]) if n in chosen]
        train = names["train"] if split == folders.ALL else [name for name in names["train"] if name not in validation]
        return {"train": train, "validation": validation, "test": names["val"]}

    def fingerprint(self, folder: pathlib.Path, split: str = "") -> str:
        """Return a digest of the sample lists, and of the size and the last 4 KiB of each listed file."""
        digest = hashlib.sha256()
        for kind, names in self.read_splits(folder, split).items():
            for name in names:
                digest.update(f"{kind} {name}\n".encode())
                for key in self.files:
                    digest.update(folders.size_and_end(self._existing(folder, key, name)))
        return digest.hexdigest()[:16]

    def read_frame(self, folder: pathlib.Path, name: str) -> dict[str, Any]:
        """Read and check one sample.

        Args:
          folder: the folder with train and val.
          name: the sample's name, such as "train/0".

        Returns:
          "name"; "image" uint8 [H, W, 3]; "segmentation" uint8 [H, W, 1], 0 = void; "depth" float32 [H, W]; "normals"
          float32 [H, W, 3], if the data set has them. What is missing is 0.

        Raises:
          UserError: a missing or damaged file, an array of another shape or with values out of range.
        """
        paths = {key: self._existing(folder, key, name) for key in self.files}
        arrays = {key: folders.read_array(path) for key, path in paths.items()}
        image = arrays["image"]
        if image.ndim != 3 or image.shape[-1] != 3:
            raise UserError(
                "DATA_IMAGE_FORMAT", f"image {paths['image']}: expected the shape [H, W, 3], got {list(image.shape)}"
            )
        for key in self.LABELS:
            one = arrays[key][..., 0] if arrays[key].ndim == 3 and key != "normals" else arrays[key]
            shape = image.shape if key == "normals" else image.shape[:2]
            if one.shape != shape or (key != "normals" and arrays[key].shape[2:] not in ((), (1,))):
                raise UserError(
                    "DATA_LABEL_FORMAT",
                    f"label {paths[key]}: expected the shape {shape}, as its image, got {arrays[key].shape}; replace "
                    "the file",
                )
            arrays[key] = one
        depth = np.nan_to_num(arrays["depth"].astype(np.float32), nan=0, posinf=0, neginf=0)
        frame = {
            "name": name,
            "image": _to_bytes(image, paths["image"]),
            "segmentation": self._to_classes(arrays["segmentation"], paths["segmentation"])[..., None],
            "depth": np.maximum(depth, 0),
        }
        if "normals" in arrays:
            frame["normals"] = np.nan_to_num(arrays["normals"].astype(np.float32), nan=0, posinf=0, neginf=0)
        return frame

    def _to_classes(self, label, path):
        """Return labels -1, 0, .. as uint8 0 = void, 1, .."""
        most = len(self.class_names) - 1
        with np.errstate(invalid="ignore"):
            fits = bool(((label >= -1) & (label <= most) & (label == np.round(label))).all())
        if not fits:
            raise UserError(
                "DATA_LABEL_OUT_OF_RANGE",
                f"label {path}: expected whole numbers from -1 (void) to {most}, got values from {np.min(label)} to "
                f"{np.max(label)}; replace the file",
            )
        return (label + 1).astype(np.uint8)

    def _existing(self, folder, key, name):
        part, _, number = name.partition("/")
        paths = [folder / part / kind / f"{number}.npy" for kind in self.files[key]]
        found = next((path for path in paths if path.is_file()), None)
        if found is None:
            raise UserError(
                "FILE_MISSING",
                f"{paths[0]} is missing; the samples of {folder / part} are numbered from 0 without a gap; restore the "
                "file",
            )
        return found


def held_out(count: int) -> frozenset[int]:
    """Return which of the `count` training samples are the validation split: a tenth, in blocks of up to 20."""
    wanted = max(1, round(VALIDATION_FRACTION * count))
    length = max(1, min(_LONGEST_BLOCK, wanted // 4))
    starts = np.random.default_rng(SPLIT_SEED).permutation(range(0, count, length))
    order = [n for start in starts for n in range(start, min(start + length, count))]
    return frozenset(order[:wanted])


def _count(folder: pathlib.Path) -> int:
    """Return the number of samples in a folder of images, which are numbered from 0 without a gap."""
    if not folder.is_dir():
        raise UserError("FILE_MISSING", f"{folder} is missing; a folder in MTAN's form has train/image and val/image")
    count = sum(path.stem.isdecimal() for path in folder.glob("*.npy"))
    if not count:
        raise UserError("DATA_TOO_FEW_IMAGES", f"{folder} has no image; expected 0.npy, 1.npy, ...")
    return count


def _to_bytes(image, path):
    """Return an image of numbers in [0, 1], or of bytes, as uint8."""
    if image.dtype == np.uint8:
        return np.asarray(image)
    low, high = np.min(image), np.max(image)
    if not (low > -0.5 and high < 1.5):  # resizing may have left values just outside
        raise UserError(
            "DATA_IMAGE_FORMAT", f"image {path}: expected values in [0, 1], got {low} to {high}; replace the file"
        )
    return np.round(255 * np.clip(image.astype(np.float64), 0, 1)).astype(np.uint8)


NYUV2_13 = Layout(
    "nyuv2_13",
    tuple(NYUV2_13_CLASSES),
    {"image": ("image",), "segmentation": ("label",), "depth": ("depth",), "normals": ("normal",)},
)
CITYSCAPES_7 = Layout(
    "cityscapes_7",
    tuple(CITYSCAPES_7_CLASSES),
    {"image": ("image",), "segmentation": ("label_7", "label"), "depth": ("depth",)},
)


class _Builder(folders.FolderBuilder, skip_registration=True):  # type: ignore[call-arg]  # TFDS: untyped
    """Builder of a folder in MTAN's form. `manual_dir` is the folder; for `split`, see `Layout.read_splits`."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir is the published folder (train, val)."
    layout: ClassVar[Layout]

    def _info(self):
        def array(*shape):
            return tfds.features.Tensor(shape=shape, dtype=np.float32, encoding="zlib")

        features = {
            "name": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "segmentation": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            "depth": array(None, None),
            "normals": array(None, None, 3),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {key: feature for key, feature in features.items() if key in ("name", *self.layout.files)}
            ),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        folder = pathlib.Path(dl_manager.manual_dir)
        lists = self.layout.read_splits(folder, self._split)
        self.record(lists, self.layout.fingerprint(folder, self._split))
        return {split: self._generate_examples(folder, names) for split, names in lists.items()}

    def _generate_examples(self, folder, names):
        for index, name in enumerate(progress.track(names, "preparing samples")):
            frame = self.layout.read_frame(folder, name)
            encoded = {
                "image": folders.encode_png(frame["image"][..., ::-1]),  # OpenCV takes BGR
                "segmentation": folders.encode_png(frame["segmentation"]),
            }
            yield index, frame | encoded


class Nyuv213(_Builder):
    """Builder of MTAN's NYU-v2 with 13 classes."""

    name = "nyuv2_13"
    layout = NYUV2_13


class Cityscapes7(_Builder):
    """Builder of MTAN's Cityscapes with 7 classes and disparity."""

    name = "cityscapes_7"
    layout = CITYSCAPES_7
