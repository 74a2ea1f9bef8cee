"""Fair timing of functions that run on a device."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def timed(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Time functions in alternation, after one call of each to warm up.

    Args:
      functions: name -> function without arguments that returns arrays.
      rounds: number of timed calls of each.

    Returns:
      name -> seconds of each round.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}
