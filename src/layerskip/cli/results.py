"""What the verbs that measure share: counts checked, prompts read, progress shown, results described and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from layerskip.cli.app import load
from layerskip.cli.show.terminal import err
from layerskip.errors import UserError

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel
    from layerskip.watch import Watch


def check_counts(**given: int | None) -> None:
    for name, value in given.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}", f"--{name} is at least 1")


def prompt_lines(path: Path | None, limit: int | None) -> list[Any]:
    from layerskip.config import read_prompts
    from layerskip.measure import prompt_file

    return read_prompts(path or prompt_file())[:limit]


def looked_at(path: Path | None, count: int) -> dict[str, Any]:
    """Say which prompts a result is of, and how many."""
    return {"prompts": "built in" if path is None else path.name, "num_prompts": count}


def encoded(lm: LanguageModel, content: Any, chat: bool | None = None, separator: str = "") -> list[int]:
    """Encode text or messages, wrapped if `chat` (None: if it can); `separator` follows text that is not."""
    wrap = lm.has_template if chat is None else chat
    return lm.encode(content if wrap or not isinstance(content, str) else content + separator, chat=wrap)


def unescaped(text: str) -> str:
    """Read \\n and \\t as they are typed in a shell; other characters stay."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def loaded(*arguments: Any) -> tuple[LanguageModel, float]:
    import time

    began = time.perf_counter()
    return load(*arguments), time.perf_counter() - began


@contextmanager
def progress() -> Iterator[Watch]:
    """Show on stderr what is going on; a line per kind of work, drawn only while a terminal looks on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        task = bars.add_task("", total=None)

        def watch(what: str, done: int, of: int) -> None:
            bars.update(task, description=what, completed=done, total=of or None)

        yield watch


def configuration(
    given: dict[str, Any], lm: LanguageModel, load_s: float | None = None, **more: Any
) -> dict[str, Any]:
    """Say what was measured, with what, where and when; files and folders appear by their last name only.

    `given` are the verb's arguments by name, `model` among them.
    """
    from layerskip.measure import results

    model, kernels = given["model"], getattr(lm.stack, "kernels", None)
    told = {
        "model": results.named(Path(model)) if Path(model).exists() else model,
        **more,
        "dtype": str(lm.stack.dtype).removeprefix("torch."),
        "trained_exits": list(lm.facts.exits),
        "load_s": load_s,
        "compile_s": kernels and kernels.compile_s,
    }
    return results.configuration({**given, **told}, lm.stack.device)


def save(result: dict[str, Any], kind: str, *parts: str) -> Path:
    """Write KIND_MODEL_DTYPE_PARTS_DEVICE_DATE.json under benchmarks/results, else into the current folder.

    `result` carries its `configuration`. Raises: UserError when it cannot be written.
    """
    from layerskip.measure import results

    made = result["configuration"]
    folder = Path("benchmarks/results") if Path("benchmarks/results").is_dir() else Path()
    return results.save(result, folder, kind, made["model"], made["dtype"], *parts, made["device"])
