"""Which files of a folder are a checkpoint: what is copied, exported and uploaded, and nothing that lies beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerskip.checkpoint.configuration import read_configuration

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.jinja",
    "generation_config.json",
)  # fmt: skip
LICENCES = ("LICENSE*", "NOTICE*")
TOLD = ("README.md", *LICENCES)  # for readers
PARTS = ("draft_vocab", "draft_head", "exit_adapter")  # keys of our entry that name files


def parts(folder: Path) -> list[str]:
    """Names of the files that the `layerskip` entry of a folder names. Raises: UserError for no configuration."""
    entry = read_configuration(folder / "config.json").get("layerskip")
    return [name for name in named_parts(entry) if (folder / name).is_file()]


def named_parts(entry: Any) -> list[str]:
    """Names of the files that a `layerskip` entry names, whatever it is."""
    named = (entry.get(key) for key in PARTS) if isinstance(entry, dict) else ()
    return [name for name in named if isinstance(name, str)]


def own_weights(folder: Path) -> list[Path]:
    """The weight files of the model itself, without those that only draft."""
    beside = {"exit_adapter.safetensors", "draft_head.safetensors", *parts(folder)}
    return [file for file in matching(folder, WEIGHTS) if file.name not in beside]


def checkpoint_files(folder: Path) -> list[Path]:
    """All files of a checkpoint, by name. Raises: UserError for a folder without a configuration."""
    files = matching(folder, (*WEIGHTS, *TOKENIZER, *TOLD, "config.json"))
    return sorted({*files, *(folder / name for name in parts(folder))})


def matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Regular files right in a folder that fit a pattern, by name."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
