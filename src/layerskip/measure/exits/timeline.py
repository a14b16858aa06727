"""How a generation came about, round by round: what was drafted, what was kept, what the model said itself.

    shown = timeline(list(lm.stream(prompt, mode="self-speculative")), lm.tokenizer)
    for strip in shown.strips:
        strip.exit_layer, strip.draft_length, strip.cells      # cells: (kind, token)

`Timeline` is plain data, as `Lens` is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerskip.measure.exits.lens import spelled

if TYPE_CHECKING:
    from layerskip.decode.request import Round

KINDS = {
    "kept": "drafted and kept",
    "rejected": "drafted and rejected",
    "dropped": "drafted behind a rejected one",
    "correction": "the full model's own, for the rejected one",
    "bonus": "the full model's own, after a draft kept whole",
    "plain": "the full model's own, nothing drafted",
}
COMMITTED = ("kept", "correction", "bonus", "plain")
"""Kinds that are output; the others were work for nothing."""


@dataclass(frozen=True)
class Strip:
    """One round, in the order in which its tokens stand."""

    exit_layer: int
    draft_length: int  # K asked for
    source: str  # prefill, plain, exit, lookup, as in `Round`
    cells: list[tuple[str, str]]  # (kind, token)

    def count(self, *kinds: str) -> int:
        return sum(kind in kinds for kind, _ in self.cells)


@dataclass(frozen=True)
class Timeline:
    """The rounds of one sequence; the first is the prompt's, which yields a token without drafting."""

    strips: list[Strip]

    @classmethod
    def read(cls, record: dict[str, Any]) -> Timeline:
        """Build it again from a result file."""
        strips = [
            Strip(**{**strip, "cells": [tuple(cell) for cell in strip["cells"]]})
            for strip in record["strips"]
        ]
        return cls(strips)

    @property
    def rounds(self) -> list[Strip]:
        """Strips that decoded."""
        return [strip for strip in self.strips if strip.source != "prefill"]

    def summary(self) -> str:
        """Sum it up in a line: tokens per round and acceptance, counted as everywhere else."""
        rounds = self.rounds
        tokens = sum(strip.count(*COMMITTED) for strip in rounds)
        kept = sum(strip.count("kept") for strip in rounds)
        drafted = kept + sum(strip.count("rejected", "dropped") for strip in rounds)
        told = f"{tokens} tokens in {len(rounds)} rounds"
        if rounds:
            told += f", {tokens / len(rounds):.2f} tokens/round"
        return told + (f", {kept} of {drafted} drafts kept ({100 * kept / drafted:.0f}%)" if drafted else "")


def timeline(rounds: Iterable[Round], tokenizer: Any) -> Timeline:
    """Lay out the rounds of one sequence. Drafts that the end of the output cut off were not judged: left out."""
    spoken = [round for round in rounds if round.tokens]
    words = spelled(tokenizer, [token for round in spoken for token in (*round.draft, *round.tokens)])
    return Timeline([_strip(round, words) for round in spoken])


def _strip(round: Round, words: dict[int, str]) -> Strip:
    draft, kept = round.draft[: round.drafted], round.accepted
    own = "plain" if not draft else "bonus" if kept == len(draft) else "correction"
    parts: list[tuple[str, Sequence[int]]] = [
        ("kept", draft[:kept]),
        ("rejected", draft[kept : kept + 1]),
        ("dropped", draft[kept + 1 :]),
        (own, round.tokens[kept:]),
    ]
    cells = [(kind, words[token]) for kind, tokens in parts for token in tokens]
    return Strip(round.exit_layer, round.draft_length, round.source, cells)
