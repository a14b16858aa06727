"""The command line: each verb is a file of this folder that parses, calls one function, prints.

A new verb is a file with a `@verb` function: files are found. Heavy imports happen inside the functions.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.text import Text

from layerskip.cli.app import app
from layerskip.cli.show.terminal import err, loudness, note
from layerskip.errors import UserError

PACKAGE = Path(__file__).parents[1]
ORDER = (  # of `layerskip --help`; other files follow
    "generate", "chat", "models", "formats", "env", "demo", "bench", "draft_vocab", "eval", "train", "recipes",
    "distill_data", "inspect", "doctor", "tune", "verify", "pack_delta",
)  # fmt: skip
others = {file.stem for file in Path(__file__).parent.glob("*.py")} - {*ORDER, "main", "__init__"}
for name in (*ORDER, *sorted(others)):
    import_module(f"layerskip.cli.{name}")


def main() -> None:
    """Run the command line; what a user caused is two lines on stderr and exit code 2."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app(prog_name="layerskip")
    except UserError as error:
        err.print(Text("error: ", style="bold red") + Text(error.message, style="default"))
        if error.hint:
            err.print(Text(f"  {error.hint}"))
        if loudness.verbose:
            traceback.print_exception(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: Any = None,
) -> None:
    """Show our own warnings as notes; those of libraries where --verbose asks for them."""
    if Path(filename).is_relative_to(PACKAGE):
        note(f"warning: {message}", "yellow")
    elif loudness.verbose:
        note(f"{filename}:{lineno}: {category.__name__}: {message}")
