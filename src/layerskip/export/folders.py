"""A folder that appears whole or not at all, and the files of a checkpoint that go into it."""

from __future__ import annotations

import filecmp
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from layerskip.errors import UserError, hint_of
from layerskip.reading import reason
from layerskip.train.checkpoints import publish

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


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
            file.chmod(0o755 if file.suffix == ".sh" else 0o644)  # safetensors writes for its owner alone
        publish(making, output)
    except OSError as error:
        if error.errno is None:  # no file's
            raise
        raise UserError(f"cannot export to {output}: {reason(error)}", hint_of(error)) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def carry(files: Iterable[Path], folder: Path) -> None:
    """Copy files byte for byte, and compare each. Raises: UserError where a copy differs."""
    for file in files:
        shutil.copyfile(file, folder / file.name)
        if not filecmp.cmp(file, folder / file.name, shallow=False):
            raise UserError(
                f"{file.name} was not copied as it is", "is the disk sound, and nobody writing there?"
            )


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below a folder, by path."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
