"""Which row a prompt should go on in, copy from, or take: what is in the caches already is not computed twice.

    choice = chosen(prompt, held, free=engine.has_room)

A row that is kept holds an earlier conversation. Its next turn goes on in it; a prompt that shares only the
beginning (a system prompt) copies that into a row of its own, as long as there is one, so that both stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Who = TypeVar("Who")
WORTH = 16  # tokens in common from which on a copy is worth more than computing them


@dataclass(frozen=True)
class Held(Generic[Who]):
    """What a row holds: its committed tokens, and whether it is kept (else it is running)."""

    who: Who
    tokens: Sequence[int]
    kept: bool
    used: float  # when it was last of use


@dataclass(frozen=True)
class Placed(Generic[Who]):
    """Where a prompt goes: on in a kept row, or into a free one, copying from `like`, once `evicted` is gone."""

    after: Who | None = None
    like: Who | None = None
    evicted: Who | None = None


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the leading tokens that two lists share."""
    most = min(len(one), len(other))
    if list(one[:most]) == list(other[:most]):
        return most
    low, high = 0, most  # equal up to low, different before high
    while high - low > 1:
        middle = (low + high) // 2
        if list(one[low:middle]) == list(other[low:middle]):
            low = middle
        else:
            high = middle
    return low


def chosen(prompt: Sequence[int], held: Sequence[Held[Who]], free: bool) -> Placed[Who] | None:
    """Say where a prompt goes; None where every row is running."""
    kept = [one for one in held if one.kept]
    if not free and not kept:
        return None
    shared = {id(one): common(prompt, one.tokens) for one in held}
    best = max(held, key=lambda one: (shared[id(one)], one.kept), default=None)
    most = 0 if best is None else shared[id(best)]
    if best is not None and best.kept and most >= WORTH and most >= len(best.tokens) - 1:
        return Placed(after=best.who)  # the next turn of that conversation
    oldest = min(kept, key=lambda one: one.used, default=None)
    if best is None or most < WORTH:
        return Placed() if free or oldest is None else Placed(evicted=oldest.who)
    if free:
        return Placed(like=best.who)
    if best.kept and best is oldest:
        return Placed(after=best.who)
    assert oldest is not None
    return Placed(like=best.who, evicted=oldest.who)
