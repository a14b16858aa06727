"""What every result file says about its making: arguments, versions, device, commit, date; never a path.

Imported by the scripts beside it: `record.configuration(arguments, device)`, `record.save(result, "kind", ...)`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.environment import environment
from layerskip.measure.card import device_name

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).parent
LEFT_OUT = ("save", "work", "figure", "result", "case")  # where things lie, not what was measured


def configuration(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Say what was measured, with what, where and when; files and folders appear by their last name only."""
    facts = environment()
    return {
        **{name: named(value) for name, value in vars(arguments).items() if name not in LEFT_OUT},
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
    if isinstance(value, Path) or (isinstance(value, str) and "/" in value and Path(value).exists()):
        return Path(value).resolve().name
    return value


def save(result: dict[str, Any], *parts: str) -> Path:
    """Write benchmarks/results/PARTS_DATE.json; one of the same name is replaced."""
    name = "_".join([*(part.replace("/", "-") for part in parts), time.strftime("%Y-%m-%d")]) + ".json"
    path = HERE / "results" / name
    # Lists of plain values stand on one line: a curve of a hundred points is not a hundred lines.
    flat = re.sub(
        r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\n\s*", " ", found[0]), json.dumps(result, indent=1)
    )
    path.write_text(flat + "\n", encoding="utf-8")
    print(f"written: benchmarks/results/{name}")
    return path


def _commit() -> str | None:
    git = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # not a checkout
