"""Images a second that one core loads: read, decode, resize, labels, 480x640 to 256x256; the step's need beside it.

    python -m benchmarks.loader [--size 256] [--frames 48] [--step_ms 8000 --batch 4]

Embedded rooms, stored as the real frames are (PNG and array_record files), one thread of one process. `--step_ms`
is a step's time from benchmarks/step.py.
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
    """Of each round over the training frames."""
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
    cv2.setNumThreads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("--frames", type=int, default=48, help="rooms to render, five sixths of them to train on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step_ms", type=float, help="time of a training step")
    parser.add_argument("--batch", type=int, default=4, help="images in that step")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rates = images_per_second(flags.size, flags.frames, flags.rounds, pathlib.Path(folder))
    print(f"{np.median(rates):.0f} images a second and core ({rates.min():.0f} .. {rates.max():.0f})")
    if flags.step_ms:
        need = flags.batch / flags.step_ms * 1e3
        print(f"the step needs {need:.2f} a second: one core loads {np.median(rates) / need:.0f} times as many")


if __name__ == "__main__":
    main()
