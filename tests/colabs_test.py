"""The notebooks run from first cell to last at the smallest size, and install the package where it is missing."""

import ast
import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import copied_repository, new_environment
from tests.readme_test import blocks

COLABS = pathlib.Path(__file__).parents[1] / "colabs"
NAMES = sorted(path.stem for path in COLABS.glob("*.ipynb"))
SMALL = "workdir = 'run'; frames, size, epochs = 24, (32, 48), 2; depth, width = 10, 8; target = 0.5; rounds = 2"


def execute(name, options, folder):
    """Return the notebook after a run in `folder`, with the options of its tagged cell replaced."""
    notebook = nbformat.read(COLABS / f"{name}.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    cell.source = options
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return notebook


def outputs(notebook, kind):
    return [
        output.data[kind]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if kind in output.get("data", {})
    ]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """Return (the executed notebook, the folder it ran in)."""
    folder = tmp_path_factory.mktemp("colab")
    return execute("quickstart", SMALL, folder), folder


@pytest.mark.slow
def test_quickstart_ends_with_a_smaller_model_and_plots(quickstart):
    notebook, folder = quickstart
    assert len(outputs(notebook, "image/png")) == 4
    sizes, timing = outputs(notebook, "text/markdown")
    trained, compact = (int(cell.replace(",", "")) for cell in sizes.splitlines()[2].split("|")[2:4])
    assert 0 < compact < trained
    assert "| backbone | 1     | compact |" in timing
    assert (folder / "run" / "results.json").exists()


@pytest.mark.slow
def test_patterns_of_two_runs(quickstart):
    _, folder = quickstart
    shutil.copytree(folder / "run", folder / "again")
    results = json.loads((folder / "again" / "results.json").read_text())
    (folder / "again" / "results.json").write_text(json.dumps({**results, "seed": 1}))
    notebook = execute("explore_patterns", "folders = ['run', 'again']", folder)
    titles = [text for text in outputs(notebook, "text/markdown") if text.startswith("###")]
    assert len(titles) == 4, "metrics, zeros over the run and by layer, predictions"
    assert len(outputs(notebook, "image/png")) == len(titles) + 2, "one of the pair of runs, and one of the norms"


def test_your_own_model_is_smaller_and_timed(tmp_path):
    notebook = execute("your_own_model", "steps, rounds = 30, 3", tmp_path)
    printed = "".join(output.text for cell in notebook.cells for output in cell.get("outputs", ()) if "text" in output)
    before, after = re.search(r"([\d,]+) parameters became ([\d,]+)", printed).groups()
    assert int(after.replace(",", "")) < int(before.replace(",", ""))
    dense, small, ratio = map(float, re.search(r"([\d.]+) ms became ([\d.]+) ms .* ([\d.]+) times", printed).groups())
    assert small > 0 and ratio == pytest.approx(dense / small, rel=0.2)
    assert re.search(r"training images: ([\d.]+) % with(?s:.*)without them: ([\d.]+) %", printed)
    assert len(outputs(notebook, "image/png")) == 2


def statements(code):
    """Return the top-level statements of Python code, each import of a name as one."""
    found = set()
    for node in ast.parse(code).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {f"{getattr(node, 'module', '')} {ast.unparse(name)}" for name in node.names}
        else:
            found.add(ast.unparse(node))
    return found


def test_your_own_model_has_the_code_of_the_tutorial():
    notebook = nbformat.read(COLABS / "your_own_model.ipynb", as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells[3:] if cell.cell_type == "code")
    train, compact, timing = map(statements, blocks("docs/your_model.md")[:3])
    assert {line.splitlines()[0] for line in train - statements(code)} == {
        "model, steps = (Net(), 400)",  # steps is an option of the notebook
        "for _ in range(steps):",  # which also draws the curve
    }
    assert compact <= statements(code)
    (line,) = timing - statements(code)
    assert line.replace("rounds=50", "rounds=rounds") in statements(code)


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_kept_without_outputs(name):
    notebook = nbformat.read(COLABS / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def head(name):
    """Return the sources of a notebook's first two code cells: what to install, and how."""
    notebook = nbformat.read(COLABS / f"{name}.ipynb", as_version=4)
    source, install, *_ = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return source, install


def test_all_notebooks_install_the_package_in_the_same_way():
    assert len(NAMES) == 3 and len({head(name) for name in NAMES}) == 1
    assert "git+https://" in head(NAMES[0])[0] and head(NAMES[0])[0].endswith('SOURCE = ""')


@pytest.mark.parametrize("place", ["installed", "a clone", "nowhere", "nowhere, with a source"])
def test_a_notebook_installs_only_what_is_missing(place, tmp_path, monkeypatch):
    (tmp_path / "colabs").mkdir()
    if place == "a clone":
        (tmp_path / "mtl_sparse").mkdir()
        (tmp_path / "mtl_sparse" / "__init__.py").touch()
    if place != "installed":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path / "colabs")
    monkeypatch.setattr(sys, "path", [])
    code = head("quickstart")[1].replace("%pip install -q {SOURCE}", "pip(SOURCE)")
    given = []
    names = {"pip": given.append, "SOURCE": "x" if "source" in place else ""}
    if place == "nowhere":
        with pytest.raises(ValueError, match="SOURCE"):
            exec(code, names)
    else:
        exec(code, names)
    assert given == (["x"] if "source" in place else [])
    assert sys.path == ([str(tmp_path)] if place == "a clone" else [])


@pytest.mark.slow
def test_a_notebook_without_a_clone_installs_the_package(tmp_path):
    """Needs a package index: the package is installed by the notebook, into a new environment that has only Jupyter."""
    environment = new_environment()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    binaries = tmp_path / "venv" / "bin"
    subprocess.run([binaries / "pip", "install", "-q", "ipykernel", "nbclient"], env=environment, check=True)
    clone = copied_repository(tmp_path / "clone")
    notebook = nbformat.read(COLABS / "your_own_model.ipynb", as_version=4)
    (source,) = [cell for cell in notebook.cells if cell.source.endswith('SOURCE = ""')]
    source.source = f"SOURCE = {str(clone)!r}"
    (options,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    options.source = "steps, rounds = 30, 3"
    (tmp_path / "elsewhere").mkdir()
    nbformat.write(notebook, tmp_path / "elsewhere" / "mine.ipynb")
    command = [binaries / "jupyter-execute", "--timeout=600", "--output=done.ipynb", "mine.ipynb"]
    subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, check=True)
    assert len(outputs(nbformat.read(tmp_path / "elsewhere" / "done.ipynb", as_version=4), "image/png")) == 2
