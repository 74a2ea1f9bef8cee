"""Small configs and data that the tests share."""

import atexit
import contextlib
import gc
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from mtl_sparse.runtime import environment  # imports no JAX

# Most of the suite's time is XLA compiling small models that run a few steps, some of them in subprocesses: do not
# optimize the code, use the emitters that compile faster (if XLA still has them), and compile each model once.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + (f" {environment.FUSION_EMITTERS}=false" if environment.knows(environment.FUSION_EMITTERS) else ""),
)
# One cache for the workers and their subprocesses; JAX locks it if its size is limited.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax_cache_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**31))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest

from configs import demo, demo_faces
from input_pipeline import datasets
from input_pipeline.synthetic import faces as faces_lib
from input_pipeline.synthetic import rooms as rooms_lib
from mtl_sparse.report import plots, run_page
from mtl_sparse.runtime.errors import UserError

# Tracing makes many objects that live: searching them for garbage took a quarter of the suite's time.
gc.set_threshold(200_000, 20, 100)

# Files with the longest tests: they run first, in this order, so that two workers end at the same time.
LONGEST = (
    "faults",
    "processes",
    "train",
    "multitask",
    "sweep",
    "compact",
    "colabs",
    "lomt",
    "reference",
    "attributes",
    "readme",
    "launch",
)


@contextlib.contextmanager
def raises(code: str, *, naming: str):
    """Expect a UserError with this code, whose message contains `naming`: the thing that is wrong, not the wording."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert caught.value.code == code, f"{caught.value.code}: {caught.value}"
    assert naming in str(caught.value)


def copied_repository(folder: pathlib.Path) -> pathlib.Path:
    """Copy the tracked and new files of the repository, as a clone has them, and return the folder."""
    root = pathlib.Path(__file__).parents[1]
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, folder / name)
    return folder


def new_environment() -> dict[str, str]:
    """Return this process's environment variables without the tests' options and the developer's Python."""
    ours = ("PYTHON", "XLA_", "JAX_", "VIRTUAL_ENV", "GLIBC_TUNABLES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    here = str(pathlib.Path(sys.prefix) / "bin")
    kept["PATH"] = os.pathsep.join(part for part in kept["PATH"].split(os.pathsep) if part != here)
    return kept


def pytest_collection_modifyitems(items):
    names = [f"{name}_test" for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


@pytest.fixture(scope="session")
def rooms(tmp_path_factory) -> pathlib.Path:
    """Return an embedded NYUD_MT folder of 20 + 9 samples at 32x48, prepared; do not change it."""
    folder = rooms_lib.render_folder(20, 9, 32, 48, seed=0, folder=str(tmp_path_factory.mktemp("data")))
    datasets.load(tiny(folder).data)
    return folder


@pytest.fixture
def own_rooms(rooms, tmp_path) -> pathlib.Path:
    """Return a copy of the folder that a test may damage, not prepared."""
    return pathlib.Path(shutil.copytree(rooms, tmp_path / "NYUD_MT"))


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> pathlib.Path:
    """Return an embedded CelebAMask-HQ folder of 20 faces at 32x32; do not change it."""
    return faces_lib.draw_folder(20, 32, 32, seed=0, folder=str(tmp_path_factory.mktemp("data")))


def tiny_faces(folder):
    """Return the config of the faces' demo at a size that trains in seconds, on this CelebAMask-HQ folder."""
    config = demo_faces.get_config()
    config.loss.weighting = "uncertainty"
    return _tiny(config, folder, (32, 32))


def tiny(folder):
    """Return the demo's config at a size that trains in seconds, on this NYUD_MT folder."""
    return _tiny(demo.get_config(), folder, (32, 48))


def _tiny(config, folder, size):
    config.data.embedded.frames = 0
    config.data.folder = str(folder)
    config.data.size = size
    config.model.update(depth=10, width=4, head_features=4, classifier_features=(4, 3))
    config.sparsity.update(target=0.0, lambda_=4e-6, start_at=0.0, warmup=0.0)
    config.train.update(batch_size=8, eval_batch_size=8, epochs=2)
    config.run.update(log_every_steps=1, checkpoint_every_steps=1, sample_frames=2, summary_rounds=0)
    return config


@pytest.fixture
def config(rooms):
    return tiny(rooms)


@pytest.fixture
def undrawn():
    """Leave out the plots and the page of runs, which take a third of the time of a short one."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plots, "draw", lambda workdir: [])
        patched.setattr(run_page, "try_write", lambda *_: True)
        yield


@pytest.fixture(scope="session")
def sparse_run(rooms, tmp_path_factory):
    """Return (config, folder) of a finished run in which some groups are zero; do not change it.

    One head reads the end of the backbone, the other an earlier layer, before the last stride.
    """
    from mtl_sparse.jobs import train

    config = tiny(rooms)
    config.model.update(width=8, attach=("layer4_0", "layer1_0"))
    config.sparsity.update(lambda_=6e-2, warmup_steps=0)
    config.tasks = ("segmentation", "depth")
    folder = tmp_path_factory.mktemp("runs") / "sparse"
    train.train(config, folder)
    return config, folder


@pytest.fixture(scope="module", autouse=True)
def free_executables():
    """Drop the compiled functions of a module: each keeps memory maps, of which a process can have 65530."""
    yield
    jax.clear_caches()
