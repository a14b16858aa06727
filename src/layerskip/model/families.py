"""Where each family of Hugging Face models keeps its parts: a table, no file per family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from layerskip.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

ADDING_A_MODEL = "docs/extending.md says what a family must provide"


def _token_embedding(decoder: Any, table: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    embedded: Tensor = table(tokens)
    return embedded


def _gpt2_embedding(decoder: Any, table: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    embedded: Tensor = decoder.wte(tokens) + decoder.wpe(positions)
    return embedded


def _opt_embedding(decoder: Any, table: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    embedded = decoder.embed_tokens(tokens)
    if decoder.project_in is not None:
        embedded = decoder.project_in(embedded)
    summed: Tensor = embedded + decoder.embed_positions(None, 0, position_ids=positions)
    return summed


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts; paths are attributes of the causal model's decoder."""

    decoder: str = "model"
    layers: str = "layers"
    finish: tuple[str, ...] = ("norm",)  # applied in order before the head; a missing (None) part is skipped
    rotary: str | None = "rotary_emb"
    rotary_per_kind: bool = False  # one table for full, one for sliding attention
    window: str = "none"  # which layers slide: none, all (when the config sets a window), layer_types
    cache_argument: str = "past_key_values"
    embed: Callable[[Any, Any, Tensor, Tensor], Tensor] = _token_embedding


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(window="all"),
    "qwen2": Family(window="layer_types"),
    "qwen3": Family(window="layer_types"),
    "phi3": Family(window="all"),
    "smollm3": Family(window="layer_types"),
    "olmo2": Family(),
    "gemma": Family(),
    "gemma2": Family(window="layer_types"),
    "gemma3_text": Family(window="layer_types", rotary_per_kind=True),
    "gpt2": Family("transformer", "h", ("ln_f",), rotary=None, embed=_gpt2_embedding),
    "opt": Family(
        "model.decoder", finish=("final_layer_norm", "project_out"), rotary=None, embed=_opt_embedding
    ),
    "gpt_neox": Family("gpt_neox", finish=("final_layer_norm",), cache_argument="layer_past"),
}


def parts_of(hf: Any) -> tuple[Any, list[Any], Any, list[Any]]:
    """Find decoder, layers, rotary module and finishing modules by the family's paths. Raises: UserError."""
    kind = hf.config.get_text_config().model_type
    family = FAMILIES.get(kind, Family())
    try:
        decoder = hf.get_submodule(family.decoder)
        rotary = getattr(decoder, family.rotary) if family.rotary else None
        finish = [module for name in family.finish if (module := getattr(decoder, name)) is not None]
        return decoder, list(getattr(decoder, family.layers)), rotary, finish
    except AttributeError as error:
        raise UserError(f"model type {kind!r} is not supported: {error}", ADDING_A_MODEL) from None


def tied(table: Tensor, head: Tensor) -> bool:
    """Whether two weights are one tensor, or share its memory: an embedding table used as the head."""
    return table is head or (table.device.type != "meta" and table.data_ptr() == head.data_ptr())


def device_of(hf: Any) -> torch.device:
    """Where tokens go in; a table offloaded by accelerate takes them from the CPU through its hooks."""
    device: torch.device = hf.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def refuse_unsupported(hf: Any) -> None:
    """Refuse by name what the rounds cannot decode exactly, before anything is computed. Raises: UserError."""
    refuse_architecture(hf)
    if any(module.training for module in hf.modules()):
        raise UserError(
            "the model is in training mode: dropout would change its output", "call model.eval() first"
        )
    if (attention := hf.config._attn_implementation) not in ("sdpa", "eager"):
        raise UserError(
            f"attention implementation {attention!r} is not supported (sdpa and eager are)",
            'load the model with attn_implementation="sdpa"',
        )


def refuse_architecture(hf: Any) -> None:
    """Refuse kinds of models that neither decoding nor training knows. Raises: UserError."""
    config = hf.config
    text = config.get_text_config()
    kind = text.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{kind!r} is an encoder-decoder; layerskip decodes decoder-only models")
    if any(hasattr(config, name) for name in ("vision_config", "audio_config")):
        raise UserError(
            f"{config.model_type!r} is multimodal and not supported", "export its text decoder and load that"
        )
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any(getattr(text, name, None) for name in experts):
        raise UserError(f"{kind!r} is a mixture of experts and not supported yet", ADDING_A_MODEL)
    kinds = set(getattr(text, "layer_types", None) or ())
    if (unknown := kinds - {"full_attention", "sliding_attention"}) or not hasattr(
        text, "num_attention_heads"
    ):
        what = ", ".join(sorted(unknown)) or "recurrent"
        raise UserError(
            f"{kind!r} has layers of a kind whose state cannot be rolled back ({what})", ADDING_A_MODEL
        )
    if hf.get_output_embeddings() is None:
        raise UserError(
            f"{type(hf).__name__} has no language-model head", "load it with AutoModelForCausalLM"
        )


def context_of(config: Any) -> int | None:
    """Find how long a sequence may get.

    Rotary tables that are recomputed beyond the original length (dynamic, longrope) would give draft and
    verification other angles than plain decoding, so such models stop at the original length.
    """
    context: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            context = parameters.get("original_max_position_embeddings") or context
    return context


def windows_of(config: Any, family: Family, num_layers: int) -> list[int | None]:
    """The sliding window of each layer in positions; None where a layer sees everything."""
    window: int | None = getattr(config, "sliding_window", None)
    if family.window == "all":
        return [window] * num_layers
    if family.window == "layer_types":
        types = config.layer_types[:num_layers]
        return [window if kind == "sliding_attention" else None for kind in types]
    return [None] * num_layers
