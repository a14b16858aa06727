"""Read training examples from files, folders and data sets; wrong columns are named before any work.

for example in examples("train.jsonl.gz", Columns(completion="response")): ...
"""

from __future__ import annotations

import csv
import difflib
import gzip
import itertools
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerskip.errors import UserError
from layerskip.reading import messages_of, named_path, parsed, reason, spoken
from layerskip.train.data.states import Kept

TABLES = {".csv": ",", ".tsv": "\t"}
DATA = {".jsonl", ".ndjson", ".json", ".parquet", *TABLES}
TEXT = set(
    ".txt .md .rst .tex .py .pyi .pyx .c .h .cc .cpp .hpp .cu .cuh .rs .go .java .kt .scala .js .mjs .jsx .ts "  # noqa: SIM905
    ".tsx .cs .rb .php .pl .lua .r .jl .swift .hs .ml .ex .clj .lisp .el .sh .sql .css .scss .html .xml .xhtml "
    ".yaml .yml .toml .cmake .proto .log .text .markdown .org .adoc".split()
)
REFUSED = {  # what these hold is not text, whatever their bytes decode to
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "save the sheet as .csv"),
    **dict.fromkeys(
        (".pkl", ".pickle", ".pt", ".pth"), "a pickle can run code when it is read: save as .jsonl"
    ),
    **dict.fromkeys(
        (".npy", ".npz", ".arrow", ".feather", ".orc", ".avro", ".h5", ".db"), "save as .parquet"
    ),
    **dict.fromkeys(
        (".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z"), "unpack it; .gz is read as it is"
    ),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub", ".rtf"), "save its text as .txt"),
}
# Usual names of what our columns hold, for the hint when a column is missing.
_ALIASES = {
    "completion": ("response", "answer", "output", "target", "solution", "chosen", "summary", "label"),
    "prompt": ("instruction", "question", "input", "query", "problem", "source", "utterance"),
    "messages": ("conversations", "conversation", "chat", "dialog", "dialogue", "turns"),
    "text": ("content", "code", "document", "body", "raw", "article"),
}
_KEPT = ("input_ids", "completion_mask", "finish_reason", "states")
_SHAPE = (
    'a chat is a list such as [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]'
)

Example = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """What the columns of a data set are called."""

    text: str = "text"
    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"


def examples(source: str | Path, columns: Columns | None = None) -> Iterator[Example]:
    """Yield the examples of a source in a fixed order.

    A source is a .jsonl, .json, .csv, .parquet, text or source code file (all but parquet also as .gz), a folder of
    such files, or the name of a `datasets` data set: `org/name`, `org/name:config`, `org/name:config:split`.
    An example has `messages`, `prompt` and `completion`, or `text`, under these names whatever the columns are
    called; token ids of data written by a model (`input_ids`); and `where` it stands, for errors.

    Raises: UserError for a missing or empty source, and for a record without the columns.
    """
    columns = columns or Columns()
    empty = True
    for where, record in _records(str(source)):
        empty = False
        yield {**_example(where, record, columns), "where": where}
    if empty:
        raise UserError(f"{source} has no examples", "give a file with at least one example")


# -- from sources to records ---------------------------------------------------------------------------------


def _records(source: str) -> Iterator[tuple[str, Any]]:
    path = named_path(source)
    if path.is_dir():
        for file in _files(path):
            yield from _read(file, in_folder=True)
    elif path.is_file():
        yield from _read(path)
    else:
        yield from _hub(source)


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _files(folder: Path) -> list[Path]:
    """List the data files of a folder, or its text and source code when there are none; hidden files left out."""
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
    ]
    data = [
        path for path in found if _kind(path) in DATA - {".json"}
    ]  # .json beside source code is no data set
    chosen = data or [path for path in found if _kind(path) in TEXT]
    if not chosen:
        raise UserError(
            f"the folder {folder} has no data", "it needs .jsonl, .parquet, text or source code files"
        )
    return chosen


def _read(path: Path, in_folder: bool = False) -> Iterator[tuple[str, Any]]:
    kind = _kind(path)
    if kind == ".parquet":
        yield from _parquet(path)
        return
    if kind and kind not in DATA | TEXT:
        hint = REFUSED.get(kind, "if it is plain text, call it .txt; else give .jsonl, .csv or .parquet")
        raise UserError(f"{path}: files that end in {kind} are not read as training data", hint)
    opened: Any = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="" if kind in TABLES else "\n") as lines:
            if kind in TABLES:
                yield from _table(path, lines, TABLES[kind])
                return
            if kind in (".jsonl", ".ndjson"):
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        where = f"{path}, line {number}"
                        record = parsed(line, where, "one JSON object per line in .jsonl")
                        if isinstance(record, dict) and "states" in record:
                            record["states"] = Kept.told(record, path)
                        yield where, record
                return
            text = lines.read()
    except UnicodeDecodeError as error:
        if in_folder and kind not in DATA:
            warnings.warn(f"{path} is not UTF-8 text and was left out", stacklevel=2)
            return
        raise UserError(f"{path} is not UTF-8 text: {error}", "convert it, or leave it out") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    if "\0" in text:
        if in_folder and kind not in DATA:
            warnings.warn(f"{path} is binary and was left out", stacklevel=2)
            return
        raise UserError(f"{path} is binary: it has NUL bytes", "convert it to text, or leave it out")
    if kind == ".json":
        loaded = parsed(text, str(path), "one JSON object per line in .jsonl")
        if not isinstance(loaded, list):
            raise UserError(
                f"{path} is not a list of examples", "a .json file holds one list; else use .jsonl"
            )
        yield from ((f"{path}, example {number}", record) for number, record in enumerate(loaded, 1))
    elif text.strip():
        yield str(path), text


def _table(path: Path, lines: Iterable[str], delimiter: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows below a header as records; an empty cell is an empty text."""
    csv.field_size_limit(2**31 - 1)  # by default a cell of 128 KB is an error
    lines = iter(lines)
    first = next(lines, "")
    if delimiter not in first:  # spreadsheets of many countries write ;
        delimiter = next((other for other in ";\t" if other in first), delimiter)
    rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    header = next(rows, [])
    if not all(map(str.strip, header)) or len({*header}) < len(header):
        raise UserError(
            f"{path}: its header is {header!r}", "the first row names the columns, each by another name"
        )
    for number, row in enumerate(rows, 1):
        if len(row) > len(header) or any("\0" in cell for cell in row):
            told = (
                f"has {len(row)} cells for {len(header)} columns" if len(row) > len(header) else "is binary"
            )
            raise UserError(f"{path}, row {number} {told}", "quote cells that hold commas or line breaks")
        if row:
            yield f"{path}, row {number}", dict(zip(header, row, strict=False))


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow", "pip install layerskip[train]") from error
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except (OSError, ValueError, ArithmeticError, NotImplementedError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error


def _hub(source: str) -> Iterator[tuple[str, Any]]:
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    path = Path(source)
    if _kind(path) in DATA | TEXT | {*REFUSED} or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        stems = {Path(other).stem: other for other in beside}  # endings are alike anyway
        close = difflib.get_close_matches(path.stem, stems)
        hint = (
            f"did you mean {' or '.join(repr(stems[one]) for one in close)}?" if close else "check the path"
        )
        raise UserError(f"no file or folder {source}", hint)
    try:
        import datasets
    except ImportError as error:
        hint = "pip install layerskip[train] to read data sets by name"
        raise UserError(f"no file or folder {source}", hint) from error
    split = split or "train"
    try:
        loaded = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot load {source!r}: {reason}", "give a file, a folder, or org/name:config:split"
        ) from error
    for number, record in enumerate(loaded, 1):
        yield f"{source}, {split} example {number}", record


# -- from records to examples --------------------------------------------------------------------------------


def _example(where: str, record: Any, columns: Columns) -> Example:
    if isinstance(record, str):
        return {"text": record}
    if not isinstance(record, Mapping):
        raise UserError(f"{where} is not an object", 'an example is an object such as {"text": "..."}')
    has = {key for key, value in record.items() if value is not None}
    kept = {key: record[key] for key in _KEPT if key in has}
    if columns.messages in has:
        return {"messages": _messages(record[columns.messages], where), **kept}
    if spoken(record.get("conversations")):
        return {"messages": _messages(record["conversations"], where), **kept}
    if {columns.prompt, columns.completion} <= has:
        return {**_pair(record[columns.prompt], record[columns.completion], where, columns), **kept}
    if columns.text in has:
        if not isinstance(record[columns.text], str):
            raise UserError(f"{where}: {columns.text!r} is not text", "name the column that holds text")
        return {"text": record[columns.text], **kept}
    if "input_ids" in has:
        return kept
    wanting = columns.messages, columns.prompt, columns.completion, columns.text
    if null := [name for name in wanting if name in record and name not in has]:
        raise UserError(f"{where}: {null[0]!r} is null", "leave the line out, or name another column")
    names = ", ".join(map(repr, record)) or "none"
    wanted = f"{columns.messages!r}, {columns.prompt!r} with {columns.completion!r}, or {columns.text!r}"
    raise UserError(f"{where} has the columns {names}; needed: {wanted}", _hint(record, columns))


def _pair(prompt: Any, completion: Any, where: str, columns: Columns) -> Example:
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": prompt, "completion": completion}
    if isinstance(prompt, list):  # a conversation cut in two: loss on the second part
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        first, second = _messages(prompt, where), _messages(completion, where)
        return {"messages": first + second, "num_given": len(first)}
    name = columns.completion if isinstance(prompt, str) else columns.prompt
    raise UserError(f"{where}: {name!r} is not text", "prompt and completion are both text")


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: the chat has no messages", _SHAPE)
    value = messages_of(value, where)
    for index, message in enumerate(value, 1):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise UserError(f"{where}: message {index} has no text under {key!r}", _SHAPE)
    return [dict(message) for message in value]


def _hint(record: Mapping[str, Any], columns: Columns) -> str:
    """Say how to name the columns, from what a record has."""

    def alike(role: str) -> str | None:
        return next((name for name in record if name.lower() in _ALIASES[role]), None)

    if columns.prompt in record or alike("prompt"):
        settings = [] if columns.prompt in record else [f"columns.prompt={alike('prompt')}"]
        if columns.completion not in record:
            settings.append(f"columns.completion={alike('completion') or 'NAME'}")
        return "set " + " and ".join(settings)
    for role in ("messages", "text"):
        if name := alike(role):
            return f"set columns.{role}={name}"
    return "set columns.text=NAME, columns.messages=NAME, or columns.prompt=NAME and columns.completion=NAME"
