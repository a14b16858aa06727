"""Checkpoints that exist whole or not at all: written aside, flushed, renamed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

STAGING = ".saving"
_REPLACED = ".replaced"
_NAME = re.compile(r"checkpoint-(\d+)")


def latest(output: Path) -> Path | None:
    """Find the newest checkpoint of a run."""
    _give_back(output)
    found = [
        (int(match[1]), path)
        for path in (output.iterdir() if output.is_dir() else ())
        if (match := _NAME.fullmatch(path.name)) and (path / "trainer_state.json").is_file()
    ]
    return max(found)[1] if found else None


def best(state: Any, output: Path) -> str | None:
    """Find the best checkpoint where the run's folder stands now: its state has the path of its making."""
    here = output / f"checkpoint-{state.best_global_step}"
    return str(here) if here.is_dir() else state.best_model_checkpoint


def clear_staging(output: Path) -> Path:
    """Make an empty folder to write a checkpoint into; what a killed run left there goes."""
    _give_back(output)
    staging = output / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def publish(written: Path, final: Path) -> None:
    """Flush a folder to the disk and give it its final name in one step, in place of a folder of that name.

    Raises: OSError.
    """
    for folder, _, files in os.walk(written):
        for name in files:
            _flush(Path(folder) / name)
        _flush(Path(folder))
    if final.exists():
        old = written.with_name(final.name + _REPLACED)
        final.rename(old)
        written.rename(final)
        shutil.rmtree(old)
    else:
        written.rename(final)
    _flush(final.parent)


def disk_error(error: BaseException) -> bool:
    """Whether writing a file failed: torch and safetensors raise errors of their own for it."""
    own = ("PytorchStreamWriter", "inline_container")
    return (
        isinstance(error, OSError)
        or (isinstance(error, SafetensorError) and "I/O error" in str(error))
        or (isinstance(error, RuntimeError) and any(name in str(error) for name in own))
    )


def _give_back(output: Path) -> None:
    """Rename a checkpoint back that a kill caught in `publish` between being replaced and its replacement."""
    for old in (output / STAGING).glob("*" + _REPLACED):
        final = output / old.name.removesuffix(_REPLACED)
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            if not final.exists():
                old.rename(final)


def _flush(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # folders cannot be opened on some systems
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
