"""Refuse training prompts that share a passage with texts a model is judged by.

    python scripts/check_prompts.py --train work/prompts --judged DATA/human-eval --judged DATA/spec-bench
    python scripts/check_prompts.py --train work/own.jsonl --judged DATA/wikitext-2 --drop

A passage is 13 words in a row, in any case, without marks. A text of fewer is one passage. Files are .jsonl, also
.gz, or .txt; of a folder all of them. Ends with 1 and tells where they meet; with `--drop` those training lines are
taken out, and it ends with 0.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PASSAGE = 13
SHORTEST = 6  # words of a text that is compared at all: "Hello, how are you?" may stand anywhere
ENDINGS = (".jsonl", ".jsonl.gz", ".txt")


def texts(value: Any) -> Iterator[str]:
    """Every string of a JSON value; names of keys are left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)


def passages(text: str) -> set[int]:
    """Hashes of the passages of a text."""
    words = re.findall(r"\w+", text.lower())
    if len(words) < SHORTEST:
        return set()
    return {hash(tuple(words[i : i + PASSAGE])) for i in range(max(1, len(words) - PASSAGE + 1))}


def files(given: list[Path]) -> Iterator[Path]:
    for path in given:
        yield from sorted(f for f in path.iterdir() if f.name.endswith(ENDINGS)) if path.is_dir() else [path]


def lines(path: Path) -> list[str]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [line for line in content.decode("utf-8").split("\n") if line.strip()]


def read(path: Path, line: str) -> list[str]:
    return [line] if path.name.endswith(".txt") else list(texts(json.loads(line)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, action="append", required=True)
    parser.add_argument("--judged", type=Path, action="append", required=True)
    parser.add_argument("--drop", action="store_true", help="take the lines out of the training files")
    given = parser.parse_args()
    judged: dict[int, str] = {}
    for path in files(given.judged):
        if "LICENCE" in path.name:
            continue
        for number, line in enumerate(lines(path), 1):
            for text in read(path, line):
                judged.update(dict.fromkeys(passages(text), f"{path.name}:{number}"))
    if not judged:
        raise SystemExit("the judged files hold no text: give .jsonl or .txt files")
    seen = met = 0
    for path in files(given.train):
        kept = []
        for number, line in enumerate(lines(path), 1):
            seen += 1
            shared = {p for text in read(path, line) for p in passages(text)} & judged.keys()
            if shared:
                met += 1
                print(f"{path}:{number} shares {len(shared)} passages, one with {judged[min(shared)]}")
            else:
                kept.append(line + "\n")
        if given.drop and path.suffix != ".gz":
            path.write_text("".join(kept), encoding="utf-8")
    print(f"{seen:,} training lines, {len(judged):,} judged passages: {met} lines share one")
    sys.exit(1 if met and not given.drop else 0)


if __name__ == "__main__":
    main()
