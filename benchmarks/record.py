"""What the scripts beside it share: what their result files say about their making, and where they go.

`record.configuration(arguments, device)`, `record.save(result, "kind", ...)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.measure import results

if TYPE_CHECKING:
    import argparse

    import torch

HERE = Path(__file__).parent
LEFT_OUT = ("save", "work", "figure", "result", "case")  # where things lie, not what was measured


def configuration(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Say what was measured, with what, where and when."""
    given = {name: value for name, value in vars(arguments).items() if name not in LEFT_OUT}
    return results.configuration(given, device)


def save(result: dict[str, Any], *parts: str) -> Path:
    """Write benchmarks/results/PARTS_DATE.json; one of the same name is replaced."""
    path = results.save(result, HERE / "results", *parts)
    print(f"written: benchmarks/results/{path.name}")
    return path
