"""Turn a stored sample into a training example: joint transforms of image and labels in NumPy and OpenCV."""

import dataclasses
import functools

import cv2
import numpy as np
from jaxtyping import Float32, Num, UInt8

from mtl_sparse.runtime.errors import UserError
from mtl_sparse.runtime.labels import VOID

# Mean and standard deviation of ImageNet's RGB values in [0, 1], customary also for training from scratch.
IMAGE_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGE_STD = np.array([0.229, 0.224, 0.225], np.float32)


def image_statistics(unit_range: bool) -> tuple[Float32[np.ndarray, "3"], Float32[np.ndarray, "3"]]:
    """Return the mean and standard deviation that normalize images in [0, 1]: ImageNet's, or 0 and 1."""
    return (np.zeros(3, np.float32), np.ones(3, np.float32)) if unit_range else (IMAGE_MEAN, IMAGE_STD)


def normalize_image(image: UInt8[np.ndarray, "... 3"], unit_range: bool = False) -> Float32[np.ndarray, "... 3"]:
    """Normalize an RGB image by `image_statistics`: ImageNet's, or values in [0, 1] if `unit_range`."""
    mean, std = image_statistics(unit_range)
    return ((image.astype(np.float32) / 255.0 - mean) / std).astype(np.float32)


def unnormalize_image(image: Float32[np.ndarray, "... 3"], unit_range: bool = False) -> UInt8[np.ndarray, "... 3"]:
    """Invert `normalize_image`."""
    mean, std = image_statistics(unit_range)
    return np.clip(np.round((image * std + mean) * 255.0), 0, 255).astype(np.uint8)


def normalize_depth(depth: Num[np.ndarray, "H W"]) -> Float32[np.ndarray, "H W"]:
    """Divide depth by its maximum over the image, and clip it to [0.1, 99th percentile], as in the paper.

    Args:
      depth: depth in meters, 0 where there is no measurement.

    Returns:
      Depth in [0.1, 1], 0 where there is no measurement.
    """
    valid = depth > 0
    if not valid.any():
        return np.zeros_like(depth)
    relative = depth / depth.max()
    top = np.percentile(relative[valid], 99)
    return np.where(valid, np.clip(relative, 0.1, max(top, 0.1)), 0).astype(np.float32)


def check_segmentation(label: np.ndarray, num_classes: int, which: str) -> None:
    """Check the values of a segmentation.

    Args:
      label: integers of any shape, 0 = void.
      num_classes: number of classes without void.
      which: name of the sample, for the message.

    Raises:
      UserError: values outside 0 .. num_classes.
    """
    if not 0 <= label.min() <= label.max() <= num_classes:
        raise UserError(
            "DATA_LABEL_OUT_OF_RANGE",
            f"{which}: with config.data.num_classes={num_classes}, expected a segmentation of 0 (void) to "
            f"{num_classes}, got {label.min()} to {label.max()}",
        )


def _scaled(start: int, count: int, factor: float) -> slice:
    """Return the pixels of a map `factor` times as large that `count` pixels from `start` on cover; at least one."""
    first = round(start * factor)
    return slice(first, max(round((start + count) * factor), first + 1))


@functools.lru_cache(maxsize=64)
def _nearest(old: int, new: int) -> np.ndarray:
    """Return the index among `old` pixels that is nearest to each of `new` pixels of the same extent, as in OpenCV."""
    index = np.arange(old, dtype=np.int32)[:, None]
    return cv2.resize(index, (1, new), interpolation=cv2.INTER_NEAREST_EXACT)[:, 0]


@dataclasses.dataclass(frozen=True)
class Transform:
    """Transform of a stored sample to an example of a given size.

    A sample is a dictionary of arrays: "image" uint8 RGB [H, W, 3], and labels. The labels below have a fixed meaning.
    Any other label is resized by nearest neighbor if it has two or more dimensions, and unchanged otherwise.

    - segmentation: integers [H, W] or [H, W, 1], 0 = void, k = class k - 1.
    - depth: [H, W] or [H, W, 1], meters (or disparity, see `depth_target`), 0 = no measurement.
    - normals: float32 [H, W, 3], unit vectors (x right, y down, z forward), 0 = none.
    - edge: [H, W] or [H, W, 1] in [0, 1], of any numeric dtype or bool.

    A label may differ in size from its image if their aspect ratios are equal.

    Attributes:
      size: (height, width) of the example; images and labels are resized without cropping or padding.
      labels: keys of the labels of the example.
      depth_target: "normalized" (as in the paper, see `normalize_depth`), "metres", or "disparity", for labels that are
        inverse depth, in their own unit.
      flip: whether to mirror an example with probability 1/2; the x of its normals then changes sign.
      max_scale: zoom in by a random factor in [1, max_scale] at a random place; 1 is off. Depth is divided by the
        factor, and disparity multiplied, since a scene that appears that much larger is that much nearer. Normals are
        transformed accordingly, exactly for a crop at the image center; elsewhere a shear is neglected.
      scales: zoom in by one of these factors, such as MTAN's (1, 1.2, 1.5), instead; () is off.
      unit_range: whether images stay in [0, 1].
      num_classes: number of classes of the segmentation; 0 skips the check of its values.
    """

    size: tuple[int, int]
    labels: tuple[str, ...] = ("segmentation", "depth", "normals", "edge")
    depth_target: str = "normalized"
    flip: bool = False
    max_scale: float = 1.0
    unit_range: bool = False
    num_classes: int = 0
    scales: tuple[float, ...] = ()

    def __call__(self, frame: dict, rng: np.random.Generator | None = None) -> dict[str, np.ndarray | np.float32]:
        """Return the example of a stored sample.

        Args:
          frame: the stored sample.
          rng: random generator of the augmentations; None turns them off.

        Returns:
          "image" float32 [H, W, 3], normalized; "mask" float32 [], 1 (0 marks the padding of a last batch); and of
          `labels`: "segmentation" int32 [H, W], class or VOID; "depth" float32 [H, W], 0 = invalid; "normals" float32
          [H, W, 3], unit vectors or 0 = invalid; "edge" float32 [H, W] in [0, 1]; others in their own dtype.

        Raises:
          UserError: a segmentation outside 0 .. num_classes.
        """
        arrays = {key: np.asarray(frame[key]) for key in ("image", *self.labels)}
        # OpenCV rounds integers and cannot resize some dtypes.
        for key in arrays.keys() & {"depth", "normals", "edge"}:
            arrays[key] = arrays[key].astype(np.float32, copy=False)
        maps = [key for key, array in arrays.items() if array.ndim >= 2]
        if rng is not None and (self.max_scale > 1 or self.scales):
            self._zoom(arrays, maps, rng)
        if rng is not None and self.flip and rng.random() < 0.5:
            arrays |= {key: arrays[key][:, ::-1] for key in maps}
            if "normals" in arrays:
                arrays["normals"] = arrays["normals"] * np.array([-1, 1, 1], np.float32)
        image = normalize_image(self._smooth(arrays["image"]), self.unit_range)
        return {"image": image, **{key: self._label(key, arrays[key]) for key in self.labels}, "mask": np.float32(1)}

    def _zoom(self, arrays: dict[str, np.ndarray], maps: list[str], rng: np.random.Generator) -> None:
        """Crop the `maps` among the arrays at a random place, and scale depth and normals accordingly."""
        scale = self.scales[rng.integers(len(self.scales))] if self.scales else rng.uniform(1, self.max_scale)
        height, width = arrays["image"].shape[:2]
        crop_h, crop_w = round(height / scale), round(width / scale)
        top, left = rng.integers(height - crop_h + 1), rng.integers(width - crop_w + 1)
        for key in maps:
            rows = _scaled(top, crop_h, arrays[key].shape[0] / height)
            columns = _scaled(left, crop_w, arrays[key].shape[1] / width)
            arrays[key] = arrays[key][rows, columns]
        if "depth" in arrays:
            is_inverse = self.depth_target == "disparity"
            arrays["depth"] = arrays["depth"] * scale if is_inverse else arrays["depth"] / scale
        if "normals" in arrays:  # the inverse transpose of dividing z; `_label` normalizes them
            arrays["normals"] = arrays["normals"] * np.array([1, 1, scale], np.float32)

    def _label(self, key: str, x: np.ndarray) -> np.ndarray:
        """Return one label, resized and in the form of an example."""
        if x.ndim < 2:
            return x
        if key == "edge":  # one pixel wide: nearest neighbor would break it, the area mean only makes it fainter
            return self._smooth(x).astype(np.float32).reshape(self.size)
        x = self._nearest(x)  # keeps exact values, and pixels without a label stay unlabeled
        if key == "segmentation":
            x = x.astype(np.int32).reshape(self.size)
            if self.num_classes:
                check_segmentation(x, self.num_classes, "a stored sample")
            return np.where(x == 0, VOID, x - 1)
        if key == "depth":
            x = np.nan_to_num(x.reshape(self.size), nan=0, posinf=0, neginf=0)  # however missing values are marked
            return normalize_depth(x) if self.depth_target == "normalized" else x.astype(np.float32)
        if key == "normals":
            x = np.nan_to_num(x, nan=0, posinf=0, neginf=0)
            length = np.linalg.norm(x, axis=-1, keepdims=True)
            return np.where(length > 1e-3, x / np.maximum(length, 1e-3), 0).astype(np.float32)
        return x

    def _nearest(self, x: np.ndarray) -> np.ndarray:
        rows, columns = (_nearest(old, new) for old, new in zip(x.shape[:2], self.size, strict=True))
        return x.take(rows, 0).take(columns, 1)

    def _smooth(self, x: np.ndarray) -> np.ndarray:
        shrinks = self.size[0] < x.shape[0] or self.size[1] < x.shape[1]
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        return cv2.resize(np.ascontiguousarray(x), self.size[::-1], interpolation=interpolation)
