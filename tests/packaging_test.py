"""setup.cfg declares what the code imports, and its wheel works from any folder."""

import ast
import configparser
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import mtl_sparse
from tests.conftest import new_environment

ROOT = pathlib.Path(__file__).parents[1]
OURS = {"benchmarks", "configs", "input_pipeline", "launch", "mtl_sparse", "tests"}
# Scripts that wrote the reference files of tests/data; they say what they need.
SCRIPTS = {"efficientnet_reference.py", "imagenet_reference.py"}


def declared(option):
    """Normalized names of the requirements in setup.cfg: those of the core for "", or of an extra."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    text = parser["options.extras_require"][option] if option else parser["options"]["install_requires"]
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {normalized(re.match(r"[\w.-]+", line).group()) for line in lines}


def normalized(name):
    return re.sub("[-_.]+", "-", name).lower()


def imported(*places):
    """{top-level module: the files below ROOT that import it}, without the standard library and this project."""
    found = {}
    for place in places:
        path = ROOT / place
        for file in [path] if path.is_file() else path.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())) if file.name not in SCRIPTS else ():
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - OURS:
                    found.setdefault(name, set()).add(str(file.relative_to(ROOT)))
    return found


def undeclared(modules, requirements):
    """The modules of which no distribution is among the requirements."""
    by_module = importlib.metadata.packages_distributions()
    return {
        module: sorted(files)
        for module, files in modules.items()
        if not {normalized(name) for name in by_module.get(module, [module])} & requirements
    }


def test_what_the_package_imports_is_declared():
    optional = declared("onnx") | declared("slurm") | declared("torch")
    modules = imported("mtl_sparse", "input_pipeline", "configs", "launch.py")
    assert undeclared(modules, declared("") | optional) == {}
    assert {"scipy", "cv2", "tensorflow_datasets"} <= modules.keys()


def test_what_the_tests_import_is_declared():
    modules = imported("tests", "benchmarks")
    assert undeclared(modules, declared("") | declared("test") | declared("torch") | declared("browser")) == {}
    assert {"pytest", "nbformat"} <= modules.keys()


def test_tensorflow_is_in_no_requirement_but_its_extra():
    assert "tensorflow-cpu" in declared("tensorflow")
    for option in ("", "test", "docs", "onnx", "slurm", "torch", "gpu"):
        assert not declared(option) & {"tensorflow", "tensorflow-cpu"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return a wheel of the project, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("mtl_sparse", "input_pipeline", "configs", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("launch.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], cwd=source, capture_output=True, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """Return a folder with the wheel's packages and the command that pip makes of its entry point."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    (entry,) = importlib.metadata.Distribution.at(next(folder.glob("*.dist-info"))).entry_points
    command = folder / "bin" / entry.name
    command.parent.mkdir()
    command.write_text(f"import {entry.module}\n{entry.module}.{entry.attr}()\n")
    return folder


@pytest.fixture
def project(tmp_path):
    """Return a folder of a user who has packages named configs and input_pipeline."""
    for name, module in (("configs", "mine"), ("input_pipeline", "datasets")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / f"{module}.py").write_text("OWN = True\n")
    return tmp_path


def python(*arguments, site, cwd, path=()):
    """Run Python with the wheel's packages installed in `site`, and return what it printed as (stdout, stderr)."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, site]))}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_the_wheel_has_the_code_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    code = [ROOT / "launch.py", ROOT / "mtl_sparse" / "py.typed", ROOT / "mtl_sparse" / "report" / "page.html"]
    code += [path for part in ("mtl_sparse", "input_pipeline", "configs") for path in (ROOT / part).rglob("*.py")]
    metadata = [name for name in names if name.startswith(f"mtl_sparse-{mtl_sparse.__version__}.dist-info/")]
    assert sorted(set(names) - set(metadata)) == sorted(str(path.relative_to(ROOT)) for path in code)


def test_the_command_finds_its_configs_and_data_from_the_folder_of_another_project(site, project, rooms):
    options = ["--config=configs/demo.py", "--config.data.embedded.frames=0", f"--config.data.folder={rooms}"]
    options += ["--config.data.size=(32, 48)", "--job=prepare"]
    code, out, err = python(site / "bin" / "mtl-sparse", *options, site=site, cwd=project)
    assert code == 0 and "test: 9 images" in out, err


def test_the_command_names_a_package_that_hides_its_own(site, project):
    command = site / "bin" / "mtl-sparse"
    code, _, err = python(command, "--config=configs/demo.py", site=site, cwd=project, path=[project])
    assert code == 2 and "Traceback" not in err
    assert f"{project}/configs" in err and str(site) in err and "[PACKAGE_SHADOWED]" in err


SCRIPT = """
import sys
import configs.mine, input_pipeline.datasets
import jax.numpy as jnp, mtl_sparse
from mtl_sparse import compaction, tasks
from mtl_sparse.tasks import weighting

assert configs.mine.OWN and input_pipeline.datasets.OWN
params = {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)}
tx = mtl_sparse.proximal_adam(1e-3, lambda_=1e-2)
tx.update(params, tx.init(params), params)
weighting.gradient_weights("mgda", jnp.eye(2))
compaction.compact(lambda params, x: x @ params["bias"], params, jnp.ones((2, 8)))
assert [name for name in sys.modules if name.startswith("input_pipeline.")] == ["input_pipeline.datasets"]
try:
    mtl_sparse.train
except mtl_sparse.UserError as error:
    print(mtl_sparse.__file__, error.code, error)
"""


def test_a_project_with_packages_of_the_same_names_uses_all_but_training(site, project):
    (project / "script.py").write_text(SCRIPT)
    code, out, err = python("script.py", site=site, cwd=project)
    assert code == 0, err
    file, code, *message = out.split()
    assert file == str(site / "mtl_sparse" / "__init__.py") and code == "PACKAGE_SHADOWED"
    assert f"{project}/input_pipeline" in " ".join(message)


@pytest.mark.slow
def test_a_run_from_an_installed_wheel(wheel, project):
    """Needs a package index: pip installs the requirements into a new environment."""
    environment = new_environment()

    def run(*command):
        options = {"cwd": project, "env": environment, "check": True, "capture_output": True, "text": True}
        return subprocess.run(list(map(str, command)), **options).stdout

    run(sys.executable, "-m", "venv", "venv")
    run("venv/bin/pip", "install", "-q", wheel)
    options = ["frames=24", "height=32", "width=48"]
    out = run(
        "venv/bin/mtl-sparse", "--config=configs/demo.py", *(f"--config.data.embedded.{option}" for option in options),
        "--config.data.size=(32, 48)", "--config.model.depth=10", "--config.model.width=8", "--config.train.epochs=1",
    )  # fmt: skip
    assert "**cosine**" in out and "--job=compact" in out
    assert (project / "runs" / "demo" / "plots" / "samples.png").is_file()
