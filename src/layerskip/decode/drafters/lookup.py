"""Copy from the text so far: where the last tokens have stood before, propose what followed them there.

Nothing is trained and no layer is run to draft, so verification starts at layer 0. Looking up costs microseconds.

Source: prompt lookup (Saxena 2023); inference with reference (Yang et al., arXiv 2304.04487).
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from layerskip.decode.drafters.drafter import Proposal
from layerskip.decode.row import Draft

if TYPE_CHECKING:
    from collections.abc import Sequence

    from layerskip.decode.row import Row
    from layerskip.model.cache import Cache
    from layerskip.model.head import Head
    from layerskip.model.stack import Stack


class LookupDrafter:
    """Copy behind the longest match of a row's last tokens; a row whose last token is new drafts nothing."""

    name = "lookup"

    def __init__(self, stack: Stack, cache: Cache, head: Head | None) -> None:
        """Take what every drafter is made from, and need none of it."""

    def draft(self, rows: Sequence[Row], limits: Sequence[int]) -> Proposal:
        return Proposal([Draft(copied(row, limit)) for row, limit in zip(rows, limits, strict=True)])


def copied(row: Row, limit: int) -> list[int]:
    """Copy up to `limit` tokens behind the best match of the row's last ones, up to an end of sequence."""
    tokens: list[int] = []
    for token in islice(row.history.continuation(row.tokens), limit) if limit else ():
        tokens.append(token)
        if token in row.request.eos:
            break
    return tokens
