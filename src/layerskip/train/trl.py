"""The recipe on TRL's supervised fine-tuning: its data formats, packing and templates, our loss and dropout.

    from layerskip.train.trl import LayerSkipSFTConfig, LayerSkipSFTTrainer
    args = LayerSkipSFTConfig("out", p_max=0.1, exits=[4, 8], packing=True)
    LayerSkipSFTTrainer(model=model, args=args, train_dataset=chats, processing_class=tokenizer).train()

TRL is imported when one of the two is first asked for. Its own figures (entropy, token accuracy) come from whole
logits and are absent; those of every exit take their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from layerskip.errors import UserError

NAMES = ("LayerSkipSFTConfig", "LayerSkipSFTTrainer")


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals().update(_classes())
    return globals()[name]


def _classes() -> dict[str, Any]:
    """Make both classes. Raises: UserError where TRL is missing."""
    import torch

    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise UserError("supervised fine-tuning with TRL needs trl", "pip install trl") from error
    from layerskip.train.trainer import LayerSkipFields, LayerSkipMixin

    @dataclass
    class LayerSkipSFTConfig(LayerSkipFields, SFTConfig):
        """`SFTConfig` with the recipe's settings; on a CPU arithmetic is float32 unless bf16 is given."""

        def __post_init__(self) -> None:
            # TRL's own default is bf16 everywhere, which transformers refuses where there is no accelerator.
            told: Any = self
            if told.bf16 is None and (told.use_cpu or not torch.accelerator.is_available()):
                told.bf16 = False
            super().__post_init__()

    class LayerSkipSFTTrainer(LayerSkipMixin, SFTTrainer):
        """`SFTTrainer` with layer dropout and early-exit loss."""

    made: dict[str, Any] = {}
    for one in (LayerSkipSFTConfig, LayerSkipSFTTrainer):
        one.__module__, one.__qualname__ = __name__, one.__name__  # found by pickle: arguments are saved
        made[one.__name__] = one
    return made
