"""One process with one device, one with four, and two with two each give the same run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from mtl_sparse.jobs import train
from mtl_sparse.runtime import processes
from mtl_sparse.runtime.errors import Stopped, UserError
from mtl_sparse.training import loop
from mtl_sparse.training import setup as setup_lib
from tests.conftest import raises, tiny

SCRIPT = """
import json, sys
import jax
from mtl_sparse.runtime import processes
if {count} > 1:
    processes.join("127.0.0.1:{port}", {count}, int(sys.argv[1]))
from mtl_sparse.jobs import train
from tests.runtime.processes_test import twenty_steps
results = train.train(twenty_steps({rooms!r}), {folder!r})
print(json.dumps([jax.device_count(), results["test"]]))
"""


def twenty_steps(rooms):
    """A run with dropout and BatchNorm at global batch 8, with the paper's learning rate.

    The penalty grows over all of it and stays small: at the demo's, Adam and the adaptive metric turn roundings of
    near-zero gradients into differences of a percent.
    """
    config = tiny(rooms)
    config.tasks = ("depth",)
    config.model.update(width=8, attach=("layer2_0",))  # its front, which compiles sooner
    config.optimizer.learning_rate = 1e-4
    config.sparsity.update(lambda_=2e-6, warmup_steps=20)
    config.train.epochs = 10
    return config


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def launched(script, count, devices, **values):
    """Start processes with so many devices each, that run a script with a free {port} and their index as argument."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}"
    script = script.format(count=count, port=port, **values)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "XLA_FLAGS": flags}
    return [subprocess.Popen([*command, str(index)], env=environment, **pipes) for index in range(count)]


@pytest.fixture(scope="module")
def one(rooms, tmp_path_factory):
    """Return (test metrics, lines of metrics.jsonl, folder as it was after step 8) of the run on one device."""
    folder = tmp_path_factory.mktemp("run")
    make_train_step = loop.make_train_step

    def stopping(run):
        step_fn, taken = make_train_step(run), []

        def step(*arguments):
            taken.append(1)
            if len(taken) == 8:
                os.kill(os.getpid(), signal.SIGTERM)
            return step_fn(*arguments)

        return step

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="step 8 of 20"):
        patch.setattr(loop, "make_train_step", stopping)
        train.train(twenty_steps(rooms), folder)
    half = shutil.copytree(folder, tmp_path_factory.mktemp("half"), dirs_exist_ok=True)
    return train.train(twenty_steps(rooms), folder)["test"], rows(folder), half


@pytest.mark.parametrize(
    ("count", "devices", "resumes"),
    [(2, 2, False), *(pytest.param(1, 4, resumes, marks=pytest.mark.slow) for resumes in (True, False))],
)
def test_four_devices_give_the_losses_and_the_evaluation_of_one(one, rooms, tmp_path, count, devices, resumes):
    """From the start, or from a checkpoint that one device wrote; up to rounding, which may move a pixel at a limit."""
    test, lines, half = one
    if resumes:
        shutil.copytree(half, tmp_path, dirs_exist_ok=True)
        assert len(rows(tmp_path)) < len(lines)
    for process in launched(SCRIPT, count, devices, rooms=str(rooms), folder=str(tmp_path)):
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-2000:]
        number, theirs = json.loads(out.splitlines()[-1])  # every process has the results
        assert number == 4 and theirs == pytest.approx(test, rel=1e-4, abs=1e-6)
    assert json.loads((tmp_path / "results.json").read_text())["test"] == theirs
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1 + resumes, "one process writes"
    assert sum(row["split"] == "train" for row in lines) == 20
    assert np.ptp([row["loss"] for row in lines if row["split"] == "train"]) > 0.005, "the losses move"
    for ours, others in zip(lines, rows(tmp_path), strict=True):
        for name, value in ours.items():
            close = {"rel": 1e-4, "abs": 1e-6} if name.endswith("loss") or ours["split"] != "train" else {"rel": 1e-2}
            if "delta" in name and not name.endswith("_stride8"):  # a fraction of the pixels: rounding may move one
                close["abs"] = 1.01 / (2 * 32 * 48)
            assert others[name] == (value if name == "split" else pytest.approx(value, **close)), (ours["step"], name)


AGREE = """
import json, sys
import numpy as np
from mtl_sparse.runtime import processes
from mtl_sparse.runtime.errors import UserError
me = int(sys.argv[1])
processes.join("127.0.0.1:{port}", 2, me)
found = []
def refuse(where):
    if me == where:
        raise UserError(f"CODE_{{where}}", f"process {{where}} cannot")
for call in (lambda: processes.on_first(lambda: refuse(0)), lambda: processes.in_turn(lambda: refuse(1))):
    try:
        call()
    except UserError as error:
        found.append([error.code, str(error)])
found.append(processes.on_first(lambda: {{"ä": me}}))
found.append(processes.in_turn(lambda: me))
tree = {{"x": np.float32([me + 1 / 3, -0.0, np.nan]), "n": np.int32(me + 5), "b": np.array([not me, me], bool),
        "none": np.zeros([0], np.float32)}}
found.append({{name: x.tobytes().hex() for name, x in processes.from_first(tree).items()}})
found.append(processes.total(np.float64([1 / 3 + me, me]))[0])
print(json.dumps(found))
"""


def test_two_processes_agree():
    """On what the first has, to the bit; an error of either, with its code, is raised in both."""
    first = {
        "x": np.float32([1 / 3, -0.0, np.nan]),
        "n": np.int32(5),
        "b": np.array([True, False]),
        "none": np.zeros(0),
    }
    bits = {name: x.tobytes().hex() for name, x in first.items()}
    for index, process in enumerate(launched(AGREE, 2, 1)):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-2000:]
        errors = [["CODE_0", "process 0 cannot"], ["CODE_1", "process 1 cannot"]]
        assert json.loads(out.splitlines()[-1]) == [*errors, {"ä": 0}, index, bits, 1 / 3 + (1 / 3 + 1)]


@pytest.mark.parametrize("what", ["seed", "run.skip_not_finite", "the data"])
def test_a_process_with_other_options_or_data_is_refused(rooms, monkeypatch, what):
    monkeypatch.setattr(processes, "on_first", lambda function: {**function(), what: 9})
    with raises("PROCESSES_DIFFER", naming=f"process 0 ({what})"):
        train._check_alike(setup_lib.setup(twenty_steps(rooms)))


def test_one_process_needs_no_others():
    assert processes.is_first()
    assert processes.on_first(lambda: {"a": 1}) == {"a": 1} and processes.in_turn(lambda: 3) == 3
    for agree in (processes.on_first, processes.in_turn):
        with raises("FILE_MISSING", naming="a.npy"):
            agree(missing)
    tree = {"x": np.arange(3)}
    assert processes.from_first(tree) is tree and processes.total(tree) is tree


def missing():
    raise UserError("FILE_MISSING", "a.npy is missing")


@pytest.mark.parametrize(
    "arguments",
    [("here", 2, 0), ("here:x", 2, 0), ("here:1", None, 0), ("here:1", 2, None), ("here:1", 2, 2), ("here:1", 2, -1)],
)
def test_processes_that_cannot_exist_are_named(arguments):
    coordinator, count, index = arguments
    with raises(
        "OPTION_OUT_OF_RANGE", naming=f"--coordinator={coordinator!r}, --num_processes={count}, --process_id={index}"
    ):
        processes.join(*arguments)


def test_processes_that_do_not_find_each_other_are_named():
    with raises("PROCESSES_NOT_CONNECTED", naming="--coordinator='auto'"):
        processes.join("auto", None, None)
