"""Results kept item by item in a folder, so that a run that was stopped goes on with the same command.

    records = Records(work_folder(None, "text", setup))      # or a folder of the caller's
    left = [i for i in range(n) if i not in records.found]
    records.keep({"index": i, ...})                          # a line in the file, there whatever happens next

A folder says in `setup.json` what its records are of, and takes no others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layerskip.checkpoint.files import write_json
from layerskip.checkpoint.kept import kept_file
from layerskip.errors import UserError
from layerskip.reading import USER_BYTES, parsed, read_bytes, read_json

Record = dict[str, Any]


def work_folder(chosen: Path | None, name: str, setup: dict[str, Any]) -> Path:
    """Make the folder for records of `setup`: `chosen`/name, else one of its own under the cache folder.

    `setup` is all that decides the numbers, as JSON has it. Raises: UserError when the folder holds records of
    something else, or cannot be written.
    """
    setup = json.loads(json.dumps(setup))
    folder = kept_file("eval", setup, f"{name}-", "") if chosen is None else chosen / name
    if folder is None:
        raise UserError("there is no cache folder to keep results in", "--work names another folder")
    file = folder / "setup.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = read_json(file, dict) if file.exists() else None
        if before is None:
            write_json(file, setup, indent=1)
    except OSError as error:
        raise UserError(f"cannot keep results in {folder}: {error}", "--work names another folder") from error
    except UserError as error:
        raise UserError(f"{file} is damaged: {error.message}", "remove it, or name another --work") from error
    if before is not None and before != setup:
        changed = sorted(key for key in {*before, *setup} if before.get(key) != setup.get(key))
        raise UserError(
            f"{folder} has results of another run: {', '.join(changed)} differ",
            "name another --work, or remove it",
        )
    return folder


class Records:
    """The records of one file, by key: an item's index, or several values where one is not enough.

    `advice` is what errors tell the user to do.
    Raises: UserError for a file that is damaged.
    """

    def __init__(
        self,
        folder: Path,
        name: str = "records",
        key: tuple[str, ...] = ("index",),
        advice: str = "name another --work",
    ) -> None:
        """Read what is there; a line that a kill cut off is cut off the file."""
        self.file = folder / f"{name}.jsonl"
        self._key, self._advice = key, advice
        self.found: dict[Any, Record] = {}
        content = read_bytes(self.file, USER_BYTES) if self.file.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.file.open("rb+") as file:
                file.truncate(len(whole))
        try:
            for line in whole.splitlines():
                self._add(parsed(line.decode(), str(self.file)))
        except (UserError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.file} is damaged: {error!r}", f"remove it, or {self._advice}") from error

    def _add(self, record: Record) -> None:
        values = tuple(record[name] for name in self._key)
        self.found[values[0] if len(values) == 1 else values] = record

    def keep(self, record: Record) -> None:
        """Append a record to the file. Raises: UserError when it cannot be written."""
        try:
            with self.file.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n")
        except OSError as error:
            raise UserError(f"cannot keep results in {self.file}: {error}", self._advice) from error
        self._add(record)
