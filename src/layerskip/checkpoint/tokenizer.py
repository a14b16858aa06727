"""Read the tokenizer that lies in a checkpoint's folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerskip.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")


def tokenizer_in(folder: Path) -> Any:
    """Read a folder's tokenizer; None where it has none, for transformers would make up an empty one.

    Raises: UserError where it cannot be read.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"cannot read the tokenizer of {folder}: {error}", "add its tokenizer.json"
        ) from error
