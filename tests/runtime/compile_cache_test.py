"""The compile cache, each time in a new process: JAX reads its options once."""

import os
import subprocess
import sys

SCRIPT = """
import jax
from mtl_sparse.runtime import compile_cache
print(compile_cache.enable())
jax.jit(lambda x: x * 2 + 1)(3.0)
"""


def enabled(tmp_path, **options):
    ours = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    environment = {
        **ours,
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **options,
    }
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_programs_are_kept_where_the_user_keeps_caches(tmp_path):
    folder = enabled(tmp_path)
    assert folder.startswith(str(tmp_path / "mtl_sparse" / "jax-"))
    kept = {path.name for path in (tmp_path / "mtl_sparse").glob("jax-*/*-cache")}
    assert any("lambda" in name for name in kept)
    assert enabled(tmp_path) == folder
    assert {path.name for path in (tmp_path / "mtl_sparse").glob("jax-*/*-cache")} == kept, "found again"


def test_jaxs_own_options_come_first(tmp_path):
    assert enabled(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own")) == "None"
    assert list((tmp_path / "own").glob("*-cache")) and not (tmp_path / "mtl_sparse").exists()
    assert enabled(tmp_path / "off", JAX_ENABLE_COMPILATION_CACHE="false") == "None"
    (tmp_path / "file").write_text("")
    assert enabled(tmp_path / "file") == "None", "a folder that cannot be created"
