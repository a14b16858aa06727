"""One sequence in the engine, and what a round found out about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from layerskip.decode.history import History
from layerskip.model.step import Step

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.decode.control import Choice
    from layerskip.decode.request import Request
    from layerskip.decode.sampling import Uniforms
    from layerskip.model.cache import Cache
    from layerskip.model.stack import Stack


@dataclass
class Row:
    """One sequence in the engine. `tokens` are prompt and output, all committed."""

    slot: int  # its row in the cache
    request: Request
    depth: int
    choice: Choice  # of its next round
    tokens: list[int]
    uniforms: Uniforms
    state: tuple[Any, ...]  # of the processors, at the next position
    history: History = field(default_factory=History)  # of its tokens, for drafts that copy
    arrived: int = 0  # its place among all requests the engine has taken
    waited: int = 0  # step id of the last service
    finished: bool = False
    suspended: bool = False  # in no step until it is taken in again; its cache stays
    answers: list[tuple[int, bool]] = field(default_factory=list)  # of the stop function, not committed yet

    @property
    def exit_layer(self) -> int:
        return self.choice.exit_layer

    @property
    def budget(self) -> int:
        """How many tokens may still be committed."""
        return len(self.request.prompt) + self.request.max_new_tokens - len(self.tokens)

    def drafts_allowed(self, capacity: int) -> int:
        """Count the drafts that budget and cache leave room for, with one more token committed behind them."""
        return min(self.choice.draft_length, self.room(capacity))

    def room(self, capacity: int) -> int:
        """Count the tokens that may be drafted, whatever was chosen."""
        return max(0, min(self.budget - 1, capacity - len(self.tokens)))

    def reusable(self, prompt: Sequence[int], cached: int) -> int:
        """Count the leading tokens of a new prompt whose keys and values are among the row's first `cached`.

        The prompt's last token is left out: it has to be run for its logits.
        """
        pairs = zip(self.tokens[:cached], prompt[:-1], strict=False)
        return next(
            (i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(cached, len(prompt) - 1)
        )

    def stops_at(self, place: int, token: int) -> bool:
        """Ask the stop function about a token not committed yet, and once only: a round may be repeated."""
        if self.request.stop is None:
            return False
        if place == len(self.answers):
            self.answers.append((token, self.request.stop(token)))
        elif self.answers[place][0] != token:  # a controller chose otherwise in the repeated round
            self.answers[place:] = [(token, self.request.stop(token))]
        return self.answers[place][1]

    def numbers(self, *addresses: tuple[int, ...], device: torch.device) -> Tensor:
        """Look up the row's uniform numbers at (position, purpose[, beginning of the round, for drafts]).

        Shapes: float64 [addresses].
        """
        found = [self.uniforms.at(self.request.index, *address) for address in addresses]
        return torch.tensor(found, dtype=torch.float64, device=device)


def span(
    rows: Sequence[Row], starts: Sequence[int], counts: Sequence[int], stack: Stack, cache: Cache
) -> Step:
    """Lay out consecutive tokens of rows: row b brings `counts[b]` of them from position `starts[b]` on."""
    return Step.span([row.slot for row in rows], starts, counts, stack.device, spill=cache.capacity)


@dataclass
class Draft:
    """What a drafter proposes for one row."""

    tokens: list[int] = field(default_factory=list)
    # q of each token, [V], where rows sample; None: all its mass is on the drafted token. Greedy rows need none.
    laws: list[Tensor | None] = field(default_factory=list)


class Verdict(NamedTuple):
    """What the target made of a draft."""

    kept: int  # leading drafts accepted
    following: int  # the token behind them
    state: tuple[Any, ...]  # of the processors, behind the last kept draft


class Outcome(NamedTuple):
    """What a work item found out about one row, before anything is committed."""

    draft: list[int]
    verdict: Verdict | None  # None: a part of a prompt, after which nothing is said yet
    layer_passes: int  # layers x positions that went through them; on the device padding included
    logits: Tensor | None  # [N, V] of the target; None where they stayed on the device
    agreements: Mapping[int, tuple[float, int]] = {}

    @property
    def kept(self) -> int:
        return 0 if self.verdict is None else self.verdict.kept

    @property
    def committed(self) -> list[int]:
        """The drafts that were kept and the token behind them."""
        return [] if self.verdict is None else [*self.draft[: self.kept], self.verdict.following]
