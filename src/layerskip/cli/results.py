"""What the verbs that measure share: loading timed, progress shown, results described and saved."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from layerskip.cli.app import load
from layerskip.cli.show.terminal import Lines, note, notes

if TYPE_CHECKING:
    from layerskip.cli.options import Given
    from layerskip.decode.language_model import LanguageModel
    from layerskip.decode.options import LoadOptions
    from layerskip.watch import Watch

WHERE = ("as_json", "save", "output", "work")  # where results go; they are the same everywhere


def loaded(model: str, how: LoadOptions) -> tuple[LanguageModel, float]:
    began = time.perf_counter()
    return load(model, how), time.perf_counter() - began


@contextmanager
def progress(first: str = "") -> Iterator[Watch]:
    """Show on stderr what is going on: a bar on a terminal, else lines; `first` is going on now."""
    if not notes.is_terminal:
        watch: Watch = Lines()
        if first:
            watch(first, 0, 0)
        yield watch
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=notes, transient=True) as bars:
        task = bars.add_task(first, total=None)
        yield lambda what, done, of: bars.update(task, description=what, completed=done, total=of or None)


def configuration(
    given: Given, lm: LanguageModel, load_s: float | None = None, **more: Any
) -> dict[str, Any]:
    """Say what was measured, with what, where and when; files and folders appear by their last name only."""
    from layerskip.measure import results

    asked = {name: value for name, value in given.values.items() if name not in WHERE}
    model, kernels = asked["model"], getattr(lm.stack, "kernels", None)
    told = {
        "model": results.named(Path(model)) if Path(model).exists() else model,
        **more,
        "dtype": str(lm.stack.dtype).removeprefix("torch."),
        "trained_exits": list(lm.facts.exits),
        "load_s": load_s,
        "compile_s": kernels and kernels.compile_s,
    }
    return results.configuration({**asked, **told}, lm.stack.device)


def save_result(result: dict[str, Any], kind: str, *parts: str) -> None:
    """Write KIND_MODEL_DTYPE_PARTS_DEVICE_DATE.json under benchmarks/results, else into the current folder.

    `result` carries its `configuration`. Raises: UserError when it cannot be written.
    """
    from layerskip.measure import results

    made = result["configuration"]
    folder = Path("benchmarks/results") if Path("benchmarks/results").is_dir() else Path()
    file = results.save(result, folder, kind, made["model"], made["dtype"], *parts, made["device"])
    note(f"written: {file}")
