"""What an error that the system raised tells a user to do."""

import errno
import os

import pytest
from safetensors import SafetensorError

from layerskip.errors import hint_of


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
        (errno.ENOTDIR, "stands where a folder"),
        (errno.ENOENT, "does not exist"),
    ],
)
def test_a_hint_says_what_the_system_said(number, told):
    """A folder without permission to write was told to "free some space"."""
    hint = hint_of(OSError(number, os.strerror(number)), "give another --output")
    assert told in hint
    assert "give another --output" in hint
    assert ("free space" in hint) == (number == errno.ENOSPC)


def test_the_number_is_read_from_the_text_of_safetensors():
    error = SafetensorError("I/O error: Permission denied (os error 13)")
    assert "no permission" in hint_of(error)


def test_an_error_that_says_nothing_names_both_causes():
    hint = hint_of(RuntimeError("PytorchStreamWriter failed writing file"))
    assert "free space" in hint
    assert "can be written" in hint
