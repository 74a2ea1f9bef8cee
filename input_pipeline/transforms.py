"""From a stored frame to a training example: joint image and label transforms in numpy and OpenCV."""

import dataclasses
import functools

import cv2
import numpy as np

from input_pipeline.labels import VOID
from mtl_sparse.runtime.errors import UserError

# Mean and standard deviation of ImageNet's RGB in [0, 1], the field's habit also for training from scratch.
IMAGE_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGE_STD = np.array([0.229, 0.224, 0.225], np.float32)


def image_statistics(unit_range: bool) -> tuple[np.ndarray, np.ndarray]:
    """(mean, standard deviation) [3] by which images in [0, 1] are normalised: ImageNet's, or 0 and 1 to stay there."""
    return (np.zeros(3, np.float32), np.ones(3, np.float32)) if unit_range else (IMAGE_MEAN, IMAGE_STD)


def normalize_image(image: np.ndarray, unit_range: bool = False) -> np.ndarray:
    """uint8 RGB [..., 3] -> float32 by `image_statistics`: ImageNet's mean at 0 and spread at 1, or in [0, 1]."""
    mean, std = image_statistics(unit_range)
    return ((image.astype(np.float32) / 255.0 - mean) / std).astype(np.float32)


def unnormalize_image(image: np.ndarray, unit_range: bool = False) -> np.ndarray:
    """Inverse of `normalize_image`."""
    mean, std = image_statistics(unit_range)
    return np.clip(np.round((image * std + mean) * 255.0), 0, 255).astype(np.uint8)


def normalize_depth(depth: np.ndarray) -> np.ndarray:
    """The paper's depth: divided by the image's own maximum, clipped to [0.1, its 99th percentile].

    Args:
      depth: [H, W] in metres, 0 where there is no measurement.

    Returns:
      float32 [H, W] in [0.1, 1], still 0 where there is no measurement.
    """
    valid = depth > 0
    if not valid.any():
        return np.zeros_like(depth)
    relative = depth / depth.max()
    top = np.percentile(relative[valid], 99)
    return np.where(valid, np.clip(relative, 0.1, max(top, 0.1)), 0).astype(np.float32)


def check_segmentation(label: np.ndarray, num_classes: int, which: str) -> None:
    """Raises UserError for values outside 0 .. num_classes; `which` begins the sentence."""
    if not 0 <= label.min() <= label.max() <= num_classes:
        raise UserError(
            f"{which} of {label.min()} to {label.max()}; with config.data.num_classes={num_classes} it is 0 (void) to "
            f"{num_classes}"
        )


def _scaled(start: int, count: int, factor: float) -> slice:
    """The pixels of a map `factor` times as large that lie under `count` pixels from `start` on; at least one."""
    first = round(start * factor)
    return slice(first, max(round((start + count) * factor), first + 1))


@functools.lru_cache(maxsize=64)
def _nearest(old: int, new: int) -> np.ndarray:
    """Index of the pixel nearest to each of `new` pixels that cover the same length as `old` ones, as in OpenCV."""
    index = np.arange(old, dtype=np.int32)[:, None]
    return cv2.resize(index, (1, new), interpolation=cv2.INTER_NEAREST_EXACT)[:, 0]


@dataclasses.dataclass(frozen=True)
class Transform:
    """Stored frame -> example of the given size.

    A frame is a dictionary of arrays: "image" uint8 RGB [H, W, 3], and labels. Labels of these keys have a meaning of
    their own, any other is resized by nearest neighbour where it has two dimensions or more, or kept as it is:

      segmentation: uint8 [H, W] or [H, W, 1], 0 = void, k = class k - 1.
      depth: float32 [H, W], metres, 0 = no measurement.
      normals: float32 [H, W, 3], unit vectors (x right, y down, z forward), 0 = none.
      edge: [H, W] in [0, 1], of any numeric dtype or bool.

    A label may have another size than its image, where their sides have the same ratio.

    Attributes:
      size: (height, width) of the example, reached by plain resizing.
      labels: keys of the labels that the example has.
      depth_target: "normalized" (the paper's, see `normalize_depth`) or "metres".
      flip: mirror every second example; the normals' x changes sign with it.
      max_scale: zoom in by a random factor in [1, max_scale] at a random place; depth is divided by it,
        as the same scene seen that much larger is that much nearer, and the normals turn with it (exactly so where the
        place is the image's middle; beside it a shear is left out). 1 is off.
      unit_range: images stay in [0, 1].
      num_classes: of the segmentation; 0 does not check its labels.
    """

    size: tuple[int, int]
    labels: tuple[str, ...] = ("segmentation", "depth", "normals", "edge")
    depth_target: str = "normalized"
    flip: bool = False
    max_scale: float = 1.0
    unit_range: bool = False
    num_classes: int = 0

    def __call__(self, frame: dict, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """Args: frame, as stored; rng, for the augmentations (None: they are off).

        Returns:
          image float32 [H, W, 3] normalised; of the labels asked for: segmentation int32 [H, W], class or VOID; depth
          float32 [H, W], 0 = invalid; normals float32 [H, W, 3] unit or 0 = invalid; edge float32 [H, W] in [0, 1];
          others in their own dtype; mask float32 [], 1 (0 marks the padding of a last batch).

        Raises:
          UserError: a segmentation outside 0 .. num_classes.
        """
        arrays = {key: np.asarray(frame[key]) for key in ("image", *self.labels)}
        # Integers would be rounded, and OpenCV cannot resize some dtypes.
        for key in arrays.keys() & {"depth", "normals", "edge"}:
            arrays[key] = arrays[key].astype(np.float32, copy=False)
        maps = [key for key, array in arrays.items() if array.ndim >= 2]
        if rng is not None and self.max_scale > 1:
            scale = rng.uniform(1, self.max_scale)
            height, width = arrays["image"].shape[:2]
            crop_h, crop_w = round(height / scale), round(width / scale)
            top, left = rng.integers(height - crop_h + 1), rng.integers(width - crop_w + 1)
            for key in maps:
                rows = _scaled(top, crop_h, arrays[key].shape[0] / height)
                columns = _scaled(left, crop_w, arrays[key].shape[1] / width)
                arrays[key] = arrays[key][rows, columns]
            if "depth" in arrays:
                arrays["depth"] = arrays["depth"] / scale
            if "normals" in arrays:  # the inverse transpose of a divided z; `_label` brings them back to length 1
                arrays["normals"] = arrays["normals"] * np.float32([1, 1, scale])
        if rng is not None and self.flip and rng.random() < 0.5:
            arrays |= {key: arrays[key][:, ::-1] for key in maps}
            if "normals" in arrays:
                arrays["normals"] = arrays["normals"] * np.float32([-1, 1, 1])
        image = normalize_image(self._smooth(arrays["image"]), self.unit_range)
        return {"image": image, **{key: self._label(key, arrays[key]) for key in self.labels}, "mask": np.float32(1)}

    def _label(self, key, x):
        if x.ndim < 2:
            return x
        if key == "edge":  # one pixel wide: nearest would tear it, the area mean keeps it, paler
            return self._smooth(x).astype(np.float32).reshape(self.size)
        x = self._nearest(x)  # the others keep their exact values, and pixels without a label stay without one
        if key == "segmentation":
            x = x.astype(np.int32).reshape(self.size)
            if self.num_classes:
                check_segmentation(x, self.num_classes, "a frame has a segmentation")
            return np.where(x == 0, VOID, x - 1)
        if key == "depth":
            x = np.nan_to_num(x.reshape(self.size), nan=0, posinf=0, neginf=0)  # however a sensor marks what it missed
            return normalize_depth(x) if self.depth_target == "normalized" else x.astype(np.float32)
        if key == "normals":
            x = np.nan_to_num(x, nan=0, posinf=0, neginf=0)
            length = np.linalg.norm(x, axis=-1, keepdims=True)
            return np.where(length > 1e-3, x / np.maximum(length, 1e-3), 0).astype(np.float32)
        return x

    def _nearest(self, x):
        rows, columns = (_nearest(old, new) for old, new in zip(x.shape[:2], self.size, strict=True))
        return x.take(rows, 0).take(columns, 1)

    def _smooth(self, x):
        shrinks = self.size[0] < x.shape[0] or self.size[1] < x.shape[1]
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        return cv2.resize(np.ascontiguousarray(x), self.size[::-1], interpolation=interpolation)
