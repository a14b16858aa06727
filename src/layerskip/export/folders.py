"""A folder that appears whole or not at all, and the files of a checkpoint that go into it."""

from __future__ import annotations

import filecmp
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from layerskip.errors import UserError, hint_of

if TYPE_CHECKING:
    from collections.abc import Iterator

CARRIED = (
    "*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*",
    "NOTICE*",
)  # fmt: skip
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Lend an empty folder beside `output`; it takes that name when the block has ended well, else it goes.

    Raises: UserError where something is there already, or the disk does not let us.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already", "remove it, or name another --output")
    making = output.absolute().parent / f".{output.name}.exporting"
    try:
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        yield making
        for file in (path for path in making.rglob("*") if path.is_file()):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            file.chmod(0o644)  # safetensors writes files that only their owner reads
        if output.is_dir():
            output.rmdir()
        os.replace(making, output)
    except OSError as error:
        if error.errno is None:  # no file's
            raise
        raise UserError(f"cannot write {output}: {error.strerror}", hint_of(error)) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def carry(source: Path, folder: Path, *, weights: bool = True) -> list[str]:
    """Copy a checkpoint's files byte for byte, with or without its weights, and compare each; return their names.

    Raises: UserError where a copy differs.
    """
    names = {path.name for pattern in CARRIED for path in source.glob(pattern) if path.is_file()}
    left = {path.name for pattern in WEIGHTS for path in source.glob(pattern)} if not weights else set()
    for name in sorted(names - left):
        shutil.copyfile(source / name, folder / name)
        if not filecmp.cmp(source / name, folder / name, shallow=False):
            raise UserError(f"{name} was not copied as it is", "is the disk sound, and nobody writing there?")
    return sorted(names - left)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below a folder, by path."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
