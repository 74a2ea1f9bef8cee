"""Fair timing of functions that run on a device."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def timed(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each round of each function () -> arrays, in alternation, after one call to warm up."""
    for function in functions.values():
        jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}
