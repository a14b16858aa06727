"""Prompts of a verb: which lines of which file, and how a model reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from layerskip.option import Option, option

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel
    from layerskip.measure.lines import PromptLine

Separator = Annotated[str, Option("What follows a text prompt that is not wrapped; \\n is a line break.")]


@dataclass(frozen=True)
class PromptOptions:
    """Prompts to measure on."""

    prompts: Path | None = option(None, "JSON lines with prompt or messages.", shown="ten built in")
    limit: int | None = option(None, "Use the first prompts only.", least=1, shown="all")

    def lines(self) -> list[PromptLine]:
        from layerskip.measure import prompt_file
        from layerskip.measure.lines import read_prompts

        return read_prompts(self.prompts or prompt_file())[: self.limit]

    def looked_at(self, count: int) -> dict[str, Any]:
        """Say which prompts a result is of, and how many."""
        return {"prompts": "built in" if self.prompts is None else self.prompts.name, "num_prompts": count}


def encoded(lm: LanguageModel, content: Any, chat: bool | None = None, separator: str = "") -> list[int]:
    """Encode text or messages, wrapped if `chat` (None: if it can); `separator` follows text that is not."""
    wrap = lm.has_template if chat is None else chat
    return lm.encode(content if wrap or not isinstance(content, str) else content + separator, chat=wrap)


def unescaped(text: str) -> str:
    """Read \\n and \\t as they are typed in a shell; other characters stay."""
    return text.replace("\\n", "\n").replace("\\t", "\t")
