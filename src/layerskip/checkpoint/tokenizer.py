"""Read the tokenizer that lies in a checkpoint's folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from layerskip.errors import UserError
from layerskip.reading import reason

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
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.decode(tokenizer.encode("a"))  # a setting of another type shows when it is used
        return tokenizer
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # the tokenizers library panics in Rust, which is no Exception, on some files
        raise UserError(
            f"cannot read the tokenizer of {folder}: {reason(error)}", "add its tokenizer.json"
        ) from error
