"""What the scripts beside it share: what their result files say about their making, and where they lie.

`record.configuration(arguments, device)`, `record.save(result, "kind", ...)`, `record.newest("kind_*.json")`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.errors import UserError
from layerskip.measure import results

if TYPE_CHECKING:
    from collections.abc import Callable

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


def run(main: Callable[[], None]) -> None:
    """Run a script; what its user caused is two lines and an exit code."""
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error.message}\n{error.hint or ''}") from None


def newest(pattern: str) -> Path | None:
    """Find the latest result file of a kind; names end in their date."""
    return max(HERE.glob(f"results/{pattern}"), key=lambda path: path.name[-15:], default=None)


def newest_of_each(pattern: str) -> list[Path]:
    """Find the latest result file of each model, dtype and device."""
    found = sorted(HERE.glob(f"results/{pattern}"), key=lambda path: path.name[-15:])
    return sorted({path.name[:-15]: path for path in found}.values())


def comparison(description: str | None, tasks: str) -> argparse.ArgumentParser:
    """The options of scripts that judge the built-in model; `tasks` are the default ones."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="folder or name of the model")
    parser.add_argument("--data", required=True, type=Path, help="folder of the tasks' files")
    parser.add_argument("--tasks", default=tasks, help="comma-separated")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="finished work; default: by settings, in the cache folder")
    parser.add_argument("--name", help="what the result file calls the model; default: its folder")
    parser.add_argument("--save", action="store_true", help="write a file into benchmarks/results")
    return parser
