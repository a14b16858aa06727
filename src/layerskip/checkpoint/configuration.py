"""config.json, read and checked before anything is built from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerskip.errors import UserError
from layerskip.reading import read_json

SIZES = {  # under all names transformers has for them; the most is far beyond every model, but can be counted to
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 1000),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"), 10**5),
    **dict.fromkeys(("hidden_size", "n_embd", "ffn_dim", "word_embed_proj_dim"), 10**6),
    **dict.fromkeys(("intermediate_size", "n_inner", "max_position_embeddings", "n_positions"), 10**9),
    **dict.fromkeys(("vocab_size", "sliding_window"), 10**9),
}
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NUMBERS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "initializer_range", "rope_theta")


def read_configuration(file: Path) -> dict[str, Any]:
    """Read a config.json. Raises: UserError for what is no model's: no object, -1 layers, an id of 1.5."""
    config: dict[str, Any] = read_json(file, dict)
    _check(config, str(file))
    return config


def num_layers_in(folder: Path) -> int | None:
    """Read how many layers the model of a folder has, without transformers; None where nothing says so.

    Raises: UserError as `read_configuration`.
    """
    if not (folder / "config.json").is_file():
        return None
    config = read_configuration(folder / "config.json")
    parts = [config, *(part for name, part in config.items() if name == "text_config" and part)]
    named = ("num_hidden_layers", "n_layer", "num_layers")
    return next((part[name] for part in parts for name in named if part.get(name)), None)


def _check(config: dict[str, Any], where: str) -> None:
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"{where}: model_type is {kind!r}, not text", "save or copy it again")
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith("_config"):
            _check(value, f"{where}: {name}")
        elif value is None:
            continue
        elif name in SIZES and not (type(value) is int and 1 <= value <= SIZES[name]):
            allowed = f"{name} is a whole number from 1 to {SIZES[name]}"
            raise UserError(f"{where}: {name} is {str(value)[:80]!r}", allowed)
        elif name in NUMBERS and (type(value) not in (int, float) or not 0 < value < 1e30):
            raise UserError(f"{where}: {name} is {str(value)[:80]!r}", f"{name} is a number above 0")
        elif name in IDS:
            check_ids(value, f"{where}: {name}")


def check_ids(value: Any, where: str) -> None:
    """Refuse what is neither a token id nor a list of them. Raises: UserError."""
    for one in value if isinstance(value, list) else [value]:
        if type(one) is not int or not -1 <= one < 2**31:  # some checkpoints say -1 for none
            raise UserError(f"{where} is {str(value)[:80]!r}", "a token id is a whole number, 0 or more")
