"""Where drafts come from. A drafter is a class with a line in `DRAFTERS`; verification does not ask who drafted.

drafter = DRAFTERS["exit"](stack, cache, draft_head)
proposal = drafter.draft(rows, limits)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerskip.decode.drafters.exit import ExitDrafter
from layerskip.decode.drafters.lookup import LookupDrafter

if TYPE_CHECKING:
    from collections.abc import Callable

    from layerskip.decode.drafters.drafter import Drafter
    from layerskip.model.cache import Cache
    from layerskip.model.head import Head
    from layerskip.model.stack import Stack

DRAFTERS: dict[str, Callable[[Stack, Cache, Head | None], Drafter]] = {
    ExitDrafter.name: ExitDrafter,
    LookupDrafter.name: LookupDrafter,
}
