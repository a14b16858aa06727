"""What goes into the engine and what comes out: `Request`, `Round` and, where a row ends by an error, `Failure`.

The CLI, the server, the benchmark and the tuner consume the stream of rounds and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerskip.decode.sampling import Processing
from layerskip.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.decode.control import Controller


@dataclass(frozen=True)
class Request:
    """One sequence to continue, and how. `exit_layer` None means all layers: plain decoding.

    Raises: UserError for fields at odds.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    exit_layer: int | None = None
    draft_length: int = 0
    confidence: float = 0.0  # stop drafting where the draft head's largest probability is below
    controller: Controller | None = None  # chooses anew each round, instead of these three
    drafter: str = "exit"  # who proposes drafts, a name in `drafters.DRAFTERS`
    unverified: bool = False  # early-exit decoding: stop at the exit layer and do not verify
    eos: frozenset[int] = frozenset()
    processing: Processing = Processing()
    seed: int = 0
    index: int = 0  # place in the caller's order: keys the row's random numbers
    stop: Callable[[int], bool] | None = None  # asked after every committed token, in order
    logprobs: bool = False
    top_logprobs: int = 0  # of so many of the likeliest tokens too
    simulated: float | None = None  # keep each greedy draft with this probability, whatever the target says
    keep: bool = False  # leave the row's cache in place when it finishes, for a next turn
    states: bool = False  # its last round tells what the last layer said, of an engine with `finals`

    def __post_init__(self) -> None:
        if self.controller is not None and self.drafter != "exit":
            raise UserError(
                "a controller chooses among exits only", 'leave out the policy, or use drafter="exit"'
            )
        if self.states and self.unverified:
            raise UserError("early-exit decoding runs no last layer", "leave out states, or the mode")
        if self.simulated is not None and not self.processing.plain_greedy:
            raise UserError(
                "an acceptance can be simulated for plain greedy drafts only", "no sampling, no processors"
            )


@dataclass(frozen=True)
class Round:
    """What one work item committed to one row: what `stream` yields and a `Generation` lists."""

    row: int
    tokens: list[int]  # committed
    draft: list[int]
    accepted: int  # drafts committed, 0..K
    exit_layer: int
    draft_length: int  # K asked for; a draft may be shorter (end of sequence, confidence, budget, capacity)
    source: str  # prefill, plain, early-exit, or the drafter: exit, lookup
    step_id: int
    step_s: float  # seconds, shared by all rows of the step: sum once per step_id
    layer_passes: int  # layers x tokens of this row that went through them
    prompt_tokens: int = 0  # prompt positions computed by this work item
    finish_reason: str | None = None  # eos, stop, length
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None  # the likeliest tokens in every token's place
    states: Tensor | None = None  # behind the final norm, of all tokens but the last, [T - 1, D] on the CPU

    @property
    def drafted(self) -> int:
        """Count the drafts that were judged: those cut off by the end of the output are not rejections."""
        return self.accepted if self.finish_reason and len(self.tokens) == self.accepted else len(self.draft)


@dataclass(frozen=True)
class Failure:
    """A row that ended by an error: the engine has let go of it, the other rows go on."""

    row: int
    error: Exception
