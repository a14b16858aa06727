"""What a server is told when it starts, and how many rows its memory holds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerskip.errors import UserError
from layerskip.option import check, option
from layerskip.reading import read_text

if TYPE_CHECKING:
    from layerskip.model.stack import Stack

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY = "LAYERSKIP_API_KEY"
SHARE = 0.5  # of free memory that rows may take unasked
CONTEXT = 4096  # tokens of a row unasked, or the model's context where that is less


@dataclass(frozen=True)
class ServeOptions:
    """Options of a server. Raises: UserError for one out of range."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 is every network.")
    port: int = option(8000, "Port; 0 is any free one.", least=0, most=65535)
    name: str | None = option(None, "What clients call the model.", shown="as it was given")
    rows: int | None = option(None, "Requests decoded together.", least=1, shown="8, or what memory holds")
    context: int | None = option(None, "Tokens of a request, prompt and output.", least=16, shown="4096")
    memory: float | None = option(None, "GiB for keys and values.", above=0, shown="half of what is free")
    queue: int = option(64, "Requests that may wait for a row; more get status 429.", least=0)
    timeout: float = option(600.0, "Seconds a request may take, waiting included.", above=0)
    stalled: float = option(60.0, "Seconds a paused request may wait for its client to read on.", above=0)
    choices: int = option(8, "The largest n of a request.", least=1)
    body: int = option(1 << 20, "Bytes of a request at most.", least=1024)
    prefill_chunk: int | None = option(
        None, "Prompt tokens computed between two rounds.", least=1, shown="256 or 512"
    )
    api_key_file: Path | None = option(None, f"File with the key that clients must send; or {KEY}.")
    cors_origin: Sequence[str] = option(
        (), "Origin of web pages that may call; may be repeated.", typed=list[str] | None
    )
    log_prompts: bool = option(False, "Write prompts and answers into the log.")

    def __post_init__(self) -> None:
        check(type(self), vars(self))

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK

    def fitted(self, stack: Stack, finals: bool = False) -> ServeOptions:
        """Settle context and rows by the model and the memory; with `finals` rows keep the last layer's states.

        Raises: UserError where not even one row fits.
        """
        from layerskip.model.cache import available_bytes

        most = stack.context or self.context or CONTEXT
        context = self.context or min(CONTEXT, most)
        if context > most:
            raise UserError(f"a context of {context} passes the model's of {most}", "make --context smaller")
        each = row_bytes(stack, context, finals)
        free = available_bytes(stack.device)
        room = None if free is None else int(SHARE * free)
        if self.memory is not None:
            room = int(self.memory * 2**30)
        holds = None if room is None else room // each
        if holds == 0:
            raise UserError(
                f"a row of {context} tokens needs {each / 2**30:.2f} GiB, there are {(room or 0) / 2**30:.2f}",
                "make --context smaller, or --memory larger",
            )
        if self.rows is not None and holds is not None and self.rows > holds:
            raise UserError(
                f"{self.rows} rows of {context} tokens need {self.rows * each / 2**30:.2f} GiB, "
                f"there are {(room or 0) / 2**30:.2f}",
                f"--rows {holds} fit; or make --context smaller, or --memory larger",
            )
        rows = self.rows or (holds if self.memory is not None and holds else min(8, holds or 8))
        return replace(self, context=context, rows=rows)


def row_bytes(stack: Stack, context: int, finals: bool = False) -> int:
    """Bytes of keys and values of one row, and of the last layer's states where they are kept."""
    each = sum(shape.token_bytes for shape in stack.new_cache(1, 1).shapes)
    return (each + finals * stack.width * stack.dtype.itemsize) * (context + 1)


def read_key(file: Path | None) -> str | None:
    """Read a server's key out of its file, else the environment; None where there is none.

    Raises: UserError for a file without one.
    """
    if file is None:
        return os.environ.get(KEY) or None
    key = read_text(file, 4096).strip()
    if not key:
        raise UserError(f"{file} is empty", "write the key into it, or leave out --api-key-file")
    return key
