"""What the verbs that measure share: counts checked, prompts read, progress shown, results described and saved."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from layerskip.cli_app import load
from layerskip.display import err
from layerskip.errors import UserError

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel


def check_counts(**given: int | None) -> None:
    for name, value in given.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}", f"--{name} is at least 1")


def prompt_lines(path: Path | None, limit: int | None) -> list[Any]:
    from layerskip.config import read_prompts
    from layerskip.measure import prompt_file

    return read_prompts(path or prompt_file())[:limit]


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
def progress() -> Iterator[Callable[[str, int, int], None]]:
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
    import subprocess
    import time

    from layerskip.environment import environment
    from layerskip.measure.card import device_name

    facts = environment()
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # not a checkout
    model, kernels = given["model"], getattr(lm.stack, "kernels", None)
    return {
        **{name: value.name if isinstance(value, Path) else value for name, value in given.items()},
        "model": Path(model).name if Path(model).exists() else model,
        **more,
        "dtype": str(lm.stack.dtype).removeprefix("torch."),
        "device": lm.stack.device.type,
        "device_name": device_name(lm.stack.device),
        "trained_exits": list(lm.facts.exits),
        "load_s": load_s,
        "compile_s": kernels and kernels.compile_s,
        "commit": commit,
        "versions": {name: facts[name] for name in ("layerskip", "python", "torch", "transformers")},
        "date": time.strftime("%Y-%m-%d"),
    }


def save(result: dict[str, Any], kind: str, *parts: str) -> Path:
    """Write KIND_MODEL_DTYPE_PARTS_DEVICE_DATE.json under benchmarks/results, else into the current folder.

    `result` carries its `configuration`. Raises: UserError when it cannot be written.
    """
    told = result["configuration"]
    names = [kind, told["model"].replace("/", "-"), told["dtype"], *parts, told["device"], told["date"]]
    folder = Path("benchmarks/results") if Path("benchmarks/results").is_dir() else Path()
    file = folder / ("_".join(names) + ".json")
    try:
        file.write_text(_laid_out(result) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error}") from error
    return file


def _laid_out(result: dict[str, Any]) -> str:
    """Write JSON with an item per line, but a list of plain values on one line: a row of a table is a line."""
    text = r'"(?:[^"\\]|\\.)*"'
    found = re.compile(rf'{text}|\[(?:{text}|[^\[\]{{}}"])*\]')  # text first: brackets in it are no lists
    return found.sub(lambda part: json.dumps(json.loads(part[0])), json.dumps(result, indent=1))
