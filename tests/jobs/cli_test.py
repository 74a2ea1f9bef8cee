"""The parsing of the command line, without starting launch.py."""

import pathlib
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from mtl_sparse.jobs import cli
from tests.conftest import raises

ROOT = pathlib.Path(__file__).parents[2]
NYU = f"--config={ROOT / 'configs' / 'nyu.py'}"

NORMALIZED = {
    "a space before the value": (["--config.tasks", "depth"], ["--config.tasks=('depth',)"]),
    "a colon in a name": (
        ["--config.tasks=a,attribute:Smiling"],
        ["--config.tasks=('a', 'attribute:Smiling')"],
    ),
    "a tuple": (["--config.tasks=('a','b')"], ["--config.tasks=('a','b')"]),
    "a list": (["--config.tasks", "['a', 'b']"], ["--config.tasks=['a', 'b']"]),
    "a string": (["--config.tasks='a'"], ["--config.tasks='a'"]),
    "an empty value": (["--config.tasks="], ["--config.tasks=()"]),
    "no value": (["--config.tasks", "--workdir=x"], ["--config.tasks", "--workdir=x"]),
    "spaces and a trailing comma": (["--config.tasks= a , b,"], ["--config.tasks=('a', 'b')"]),
    "attachment points": (
        ["--config.model.attach", "layer1_0,layer2_0"],
        ["--config.model.attach=('layer1_0', 'layer2_0')"],
    ),
    "twice": (["--config.tasks=a", "--config.tasks", "b"], ["--config.tasks=('a',)", "--config.tasks=('b',)"]),
    "other options": (
        ["--config=c.py", "--config.data.size=(32, 48)", "--workdir", "a,b"],
        ["--config=c.py", "--config.data.size=(32, 48)", "--workdir", "a,b"],
    ),
    "import": (["--job=import", "--checkpoint=x.pt"], [NYU, "--job=import", "--checkpoint=x.pt"]),
    "import after a space": (["--job", "import"], [NYU, "--job", "import"]),
    "a job that is called alike": (["--job=important"], ["--job=important"]),
    "import with a config": (["--job=import", "--config=c.py"], ["--job=import", "--config=c.py"]),
    "import with a config after a space": (["--config", "c.py", "--job=import"], ["--config", "c.py", "--job=import"]),
    "another job without a config": (["--job=train"], ["--job=train"]),
    "a config's option is no config": (["--job=import", "--config.seed=1"], [NYU, "--job=import", "--config.seed=1"]),
}


@pytest.mark.parametrize("case", NORMALIZED)
def test_names_become_tuples_and_import_gets_a_config(case):
    given, expected = NORMALIZED[case]
    arguments = ["launch.py", *given]
    assert cli.normalize(arguments) == ["launch.py", *expected]
    assert arguments == ["launch.py", *given], "the arguments that were passed in stay"
    assert cli.normalize(cli.normalize(arguments)) == cli.normalize(arguments)


def test_a_config_of_the_project_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = ROOT / "configs" / "run.py"
    assert cli.normalize(["launch.py", "--config=configs/nyu.py"]) == ["launch.py", NYU]
    assert cli.normalize(["launch.py", "--config", "configs/run.py:a"]) == ["launch.py", "--config", f"{runs}:a"]
    for other in ("configs/mine.py", "nyu.py", "launch.py", "configs", "configs/"):
        assert cli.normalize(["launch.py", f"--config={other}"]) == ["launch.py", f"--config={other}"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "nyu.py").touch()
    assert cli.normalize(["launch.py", "--config=configs/nyu.py"]) == ["launch.py", "--config=configs/nyu.py"]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--job=sweep"], "sweep"),
        (["--job", "sweep"], "sweep"),
        (["--job=a=b"], "a=b"),
        (["--job="], ""),
        (["--job"], ""),
        (["--jobs=sweep", "job=sweep"], ""),
        (["--job=sweep", "--job=train"], "sweep"),
    ],
)
def test_an_option_is_found_in_both_forms(arguments, value):
    assert cli.option(["launch.py", *arguments], "--job") == value


def test_names_are_split_at_commas():
    assert cli.split_names(("a,b", "attribute:Smiling")) == ("a", "b", "attribute:Smiling")
    assert cli.split_names(("a, b",)) == ("a", "b") and cli.split_names(()) == ()
    assert cli.split_names((1,)) == ("1",), "which is then an unknown task"


def test_folders_with_commas_in_their_names_stay_whole(tmp_path, monkeypatch):
    """Earlier versions separated the options in a trial's name by commas."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "lambda_=1,seed=0", "b"):
        pathlib.Path(name).mkdir()
    parts = "a,lambda_=1,seed=0,b".split(",")
    assert cli.existing_folders(parts) == ["a", "lambda_=1,seed=0", "b"]
    assert cli.existing_folders([*parts, "missing", "too"]) == ["a", "lambda_=1,seed=0", "b", "missing", "too"]
    assert cli.existing_folders([""]) == []


def test_a_config_is_a_file_and_its_argument(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("")
    assert cli.split_config(str(path)) == (path, "")
    assert cli.split_config(f"{path}:a:b") == (path, "a:b")
    with raises("FILE_MISSING", naming=str(tmp_path / "other.py")):
        cli.split_config(f"{tmp_path / 'other.py'}:a")


@pytest.mark.parametrize(
    ("job", "config", "argument", "folder"),
    [
        ("train", "demo", "", "runs/demo"),
        ("train", "celebamask_hq", "seg+male", "runs/celebamask_hq_seg+male"),
        ("sweep", "sweeps", "table1:demo", "runs/sweeps_table1_demo"),
        ("lomt", "sweeps", "lomt:demo", "runs/sweeps_lomt_demo"),
        ("lomt", "demo", "", "runs/demo_lomt"),
        ("compact", "run", "runs/mine", "runs/mine"),
    ],
)
def test_each_config_has_a_folder(job, config, argument, folder):
    assert cli.default_workdir(job, pathlib.Path(f"configs/{config}.py"), argument) == folder


def message(arguments, error=None):
    return cli.parse_error([f"--config={ROOT}/configs/demo.py", *arguments], error or KeyError("no such field"))


def test_an_unknown_option_is_named_with_the_nearest_ones():
    text = message(["--config.seed=1", "--config.sparsity.lamda=1"])
    assert "config.sparsity.lamda" in text and "config.sparsity.lambda_" in text
    assert "config.data.embedded.height" in message(["--config.height=64"])


def test_a_parse_error_is_one_line():
    assert "configs/demo.py" in cli.parse_error([], ValueError("flag --config must have a value other than None"))
    text = message(["--config.seed=x"], ValueError("cannot parse\n x"))
    assert text.endswith("cannot parse x") and "\n" not in text
    wrapped = OSError("Traceback ...\\n mtl_sparse.runtime.errors.UserError: a.json is missing\\n")
    assert message([], wrapped) == "a.json is missing"


def test_a_file_to_register_is_run(tmp_path):
    (tmp_path / "mine.py").write_text("x = 3")
    assert cli.run_file(str(tmp_path / "mine.py")).x == 3
    with raises("FILE_MISSING", naming=f"--register={tmp_path / 'other.py'}"):
        cli.run_file(str(tmp_path / "other.py"))
    (tmp_path / "mine.txt").write_text("x = 3")
    with raises("FILE_DAMAGED", naming=f"--register={tmp_path / 'mine.txt'}"):
        cli.run_file(str(tmp_path / "mine.txt"))


def test_names_with_a_colon_reach_the_config(monkeypatch):
    """Through `normalize`, the flag of ml_collections and `split_names`, as in launch.py."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    command = cli.normalize(
        ["launch.py", f"--config={ROOT}/configs/demo.py", "--config.tasks", "depth,attribute:Smiling"]
    )
    monkeypatch.setattr(sys, "argv", command)  # config_flags reads overrides from it
    values(command)
    assert cli.split_names(values.config.tasks) == ("depth", "attribute:Smiling")
