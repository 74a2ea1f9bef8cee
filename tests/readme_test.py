"""What the README shows is run as it stands there."""

import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from configs import sweeps
from input_pipeline import datasets, loader
from mtl_sparse import tasks
from mtl_sparse.jobs import train
from mtl_sparse.training import config as config_lib
from mtl_sparse.training import setup as setup_lib
from mtl_sparse.training import state as state_lib
from mtl_sparse.training import step as step_lib

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def snippet(containing):
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if containing in block]
    return found


def test_somebody_elses_model(capsys):
    exec(snippet("proximal_adam"), {})
    percentage, groups = re.fullmatch(r"(\d+) % of (\d+) groups are zero\n", capsys.readouterr().out).groups()
    assert abs(int(percentage) - 70) <= 6, "each group is a whole point, and roundings move some"
    assert int(groups) == 3 + 48 + 48


def test_a_task_of_your_own(config, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    exec(snippet("TASKS["), names := {})
    config.tasks = names["get_config"]().tasks
    run = setup_lib.setup(config)
    state, scalars = step_lib.make_train_step(run)(
        loader.replicate(state_lib.initial(run)), loader.shard(next(run.batches.train(0)))
    )
    assert 0 < float(scalars["depth_l1/loss"]) < 1
    assert state.params["model"]["head_depth_l1"]["out"]["kernel"].shape[-1] == 1
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(np.isfinite(leaf).all()), state.params))


def test_a_data_set_of_your_own(monkeypatch, tmp_path):
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


SETTINGS = [line.split(" | ")[1] for line in README.splitlines() if line.startswith("|") and "--config." in line]


@pytest.mark.parametrize("name", ["nyu", "demo"])
@pytest.mark.parametrize("row", SETTINGS)
def test_every_setting_is_taken_as_it_stands(row, name, monkeypatch):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    arguments = re.findall(r"--config\S*[^\s`,]", row)
    command = ["launch.py", f"--config={ROOT}/configs/{name}.py", *arguments]
    monkeypatch.setattr(sys, "argv", command)  # where config_flags looks for overrides
    values(command)
    config = values.config
    config.tasks = tuple(part for entry in config.tasks for part in entry.split(","))  # as launch.py does
    if "lambda_=1e-4" in row or "penalty" in row:
        assert len(arguments) == 2, "alternatives, or what another config needs"
    config_lib.check(config)


def test_every_sweep_has_as_many_runs_as_it_says():
    said = re.findall(r"^\| `(\w+)` \| .*?\((\d+)(?: runs)?\)", README, re.M)
    assert {name for name, _ in said} == sweeps.SWEEPS.keys()
    counts = {name: int(count) for name, count in said}
    assert counts.pop("lomt") == 6 * len(sweeps.trials("lomt")), "four single tasks and two multi-task runs a seed"
    assert counts == {name: len(sweeps.trials(name)) for name in counts}


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = [line for line in README.splitlines() if line.endswith("-m pytest")]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_file_that_is_linked_exists():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("https://")]
    missing = [link for link in links if not (ROOT / link).exists()]
    assert len(links) > 20 and not missing
