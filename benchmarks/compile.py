"""Time until the first training step, with an empty compile cache and with a filled one.

    python -m benchmarks.compile [--size 256] [--batch 4]

Starts a ResNet-50 with three tasks twice, each time in a new process. The second start uses the compile cache that the
first one filled.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import tempfile
import time

from benchmarks import ours
from mtl_sparse.report.tables import markdown
from mtl_sparse.runtime import environment


def start(**settings) -> list[float]:
    """Return the seconds of building the state, of the first step and of the second; call it in a new process."""
    seconds, begin = [], time.perf_counter()
    call = ours.training_step(**settings)
    for step in (lambda: None, call, call):
        step()
        seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    return seconds


def table(**settings) -> str:
    """Time a start with an empty cache, then a second start, and return a Markdown table."""
    lines = [("start", "state s", "first step s", "second step s", "wait s")]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        for name in ("first", "second"):
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                state, first, second = pool.submit(start, **settings).result()
            lines.append((name, *(f"{seconds:.1f}" for seconds in (state, first, second, first - second))))
    return markdown(lines)


if __name__ == "__main__":
    environment.tune()  # inherited by the processes started below
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    print(table(**vars(parser.parse_args())))
