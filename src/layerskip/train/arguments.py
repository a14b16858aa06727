"""The recipe's settings as fields of Hugging Face's `TrainingArguments`, or of any other dataclass of arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from layerskip.train.objective.schedule import Schedule


@dataclass
class LayerSkipFields:
    """What the recipe adds to any `TrainingArguments`. Defaults are the paper's continual training."""

    p_max: float = field(
        default=0.1, metadata={"help": "Drop rate of the last layer; 0 is no layer dropout."}
    )
    drop_depth: str = field(default="exp", metadata={"help": "Rate over depth: exp, linear or uniform."})
    drop_time: str = field(default="const", metadata={"help": "Rate over time: const, exp or linear_down."})
    residual_scale: str = field(default="none", metadata={"help": "none, or inverse: kept layers / (1 - p)."})
    e_scale: float = field(
        default=1.0, metadata={"help": "Weight of the exits' loss; 0 trains the end only."}
    )
    weighting: Any = field(
        default="paper", metadata={"help": "paper, uniform, or a weight for each exit: {4: 2.0}."}
    )
    curriculum: str = field(
        default="rotational", metadata={"help": "Exits trained at a step: rotational, gradual, all or fixed."}
    )
    rotation: int | None = field(
        default=None, metadata={"help": "Every rotation-th exit is on; default: one exit a step."}
    )
    exits: list[int] | None = field(default=None, metadata={"help": "Exits to train; default: all."})
    last_every: int = field(
        default=1, metadata={"help": "N: every N-th row runs all layers; the others end at an early exit."}
    )
    exit_loss: str = field(default="ce", metadata={"help": "ce, kl (to the final layer) or ce+kl."})
    last_loss: str = field(
        default="ce", metadata={"help": "ce, or the last layer stays what it was: kl or anchor."}
    )
    exit_vocab: int | None = field(
        default=None,
        metadata={"help": "Rows that end early are scored against the data's N most frequent tokens."},
    )
    exit_map: bool = field(default=False, metadata={"help": "Read the exit through a trained square matrix."})
    exit_adapter: bool = field(
        default=False,
        metadata={"help": "Read the exit through a trained adapter that remembers the last state."},
    )
    adapter_blocks: int = field(default=1, metadata={"help": "Blocks of the adapter; 0 leaves its two maps."})
    adapter_hidden: int | None = field(
        default=None, metadata={"help": "Width of a block's hidden layer; default: that of the model."}
    )
    adapter_steps: int = field(
        default=3, metadata={"help": "Drafts of a round that are trained, each on the last."}
    )
    optimizer: str = field(
        default="adamw", metadata={"help": "adamw (as optim says), or muon, for what freeze=model leaves."}
    )
    freeze: str = field(
        default="nothing", metadata={"help": "nothing, embeddings (and head), above (the exits) or model."}
    )

    def schedule(self, num_layers: int) -> Schedule:
        """Bind these settings to a model of `num_layers` layers. Raises: UserError where they do not fit it."""
        return Schedule.of(num_layers, self, self.exits)


@dataclass
class LayerSkipArguments(LayerSkipFields, TrainingArguments):
    """`TrainingArguments` with the recipe's settings."""
