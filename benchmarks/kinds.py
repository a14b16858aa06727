"""The kinds of text that methods are compared on: where their prompts lie, and in which order they are taken.

    KINDS["gsm8k"].prompts(DATA, 12)      # the first twelve

Questions of GSM8K are the last of the file, those of a chat come from each category in turn. HumanEval is completed
as text; other prompts are wrapped by the chat template.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerskip.errors import UserError
from layerskip.measure.lines import json_lines

QUESTIONS = "spec-bench/dev-120.jsonl"
CHAT = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


@dataclass(frozen=True)
class Kind:
    """What a kind is called, where its prompts lie, how they are taken from the lines, whether they are wrapped."""

    title: str
    file: str
    texts: Callable[[list[Any]], list[str]]
    chat: bool = True

    def prompts(self, data: Path, limit: int) -> list[str]:
        """Read the first of them. Raises: UserError for a file that is missing or of another kind."""
        lines = [line for _, line in json_lines(data / self.file)]
        try:
            found = self.texts(lines)[:limit]
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(f"{self.file} has a line without {error}") from error
        if not found:
            raise UserError(f"{self.file} has no prompts of the wanted kind")
        return found


def in_turn(lines: Sequence[Mapping[str, Any]], categories: Sequence[str]) -> list[str]:
    """Take the first turns of questions, one of each category after the other."""
    by = [[line["turns"][0] for line in lines if line["category"] == name] for name in categories]
    return [text for turn in itertools.zip_longest(*by) for text in turn if text is not None]


def of_group(*categories: str) -> Callable[[list[Any]], list[str]]:
    return lambda lines: in_turn(lines, categories)


KINDS = {
    "chat": Kind("chat", QUESTIONS, of_group(*CHAT)),
    "qa": Kind("short questions", QUESTIONS, of_group("qa")),
    "summaries": Kind("news summaries", QUESTIONS, of_group("summarization")),
    "cnn-dm": Kind(
        "news summaries (CNN/DM)",
        "cnn-dailymail/summarization.jsonl",
        lambda lines: [one["prompt"] for one in lines],
    ),
    "translation": Kind("translation", QUESTIONS, of_group("translation")),
    "retrieval": Kind("answers from given passages", QUESTIONS, of_group("rag")),
    "maths": Kind("maths questions", QUESTIONS, of_group("math_reasoning")),
    "gsm8k": Kind(
        "maths questions (GSM8K)",
        "gsm8k/test.jsonl.gz",
        lambda lines: [one["prompt"] for one in reversed(lines)],
    ),
    # Without the line break at its end, as the scored task: see layerskip.measure.tasks.generation.
    "humaneval": Kind(
        "code (HumanEval)",
        "human-eval/HumanEval.jsonl",
        lambda lines: [one["prompt"].rstrip() for one in lines],
        chat=False,
    ),
}


def chosen(names: str) -> dict[str, Kind]:
    """Read kinds as typed, with commas between. Raises: UserError for an unknown one."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := sorted({*wanted} - {*KINDS}):
        raise UserError(f"unknown kind of text {unknown[0]!r}", "of " + ", ".join(KINDS))
    return {name: kind for name, kind in KINDS.items() if name in wanted}
