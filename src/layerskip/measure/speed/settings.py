"""What a benchmark compares, and on which prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerskip.decode.options import Options
from layerskip.measure.speed.methods import AR, EARLY_EXIT, SELF_SPECULATIVE

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Prompt:
    """A prompt in tokens."""

    task: str | None
    tokens: list[int]


@dataclass(frozen=True)
class Settings:
    """What to compare, and how often."""

    methods: Sequence[str] = (AR, SELF_SPECULATIVE, EARLY_EXIT)
    exit_layer: int | None = None  # None: the checkpoint's
    draft_length: int | None = None
    draft_vocab: int | str | None = None  # auto: by the cost model; None: as `generate` does by default
    max_new_tokens: int = 64
    trials: int = 3
    simulate_acceptance: float | None = None
    hf_dtype: torch.dtype | None = None  # None: ours
    quantisation: str | None = None
    policy: str | None = None
    confidence: float | None = None
    guard: bool | None = None
    drafter: str | None = None
    match_min: int | None = None
    copy_length: int | None = None

    def options(self, **more: Any) -> Options:
        """The options of our self-speculative runs. Raises: UserError."""
        return Options.parse(
            {
                "mode": SELF_SPECULATIVE,
                "exit_layer": self.exit_layer,
                "draft_length": self.draft_length,
                "simulate_acceptance": self.simulate_acceptance,
                "max_new_tokens": self.max_new_tokens,
                "policy": self.policy,
                "confidence": self.confidence,
                "guard": self.guard,
                "drafter": self.drafter,
                "match_min": self.match_min,
                "copy_length": self.copy_length,
                "eos_token_id": [],
                **more,
            }
        )
