"""Result files: what every one says about its making, and how it is laid out; never a path.

    result["configuration"] = configuration(arguments_by_name, lm.stack.device)
    save(result, Path("benchmarks/results"), "eval", "smollm2-135m", "float32", "cpu")

The command line and the scripts in benchmarks/ write theirs with it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.errors import UserError, hint_of
from layerskip.measure.environment import device_name, environment

if TYPE_CHECKING:
    import torch


def configuration(given: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Say what was measured, with what, where and when; files and folders appear by their last name only."""
    facts = environment()
    return {
        **{name: named(value) for name, value in given.items()},
        "device": device.type,
        "device_name": device_name(device),
        "commit": _commit(),
        "versions": {name: facts[name] for name in ("layerskip", "python", "torch", "transformers")},
        "date": time.strftime("%Y-%m-%d"),
    }


def named(value: Any) -> Any:
    """Shorten paths to their last name, inside lists and mappings too."""
    if isinstance(value, dict):
        return {key: named(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [named(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, str) and "/" in value and os.path.exists(value)):
        return os.path.basename(os.path.abspath(value))
    return value


def save(result: Mapping[str, Any], folder: Path, *parts: str) -> Path:
    """Write PARTS_DATE.json; one of the same name is replaced. Raises: UserError when it cannot be written.

    `result` carries its `configuration`.
    """
    names = [*(part.replace("/", "-") for part in parts), result["configuration"]["date"]]
    file = folder / ("_".join(names) + ".json")
    try:
        file.write_text(_laid_out(result) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write {file}: {error}", hint_of(error, "run it from another folder")
        ) from error
    return file


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # not a checkout


def _laid_out(result: Mapping[str, Any]) -> str:
    """Write JSON with an item per line, but a list of plain values on one line: a row of a table is a line."""
    text = r'"(?:[^"\\]|\\.)*"'
    found = re.compile(rf'{text}|\[(?:{text}|[^\[\]{{}}"])*\]')  # text first: brackets in it are no lists
    return found.sub(lambda part: json.dumps(json.loads(part[0])), json.dumps(result, indent=1))
