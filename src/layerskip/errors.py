"""The one printable exception: everything a user can cause, with what to do about it."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable


class UserError(Exception):
    """Report something the user can fix.

    The command line prints `message` and `hint` and leaves with exit code 2; from Python it is an
    ordinary exception. Our own mistakes are assertions and never this class.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message if not hint else f"{message}\n  {hint}")
        self.message = message
        self.hint = hint


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Phrase the closest known names as a suggestion, or list them all when none is close, each behind `prefix`."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(prefix + candidate) for candidate in close) + "?"
    return "known: " + ", ".join(prefix + known_name for known_name in names)


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM}


def hint_of(error: BaseException, elsewhere: str = "name another folder") -> str:
    """Say what to do about a file that could not be written, by what the system said; `elsewhere` is the way round.

    safetensors passes the system's number on in its text; torch says nothing but that writing failed.
    """
    told = re.search(r"os error (\d+)", str(error))
    number = int(told[1]) if told else getattr(error, "errno", None)
    if number in _FULL:
        return f"the disk is full: free space, or {elsewhere}"
    if number in _FORBIDDEN:
        return f"you have no permission to write there: {elsewhere}, or change the folder's permissions"
    if number == errno.EROFS:
        return f"that file system is read-only: {elsewhere}"
    if number in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return f"a file stands where a folder should be, or a folder where a file should: {elsewhere}"
    if isinstance(error, ValueError):  # not the system's
        return elsewhere
    if number == errno.ENOENT:
        return f"that folder does not exist: make it, or {elsewhere}"
    return f"free space if the disk is full, see that the folder can be written, or {elsewhere}"
