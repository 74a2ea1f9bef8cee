"""JAX's persistent compile cache, on by default: a second start of a run does not compile again."""

import hashlib
import os
import pathlib
from typing import Any

import jax

_MOST_BYTES = 4 * 2**30


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


def _machine() -> str:
    """Return a digest of the processor type: machines may share a home folder, but not compiled programs."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [str(os.uname())]
    kinds = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256("\n".join(kinds).encode()).hexdigest()[:12]
