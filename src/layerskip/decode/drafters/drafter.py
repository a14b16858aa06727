"""The contract of a drafter: tokens, the law of each, and the states it has computed on the way.

Acceptance is exact for any law (see `sampling.accept`), so a drafter owes the law it really drew from and nothing
else. What it decides it decides from committed tokens and its own laws. Greedy drafts may also be cut by measured
costs and by the rows beside them, sampled ones never.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from layerskip.decode.row import Draft, Row


@dataclass
class Proposal:
    """One draft per row, and how far the layers have been run for it.

    Shapes: states and each of taps [B, T, D], T = the longest draft + 1: the last committed token's position and
    that of every drafted token. A drafter that ran no layer has `layers` 0 and no states.
    """

    drafts: list[Draft]
    layers: int = 0  # layers the states have been through, whose keys and values are in the cache
    states: Tensor | None = None
    taps: Mapping[int, Tensor] = field(default_factory=dict)  # states of the row's probes up to `layers`


class Drafter(Protocol):
    """Propose up to `limits[b]` tokens for each row; commit nothing and leave the rows as they are.

    Drafting twice gives the same twice, up to where greedy drafts are cut: a round that failed for one row is done
    again for the others. Random
    numbers are those of `row.numbers` under the purpose DRAFT.
    """

    name: str

    def draft(self, rows: Sequence[Row], limits: Sequence[int]) -> Proposal: ...
