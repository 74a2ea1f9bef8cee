"""No file that is read can run code, and no archive is unpacked."""

import pathlib
import pickle
import re
import shutil

import jax
import numpy as np

from input_pipeline import datasets
from mtl_sparse.jobs import export
from mtl_sparse.pretrained import state_dicts
from mtl_sparse.report import records
from mtl_sparse.training import checkpoints
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib
from tests.conftest import raises

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = [ROOT / "launch.py", *(path for part in ("configs", "input_pipeline", "mtl_sparse", "benchmarks")
                                 for path in (ROOT / part).rglob("*.py"))]  # fmt: skip


class Trap:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran')",)


def test_no_pickle_is_loaded_from_data_checkpoints_or_exports(sparse_run, monkeypatch, tmp_path):
    config, original = sparse_run
    folder = shutil.copytree(original, tmp_path / "run")

    def refuse(*_, **__):
        raise AssertionError("a pickle was loaded")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert datasets.load(config.data).train[0]["image"].ndim == 3
    saved = checkpoints.Checkpoints(folder)
    state, _ = saved.restore("latest", state_lib.shapes(setup_lib.setup(config)))
    saved.close()
    assert int(state.step) > 0 and records.read_samples(folder)["image"].ndim == 4
    path = export.run_job(config, folder)
    images = np.zeros((1, *config.data.size, 3), np.float32)
    assert set(jax.export.deserialize(bytearray(path.read_bytes())).call(images)) == set(config.tasks)


def test_arrays_that_are_pickles_are_refused(tmp_path):
    np.savez(tmp_path / "samples.npz", image=np.array([Trap()], dtype=object), allow_pickle=True)
    with raises("FILE_DAMAGED", naming="samples.npz"):
        records.read_samples(tmp_path)
    np.savez(tmp_path / "weights.npz", **{"conv1.weight": np.array([Trap()], dtype=object)})
    with raises("FILE_DAMAGED", naming="weights.npz"):
        state_dicts.read(tmp_path / "weights.npz")


def test_the_sources_unpack_no_archive_and_load_no_pickle():
    """Reading pickles, running text, and unpacking archives would need a second look."""
    risky = (
        r"(?<![.\w])(pickle\.loads?\(|allow_pickle=True|eval\(|exec\(|tarfile|zipfile|unpack_archive|extractall|"
        r"weights_only=False|shell=True)"
    )
    found = [(path.name, match) for path in SOURCES for match in re.findall(risky, path.read_text())]
    assert len(SOURCES) > 60 and found == []
