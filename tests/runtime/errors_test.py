"""Errors that the user can fix: their code, and that they survive the way to another process."""

import copy
import errno
import pickle

import pytest

from mtl_sparse.runtime.errors import UserError, as_os_error
from tests.conftest import raises


def test_an_error_has_a_code_and_a_message():
    with raises("FILE_MISSING", naming="a.npy") as caught:
        raise UserError("FILE_MISSING", "a.npy is missing")
    assert str(caught.value) == "a.npy is missing" and isinstance(caught.value, ValueError)


@pytest.mark.parametrize("code", ["a.npy is missing", "File_Missing", "FILE-MISSING", "_FILE", "FILE_", "FILE__A", ""])
def test_a_code_is_upper_case_words(code):
    with pytest.raises(TypeError, match="UserError"):
        UserError(code, "a message")


def test_an_error_without_a_message_is_refused():
    with pytest.raises(TypeError, match="message"):
        UserError("FILE_MISSING", "")


def test_libraries_can_raise_an_error_again_with_a_text_of_theirs():
    """ml_collections does so with the errors of config files."""
    error = UserError("FILE_MISSING", "a.npy is missing")
    again = type(error)(f"while parsing: {error}")
    assert (again.code, str(again)) == ("RERAISED", "while parsing: a.npy is missing")


@pytest.mark.parametrize("copied", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "pickle"])
def test_an_error_survives_copying_and_pickling(copied):
    found = copied(UserError("DATA_IMAGE_DAMAGED", "a.png is damaged: é"))
    assert type(found) is UserError
    assert (found.code, str(found)) == ("DATA_IMAGE_DAMAGED", "a.png is damaged: é")


@pytest.mark.parametrize(
    "error",
    [ValueError("put failed: No space left on device"), RuntimeError("... [os_error_code='28'] ...")],
    ids=["orbax", "tensorstore"],
)
def test_disk_errors_of_libraries_become_os_errors(error, tmp_path):
    with pytest.raises(OSError) as caught, as_os_error(tmp_path):
        raise error
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path)
    assert caught.value.__cause__ is error


def test_other_errors_stay(tmp_path):
    named = OSError(errno.EACCES, "Permission denied", "a.npy")
    with pytest.raises(OSError) as caught, as_os_error(tmp_path):
        raise named
    assert caught.value is named
    with pytest.raises(ZeroDivisionError), as_os_error(tmp_path):
        raise ZeroDivisionError("no disk")
    with raises("FILE_MISSING", naming="No space left on device"), as_os_error(tmp_path):
        raise UserError("FILE_MISSING", "No space left on device is a message, too")
