"""Rendered rooms in MTAN's layouts, see `mtan`: stand-ins of NYU-v2 with 13 classes and of Cityscapes with 7.

The second shows the same rooms, with the classes and the disparity of the layout: it tests a pipeline, and does not
look like a street.
"""

import pathlib
import shutil

import numpy as np
from absl import logging

from input_pipeline import mtan, nyud_mt
from input_pipeline.synthetic import rooms
from mtl_sparse.runtime import progress

_VERSION = 1  # of the rendered data; increase it when the images or labels change
# Class of `nyud_mt.CLASSES` -> class of the layout. All others are furniture and objects.
_NYUV2_13 = {
    "wall": "wall", "floor": "floor", "cabinet": "furniture", "bed": "bed", "chair": "chair", "sofa": "sofa",
    "table": "table", "door": "wall", "window": "window", "bookshelf": "furniture", "picture": "picture",
    "ceiling": "ceiling", "television": "television",
}  # fmt: skip
_CITYSCAPES_7 = {
    "wall": "construction", "floor": "flat", "bed": "vehicle", "sofa": "vehicle", "table": "nature", "chair": "human",
    "door": "construction", "ceiling": "sky",
}  # fmt: skip


def draw_nyuv2(frames: int, height: int, width: int, seed: int, folder: str) -> pathlib.Path:
    """Render `frames` rooms, of which a sixth is val, in the layout of MTAN's NYU-v2, unless the folder exists.

    Args:
      frames: number of samples.
      height: height of the images in pixels.
      width: width of the images in pixels.
      seed: random seed.
      folder: parent folder. The name of the folder in it contains the other arguments.

    Returns:
      The folder with train and val.
    """
    return _draw(mtan.NYUV2_13, _lookup(mtan.NYUV2_13, _NYUV2_13, "objects"), frames, (height, width), seed, folder)


def draw_cityscapes(frames: int, height: int, width: int, seed: int, folder: str) -> pathlib.Path:
    """Render `frames` rooms in the layout of MTAN's Cityscapes; as `draw_nyuv2`, with disparity in place of depth."""
    table = _lookup(mtan.CITYSCAPES_7, _CITYSCAPES_7, "object")
    return _draw(mtan.CITYSCAPES_7, table, frames, (height, width), seed, folder)


def train_count(frames: int) -> int:
    """Return the number of training images among `frames` drawn rooms, without those that are held out."""
    train = frames - frames // 6
    return train - len(mtan.held_out(train))


def _lookup(layout, classes, other):
    """Return the array class id of `nyud_mt` -> class id of the layout, -1 for void."""
    names = [classes.get(name, other) for name in nyud_mt.CLASSES]
    return np.array([-1, *(layout.class_names.index(name) for name in names)], np.float32)


def _draw(layout, lookup, frames, size, seed, folder):
    target = pathlib.Path(folder).expanduser() / f"{layout.name}_v{_VERSION}_{frames}_{size[0]}x{size[1]}_seed{seed}"
    if target.is_dir():
        return target
    logging.info("Rendering %d embedded rooms (not real data) into %s", frames, target)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    counts = {"train": frames - frames // 6, "val": frames // 6}
    index = 0
    for part, count in counts.items():
        places = {key: partial / part / names[0] for key, names in layout.files.items()}
        for place in places.values():
            place.mkdir(parents=True)
        for number in progress.track(range(count), "rendering rooms"):
            for key, array in _sample(layout, lookup, size, (seed, index)).items():
                np.save(places[key] / f"{number}.npy", array)
            index += 1
    partial.rename(target)
    return target


def _sample(layout, lookup, size, seeds):
    room = rooms.random_room(np.random.default_rng(seeds))
    frame = rooms.render(room, size[0], size[1], np.random.default_rng((*seeds, 1)))
    depth = frame["depth"]
    if layout is mtan.CITYSCAPES_7:
        depth = np.where(depth > 0, 0.3 / np.maximum(depth, 0.3), 0).astype(np.float32)  # at most 1
    sample = {
        "image": (frame["image"] / 255).astype(np.float32),
        "segmentation": lookup[frame["segmentation"]],
        "depth": depth[..., None],
        "normals": frame["normals"],
    }
    return {key: sample[key] for key in layout.files}
