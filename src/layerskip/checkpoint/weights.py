"""Weight files of a checkpoint: which there are, and whether they are whole."""

from __future__ import annotations

import struct
from pathlib import Path

from layerskip.checkpoint.files import inside
from layerskip.errors import UserError
from layerskip.reading import JSON_BYTES, parsed, read_json


def shards_of(index: Path) -> list[str]:
    """Read the names of the weight files from their index. Raises: UserError for names outside the folder."""
    weight_map = read_json(index, dict).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} is not a valid index of shards", "save or copy it again")
    shards = sorted({*weight_map.values()})
    for shard in shards:
        inside(index.parent, shard, index.name, missing=True)
    return shards


def check_weights(file: Path) -> None:
    """Refuse a safetensors file whose length is not what its header says: downloads break off.

    Raises: UserError.
    """
    size = file.stat().st_size
    with file.open("rb") as content:
        (length,) = struct.unpack("<Q", content.read(8).ljust(8, b"\0"))
        header = content.read(length) if 2 <= length <= min(JSON_BYTES, size - 8) else b""
    if not header:
        told = "is empty" if not size else f"is cut off or damaged after {size} bytes"
        raise UserError(f"cannot load {file}: it {told}, an incomplete download", "copy or download it again")
    tensors = parsed(header.decode("utf-8", "replace"), str(file), "copy or download it again")
    try:
        ends = [tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (AttributeError, LookupError, TypeError) as error:
        raise UserError(
            f"cannot load {file}: it has no header of safetensors", "copy or download it again"
        ) from error
    if size < expected:
        raise UserError(
            f"cannot load {file}: it has {size} of {expected} bytes, an incomplete download",
            "copy or download it again",
        )
