"""The notebooks run from the first cell to the last, at the smallest size."""

import json
import pathlib
import shutil

import nbformat
import pytest
from nbclient import NotebookClient

COLABS = pathlib.Path(__file__).parents[1] / "colabs"
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


def test_quickstart_ends_with_a_smaller_model_and_plots(quickstart):
    notebook, folder = quickstart
    assert len(outputs(notebook, "image/png")) == 4
    sizes, timing = outputs(notebook, "text/markdown")
    trained, compact = (int(cell.replace(",", "")) for cell in sizes.splitlines()[2].split("|")[2:4])
    assert 0 < compact < trained
    assert "| backbone | 1     | compact |" in timing
    assert (folder / "run" / "results.json").exists()


def test_patterns_of_two_runs(quickstart):
    _, folder = quickstart
    shutil.copytree(folder / "run", folder / "again")
    results = json.loads((folder / "again" / "results.json").read_text())
    (folder / "again" / "results.json").write_text(json.dumps({**results, "seed": 1}))
    notebook = execute("explore_patterns", "folders = ['run', 'again']", folder)
    titles = [text for text in outputs(notebook, "text/markdown") if text.startswith("###")]
    assert len(titles) == 4, "metrics, zeros over the run and by layer, predictions"
    assert len(outputs(notebook, "image/png")) == len(titles) + 2, "one of the pair of runs, and one of the norms"


@pytest.mark.parametrize("name", ["quickstart", "explore_patterns"])
def test_notebooks_are_kept_without_outputs(name):
    notebook = nbformat.read(COLABS / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
