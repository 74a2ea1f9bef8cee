"""What the README shows is run as it stands there."""

import pathlib
import re

import jax
import numpy as np
from flax import jax_utils

from input_pipeline import loader
from mtl_sparse import run as run_lib
from mtl_sparse import tasks, train

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def snippet(containing):
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if containing in block]
    return found


def test_somebody_elses_model(capsys):
    exec(snippet("proximal_adam"), {})
    percentage, groups = re.fullmatch(r"(\d+) % of (\d+) groups are zero\n", capsys.readouterr().out).groups()
    assert abs(int(percentage) - 70) <= 2
    assert int(groups) == 3 + 32 + 32


def test_a_task_of_your_own(config, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    exec(snippet("TASKS["), {})
    config.tasks = ("segmentation", "depth_l1")
    run = run_lib.setup(config)
    state, scalars = train.make_train_step(run)(
        jax_utils.replicate(run.init_state()), loader.shard(next(run.train_batches(0)))
    )
    assert 0 < float(scalars["depth_l1/loss"][0]) < 1
    assert state.params["model"]["head_depth_l1"]["out"]["kernel"].shape[-1] == 1
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(np.isfinite(leaf).all()), state.params))


def test_ci_runs_the_test_command_of_the_readme():
    (command,) = [line for line in README.splitlines() if line.endswith("-m pytest")]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_every_file_that_is_linked_exists():
    missing = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not (ROOT / link).exists()]
    assert not missing
