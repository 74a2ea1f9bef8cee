"""Other packages named configs or input_pipeline are found out, and none is imported to find them."""

import sys

import pytest

from mtl_sparse.runtime import installed
from tests.conftest import raises

NAMES = ("configs", "input_pipeline")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return a folder at the head of sys.path, in a process that has imported neither package."""
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_packages_beside_mtl_sparse_pass(project):
    installed.check(*NAMES)
    assert not set(NAMES) & set(sys.modules), "nothing was imported"


@pytest.mark.parametrize("name", NAMES)
def test_another_package_of_the_name_is_reported_with_its_folder(project, name):
    (project / name).mkdir()
    (project / name / "__init__.py").touch()
    with raises("PACKAGE_SHADOWED", naming=str(project / name)) as caught:
        installed.check(*NAMES)
    assert str(installed.ROOT) in str(caught.value)


def test_another_module_of_the_name_is_reported_with_its_file(project):
    (project / "configs.py").touch()
    with raises("PACKAGE_SHADOWED", naming=str(project / "configs.py")):
        installed.check("configs")


def test_a_missing_package_is_reported(project, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(project)])
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:3])  # without the finder of an editable installation
    with raises("PACKAGE_SHADOWED", naming="nothing"):
        installed.check("input_pipeline")


def test_a_folder_without_a_package_file_does_not_hide_the_package(project):
    (project / "configs").mkdir()
    installed.check("configs")
