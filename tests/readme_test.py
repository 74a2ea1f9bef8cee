"""The snippets, commands and tables of the README work as they are written."""

import json
import pathlib
import pkgutil
import re
import sys

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

import mtl_sparse
from configs import sweeps
from input_pipeline import datasets, loader
from mtl_sparse import tasks
from mtl_sparse.compaction import primitives
from mtl_sparse.jobs import cli, train
from mtl_sparse.training import config as config_lib
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib
from mtl_sparse.training import step as step_lib

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "mtl_sparse|input_pipeline|configs|colabs|benchmarks|tests|docs"


def snippet(containing):
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if containing in block]
    return found


def test_pruning_and_compacting_another_model(capsys):
    exec(snippet("import TargetSparsity, proximal_adam"), names := {})
    percentage, groups = re.fullmatch(r"(\d+) % of (\d+) groups are zero\n", capsys.readouterr().out).groups()
    assert abs(int(percentage) - 70) <= 6, "each group is about one percent, and rounding moves some"
    assert int(groups) == 3 + 48 + 48
    exec(snippet("compaction.compact(model.apply, params, images)"), names)
    before, after = re.match(r"([\d,]+) parameters became ([\d,]+)", capsys.readouterr().out).groups()
    assert int(after.replace(",", "")) < 0.6 * int(before.replace(",", ""))
    assert float(names["difference"]) < 1e-5


def test_the_snippets_of_the_compaction_page(capsys, monkeypatch):
    monkeypatch.setattr(primitives, "RULES", dict(primitives.RULES))
    page = (ROOT / "docs" / "compaction.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, names)
    printed = capsys.readouterr().out
    assert "{'bias': (8,), 'kernel': (3, 3, 3, 8)}" in printed
    (table,) = [block for block in re.findall(r"```text\n(.*?)```", page, re.S) if "became" in block]
    assert table in printed


def test_the_snippet_of_the_weighting_page():
    page = (ROOT / "docs" / "weighting.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(block, names := {})
    weights, gradients = np.asarray(names["weights"]), np.asarray(names["gradients"])
    np.testing.assert_allclose((gradients @ gradients.T @ weights) * weights, 1, rtol=1e-4)
    np.testing.assert_allclose(names["direction"], weights @ gradients, rtol=1e-5)


def test_a_penalty_around_another_optimizer():
    exec(snippet("optax.lion"), names := {})
    params = {"conv": {"kernel": jax.numpy.ones((3, 3, 4, 8))}, "bn": {"scale": jax.numpy.ones(8)}}
    updates, _ = names["tx"].update(params, names["tx"].init(params), params)
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(np.isfinite(leaf).all()), updates))


def test_a_custom_task(config, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "depth_l1", None)  # removed again at the end
    exec(snippet("TASKS["), names := {})
    config.tasks = names["get_config"]().tasks
    run = setup_lib.setup(config)
    state, scalars = step_lib.make_train_step(run)(
        loader.replicate(state_lib.initial(run)), loader.shard(next(run.batches.train(0)))
    )
    assert 0 < float(scalars["depth_l1/loss"]) < 1
    assert state.params["model"]["head_depth_l1"]["out"]["kernel"].shape[-1] == 1
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(np.isfinite(leaf).all()), state.params))


def test_a_custom_data_set(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "DATASETS", dict(datasets.DATASETS))
    monkeypatch.chdir(tmp_path)
    text = snippet("DATASETS[")
    exec(text, names := {})
    config = names["get_config"]()
    config.train.epochs, config.run.summary_rounds = 4, 0
    config.model.update(depth=10, width=8, head_features=8)
    train.train(config, "runs/discs")
    results = json.loads((tmp_path / "runs" / "discs" / "results.json").read_text())
    assert results["frames"] == {"train": 320, "validation": 32, "test": 64}
    assert results["test"]["segmentation/miou"] > results["constant"]["segmentation/miou"] + 0.1
    assert set(results["headlines"]) == {"segmentation", "attribute:Large"}


OPTIONS = [line.split(" | ")[1] for line in README.splitlines() if line.startswith("|") and "--config." in line]


@pytest.mark.parametrize("name", ["nyu", "demo"])
@pytest.mark.parametrize("row", OPTIONS)
def test_every_option_is_accepted_as_written(row, name, monkeypatch):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    arguments = re.findall(r"--config\S*[^\s`,]", row)
    command = ["launch.py", f"--config={ROOT}/configs/{name}.py", *arguments]
    monkeypatch.setattr(sys, "argv", command)  # config_flags reads overrides from it
    values(command)
    config = values.config
    config.tasks = cli.split_names(config.tasks)
    if "lambda_=1e-4" in row or "penalty" in row:
        assert len(arguments) == 2, "two alternatives, or an option that another config needs as well"
    config_lib.check(config)


def test_every_sweep_has_the_number_of_runs_in_the_table():
    listed = re.findall(r"^\| `(\w+)` \| .*?\((\d+)(?: runs)?\)", README, re.M)
    assert {name for name, _ in listed} == sweeps.SWEEPS.keys()
    counts = {name: int(count) for name, count in listed}
    assert counts.pop("lomt") == 6 * len(sweeps.trials("lomt")), "four single-task and two multi-task runs a seed"
    assert counts == {name: len(sweeps.trials(name)) for name in counts}


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = [line for line in README.splitlines() if line.endswith("-m pytest")]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_ci_and_the_hooks_run_the_same_checks():
    checks = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith(".venv/bin/")]
    hooks = re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert [check.removesuffix(" .") for check in checks] == [hook.removesuffix(" --force-exclude") for hook in hooks]


def test_the_version_is_the_same_everywhere():
    version = mtl_sparse.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_linked_file_exists(path):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    missing = [link for link in links if not link.startswith("https://") and not (path.parent / link).exists()]
    assert missing == []
    assert path.name != "README.md" or len(links) > 20


def exists(name):
    """Return whether the repository has a file (a/b.py) or folder, or Python finds a name (a.b.c)."""
    if "/" in name:
        return (ROOT / name).exists()
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_named_module_and_file_exists(path):
    text = path.read_text()
    if path.name == "CHANGELOG.md":  # it names former modules in the first column of a table
        text = re.sub(r"(?m)^  \| .*? \| ", "", text)
    name = rf"(?:{FOLDERS})(?:/[\w.]+)*/?|(?:mtl_sparse|input_pipeline)(?:\.\w+)+"
    names = set(re.findall(rf"`({name})(?:\(.*?\))?`", text))
    assert [name for name in sorted(names) if not exists(name)] == []
    assert path.name != "README.md" or len(names) > 20


def test_the_documents_name_tests_that_exist():
    """`faults_test.py::test_a_clock...` needs a function of this beginning, and `::test_...` one in any file."""
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("*_test.py")}
    text = "".join(path.read_text() for path in DOCUMENTS)
    named = [pair for pair in re.findall(r"`(\w+_test\.py)?(?:::(\w+))?[.]*`", text) if any(pair)]
    for file, function in named:
        texts = [files[file]] if file else files.values()
        assert any(f"def {function}" in text for text in texts), f"{file}::{function}"
    assert len(named) > 20
