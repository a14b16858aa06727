"""Low-rank adapters on chosen layers, by PEFT; the head and the embeddings are never adapted."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from layerskip.errors import UserError, nearest
from layerskip.train.objective import exit_map

if TYPE_CHECKING:
    from layerskip.train.job.recipe import Lora


def with_adapters(hf: Any, lora: Lora) -> Any:
    """Wrap a model in adapters; everything else is frozen.

    Raises: UserError for layers or module names the model does not have, and for a model type that is not known.
    """
    from peft import LoraConfig, get_peft_model

    ranks = _ranks(hf, lora)
    settings = LoraConfig(
        r=lora.rank,
        rank_pattern=ranks,
        alpha_pattern={name: lora.alpha * rank / lora.rank for name, rank in ranks.items()},
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        target_modules=adapted_modules(hf, lora),
        modules_to_save=[exit_map.NAME] if exit_map.map_of(hf) is not None else None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # PEFT 0.21 asks for a name that transformers 5 renames
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(hf, settings)


def _ranks(hf: Any, lora: Lora) -> dict[str, int]:
    """Name the modules whose rank is not the common one. Raises: UserError for layers without adapters."""
    from layerskip.model.families import parts_of

    _, layers, _, _ = parts_of(hf)
    if strange := [layer for layer in lora.ranks if layer not in (lora.layers or range(1, len(layers) + 1))]:
        raise UserError(f"lora.ranks names layer {strange[0]}, which has no adapters", "see lora.layers")
    return {
        name: rank
        for layer, rank in lora.ranks.items()
        for name in adapted_modules(hf, lora.model_copy(update={"layers": [layer]}))
    }


def adapted_modules(hf: Any, lora: Lora) -> list[str]:
    """Name the linear modules to adapt, in full. Raises: UserError."""
    import torch
    from transformers.pytorch_utils import Conv1D

    from layerskip.model.families import parts_of

    _, layers, _, _ = parts_of(hf)
    chosen = range(1, len(layers) + 1) if lora.layers is None else lora.layers
    if strange := [number for number in chosen if number > len(layers)]:
        raise UserError(
            f"lora.layers names layer {strange[0]}, the model has {len(layers)}", f"from 1 to {len(layers)}"
        )
    inside = {id(module) for number in chosen for module in layers[number - 1].modules()}
    linear = [
        name
        for name, module in hf.named_modules()
        if id(module) in inside and isinstance(module, (torch.nn.Linear, Conv1D))
    ]
    if lora.targets == "all-linear":
        return linear
    wanted = [lora.targets] if isinstance(lora.targets, str) else lora.targets
    known = {name.rsplit(".", 1)[-1] for name in linear}
    for target in wanted:
        if target not in known:
            raise UserError(
                f"lora.targets: no linear module {target!r} in the layers", nearest(target, known)
            )
    return [name for name in linear if name.rsplit(".", 1)[-1] in wanted]
