"""States of a frozen model, kept on the disk for the next pass over the data, or come with the data.

    store = StateStore(folder, rows=range(len(data)), planes=2, length=512, width=576, dtype=torch.bfloat16,
                       budget=4e9, key="...")
    found = store.get(3, 512)                  # [planes, T, D], or None
    store.put(3, states)

A row of data has one place, as far as the budget reaches; rows behind it are computed anew every time. What a kill
or a power cut leaves half-written is found by its checksum and computed again: a resumed run reads the same states.
"""

from __future__ import annotations

import itertools
import os
import shutil
import zlib
from typing import IO, TYPE_CHECKING

import numpy as np
import torch

from layerskip.checkpoint.files import write_text
from layerskip.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

    from layerskip.train.data.packing import Rows

KEY_FILE = "key"


def _reserve(file: IO[bytes], size: int) -> None:
    """Make a file of so many bytes that the disk really has: a write into memory mapped over a hole would kill."""
    if not hasattr(os, "posix_fallocate"):
        file.truncate(size)
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise UserError(
            f"{file.name} cannot have {size / 1e9:.1f} GB: {error.strerror}",
            "states_gb=0 computes them anew in every epoch",
        ) from error


class StateStore:
    """One file of states and one of checksums; `key` says of what, another one's files are replaced.

    Raises: UserError where the disk has no room for the budget's part that is needed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rows: Iterable[int],
        planes: int,
        length: int,
        width: int,
        dtype: torch.dtype,
        budget: float,
        key: str,
    ) -> None:
        self.folder, self.planes, self.width, self.dtype = folder, planes, width, dtype
        self.row_bytes = planes * length * width * dtype.itemsize
        rows = sorted(rows)[: int(budget // self.row_bytes)]
        self.place_of = {row: place for place, row in enumerate(rows)}
        self._states = self._sums = None
        if not rows:
            return
        if not (folder / KEY_FILE).is_file() or (folder / KEY_FILE).read_text(encoding="utf-8") != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            free = shutil.disk_usage(folder).free
            if free < 1.02 * len(rows) * self.row_bytes:
                raise UserError(
                    f"states of {len(rows):,} rows take {len(rows) * self.row_bytes / 1e9:.1f} GB, {folder} has "
                    f"{free / 1e9:.1f} GB free",
                    "states_gb=0 computes them anew in every epoch",
                )
            for name, size in (("states", len(rows) * self.row_bytes), ("sums", 8 * len(rows))):
                with (folder / name).open("wb") as file:
                    _reserve(file, size)
            write_text(folder / KEY_FILE, key)
        self._states = np.memmap(folder / "states", np.uint8, "r+", shape=(len(rows), self.row_bytes))
        self._sums = np.memmap(folder / "sums", np.int64, "r+", shape=(len(rows),))

    def get(self, row: int, length: int) -> Tensor | None:
        """Read the states of a row, [planes, length, D]; None unless they are here and whole."""
        place = self.place_of.get(row)
        if place is None or self._states is None or self._sums is None:
            return None
        content = np.array(self._states[place, : self.planes * length * self.width * self.dtype.itemsize])
        if self._sums[place] != _sum(content):
            return None
        return torch.from_numpy(content).view(self.dtype).view(self.planes, length, self.width)

    def put(self, row: int, states: Tensor) -> None:
        """Keep the states [planes, T, D] of a row that has a place."""
        place = self.place_of.get(row)
        if place is None or self._states is None or self._sums is None:
            return
        content = states.to("cpu", self.dtype).contiguous().view(torch.uint8).flatten().numpy()
        self._states[place, : len(content)] = content
        self._sums[place] = _sum(content)

    def remove(self) -> None:
        """Give the disk back."""
        self._states = self._sums = None
        shutil.rmtree(self.folder, ignore_errors=True)


class AnswerStates:
    """States of the last layer that came with the data (`distill-data --states`), for rows of such examples."""

    def __init__(self, rows: Rows, of: str, width: int, dtype: torch.dtype) -> None:
        self.rows, self.width, self.dtype = rows, width, dtype
        told = [states is not None and states.of == of for states in rows.states]
        self.spans = [
            *itertools.pairwise(rows.bounds.tolist())
        ]  # first example of each row, and of the next one
        self.held = {row for row, (first, stop) in enumerate(self.spans) if all(told[first:stop])}

    def get(self, row: int, length: int) -> Tensor | None:
        """Read the states of a row, [1, length, D], zero for the last token of an answer; None if one is lost."""
        if row not in self.held:
            return None
        found = torch.zeros(1, length, self.width, dtype=self.dtype)
        first, stop = self.spans[row]
        at = 0
        for example in range(first, stop):
            size = int(self.rows.starts[example + 1] - self.rows.starts[example])
            kept = self.rows.states[example]
            states = None if kept is None else kept.read(self.width, self.dtype)
            if states is None or len(states) < size - 1:
                return None
            found[0, at : at + min(size, len(states))] = states[:size]
            at += size
        return found


def _sum(content: np.ndarray) -> int:
    return 1 + zlib.crc32(content.data)  # 0 is a place never written
