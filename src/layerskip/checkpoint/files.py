"""Files of a checkpoint: those it names, those that are replaced whole; and the cache folder."""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from layerskip.errors import UserError
from layerskip.reading import reason


def inside(folder: Path, name: Any, told: str = "config.json", *, missing: bool = False) -> Path:
    """Find a file that a checkpoint names: a regular one of its folder, or a link there to a regular one.

    Links are followed, for the cache of huggingface_hub is made of them; the name may not lead out of the folder.
    Raises: UserError for a name that does, a device, a pipe, a folder, or (unless it may be `missing`) nothing.
    """
    parts = () if not isinstance(name, str) else (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    away = not parts or ".." in parts or PureWindowsPath(name).drive or "\0" in name
    if away or any(kind(name).root for kind in (PurePosixPath, PureWindowsPath)):
        raise UserError(
            f"{told} in {folder} names the file {str(name)[:80]!r}, which is not inside the folder",
            "a checkpoint names its own files only; take it from a place you trust",
        )
    file = folder / str(name)
    if not missing or file.exists():
        check_regular(file)
    return file


def check_regular(file: Path) -> None:
    """Refuse what is no file with content of its own, without opening it. Raises: UserError."""
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read {file}: {reason(error)}", "copy or download the folder again"
        ) from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{file} is not a regular file", "copy or download the folder again")


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Replace a file as a whole, see `write_text`."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole, see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file as a whole: readers see the old or the new one, never a part, after a power cut too."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as part:
            part.write(content)
            part.flush()
            os.fsync(part.fileno())
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o644)  # mkstemp's files are private
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def cache_folder() -> Path:
    """Name the folder that holds built-in models: LAYERSKIP_CACHE, or the platform's cache folder.

    Raises: UserError where this user has no home folder.
    """
    try:
        if chosen := os.environ.get("LAYERSKIP_CACHE"):
            return Path(chosen).expanduser()
        if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
            return Path(local) / "layerskip"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerskip"
    except RuntimeError as error:  # ~nobody, or nobody's home
        raise UserError(f"no cache folder: {reason(error)}", "set LAYERSKIP_CACHE to a folder") from error
