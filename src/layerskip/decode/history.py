"""Where a row's tokens have stood before, and how often what followed them there has followed again.

    history = History(counted_from=len(prompt))
    history.match(tokens)                   # Match(place, length): the best earlier place of the last tokens
    history.continuation(tokens)            # what stood behind it, token by token
    history.chances(tokens, 8)              # how likely each of eight copied tokens is right, given those before

An index of committed tokens, which never roll back: it only grows. All of it is a function of the tokens, so a
seed repeats and no other row matters. What a copy *would have been* is known for every committed token, drafted or
not, so counting costs no trial.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PLACES = 16  # earlier places of the last two tokens that are compared; more of them found nothing longer
LONGEST = 32  # matched tokens beyond which a place is no better
COUNTED = 12  # matches of this length and longer are counted together
WEIGHT = 4.0  # positions that a first guess weighs
# The first guess, by length of the match: shares of copied tokens that were right along the greedy answers of a
# 135 M model to 188 prompts of nine kinds (benchmarks/lookup.py).
GUESS = (0.0, 0.26, 0.54, 0.63, 0.71, 0.74, 0.79, 0.82, 0.83, 0.85, 0.86, 0.9, 0.96)


class Match(NamedTuple):
    """`length` last tokens stood before at `tokens[place - length : place]`; length 0: they never did."""

    place: int
    length: int


class History:
    """The index and the counts of one row. Tokens from `counted_from` on are counted: the output."""

    def __init__(self, counted_from: int = 0) -> None:
        self.counted_from = counted_from
        self._size = 0  # tokens indexed
        self._single: dict[int, int] = {}  # token -> the place behind its latest occurrence
        self._pair: dict[tuple[int, int], int] = {}  # two tokens -> the place behind their latest occurrence
        self._earlier: list[int] = []  # [place]: the place of the same two tokens before, -1: none
        self._right, self._seen = [0] * (COUNTED + 1), [0] * (COUNTED + 1)

    def match(self, tokens: Sequence[int]) -> Match:
        """Find the longest match of the last tokens, the latest of equals."""
        self._follow(tokens)
        return self._find(tokens, len(tokens))

    def continuation(self, tokens: Sequence[int]) -> Iterator[int]:
        """Say what stood behind the match, without end: behind the last token the copy copies itself."""
        place, length = self.match(tokens)
        for i in count() if length else ():
            yield tokens[place + i % (len(tokens) - place)]

    def chances(self, tokens: Sequence[int], most: int, shortest: int = 1) -> list[float]:
        """Estimate, for up to `most` copied tokens, the probability that each is right where those before it are.

        Empty where no match is as long as `shortest`.
        """
        length = self.match(tokens).length
        return [self.agreement(length + i) for i in range(most)] if length >= shortest else []

    def agreement(self, length: int) -> float:
        """Estimate how often the token behind a match of this length has followed again."""
        length = min(length, COUNTED)
        return (self._right[length] + WEIGHT * GUESS[length]) / (self._seen[length] + WEIGHT)

    def _follow(self, tokens: Sequence[int]) -> None:
        """Index the tokens that were committed since, counting what a copy would have been worth at each."""
        for size in range(self._size, len(tokens)):
            if size >= self.counted_from:
                place, length = self._find(tokens, size)
                if length:
                    counted = min(length, COUNTED)
                    self._seen[counted] += 1
                    self._right[counted] += tokens[place] == tokens[size]
            self._index(tokens, size)
            self._size = size + 1

    def _index(self, tokens: Sequence[int], place: int) -> None:
        """Note that `place` stands behind the tokens before it."""
        if place >= 1:
            self._single[tokens[place - 1]] = place
        pair = (tokens[place - 2], tokens[place - 1]) if place >= 2 else None
        earlier = -1 if pair is None else self._pair.get(pair, -1)
        if earlier == place:  # an interrupt came between this and the new size
            return
        self._earlier[place:] = [earlier]
        if pair is not None:
            self._pair[pair] = place

    def _find(self, tokens: Sequence[int], size: int) -> Match:
        """Find the best match of the first `size` tokens' end among the places indexed."""
        if size < 1:
            return Match(0, 0)
        best = Match(self._single.get(tokens[size - 1], 0), 1)
        if not best.place:
            return Match(0, 0)
        place = self._pair.get((tokens[size - 2], tokens[size - 1]), -1) if size >= 2 else -1
        for _ in range(PLACES):
            if place < 0 or best.length >= LONGEST:
                break
            length, most = 2, min(LONGEST, place)
            while length < most and tokens[place - 1 - length] == tokens[size - 1 - length]:
                length += 1
            if length > best.length:
                best = Match(place, length)
            place = self._earlier[place]
        return best
