"""LOMT's published choices, from the command in docs/sweeps.md to the exported compact model."""

import pathlib
import re
import shlex

import jax
import numpy as np
import pytest

from configs import run as run_config
from mtl_sparse.jobs import cli, export, train
from mtl_sparse.pretrained import reference
from mtl_sparse.report import page, study
from mtl_sparse.training import setup as setup_lib
from tests.conftest import tiny

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "sweeps.md").read_text()


def given(flag):
    """Return the names that the page's command with raw attachment points gives to a flag."""
    commands = re.findall(r"^python launch\.py (?:.*\\\n)*.*", PAGE, re.M)
    (command,) = [command for command in commands if "--config.model.attach" in command and ":raw" in command]
    arguments = cli.normalize(shlex.split(command.replace("\\\n", " "))[1:])
    return tuple(re.findall(r"'(.*?)'", cli.option(arguments, flag)))


@pytest.mark.slow
def test_the_published_choices_run_as_published(rooms, tmp_path):
    """A narrow ResNet-50, with a penalty: trained, compacted and exported, and reported."""
    tasks, attach = given("--config.tasks"), given("--config.model.attach")
    assert dict(zip(tasks, attach, strict=True)) == reference.PUBLISHED[0][1]
    config = tiny(rooms)
    config.tasks, config.model.attach = tasks, attach
    config.model.depth = 50
    config.sparsity.update(lambda_=0.1, warmup_steps=0)
    config.train.epochs, config.run.checkpoint_every_steps = 1, 100
    results = train.train(config, tmp_path / "run")
    assert list(results["headlines"]) == list(tasks) and results["sparsity"]["group"] > 0
    assert all(np.isfinite(value) for value in results["test"].values())
    assert not any(layer["path"].startswith("backbone/layer4_0/conv2") for layer in results["sparsity"]["layers"])
    config = run_config.get_config(str(tmp_path / "run"))
    model, variables = setup_lib.load_model(tmp_path / "run", config)
    assert set(variables["params"]["backbone"]["layer4_0"]) == {"conv1"}, "nothing after it is built"
    program = jax.export.deserialize(bytearray(export.run_job(config, tmp_path / "run").read_bytes()))
    batch = np.random.default_rng(0).normal(size=(2, *config.data.size, 3)).astype(np.float32)
    for task, raw in jax.jit(model.apply)(variables, batch).items():
        np.testing.assert_allclose(program.call(batch)[task], raw, atol=1e-4 * float(np.abs(raw).max()), err_msg=task)
    assert page.write([tmp_path / "run"], tmp_path / "report").exists()
    assert study.read([tmp_path / "run"]).rows[0].attach == list(attach)
