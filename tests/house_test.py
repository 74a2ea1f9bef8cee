"""Rules of this project that no linter checks: short functions, few arguments, a light import."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = [
    ROOT / "launch.py",
    *sorted(path for part in ("mtl_sparse", "input_pipeline") for path in (ROOT / part).rglob("*.py")),
]
MOST_LINES, MOST_ARGUMENTS = 60, 10
PRESETS = ("proximal_adam",)  # published, with the arguments of what they are made of


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short_and_take_few_arguments(path):
    """Lines count from `def` to the end, without the docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first, *others = node.body
            documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            docstring = first.end_lineno - first.lineno + 1 if documented and others else 0
            lines = node.end_lineno - node.lineno + 1 - docstring
            assert lines <= MOST_LINES, f"{node.name} has {lines} lines"
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
            assert count <= MOST_ARGUMENTS or node.name in PRESETS, f"{node.name} takes {count} arguments"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_user_error_has_a_code(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UserError", "RunsFailed"):
            assert len(node.args) == 2 or isinstance(node.args[0], ast.Starred), f"line {node.lineno}"


def test_importing_the_package_is_light():
    heavy = ("tensorflow", "cv2", "matplotlib", "tensorflow_datasets", "orbax", "clu", "grain")
    heavy += ("configs", "input_pipeline")  # names that the importing project may have as well
    code = f"import sys, mtl_sparse; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
