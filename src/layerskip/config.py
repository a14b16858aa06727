"""What a user writes in files: validated with pydantic, errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from layerskip.errors import UserError


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: str
    content: str


class PromptLine(BaseModel):
    """A line of a prompts file: `prompt` (text) or `messages`. Data sets carry other columns; they are ignored."""

    model_config = ConfigDict(extra="ignore")

    prompt: str | None = None
    messages: list[Message] | None = None
    task: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> PromptLine:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if not (self.messages or (self.prompt or "").strip()):
            raise ValueError("the prompt is empty")
        return self

    @property
    def content(self) -> str | list[dict[str, str]]:
        if self.messages is not None:
            return [message.model_dump() for message in self.messages]
        assert self.prompt is not None
        return self.prompt


def read_prompts(path: Path) -> list[PromptLine]:
    """Read a JSON-lines file of prompts; blank lines are skipped.

    Raises: UserError naming the line that cannot be used, or when there is none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines cuts inside JSON strings too
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            items.append(PromptLine.model_validate(json.loads(line)))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number} is not JSON: {error}", "one JSON object per line"
            ) from error
        except ValidationError as error:
            raise UserError(
                f"{path}, line {number}: {_first(error)}", "objects need prompt or messages"
            ) from error
    if not items:
        raise UserError(f"{path} has no prompts", 'one JSON object per line: {"prompt": "..."}')
    return items


def _first(error: ValidationError) -> str:
    first: Any = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])
