"""One sequence in the engine, and what a round found out about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.decode.control import Choice
    from layerskip.decode.request import Request
    from layerskip.decode.sampling import Uniforms


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
    waited: int = 0  # step id of the last service
    finished: bool = False
    proposal: list[int] = field(default_factory=list)
    laws: list[Tensor] = field(default_factory=list)  # q of every draft, when sampling

    @property
    def exit_layer(self) -> int:
        return self.choice.exit_layer

    @property
    def budget(self) -> int:
        return len(self.request.prompt) + self.request.max_new_tokens - len(self.tokens)

    def drafts_allowed(self, capacity: int) -> int:
        """Count the drafts that budget and cache leave room for, with one more token committed behind them."""
        return max(0, min(self.choice.draft_length, self.budget - 1, capacity - len(self.tokens)))

    def reusable(self, prompt: Sequence[int], cached: int) -> int:
        """Count the leading tokens of a new prompt whose keys and values are among the row's first `cached`.

        The prompt's last token is left out: it has to be run for its logits.
        """
        pairs = zip(self.tokens[:cached], prompt[:-1], strict=False)
        return next(
            (i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(cached, len(prompt) - 1)
        )


class Outcome(NamedTuple):
    """What a round found out about one row, before anything is committed."""

    draft: list[int]
    kept: int  # leading drafts accepted
    following: int  # the token behind them
    num_computed: int  # positions that went through the layers, padding included
    logits: Tensor | None  # [N, V] of the target; None where they stayed on the device
    agreements: dict[int, tuple[float, int]] = {}  # noqa: RUF012 - never written to; see `Drafted`
