"""What a model said when it wrote its answers, kept beside them: a pass of it that training need not make again.

    file = StatesFile(Path("own.states"), known=lines, of=made_by(fingerprint, dtype, quantize))
    line["states"] = file.append(generation.states)          # [T - 1, D] of T tokens, of which the last has none
    example["states"].read(width, dtype)                     # a `Kept`; None where they cannot be used

The states stand one behind the other in one file, and each line of the data says where its own are. They are read
only for the weights and the dtype that made them, and where their checksum is right; else the model runs again.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

SUFFIX = ".states"


def made_by(weights: str | None, dtype: torch.dtype, quantize: str | None = None) -> str:
    """Name what made states; others cannot stand in for them."""
    return f"{weights} {dtype}" + (f" {quantize}" if quantize else "")


@dataclass(frozen=True, slots=True)
class Kept:
    """Where the states of one example are: `size` bytes from `start` on."""

    path: Path
    start: int
    size: int
    sum: int
    of: str

    @classmethod
    def told(cls, line: Mapping[str, Any], beside: Path) -> Kept | None:
        """Read what a line of data says of its states; None where it says nothing that can be understood."""
        try:
            told = line["states"]
            name, of = told["file"], told["of"]
            start, size, check = (int(told[key]) for key in ("start", "size", "sum"))
            return cls(beside.with_name(name), start, size, check, str(of))
        except (KeyError, TypeError, ValueError):
            return None

    def read(self, width: int, dtype: torch.dtype) -> Tensor | None:
        """Get the states, [T - 1, width]; None where they are not there, not whole or of another width."""
        row = width * dtype.itemsize
        try:
            content = np.array(
                _mapped(self.path, self.path.stat().st_size)[self.start : self.start + self.size]
            )
        except (OSError, ValueError):
            return None
        if len(content) != self.size or self.size % row or zlib.crc32(content.data) != self.sum:
            return None
        return torch.from_numpy(content).view(dtype).view(-1, width)


@functools.lru_cache(maxsize=64)
def _mapped(path: Path, size: int) -> Any:
    return np.memmap(path, np.uint8, "r", shape=(size,))


class StatesFile:
    """Append states; what stands behind those that `known` lines tell was left by a kill, and goes."""

    def __init__(self, path: Path, known: Iterable[Mapping[str, Any]], of: str) -> None:
        self.path, self.of = path, of
        own = [kept for line in known if (kept := Kept.told(line, path)) is not None and kept.path == path]
        self.end = max((kept.start + kept.size for kept in own), default=0)
        self.file = path.open("ab")
        self.file.truncate(self.end)

    def append(self, states: Tensor) -> dict[str, Any]:
        """Write states [T - 1, D] down and say where they are."""
        content = states.contiguous().view(torch.uint8).numpy().tobytes()
        self.file.write(content)
        self.file.flush()
        start, self.end = self.end, self.end + len(content)
        return {
            "file": self.path.name,
            "start": start,
            "size": len(content),
            "sum": zlib.crc32(content),
            "of": self.of,
        }

    def __enter__(self) -> StatesFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
