import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from mtl_sparse.jobs import export
from mtl_sparse.training import setup as setup_lib
from tests.conftest import raises

DOCS = (pathlib.Path(__file__).parents[2] / "docs" / "export.md").read_text()


@pytest.fixture
def run(sparse_run, tmp_path):
    config, original = sparse_run
    return config.copy_and_resolve_references(), shutil.copytree(original, tmp_path / "run")


def consumed(kind, folder):
    """Return task -> (shape, mean) that the script of docs/export.md prints where this package cannot be imported."""
    (script,) = re.findall(rf"<!-- {kind} -->\n```python\n(.*?)```", DOCS, re.S)
    block = "import sys; sys.modules.update(mtl_sparse=None, flax=None, input_pipeline=None)\n"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", block + script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [re.fullmatch(r"(\w+) (\(.*\)) (\S+)", line).groups() for line in done.stdout.splitlines()]
    return {task: (tuple(map(int, re.findall(r"\d+", shape))), float(mean)) for task, shape, mean in found}


def expected(kind, config, folder):
    """Return the outputs of the run's own model on the same images."""
    model, variables = setup_lib.load_model(folder, config)
    about = json.loads((folder / "export" / f"model.{kind}.json").read_text())
    rgb = np.random.default_rng(0).integers(0, 256, (2, *about["input"]["shape"][1:]), np.uint8)
    images = ((rgb / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])).astype(np.float32)
    return jax.device_get(jax.jit(model.apply)(variables, images))


def check(kind, config, folder):
    export.run_job(config, folder)
    found, raw = consumed(kind, folder / "export"), expected(kind, config, folder)
    assert set(found) == set(raw) == set(config.tasks)
    for task, (shape, mean) in found.items():
        assert shape == raw[task].shape
        assert mean == pytest.approx(raw[task].mean(), abs=float(1e-4 * np.abs(raw[task]).max()))


def test_stablehlo_runs_without_this_package(run):
    check("stablehlo", *run)


def test_onnx_runs_without_this_package(run):
    pytest.importorskip("jax2onnx", reason="needs the extra: pip install -e '.[onnx]'")
    config, folder = run
    config.export.format = "onnx"
    check("onnx", config, folder)


def test_a_file_that_differs_is_not_written(run, monkeypatch):
    config, folder = run
    write, read = export._FORMATS["stablehlo"]

    def wrong(path):
        return lambda images: {task: raw * 1.001 for task, raw in read(path)(images).items()}

    monkeypatch.setitem(export._FORMATS, "stablehlo", (write, wrong))
    with raises("EXPORT_NOT_EXACT", naming=str(folder / "export" / "model.stablehlo")):
        export.run_job(config, folder)
    assert not list((folder / "export").iterdir())
    nan = lambda path: lambda images: {task: raw * float("nan") for task, raw in read(path)(images).items()}  # noqa: E731
    monkeypatch.setitem(export._FORMATS, "stablehlo", (write, nan))
    with raises("EXPORT_NOT_EXACT", naming="a difference of nan"):
        export.run_job(config, folder)


def test_bad_input(run, monkeypatch):
    config, folder = run
    config.export.format = "torchscript"
    with raises("OPTION_UNKNOWN_VALUE", naming="export.format='torchscript'"):
        export.run_job(config, folder)
    config.export.format = "onnx"
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with raises("EXTRA_MISSING", naming="jax2onnx"):
        export.run_job(config, folder)
