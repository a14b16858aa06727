"""What was found out once, of a model or a machine, is kept in the cache folder under all that it depends on.

file = kept_file("row-costs", [shape, machine])      # another name wherever one of these differs
keep(file, costs)                                    # the next process reads it
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

from layerskip.checkpoint.files import cache_folder, write_json
from layerskip.errors import UserError

CODE = Path(__file__).parents[1] / "model"
MACHINE = (platform.node(), platform.machine(), platform.processor())


def digest(told: Any) -> str:
    """Sixteen hex digits of anything that JSON holds, whatever the order of its keys; the rest by its name."""
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def kept_file(kind: str, told: Any, prefix: str = "", suffix: str = ".json") -> Path | None:
    """Name a file of the cache folder's `kind`; None where there is no cache folder."""
    try:
        return cache_folder() / kind / f"{prefix}{digest(told)}{suffix}"
    except UserError:
        return None


@functools.cache
def decoders() -> str:
    """Tell this version of the package's decoders from others, that of somebody at work on them too."""
    files = sorted(path for path in CODE.rglob("*") if path.suffix in {".py", ".h", ".cpp"})
    return digest([path.read_text(encoding="utf-8") for path in files])


def keep(file: Path | None, content: Any) -> None:
    """Write JSON whole; where that cannot be, it is found out again by the next process."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
    except OSError:
        pass
