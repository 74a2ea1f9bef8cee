"""setup.cfg declares what the code imports."""

import ast
import configparser
import importlib.metadata
import pathlib
import re
import sys

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
    assert undeclared(modules, declared("") | declared("test") | declared("torch")) == {}
    assert {"pytest", "nbformat"} <= modules.keys()


def test_tensorflow_is_in_no_requirement_but_its_extra():
    assert "tensorflow-cpu" in declared("tensorflow")
    for option in ("", "test", "docs", "onnx", "slurm", "torch", "gpu"):
        assert not declared(option) & {"tensorflow", "tensorflow-cpu"}
