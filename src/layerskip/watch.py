"""How long work says how far it is: `watch("reading exits", 3, 10)`, or of 0 where nobody knows."""

from collections.abc import Callable

Watch = Callable[[str, int, int], None]  # what is going on, done, of


def silent(what: str, done: int, of: int) -> None:
    """Show nothing."""
