"""Lines of files that a user writes, prompts and task items: read with pydantic, errors that name file and line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from layerskip.errors import UserError, nearest
from layerskip.reading import USER_BYTES, messages_of, parsed, read_text, spoken

ONE_A_LINE = "one JSON object per line"
Item = TypeVar("Item", bound=BaseModel)


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: str
    content: str


class PromptLine(BaseModel):
    """A line of a prompts file: `prompt` (text) or `messages`, a question of Spec-Bench or MT-bench, or ShareGPT's.

    Of a question, `turns` with a `category`, the first turn is the prompt; of ShareGPT's `conversations`, see
    `read_prompts`, what comes before the first answer. Data sets carry other columns; they are ignored.
    """

    model_config = ConfigDict(extra="ignore")

    prompt: str | None = None
    messages: list[Message] | None = None
    task: str | None = None
    id: Any = None
    """What the user calls this prompt; answers carry it."""

    @model_validator(mode="before")
    @classmethod
    def _first_turn(cls, record: Any) -> Any:
        if not isinstance(record, dict) or {"prompt", "messages"} & {*record}:
            return record
        match record:
            case {"turns": [str(first), *_]}:
                task = record.get("task", record.get("category"))
                return {"prompt": first, "task": task, "id": record.get("id")}
        return record

    @model_validator(mode="after")
    def _one_of(self) -> PromptLine:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if not (self.messages or (self.prompt or "").strip()):
            raise ValueError("the prompt is empty")
        return self

    @property
    def content(self) -> str | list[dict[str, str]]:
        """What to continue: text, or a list of messages."""
        if self.messages is not None:
            return [message.model_dump() for message in self.messages]
        assert self.prompt is not None
        return self.prompt


class LikelihoodLine(BaseModel):
    """A line to score: `prompt` or `context`, and `response`, or `choices` and the right one's place: `answer`."""

    model_config = ConfigDict(extra="ignore")

    prompt: str | None = None
    context: str | None = None
    response: str | None = None
    choices: list[str] | None = None
    answer: Any = None

    @model_validator(mode="after")
    def _one_of(self) -> LikelihoodLine:
        if (self.prompt is None) == (self.context is None):
            raise ValueError("give either prompt or context")
        if (self.response is None) == (self.choices is None):
            raise ValueError("give either response or choices")
        if not all(self.continuations):
            raise ValueError("there is nothing to score: an empty response or choice")
        if self.choices is not None:
            last = len(self.choices) - 1
            if last < 1:
                raise ValueError("a choice needs at least two choices")
            if type(self.answer) is not int or not 0 <= self.answer <= last:
                raise ValueError(f"answer is {self.answer!r}, not the place of a choice, 0 to {last}")
        else:
            self.answer = None  # whatever another column of this name holds
        return self

    @property
    def before(self) -> str:
        """What stands before what is scored; empty where the line has nothing."""
        return (self.prompt if self.prompt is not None else self.context) or ""

    @property
    def continuations(self) -> list[str]:
        """What is scored: the choices, else the one response."""
        return self.choices if self.choices is not None else [self.response or ""]


class QuestionLine(BaseModel):
    """A question of Spec-Bench or MT-bench: the user's turns of a conversation. Other columns are ignored."""

    model_config = ConfigDict(extra="ignore")

    question_id: int | str
    category: str
    turns: list[str] = Field(min_length=1)


def read_prompts(path: Path, column: str | None = None) -> list[PromptLine]:
    """Read a JSON-lines file of prompts, possibly .gz; blank lines are skipped.

    `column` names another column than prompt or messages to take, with text or a list of messages in it.

    Raises: UserError naming the line that cannot be used, or when there is none.
    """
    items = []
    for number, record in json_lines(path):
        try:
            if column is not None:
                record = _named(record, column, f"{path}, line {number}")
            items.append(PromptLine.model_validate(_opening(record, f"{path}, line {number}")))
        except ValidationError as error:
            raise UserError(
                f"{path}, line {number}: {_first(error)}",
                _misspelt(record, ("prompt", "messages"))
                or 'a line is {"prompt": "..."} or {"messages": [...]}; of Spec-Bench\'s files "turns" is read, of '
                'ShareGPT\'s "conversations"',
            ) from error
    if not items:
        raise UserError(f"{path} has no prompts", 'one JSON object per line: {"prompt": "..."}')
    return items


def read_likelihoods(path: Path) -> list[LikelihoodLine]:
    """Read a JSON-lines file of responses or choices to score, possibly .gz.

    Raises: UserError naming the line that cannot be used, or when there is none.
    """
    names = ("prompt", "context", "response", "choices", "answer")
    told = "objects need prompt or context, and response, or choices and answer"
    example = 'one JSON object per line: {"prompt": "...", "response": "..."}'
    return _items(path, LikelihoodLine, names, told, ("nothing to score", example))


def read_questions(path: Path) -> list[QuestionLine]:
    """Read a JSON-lines file of Spec-Bench's or MT-bench's questions, possibly .gz.

    Raises: UserError naming the line that cannot be used, or when there is none.
    """
    form = 'a line is {"question_id": 1, "category": "...", "turns": ["..."]}'
    return _items(path, QuestionLine, (*QuestionLine.model_fields,), form, ("no questions", form))


def _items(
    path: Path, kind: type[Item], names: Sequence[str], told: str, nothing: tuple[str, str]
) -> list[Item]:
    items = []
    for number, record in json_lines(path):
        try:
            items.append(kind.model_validate(record))
        except ValidationError as error:
            hint = _misspelt(record, names) or told
            raise UserError(f"{path}, line {number}: {_first(error)}", hint) from error
    if not items:
        raise UserError(f"{path} has {nothing[0]}", nothing[1])
    return items


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, what it holds) of a JSON-lines file, possibly .gz; blank lines are skipped.

    Raises: UserError naming the line that is not JSON.
    """
    text = read_text(path, USER_BYTES, pipe=True)
    if path.suffix in (".csv", ".xlsx", ".parquet") or "\0" in text:
        raise UserError(f"{path} is not JSON lines", f"{ONE_A_LINE}; only training data may be tables")
    if re.match(r"\s*\[\s*\{", text) and text.rstrip()[-1:] == "]":
        hint = "one JSON object per line, not one list: jq -c '.[]' FILE turns it"
        raise UserError(f"{path}, line 1: the file is a JSON list", hint)
    for number, line in enumerate(text.split("\n"), 1):  # splitlines cuts inside JSON strings too
        if line.strip():
            yield number, parsed(line, f"{path}, line {number}", ONE_A_LINE)


def _named(record: Any, column: str, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where} is not an object", ONE_A_LINE)
    if column not in record:
        raise UserError(f"{where} has no column {column!r}", nearest(column, record))
    value = record[column]
    return {"messages" if isinstance(value, list) else "prompt": value, "id": record.get("id")}


def _opening(record: Any, where: str) -> Any:
    """Give the `messages` that open a ShareGPT conversation; any other record comes back as it is."""
    if not isinstance(record, dict):
        return record
    has = {name for name in ("prompt", "messages") if record.get(name) is not None}
    turns = record["messages"] if has == {"messages"} else record.get("conversations") if not has else None
    if turns is None or not spoken(turns):
        return record
    messages = messages_of(turns, where)
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    asked = roles.index("user") if "user" in roles else len(roles)
    answered = roles.index("assistant", asked) if "assistant" in roles[asked:] else len(roles)
    return {**record, "messages": messages[:answered]}


def _misspelt(record: Any, names: Sequence[str]) -> str | None:
    """Ask for the name that a key of a record comes close to; None where none does."""
    for key in record if isinstance(record, dict) else ():
        if key not in names and (close := difflib.get_close_matches(key, names, n=1, cutoff=0.75)):
            return f"it has {key!r}: did you mean {close[0]!r}?"
    return None


def _first(error: ValidationError) -> str:
    first: Any = error.errors()[0]
    where, told = ".".join(str(part) for part in first["loc"]), str(first["msg"])
    return f"{where}: {told}" if where else told.removeprefix("Value error, ")
