"""What all jobs have in common."""

import importlib
import inspect
import pathlib

import pytest

from mtl_sparse import jobs
from mtl_sparse.jobs import cli

MODULES = sorted(
    path.stem for path in pathlib.Path(jobs.__file__).parent.glob("[a-z]*.py") if not path.stem.startswith("cli")
)


@pytest.mark.parametrize("name", MODULES)
def test_every_job_takes_a_config_and_a_folder_first(name):
    run_job = importlib.import_module(f"mtl_sparse.jobs.{name}").run_job
    assert list(inspect.signature(run_job).parameters)[:2] == ["config", "workdir"]


def test_every_job_is_on_the_command_line():
    assert {name.removesuffix("_reference") for name in MODULES} == cli.JOBS.keys()
