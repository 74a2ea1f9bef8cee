"""--help and --config_help: complete, generated from the code that they describe, and quick."""

import os
import subprocess
import sys

import pytest

from configs import demo, nyu
from mtl_sparse.jobs import cli, cli_help
from tests.conftest import raises
from tests.launch_test import ROOT, launch

OPTIONS = cli_help.options((ROOT / "configs" / "nyu.py").read_text())


def flat(config):
    return dict(cli_help._flat(config.to_dict()))


def test_help_names_every_job_flag_and_config():
    done = launch("--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = done.stdout
    assert text == launch("-h").stdout and "\x1b" not in text
    found = {line.split()[0] for line in text.splitlines() if line.strip()}
    assert cli.JOBS.keys() <= found
    assert {"--config", "--workdir", "--job", "--config_help", "--num_processes"} <= found
    assert {f"configs/{path.name}" for path in (ROOT / "configs").glob("[a-z]*.py")} <= found
    assert all(" ".join(what.split()) in " ".join(text.split()) for _, what in cli.JOBS.values()), "their help as well"
    assert "python launch.py --config=FILE" in text and max(map(len, text.splitlines())) <= 100


def test_the_installed_command_has_its_own_name_and_may_be_cut_off(tmp_path):
    command = f"{sys.executable} -m mtl_sparse --config_help | head -1; {sys.executable} -m mtl_sparse --help"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stderr == "" and done.stdout.startswith("Options of the config")
    assert "  mtl-sparse --config=FILE" in done.stdout and "launch.py" not in done.stdout


def test_absls_help_is_still_there():
    assert "--[no]alsologtostderr" in launch("--helpfull").stdout


@pytest.mark.parametrize("flag", ["--help", "--config_help", "--config=configs/demo.py --config_help=tasks"])
def test_help_does_not_wait_for_heavy_libraries(flag):
    code = (
        f"import sys; sys.argv = ['launch.py', *{flag.split()}]\n"
        "import launch\n"
        "try: launch.run(sys.argv)\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print([name for name in ('jax', 'flax', 'tensorflow', 'matplotlib', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_every_option_is_listed_with_its_default():
    expected = flat(nyu.get_config())
    assert {option.path: cli_help.ast.literal_eval(option.default) for option in OPTIONS} == expected
    text = cli_help.config_help()
    assert [f"  {option.path}={option.default}" for option in OPTIONS] == [
        line for line in text.splitlines() if line.startswith("  ") and not line.startswith("    ")
    ]


def test_every_option_has_a_meaning():
    assert [option.path for option in OPTIONS if len(option.meaning) < 4] == []


SOURCE = """
def get_config():
    other = create(no=1)
    config = create(
        a=1,  # first
        # Both
        # of them.
        b=(1, 2),
        c="# none",
        d=4,  # alone
        e=5,
        # A section.
        s=create(
            f=6,
            # Inside.
            g=7,  # more
            t=create(h=8, i=9),  # on one line
        ),
        j=10,
        u=create(k=11),  # after
    )
    return config.lock()
"""


def test_comments_belong_to_the_options_below_and_beside_them():
    assert [(option.path, option.default, option.meaning) for option in cli_help.options(SOURCE)] == [
        ("a", "1", "first"),
        ("b", "(1, 2)", "Both of them."),
        ("c", '"# none"', "Both of them."),
        ("d", "4", "alone"),
        ("e", "5", ""),
        ("s.f", "6", "A section."),
        ("s.g", "7", "Inside. more"),
        ("s.t.h", "8", "on one line"),
        ("s.t.i", "9", "on one line"),
        ("j", "10", ""),
        ("u.k", "11", "after"),
    ]


def named(text):
    return [line.strip().partition("=")[0] for line in text.splitlines() if line.startswith("  ") and line[2] != " "]


def test_a_part_of_a_name_or_of_a_meaning_chooses_options():
    sparsity = [option.path for option in OPTIONS if option.path.startswith("sparsity.")]
    assert named(cli_help.config_help("sparsity")) == sparsity and len(sparsity) > 20
    assert named(cli_help.config_help("config.Sparsity.target_")) == [
        f"sparsity.target_{name}" for name in ("macs", "params", "ramp", "freeze")
    ]
    assert "train.bn_frames" in named(cli_help.config_help("BatchNorm")), "in no name, and in meanings"
    with raises("OPTION_UNKNOWN", naming="sparsity.lambda_"):
        cli_help.config_help("sparsity.lamda_")


def test_the_values_of_a_config_file_are_shown():
    done = launch("--config=configs/demo.py", "--config_help=sparsity.target")
    assert "  sparsity.target=0.7  (default: 0.0)\n" in done.stdout
    assert demo.get_config().sparsity.target == 0.7 and "  sparsity.target_macs=0.0\n" in done.stdout
    done = launch("--config_help=lamda_")
    assert done.returncode == 2 and "lambda_" in done.stderr and "[OPTION_UNKNOWN]" in done.stderr
