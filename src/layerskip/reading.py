"""Read what others wrote: regular files of bounded size, UTF-8, JSON of bounded depth. All failures are UserErrors.

read_json(folder / "config.json")          # a file that a checkpoint brings
read_text(path, pipe=True)                 # one a user names: it may be a pipe
parsed(line, f"{path}, line {number}")     # a line of one
"""

from __future__ import annotations

import gzip
import json
import os
import re
import stat
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerskip.errors import UserError

JSON_BYTES = 64 * 2**20  # of a file a checkpoint brings; the largest index of shards has a few megabytes
USER_BYTES = 4 * 2**30  # of one a user names: what /dev/zero and a bomb of zeros never reach the end of
MOST_DEPTH = 100
MOST_DIGITS = 18  # of a whole number: what is longer fits no 64 bits
SPEAKERS = {  # ShareGPT's names, by those of chat templates
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "bard", "bing"), "assistant"),
    "system": "system",
}

_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)  # a run of digits is found ten times faster as one of zeros
_LONG = b"0" * (MOST_DIGITS + 1)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_BRACKETS = re.compile(r"[\[\]{}]")


def named_path(name: str | os.PathLike[str]) -> Path:
    """Turn a name that someone typed into a path. Raises: UserError for a name no file can have."""
    try:
        path = Path(name).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, half a character, ~nobody
        shown = repr(str(name)[:60])
        raise UserError(f"no file can be named {shown}: {reason(error)}", "check the spelling") from error
    return path


def read_bytes(path: Path, most: int = JSON_BYTES, *, pipe: bool = False) -> bytes:
    """Read a regular file (or a pipe, if those may be) of at most `most` bytes; .gz is not unpacked.

    Raises: UserError, never waiting for a pipe's other end where none may be.
    """
    try:
        handle = os.open(path, os.O_RDONLY | (0 if pipe else getattr(os, "O_NONBLOCK", 0)))
        with os.fdopen(handle, "rb") as file:
            mode = os.fstat(handle).st_mode
            if not (stat.S_ISREG(mode) or (pipe and stat.S_ISFIFO(mode))):
                raise UserError(f"{path} is not a regular file", "name a file with content of its own")
            content = file.read(most + 1)
    except (OSError, ValueError, MemoryError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    return _bounded(content, path, most)


def read_text(path: Path, most: int = JSON_BYTES, *, pipe: bool = False) -> str:
    """Read UTF-8 text, unpacked from .gz, without the mark some editors put first. Raises: UserError."""
    content = read_bytes(path, most, pipe=pipe)
    try:
        if path.suffix.lower() == ".gz":
            import io

            with gzip.open(io.BytesIO(content)) as packed:
                content = _bounded(packed.read(most + 1), path, most)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: not UTF-8 text ({error})", "convert it to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error


def read_json(path: Path, kind: type | None = None, hint: str = "save or copy it again") -> Any:
    """Read a file of JSON; `kind` is what it must hold. Raises: UserError naming the file."""
    found = parsed(read_text(path), str(path), hint, "valid ")
    if kind is not None and not isinstance(found, kind):
        raise UserError(f"{path} is not a JSON {'list' if kind is list else 'object'}", hint)
    return found


def parsed(text: str, where: str, hint: str = "", valid: str = "") -> Any:
    """Parse JSON that is not too deep and has no number too long, nor half a character (a lone surrogate).

    Raises: UserError that begins with `where`.
    """
    try:
        if text.count("[") + text.count("{") > MOST_DEPTH and _depth(text) > MOST_DEPTH:
            raise UserError(f"{where} is nested more than {MOST_DEPTH} deep", hint)
        long = _LONG in text.encode(errors="replace").translate(_ZEROS)
        found = json.loads(text, parse_int=_whole if long else None)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = text_of(error)
        raise UserError(f"{where} has half a character, {half}: a surrogate alone", hint) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not {valid}JSON: {reason(error)}", hint) from error
    return found


def check_unicode(text: str, where: str) -> str:
    """Return text that is whole characters. Raises: UserError, for no tokenizer takes half of one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has half a character, {text_of(error)}, at place {error.start + 1}",
            "it was not UTF-8, or was cut inside a surrogate pair",
        ) from error
    return text


def spoken(value: Any) -> bool:
    """Whether a conversation is ShareGPT's: turns of `from` and `value`."""
    return isinstance(value, list) and any(isinstance(one, Mapping) and "from" in one for one in value)


def messages_of(turns: Sequence[Any], where: str) -> list[Any]:
    """Turn ShareGPT's `from` and `value` into `role` and `content`; all else stays as it is, to be checked.

    Raises: UserError for a speaker that nobody knows.
    """
    messages = []
    for turn in turns:
        if isinstance(turn, Mapping) and "from" in turn:
            speaker = str(turn["from"])
            if (role := SPEAKERS.get(speaker.lower())) is None:
                known = f"known: {', '.join(SPEAKERS)}"
                raise UserError(f"{where}: nobody is known as {speaker[:40]!r}", known)
            turn = {"role": role, "content": turn.get("value")}
        messages.append(turn)
    return messages


def text_of(error: UnicodeEncodeError) -> str:
    """Spell what could not be encoded."""
    return ascii(error.object[error.start])


def reason(error: BaseException) -> str:
    """Word an error in a line, without the path: the message has it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:300] or type(error).__name__


def _bounded(content: bytes, path: Path, most: int) -> bytes:
    if len(content) > most:
        raise UserError(f"{path} has more than {most / 2**20:.0f} MB", "is it the file that was meant?")
    return content


def _depth(text: str) -> int:
    deepest = depth = 0
    for bracket in _BRACKETS.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
