"""States of a frozen model, kept on the disk for the next pass over the data.

    store = StateStore(folder, rows=len(data), length=512, width=576, dtype=torch.bfloat16, budget=4e9, key="...")
    found = store.get([3, 17], [512, 400])      # (early, final), [B, T, D] each, or None
    store.put([3, 17], [512, 400], early, final)

A row of data has one place, as far as the budget reaches; rows behind it are computed anew every time. What a kill
or a power cut leaves half-written is found by its checksum and computed again: a resumed run reads the same states.
"""

from __future__ import annotations

import shutil
import zlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from layerskip.checkpoint.files import write_text
from layerskip.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

KEY_FILE = "key"


class StateStore:
    """One file of states and one of checksums; `key` says of what, another one's files are replaced.

    Raises: UserError where the disk has no room for the budget's part that is needed.
    """

    def __init__(
        self, folder: Path, *, rows: int, length: int, width: int, dtype: torch.dtype, budget: float, key: str
    ) -> None:
        self.folder, self.length, self.width, self.dtype = folder, length, width, dtype
        self.row_bytes = 2 * length * width * dtype.itemsize
        self.rows = min(rows, int(budget // self.row_bytes))
        self._states = self._sums = None
        if not self.rows:
            return
        if not (folder / KEY_FILE).is_file() or (folder / KEY_FILE).read_text(encoding="utf-8") != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            free = shutil.disk_usage(folder).free
            if free < 1.02 * self.rows * self.row_bytes:
                raise UserError(
                    f"states of {self.rows:,} rows take {self.rows * self.row_bytes / 1e9:.1f} GB, {folder} has "
                    f"{free / 1e9:.1f} GB free",
                    "states_gb=0 computes them anew in every epoch",
                )
            for name, size in (("states", self.rows * self.row_bytes), ("sums", 8 * self.rows)):
                with (folder / name).open("wb") as file:
                    file.truncate(size)
            write_text(folder / KEY_FILE, key)
        self._states = np.memmap(folder / "states", np.uint8, "r+", shape=(self.rows, self.row_bytes))
        self._sums = np.memmap(folder / "sums", np.int64, "r+", shape=(self.rows,))

    def get(self, rows: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Read the states of rows, zero behind their lengths; None unless all of them are here and whole."""
        if self._states is None or self._sums is None or any(row >= self.rows for row in rows):
            return None
        found = torch.zeros(2, len(rows), max(lengths), self.width, dtype=self.dtype)
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            content = self._states[row, : 2 * length * self.width * self.dtype.itemsize]
            if self._sums[row] != _sum(content):
                return None
            states = torch.from_numpy(np.array(content)).view(self.dtype).view(2, length, self.width)
            found[:, place, :length] = states
        return found[0], found[1]

    def put(self, rows: Sequence[int], lengths: Sequence[int], early: Tensor, final: Tensor) -> None:
        """Keep the states of rows that have a place. Shapes: [B, T, D] each."""
        if self._states is None or self._sums is None:
            return
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if row < self.rows:
                both = torch.stack([early[place, :length], final[place, :length]]).to("cpu", self.dtype)
                content = both.contiguous().view(torch.uint8).flatten().numpy()
                self._states[row, : len(content)] = content
                self._sums[row] = _sum(content)

    def remove(self) -> None:
        """Give the disk back."""
        self._states = self._sums = None
        shutil.rmtree(self.folder, ignore_errors=True)


def _sum(content: np.ndarray) -> int:
    return 1 + zlib.crc32(content.data)  # 0 is a place never written
