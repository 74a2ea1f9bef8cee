"""JAX's compile cache, on by default: the second start of a run finds its programs there."""

import hashlib
import os
import pathlib

import jax

_MOST_BYTES = 4 * 2**30


def enable() -> pathlib.Path | None:
    """Has JAX keep what it compiles in the user's cache folder, and returns that.

    `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` is none; then it returns
    None. The least recently used programs go beyond 4 GiB.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(home) / "mtl_sparse" / f"jax-{_machine()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a cache that cannot be is no reason not to run
        return None
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def _machine() -> str:
    """Tells processors apart that share a home folder: a program for one may not run on another."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [str(os.uname())]
    kinds = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256("\n".join(kinds).encode()).hexdigest()[:12]
