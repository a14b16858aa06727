"""What was found out once, of a model or a machine, is kept in the cache folder under all that it depends on.

file = kept_file("row-costs", [shape, machine])      # another name wherever one of these differs
keep(file, costs)                                    # the next process reads it
"""

from __future__ import annotations

import hashlib
import json
import platform
from typing import TYPE_CHECKING, Any

from layerskip.checkpoint.files import cache_folder, write_json

if TYPE_CHECKING:
    from pathlib import Path

MACHINE = (platform.node(), platform.machine(), platform.processor())


def digest(told: Any) -> str:
    """Sixteen hex digits of anything that JSON holds, whatever the order of its keys; the rest by its name."""
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def kept_file(kind: str, told: Any, prefix: str = "", suffix: str = ".json") -> Path:
    """Name a file of the cache folder's `kind`. Raises: UserError where there is no cache folder."""
    return cache_folder() / kind / f"{prefix}{digest(told)}{suffix}"


def keep(file: Path, content: Any) -> None:
    """Write JSON whole; where that cannot be, it is found out again by the next process."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
    except OSError:
        pass
