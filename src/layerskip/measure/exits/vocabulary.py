"""Which tokens deserve a place in the draft head: count them over data, rank them, say what a size covers.

Counted is what a model would write: `text`, the `response` of a prompt/response pair, the assistant's `messages`
(ShareGPT's `conversations` too). Every tenth document is held out; the ranking comes from the others, the coverage
from the held-out ones.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from layerskip.errors import UserError
from layerskip.reading import messages_of, parsed

HELD_OUT = 10  # every tenth document
BATCH = 256  # documents per call of the tokenizer
PIECE = 2000  # characters; plain files are cut into documents of about this size, at line ends
ANSWERS = ("response", "completion", "answer", "output")  # beside a prompt
KINDS = (".jsonl", ".txt", ".py", ".md")


class Frequencies(NamedTuple):
    """Counts per token id, int64 [V]."""

    counted: np.ndarray
    held_out: np.ndarray


def documents(path: Path, column: str | None = None) -> Iterator[str]:
    """Read the texts of a data file: .jsonl, .txt, .md or .py, each also as .gz.

    Raises: UserError naming the file and line that cannot be used.
    """
    kind = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
    if kind not in KINDS:
        raise UserError(
            f"{path} is of no kind that can be read", "known: " + ", ".join(KINDS) + ", and each .gz"
        )
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
            if kind == ".jsonl":
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield from _written(line, column, f"{path}, line {number}")
            else:
                yield from _pieces(lines)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    piece: list[str] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _written(line: str, column: str | None, where: str) -> Iterator[str]:
    """Find in a JSON line what a model would write."""
    item = parsed(line, where, "one JSON object per line")
    if not isinstance(item, dict):
        raise UserError(f"{where} is not an object", 'one JSON object per line: {"text": "..."}')
    names = ("text", *ANSWERS) if column is None else (column,)
    found = next((item[name] for name in names if item.get(name) is not None), None)
    if found is None and column is None:
        found = item.get("messages", item.get("conversations"))
    if isinstance(found, list):
        found = messages_of(found, where)
        found = [m.get("content") for m in found if isinstance(m, dict) and m.get("role") == "assistant"]
    texts = found if isinstance(found, list) else [found]
    written = [text for text in texts if isinstance(text, str)]
    if len(written) < len(texts):
        wanted = column or "text, prompt and response, or messages"
        raise UserError(f"{where} has no {wanted} that is text", f"its keys: {', '.join(item)}; see --column")
    yield from written


def frequencies(tokenizer: Any, texts: Iterable[str], vocab_size: int) -> Frequencies:
    """Count the tokens of documents, every tenth one apart.

    Raises: UserError when there is nothing to count.
    """
    found = Frequencies(np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64))
    batch: list[str] = []
    place = 0

    def count() -> None:
        nonlocal place
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"] if batch else ():
            into = found[place % HELD_OUT == HELD_OUT - 1]
            into += np.bincount(np.asarray(ids, np.int64), minlength=vocab_size)[:vocab_size]
            place += 1
        batch.clear()

    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            count()
    count()
    if not found.counted.sum():
        raise UserError("the data has no tokens to count", "give files with text the model should write")
    return found


def ranked(counts: np.ndarray) -> list[int]:
    """Order all token ids by falling count; equal counts, and tokens never seen, by id."""
    return [int(token) for token in np.argsort(-counts, kind="stable")]


def check_size(size: int, vocab_size: int) -> None:
    """Refuse a draft vocabulary that the model has no tokens for. Raises: UserError."""
    if not 1 <= size <= vocab_size:
        raise UserError(
            f"a draft vocabulary of {size} tokens", f"give --size a number from 1 to {vocab_size}"
        )


def first_ids(ranking: Sequence[int], size: int, always: Iterable[int]) -> list[int]:
    """Take the first `size` ids; those in `always` push out the rarest where they would be missing.

    Raises: UserError for a size outside 1..vocabulary.
    """
    check_size(size, len(ranking))
    chosen = list(ranking[:size])
    missing = [token for token in dict.fromkeys(always) if token in ranking and token not in chosen]
    return (chosen[: max(0, size - len(missing))] + missing)[:size]


def coverage(counts: np.ndarray, ranking: Sequence[int], sizes: Iterable[int]) -> dict[int, float | None]:
    """Share of the counted tokens that the first ids of a ranking cover, per size; None without any tokens."""
    within = counts[list(ranking)].cumsum()
    total = int(counts.sum())
    return {size: float(within[min(size, len(within)) - 1]) / total if total else None for size in sizes}
