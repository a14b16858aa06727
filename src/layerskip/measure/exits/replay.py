"""The rounds that greedy self-speculation would take, worked out from one pass over a plain continuation.

A draft is judged only while all drafts before it in its round were right, so what it stands on is always the plain
continuation. Whether the exit names the next token of it, position by position, therefore decides the rounds of
every draft length:

    rounds = replay(bits, draft_length=4)       # bits[n]: the exit names token n + 1 of the continuation
    rounds.tokens_per_round, rounds.acceptance

Exact: rounds, accepted drafts and tokens are the engine's own (tests/measure/test_replay.py), whatever ends the
output. Behind a miss nobody knows what would be drafted: a low confidence or an end of sequence there is not seen.
Where copies draft too, where a round begins matters: see `sources.replay_sources`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from layerskip.decode.control import EXIT, LOOKUP


class Replayed(NamedTuple):
    """The rounds of one output behind its first token; int64 [R] each."""

    drafted: np.ndarray
    accepted: np.ndarray
    tokens: np.ndarray  # committed
    looked: np.ndarray  # 1 where drafting stopped before a draw, for want of confidence
    copied: np.ndarray  # 1 where the drafts were copied from the text so far

    @classmethod
    def of(cls, rounds: Sequence[tuple[int, ...]]) -> Replayed:
        """Take rounds one by one, each with its five numbers."""
        return cls(*np.array(rounds, np.int64).reshape(-1, len(cls._fields)).T)

    @property
    def tokens_per_round(self) -> float:
        return float(self.tokens.sum() / max(1, len(self.tokens)))

    @property
    def acceptance(self) -> float | None:
        """Accepted over drafted; None where nothing was drafted."""
        drafted = int(self.drafted.sum())
        return int(self.accepted.sum()) / drafted if drafted else None

    @property
    def plain_share(self) -> float:
        """Share of rounds in which nothing was drafted."""
        return float((self.drafted == 0).mean()) if len(self.drafted) else 0.0

    @property
    def by_source(self) -> dict[str, dict[str, int]]:
        """Count rounds that drafted, their drafts and those accepted, as `decode.generation.by_source` does."""
        counts = {}
        for source, copied in ((EXIT, 0), (LOOKUP, 1)):
            own = (self.copied == copied) & (self.drafted > 0)
            if own.any():
                sums = {name: int(getattr(self, name)[own].sum()) for name in ("drafted", "accepted")}
                counts[source] = {"rounds": int(own.sum()), **sums}
        return counts


def replay(
    bits: np.ndarray,
    draft_length: int,
    budget: int | None = None,
    confidence: np.ndarray | None = None,
    threshold: float = 0.0,
) -> Replayed:
    """Play the rounds over a continuation whose first token came from the prompt.

    `bits[n]` says whether the exit names the n-th token behind that one; `confidence[n]` is its largest
    probability there, and drafting stops before a draw where it is below `threshold`. `budget` is how many
    tokens were allowed behind the first; more than there are means that the last one ended the output.

    Shapes: bits bool [N], confidence float [N]; or [drafts, N], a row for the first, the second, ... draft of a
    round, where drafts depend on its beginning; the last row counts for all behind it.
    """
    end = np.shape(bits)[-1]
    budget = end if budget is None else budget
    right = runs(np.asarray(bits, bool)).tolist()
    sure = None if confidence is None else runs(np.asarray(confidence) >= threshold).tolist()
    rounds = []
    n = 0
    while n < end:
        allowed = min(draft_length, budget - n - 1)
        limit = allowed if sure is None else min(allowed, sure[n])
        accepted = min(right[n], limit)
        finished = n + accepted == end  # the last token was drafted: an end of sequence, none follows it
        drafted = accepted if finished else limit
        tokens = accepted if finished else accepted + 1
        rounds.append((drafted, accepted, tokens, int(limit < allowed and not finished), 0))
        n += tokens
    return Replayed.of(rounds)


def joined(parts: Sequence[Replayed]) -> Replayed:
    """Put the rounds of several outputs one behind the other."""
    return Replayed(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def by_place(drafted: np.ndarray, accepted: np.ndarray, draft_length: int) -> list[float | None]:
    """Share of kept drafts at each place of a round, of those judged there; None where none was. Shapes: [R]."""
    judged, kept = ([int((count > k).sum()) for k in range(draft_length)] for count in (drafted, accepted))
    return [b / a if a else None for a, b in zip(judged, kept, strict=True)]


def runs(ones: np.ndarray) -> np.ndarray:
    """Count the ones in a row from each place on: bool [N], or [drafts, N] read along the diagonal -> int64 [N]."""
    *first, last = np.atleast_2d(ones)
    places = np.arange(len(last))
    zeros = np.where(last, len(last), places)
    counts = np.minimum.accumulate(zeros[::-1])[::-1] - places
    for row in reversed(first):
        counts = np.where(row, 1 + np.append(counts[1:], 0), 0)
    return counts
