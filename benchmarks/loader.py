"""Images per second that one core loads, compared with the number that a training step needs.

    python -m benchmarks.loader [--size 256] [--frames 48] [--step_ms 8000 --batch 4]

Reads, decodes and resizes rendered rooms and their labels from 480x640 to 256x256 in one thread of one process. The
rooms are stored like the real data: PNG images in array_record files. `--step_ms` is the time of a step as measured by
benchmarks/step.py.
"""

import argparse
import pathlib
import tempfile
import time

import cv2
import numpy as np

from configs import nyu
from input_pipeline import datasets
from input_pipeline.transforms import Transform
from mtl_sparse import tasks


def images_per_second(size: int, frames: int, rounds: int, folder: pathlib.Path, stored=(480, 640)) -> np.ndarray:
    """Return the images per second of each round over the training images.

    Args:
      size: side of the loaded images in pixels.
      frames: number of rooms to render; five sixths of them are training images.
      rounds: number of passes over the training images.
      folder: to store the rooms in.
      stored: (height, width) of the stored images.
    """
    config = nyu.get_config()
    config.data.embedded.update(frames=frames, height=stored[0], width=stored[1], folder=str(folder))
    labels = tuple(task.label for task in tasks.resolve(config))
    source = datasets.load(config.data, labels).train
    transform = Transform((size, size), labels, config.data.depth_target)
    rng, rates = np.random.default_rng(0), []
    for _ in range(rounds):
        start = time.perf_counter()
        for i in range(len(source)):
            transform(source[i], rng)
        rates.append(len(source) / (time.perf_counter() - start))
    return np.array(rates)


def main() -> None:
    """Print the images per second, and how many times a step's need they are."""
    cv2.setNumThreads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("--frames", type=int, default=48, help="rooms to render; five sixths are training images")
    parser.add_argument("--rounds", type=int, default=5, help="passes over the training images")
    parser.add_argument("--step_ms", type=float, help="time of a training step in milliseconds")
    parser.add_argument("--batch", type=int, default=4, help="images in this training step")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rates = images_per_second(flags.size, flags.frames, flags.rounds, pathlib.Path(folder))
    print(f"{np.median(rates):.0f} images per second and core ({rates.min():.0f} .. {rates.max():.0f})")
    if flags.step_ms:
        need = flags.batch / flags.step_ms * 1e3
        print(f"the step needs {need:.2f} per second: one core loads {np.median(rates) / need:.0f} times as many")


if __name__ == "__main__":
    main()
