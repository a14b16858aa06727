"""A finished continuation and its statistics, summed up from its rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.decode.options import Plan
    from layerskip.decode.request import Round


@dataclass
class Generation:
    """A finished continuation. `tokens` are the new ones only; `rounds` is how they came about.

    Units: `stats` counts tokens and gives seconds (`_s`) and tokens per second; see `statistics`.
    """

    text: str
    tokens: list[int]
    finish_reason: str | None
    rounds: list[Round]
    stats: dict[str, Any]
    error: Exception | None = None  # what ended it, where `finish_reason` is "error"

    @property
    def states(self) -> Tensor | None:
        """What the head read of all tokens but the last, [T - 1, D], prompt included; None unless asked."""
        return self.rounds[-1].states if self.rounds else None

    def checked(self) -> Generation:
        """Raise the error that ended it, where one did."""
        if self.error is not None:
            raise self.error
        return self


def statistics(rounds: Sequence[Round], plan: Plan, prompt_tokens: int) -> dict[str, Any]:
    """Count and time a sequence. Rates are None where nothing was measured; prefill and decode stay apart.

    `acceptance` is accepted over drafted; `tokens_per_round` and `layer_passes` (layers x tokens) exclude the
    prompt's.
    Units: seconds of the engine's steps, without the caller's time between them; each row counts a shared step
    whole.
    """
    decode = [round for round in rounds if round.source != "prefill"]
    decode_s = sum(round.step_s for round in decode)
    decoded = sum(len(round.tokens) for round in decode)
    drafted, accepted = sum(r.drafted for r in decode), sum(r.accepted for r in decode)
    return {
        "mode": plan.mode,
        "drafter": plan.drafter,
        "exit_layer": plan.exit_layer,
        "draft_length": plan.draft_length,
        "policy": plan.policy,
        "prompt_tokens": prompt_tokens,
        "new_tokens": sum(len(round.tokens) for round in rounds),
        "prefill_s": sum(round.step_s for round in rounds if round.source == "prefill"),
        "decode_s": decode_s,
        "decode_tokens_per_s": decoded / decode_s if decode_s else None,
        "rounds": len(decode),
        "plain_rounds": sum(not round.draft for round in decode),
        "by_source": by_source(decode),
        "drafted": drafted,
        "accepted": accepted,
        "acceptance": accepted / drafted if drafted else None,
        "tokens_per_round": decoded / len(decode) if decode else None,
        "layer_passes": sum(round.layer_passes for round in decode),
    }


def by_source(rounds: Sequence[Round]) -> dict[str, dict[str, int]]:
    """Count rounds that drafted, their drafts and those accepted, by who drafted."""
    counts: dict[str, dict[str, int]] = {}
    for round in rounds:
        if round.draft:
            own = counts.setdefault(round.source, {"rounds": 0, "drafted": 0, "accepted": 0})
            own["rounds"] += 1
            own["drafted"] += round.drafted
            own["accepted"] += round.accepted
    return counts
