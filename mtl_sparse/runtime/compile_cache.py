"""JAX's persistent compile cache, on by default: a second start of a run does not compile again."""

import contextlib
import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging

from mtl_sparse.runtime import progress, text

_MOST_BYTES = 4 * 2**30
_CACHE = "/jax/compilation_cache"  # prefix of the events of JAX's cache


def enable() -> pathlib.Path | None:
    """Enable JAX's compile cache in the user's cache folder.

    The cache holds at most 4 GiB; beyond that, JAX removes the least recently used programs. Does nothing if the user
    has set `JAX_COMPILATION_CACHE_DIR` or `JAX_ENABLE_COMPILATION_CACHE=false`.

    Returns:
      The cache folder, or None if this function enabled no cache.
    """
    options: Any = jax.config  # its type does not list the options
    if options.jax_compilation_cache_dir or not options.jax_enable_compilation_cache:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(home) / "mtl_sparse" / f"jax-{_machine()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a run works without a cache, too
        return None
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def announced(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a compiled function that logs how long its first call took, and whether it compiled or used the cache.

    Args:
      function: a result of `jax.jit` or `jax.pmap`.
      name: name of the function in the log, such as "training step".
    """
    called = False

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal called
        if called:
            return function(*arguments, **options)
        called, start = True, time.monotonic()
        with progress.phase(f"compiling the {name}, or loading it from the cache"), _events() as events:
            result = function(*arguments, **options)
        is_loaded = f"{_CACHE}/cache_hits" in events and f"{_CACHE}/cache_misses" not in events
        how = "loaded from the cache" if is_loaded else "compiled"
        logging.info("The %s was %s in %s", name, how, text.duration(time.monotonic() - start))
        return result

    return call


@contextlib.contextmanager
def _events() -> Iterator[set[str]]:
    """Yield a set that gets the names of JAX's events."""
    found: set[str] = set()

    def add(event: str, **_: Any) -> None:
        found.add(event)

    jax.monitoring.register_event_listener(add)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(add)


def _machine() -> str:
    """Return a digest of the processor type: machines may share a home folder, but not compiled programs."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [str(os.uname())]
    kinds = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256("\n".join(kinds).encode()).hexdigest()[:12]
