"""launch.py as a user calls it."""

import ast
import contextlib
import json
import os
import pathlib
import pty
import re
import signal
import subprocess
import sys

import pytest

from mtl_sparse.runtime import environment
from tests.report.study_test import write_run

ROOT = pathlib.Path(__file__).parents[1]


def launch(*arguments, cwd=ROOT, **options):
    command = [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, **options)


# Arguments, and the names and values that the message must have: what is wrong, and what is near it or possible.
BAD = {
    "unknown field": (["--config=configs/demo.py", "--config.sparsity.lamda=1"], ["lamda", "lambda_"]),
    "underscore forgotten": (
        ["--config=configs/demo.py", "--config.sparsity.lambda=1"],
        ["config.sparsity.lambda;", "config.sparsity.lambda_"],
    ),
    "section forgotten": (
        ["--config=configs/demo.py", "--config.height=64"],
        ["config.height", "config.data.embedded.height"],
    ),
    "wrong type": (["--config=configs/demo.py", "--config.train.epochs=many"], ["epochs", "many"]),
    "no config": (["--workdir=x"], ["--config=configs/demo.py"]),
    "missing config": (["--config=configs/kitti.py"], ["configs/kitti.py", "[FILE_MISSING]"]),
    "missing run": (["--config=configs/run.py:/nowhere/run"], ["/nowhere/run/config.json"]),
    "unknown task set": (["--config=configs/celebamask_hq.py:seg+smile"], ["'seg+smile'", "male"]),
    "unknown job": (["--config=configs/demo.py", "--job=trian"], ["'trian'", "train, evaluate", "[JOB_UNKNOWN]"]),
    "stray argument": (
        ["--config=configs/demo.py", "train"],
        ["'train'", "--config.FIELD=VALUE", "[ARGUMENT_UNKNOWN]"],
    ),
    "no data folder": (
        ["--config=configs/nyu.py", "--config.data.folder=/nowhere/NYUD_MT", "--config.train.batch_size=8"],
        ["/nowhere/NYUD_MT", "[DATA_FOLDER_MISSING]"],
    ),
    "nothing to import": (
        ["--job=import", "--checkpoint=/nowhere/weights.pt"],
        ["/nowhere/weights.pt", "[FILE_MISSING]"],
    ),
    "unknown task": (
        ["--config=configs/nyu.py", "--config.tasks=('albedo',)"],
        ["'albedo'", "segmentation", "[TASK_UNKNOWN]"],
    ),
    "tasks of numbers": (["--config=configs/nyu.py", "--config.tasks=(1,)"], ["'1'", "segmentation"]),
    "trials twice": (
        ["--config=configs/sweeps.py:table1:demo", "--job=sweep", "--grid=seed=0"],
        ["table1:demo", "--grid", "[OPTION_CONFLICT]"],
    ),
    "nothing to register": (
        ["--config=configs/demo.py", "--register=/nowhere/mine.py"],
        ["/nowhere/mine.py", "[FILE_MISSING]"],
    ),
    "negative lambda": (
        ["--config=configs/nyu.py", "--config.sparsity.lambda_=-1"],
        ["lambda_", "-1", "[OPTION_SPARSITY]"],
    ),
    "several processes": (
        ["--config=configs/demo.py", "--coordinator=here", "--num_processes=2", "--process_id=2"],
        ["--coordinator='here'", "--num_processes=2", "--process_id=2"],
    ),
    "a job for one process": (
        ["--config=configs/demo.py", "--coordinator=here:1", "--job=compact"],
        ["--coordinator", "compact", "[JOB_ONE_PROCESS]"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_a_non_zero_exit(case, tmp_path):
    arguments, names = BAD[case]
    done = launch(*arguments, *([] if "--workdir=x" in arguments else [f"--workdir={tmp_path / 'run'}"]))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    *_, sentence = [line for line in done.stderr.splitlines() if line.strip()]
    assert sentence.startswith("error: "), done.stderr
    assert all(name in sentence for name in names), done.stderr
    assert not (tmp_path / "run").exists(), "nothing is written for a run that cannot start"


def tiny_run(rooms, workdir):
    """Return the arguments of a run of seconds."""
    return [
        "--config=configs/demo.py",
        f"--workdir={workdir}",
        "--config.data.embedded.frames=0",
        f"--config.data.folder={rooms}",
        "--config.data.size=(32, 48)",
        f"--register={ROOT}/tests/register_backbones.py",
        "--config.model.backbone=own",
        "--config.sparsity.target=0",
        "--config.model.head_features=4",
        "--config.train.batch_size=8",
        "--config.train.epochs=1",
        "--config.tasks=normals,edge",
    ]


def test_training_from_the_command_line(rooms, tmp_path):
    workdir = tmp_path / "run"
    done = launch(*tiny_run(rooms, workdir), env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "**cosine**" in done.stdout and "% of groups zero" in done.stdout
    lines = done.stderr.splitlines()
    assert [line for line in lines if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line)] == []
    assert any("2/2 steps, " in line for line in lines) and any("epoch 1/1" in line for line in lines)
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout + done.stderr, "no control codes"
    assert "checkpoint_manager" not in done.stderr, "only this project's log lines"
    assert (workdir / "log.txt").read_text().splitlines() == lines
    assert f"  {workdir / 'results.json'} " in done.stdout and f"  {workdir / 'log.txt'} " in done.stdout
    results = json.loads((workdir / "results.json").read_text())
    assert results["config"]["tasks"] == ["normals", "edge"]
    assert results["config"]["data"]["size"] == [32, 48]

    table = launch("--config=configs/demo.py", f"--workdir={workdir}", "--job=report")
    assert table.returncode == 0, table.stderr[-2000:]
    assert "**cosine**" in table.stdout and "samples.png" in table.stdout


def in_a_terminal(*arguments, signal_at=(), **environment):
    """Return (exit code, output) of launch.py in a pseudo terminal; send a signal when a text appears."""
    env = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    env |= {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", **environment}
    command = [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)]
    parent, child = pty.openpty()
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=child, stdout=child, stderr=child)
    os.close(child)
    output = b""
    with contextlib.suppress(OSError):  # EIO, when the process has closed the terminal
        while data := os.read(parent, 65536):
            output += data
            if signal_at and signal_at[0].encode() in output:
                process.send_signal(signal_at[1])
                signal_at = ()
    os.close(parent)
    return process.wait(timeout=60), output.decode()


@pytest.mark.slow
def test_training_in_a_terminal(rooms, tmp_path):
    workdir = tmp_path / "run"
    code, output = in_a_terminal(*tiny_run(rooms, workdir))
    assert code == 0, output[-2000:]
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l"), "the cursor is visible at the end"
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", output)
    for phase in ("loading libraries", "opening the data", "making the initial weights", "compiling the training step",
                  "evaluating the validation split", "evaluating the test split", "drawing the plots"):  # fmt: skip
        assert phase in text, phase
    shown = (
        r"training, epoch 1/1 .* 2/2 steps, .*, .* left",
        r"losses +normals \d.*, edge \d",
        r"validation +epoch 1: normals cosine",
        r"sparsity +\d.* % of groups zero",
        r"lambda +\d",
    )
    assert [line for line in shown if not re.search(line, text)] == []
    assert not re.search(r"\] Setting|^[IW]\d{4} ", text, re.M), "no lines of absl"
    *_, summary = text.partition("\r\ndone in ")
    assert f"  {workdir / 'results.json'} " in summary and "--job=compact" in summary and "\x1b" not in summary
    assert "epoch 1/1, validation" in (workdir / "log.txt").read_text()
    assert "\x1b" not in (workdir / "log.txt").read_text()


def test_warnings_and_tracebacks_are_seen_in_a_terminal(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import warnings\n"
        "from mtl_sparse.runtime import progress\n"
        "with progress.phase('mine'):\n"
        "    warnings.warn('old function', FutureWarning)\n"
        "    1 / 0\n"
    )
    code, output = in_a_terminal("--config=configs/demo.py", f"--register={tmp_path / 'mine.py'}")
    assert code == 1 and output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    assert re.search(r"\x1b\[1;33m[^\x1b]*FutureWarning: old function", output), output
    assert output.index("old function") < output.index("Traceback (most recent call last)")
    assert "ZeroDivisionError: division by zero\r\n" in output[output.rindex("\x1b[?25h") :]


@pytest.mark.slow
def test_a_run_that_is_interrupted_leaves_the_terminal_as_it_was(rooms, tmp_path):
    """Ctrl-C while the first step compiles: the step is saved first."""
    arguments = [*tiny_run(rooms, tmp_path / "run"), "--config.train.epochs=2"]
    code, output = in_a_terminal(*arguments, signal_at=("compiling the training", signal.SIGINT), NO_COLOR="1")
    assert code == os.EX_TEMPFAIL, output[-2000:]
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    assert "WARNING: SIGINT received" in output and "stopped at step 1 of 4" in output
    assert "WARNING: stopped at step 1 of 4" in (tmp_path / "run" / "log.txt").read_text()
    assert not re.search(r"\x1b\[[\d;]*3\d", output), "no colors"


def test_a_locale_without_unicode_gets_every_page_and_table(tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        write_run(tmp_path / name, ("depth",), 1e-5, seed, mae=0.1)
    runs = [f"--runs={tmp_path / 'one'},{tmp_path / 'two'}", f"--workdir={tmp_path}"]
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = launch("--config=configs/nyu.py", "--job=report", *runs, env=plain)
    assert done.returncode == 0, done.stderr[-2000:]
    assert r"depth MAE \u2193" in done.stdout, "the arrow as ASCII"
    for name in ("index.html", "summary.md", "summary.csv"):
        assert "depth MAE ↓" in (tmp_path / "report" / name).read_text(encoding="utf-8")


def test_attributes_are_named_with_commas_between(faces, tmp_path):
    """ml_collections alone fails on a colon in a tuple of names without quotes: it reads the value as Python."""
    done = launch(
        "--config=configs/demo_faces.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.data.embedded.frames=0",
        f"--config.data.folder={faces}",
        "--config.tasks=segmentation,attribute:Eyeglasses,attribute:Yung",
    )
    assert "error: " in done.stderr and "'attribute:Yung'" in done.stderr
    assert "attribute:Young" in done.stderr, "the nearest"


OWN = """
import numpy as np
from configs import demo
from input_pipeline.datasets import DATASETS, Data

def samples(count):
    rng = np.random.default_rng(count)
    image = lambda: rng.integers(0, 256, (32, 48, 3), np.uint8)
    return [{"image": image(), "depth": rng.uniform(1, 9, (32, 48)).astype(np.float32)} for _ in range(count)]

DATASETS["mine"] = lambda config: Data(samples(16), samples(8), samples(9))

def get_config():
    config = demo.get_config()
    config.tasks = ("depth",)
    config.data.update(name="mine", size=(32, 48))
    config.model.update(width=4, head_features=4)
    config.train.epochs = 1
    config.run.summary_rounds = 0
    config.sparsity.update(target=0.0)
    return config
"""


@pytest.mark.slow
def test_a_sweep_over_a_custom_data_set(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    sweep = f"--workdir={tmp_path / 'sweep'}"
    grid = "--grid=optimizer.learning_rate=1e-3,1e30"
    done = launch(f"--config={tmp_path / 'mine.py'}", "--job=sweep", grid, sweep)
    assert done.returncode == 2 and "error: 1 of 2 " in done.stderr, done.stderr
    assert "learning_rate=1e+30" in done.stderr
    assert (tmp_path / "sweep" / "report" / "index.html").exists(), "of the run that has finished"
    trial = tmp_path / "sweep" / "learning_rate=0.001"
    done = launch(f"--config={ROOT}/configs/run.py:{trial}", "--job=evaluate", f"--register={tmp_path / 'mine.py'}")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these options")
@pytest.mark.parametrize("own", [None, "", "glibc.malloc.arena_max=1"])
def test_a_run_has_the_fast_environment_unless_the_user_sets_another(own, tmp_path):
    """The process of the run starts with it, and with the arguments that were given."""
    (tmp_path / "mine.py").write_text(
        "import os; print(open('/proc/self/environ').read().split(chr(0)), dict(os.environ))"
    )
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    env |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"} | ({} if own is None else {"GLIBC_TUNABLES": own})
    arguments = f"--config={ROOT}/configs/demo.py", "--job=report", f"--register={tmp_path / 'mine.py'}"
    done = launch(*arguments, f"--workdir={tmp_path / 'a folder'}", cwd=tmp_path, env=env)
    assert f"{tmp_path / 'a folder'}/results.json" in done.stderr
    started, now = ast.literal_eval(done.stdout.replace("] {", "], {"))
    assert f"GLIBC_TUNABLES={'glibc.malloc.hugetlb=1' if own is None else own}" in started
    flags = "--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
    flags += " --xla_gpu_enable_triton_gemm=false"
    assert now["XLA_FLAGS"] == f"{env['XLA_FLAGS']} {flags}", "after the user's own"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these options")
def test_a_users_choice_of_xlas_library_stays(monkeypatch):
    own = "--xla_cpu_experimental_ynn_fusion_type=+LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
    own += " --xla_gpu_enable_triton_gemm=true"
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setenv("XLA_FLAGS", own)
    assert not environment.tune() and os.environ["XLA_FLAGS"] == own


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these options")
@pytest.mark.parametrize(
    ("jaxlib", "has_library", "has_emitters"),
    [
        ("0.9.2", False, False),
        ("0.10.0", True, True),
        ("0.11.0", True, True),
        ("0.11.1", True, False),
        ("0.12.0.1", True, False),
        ("0.13.0", False, False),
        ("0.13.0.dev20270101", False, False),
        ("1.0", False, False),
    ],
)
def test_a_flag_that_jaxlib_may_not_know_is_not_set(monkeypatch, jaxlib, has_library, has_emitters):
    """XLA ends a process with an unknown flag."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"jaxlib": jaxlib}[name])
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setenv("XLA_FLAGS", "")
    assert not environment.tune()
    assert ("ynn" in os.environ["XLA_FLAGS"]) == has_library
    assert ("triton" in os.environ["XLA_FLAGS"]) == has_library
    assert environment.knows(environment.FUSION_EMITTERS) == has_emitters


def test_each_task_set_has_its_own_folder(tmp_path):
    done = launch(f"--config={ROOT}/configs/celebamask_hq.py:seg+male", "--job=report", cwd=tmp_path)
    assert "error: " in done.stderr and "runs/celebamask_hq_seg+male/results.json" in done.stderr
