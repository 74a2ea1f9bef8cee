"""From a stored frame to a training example: joint image and label transforms in numpy and OpenCV."""

import dataclasses

import cv2
import numpy as np

VOID = 255  # segmentation label of pixels that count nowhere
# Mean and standard deviation of ImageNet's RGB in [0, 1], the field's habit also for training from scratch.
IMAGE_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGE_STD = np.array([0.229, 0.224, 0.225], np.float32)


def normalize_image(image: np.ndarray) -> np.ndarray:
    """uint8 RGB [..., 3] -> float32 with ImageNet's mean 0 and standard deviation 1."""
    return ((image.astype(np.float32) / 255.0 - IMAGE_MEAN) / IMAGE_STD).astype(np.float32)


def unnormalize_image(image: np.ndarray) -> np.ndarray:
    """Inverse of `normalize_image`."""
    return np.clip(np.round((image * IMAGE_STD + IMAGE_MEAN) * 255.0), 0, 255).astype(np.uint8)


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


@dataclasses.dataclass(frozen=True)
class Transform:
    """Stored frame -> example of the given size.

    Attributes:
      size: (height, width) of the example, reached by plain resizing.
      depth_target: "normalized" (the paper's, see `normalize_depth`) or "metres".
      flip: mirror every second example; the normals' x changes sign with it.
      max_scale: zoom in by a random factor in [1, max_scale] at a random place; depth is divided by it,
        as the same scene seen that much larger is that much nearer. 1 is off.
    """

    size: tuple[int, int]
    depth_target: str = "normalized"
    flip: bool = False
    max_scale: float = 1.0

    def __call__(self, frame: dict, rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
        """Args: frame, as stored by the builder; rng, for the augmentations (None: they are off).

        Returns:
          image float32 [H, W, 3] normalised; segmentation int32 [H, W], class - 1 or VOID; depth float32
          [H, W], 0 = invalid; normals float32 [H, W, 3] unit or 0 = invalid; edge float32 [H, W] in [0, 1];
          mask float32 [], 1 (0 marks the padding of a last batch).
        """
        image, segmentation = frame["image"], frame["segmentation"][..., 0]
        depth, normals, edge = frame["depth"], frame["normals"], frame["edge"]
        if rng is not None and self.max_scale > 1:
            scale = rng.uniform(1, self.max_scale)
            height, width = image.shape[:2]
            crop_h, crop_w = round(height / scale), round(width / scale)
            top, left = rng.integers(height - crop_h + 1), rng.integers(width - crop_w + 1)
            window = np.s_[top : top + crop_h, left : left + crop_w]
            image, segmentation, edge = image[window], segmentation[window], edge[window]
            depth, normals = depth[window] / scale, normals[window]
        if rng is not None and self.flip and rng.random() < 0.5:
            image, segmentation, edge = image[:, ::-1], segmentation[:, ::-1], edge[:, ::-1]
            depth, normals = depth[:, ::-1], normals[:, ::-1] * np.float32([-1, 1, 1])

        # Labels keep their exact values, so nearest; pixels without a label stay without one.
        depth = self._nearest(depth)
        normals = self._nearest(normals)
        length = np.linalg.norm(normals, axis=-1, keepdims=True)
        segmentation = self._nearest(segmentation).astype(np.int32)
        return {
            "image": normalize_image(self._smooth(image)),
            "segmentation": np.where(segmentation == 0, VOID, segmentation - 1),
            "depth": normalize_depth(depth) if self.depth_target == "normalized" else depth.astype(np.float32),
            "normals": np.where(length > 1e-3, normals / np.maximum(length, 1e-3), 0).astype(np.float32),
            # An edge is one pixel wide: nearest would tear it, the area mean keeps it, paler.
            "edge": self._smooth(edge).astype(np.float32),
            "mask": np.float32(1),
        }

    def _nearest(self, x):
        return cv2.resize(np.ascontiguousarray(x), self.size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)

    def _smooth(self, x):
        shrinks = self.size[0] < x.shape[0] or self.size[1] < x.shape[1]
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        return cv2.resize(np.ascontiguousarray(x), self.size[::-1], interpolation=interpolation)
