"""What a run teaches beside its schedule: which losses, what stays as it is, how the exit is read.

    objective = Objective(last_loss="anchor", freeze="above")
    exits = ExitTraining(model, schedule, bound(objective, model, schedule, batches))

This is a description, without torch; `binding.bound` makes of it what one model needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from layerskip.errors import UserError, nearest

CHOICES = {
    "exit_loss": ("ce", "kl", "ce+kl"),
    "last_loss": ("ce", "kl", "anchor"),
    "freeze": ("nothing", "embeddings", "above", "model"),
    "residual_scale": ("none", "inverse"),
}


@dataclass(frozen=True)
class Objective:
    """A recipe's choice; the keys mean what they mean in a recipe. Raises: UserError for an unknown choice."""

    exit_loss: str = "ce"
    last_loss: str = "ce"
    exit_vocab: int | Sequence[int] | None = None
    """How many of the data's most frequent tokens, or these token ids, by falling frequency."""
    exit_map: bool = False
    exit_adapter: bool = False
    adapter_blocks: int = 1
    adapter_hidden: int | None = None
    adapter_steps: int = 3
    freeze: str = "nothing"
    residual_scale: str = "none"

    def __post_init__(self) -> None:
        for key, known in CHOICES.items():
            if (chosen := getattr(self, key)) not in known:
                raise UserError(f"unknown {key} {chosen!r}", nearest(str(chosen), known))
        if self.exit_vocab is not None and not (
            self.exit_vocab > 0 if isinstance(self.exit_vocab, int) else self.exit_vocab
        ):
            raise UserError(f"exit_vocab is {self.exit_vocab}", "a draft head has at least one token")

    @classmethod
    def of(cls, settings: Any) -> Objective:
        """Take the fields from a recipe or from arguments, which call them the same."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def contradiction(self, schedule: Any, adapters: bool) -> str | None:
        """Say which settings exclude one another. `schedule` is a `Schedule`, or a recipe, which has its fields."""
        one_exit = isinstance(schedule.exits, (list, tuple)) and len(schedule.exits) == 1
        fixed = schedule.curriculum == "fixed" and schedule.p_max == 0
        head_moves = self.freeze == "nothing" and not adapters
        rules = (
            (
                self.last_loss == "kl" and head_moves,
                "last_loss kl needs the head it compares with: freeze=embeddings, or lora",
            ),
            (
                schedule.last_every > 1 and self.exit_loss != "ce",
                "rows that end early (last_every) have no last layer: exit_loss=ce",
            ),
            (
                self.exit_map and (schedule.e_scale == 0 or schedule.curriculum == "gradual"),
                "exit_map needs its exit at every step: e_scale above 0, and not curriculum gradual",
            ),
            (self.exit_map and not one_exit, "exit_map belongs to one exit: exits=[E]"),
            (
                self.exit_map and self.exit_vocab is None,
                "exit_map needs exit_vocab, the size of the draft head it goes into",
            ),
            (self.exit_map and head_moves, "exit_map needs a head that stays: freeze=embeddings, or lora"),
            (
                self.freeze == "above" and schedule.e_scale == 0,
                "freeze above leaves the exits to learn, and there are none: e_scale above 0",
            ),
            (
                self.last_loss == "anchor" and not (self.freeze == "above" and fixed and not adapters),
                "last_loss anchor needs freeze=above, curriculum=fixed, p_max=0 and no lora",
            ),
            (
                self.freeze == "model" and (adapters or not (self.exit_map or self.exit_adapter)),
                "freeze model leaves the map or the adapter of the exit to learn: exit_map=true or "
                "exit_adapter=true, and no lora",
            ),
            (
                self.exit_adapter
                and not (self.freeze == "model" and one_exit and fixed and schedule.last_every == 1),
                "exit_adapter needs freeze=model, exits=[E], curriculum=fixed, p_max=0 and last_every=1",
            ),
            (
                isinstance(schedule.exits, (list, tuple)) and 0 in schedule.exits and not self.exit_adapter,
                "exit 0, the embedding, is for an adapter: exit_adapter=true",
            ),
            (self.exit_adapter and self.exit_map, "exit_adapter and exit_map exclude each other"),
            (
                self.exit_adapter and (self.adapter_blocks < 0 or self.adapter_steps < 1),
                "exit_adapter needs adapter_blocks from 0 and adapter_steps from 1 on",
            ),
        )
        return next((reason for broken, reason in rules if broken), None)
