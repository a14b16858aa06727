"""The one printable exception: everything a user can cause, with what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Report something the user can fix.

    The command line prints `message` and `hint` and leaves with exit code 2; from Python it is an
    ordinary exception. Our own mistakes are `assert`s and never this class.
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
