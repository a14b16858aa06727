"""Draft with the model's own first layers: the draft head reads their states, verification continues from them.

Behind an adapter (`model/adapter.py`) the head also reads what the last layer said of the position before: of the
last verified one as the cache has it, of a draft as the adapter made it.

Source: LayerSkip (arXiv 2404.16710), self-speculative decoding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from layerskip.decode import sampling
from layerskip.decode.copies import best_lengths
from layerskip.decode.drafters.drafter import Proposal
from layerskip.decode.row import Draft, span
from layerskip.decode.sampling import DRAFT
from layerskip.model.head import adapter_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from layerskip.decode.row import Row
    from layerskip.model.cache import Cache
    from layerskip.model.head import Head
    from layerskip.model.stack import Stack


class ExitDrafter:
    """Run one token at a time through the layers [0, E). Rows share exit layer, confidence and probes."""

    name = "exit"

    def __init__(self, stack: Stack, cache: Cache, head: Head | None) -> None:
        self.stack, self.cache, self.head = stack, cache, head
        self._chain = stack.chain(head)

    def draft(self, rows: Sequence[Row], limits: Sequence[int]) -> Proposal:
        """Draft for every row; states are those after the exit, and after probes below it.

        Pass i runs the last committed token (i = 0) or draft i-1. A row leaves after the pass of its last
        draft, which draws nothing: verification needs that position's early keys, values and state too.
        """
        exit_layer = rows[0].exit_layer
        greedy = all(row.request.processing.plain_greedy for row in rows)
        if exit_layer == 0 and greedy and not rows[0].choice.confidence and self._chain is not None:
            return Proposal(self._chained(rows, limits))
        below = [k for k in rows[0].choice.probes if k <= exit_layer]
        drafts = [Draft() for _ in rows]
        hidden: Tensor | None = None
        adapter = adapter_of(self.head, exit_layer)
        # By row: the last layer's normed state before, or its stand-in.
        before = {} if adapter is None else dict(enumerate(self._known(rows)))
        processors = [row.state for row in rows]
        inputs = [row.tokens[-1] for row in rows]
        active, index = list(range(len(rows))), 0
        while active:
            group = [rows[b] for b in active]
            starts = [len(row.tokens) - 1 + index for row in group]
            step = span(group, starts, [1] * len(group), self.stack, self.cache)
            tokens = torch.tensor([[inputs[b]] for b in active], device=self.stack.device)  # [B', 1]
            embedded = self.stack.embed(tokens, step)
            h, taps = self.stack.run(embedded, 0, exit_layer, step, self.cache, taps=below)  # [B', 1, D]
            kept = torch.stack([h, *(taps[k] for k in below)]) if below else h[None]  # [1 + probes, B', 1, D]
            if hidden is None:
                hidden = h.new_zeros(len(kept), len(rows), max(limits) + 1, h.shape[-1])
            hidden[:, active if len(active) < len(rows) else slice(None), index] = kept[:, :, 0]
            index += 1
            drawing = [
                (at, b)
                for at, b in enumerate(active)
                if index <= limits[b] and not (index > 1 and inputs[b] in rows[b].request.eos)
            ]
            if not drawing:
                break
            chosen = h[:, 0] if len(drawing) == len(active) else h[[at for at, _ in drawing], 0]
            if adapter is not None:
                chosen = adapter(chosen, torch.stack([before[b] for _, b in drawing]))
                before = dict(zip([b for _, b in drawing], self.stack.finished(chosen), strict=True))
            logits = self.stack.logits(chosen, self.head)  # [B', V or reduced]
            active = self._propose(rows, drafts, [b for _, b in drawing], processors, logits)
            for b in active:
                inputs[b] = drafts[b].tokens[-1]
        assert hidden is not None
        states, *tapped = hidden[:, :, :index]  # [B, T, D] each
        return Proposal(drafts, exit_layer, states, dict(zip(below, tapped, strict=True)))

    def _known(self, rows: Sequence[Row]) -> Tensor:
        """What the head read at the position before each row's last committed token: [B, D]."""
        ends = [len(row.tokens) - 2 for row in rows]
        return self.stack.finished(self.cache.finals_at([row.slot for row in rows], ends))

    def _chained(self, rows: Sequence[Row], limits: Sequence[int]) -> list[Draft]:
        """Draft for every row in one call, as far as the longest draft goes; cut each at its limit or end.

        Where the choice knows what positions cost, also where the head's own probabilities say that one more costs
        more than it brings. It is safe to look at drafts first: greedy ones are not drawn.
        """
        assert self._chain is not None
        found, chances = self._chain([row.tokens[-1] for row in rows], self._known(rows), max(limits))
        ends = []
        for row, limit, tokens in zip(rows, limits, found, strict=True):
            end = next((i + 1 for i, token in enumerate(tokens) if token in row.request.eos), limit)
            ends.append(min(end, limit))
        if (costs := rows[0].choice.costs) is not None:
            likely = [own[:end] for own, end in zip(chances, ends, strict=True)]
            ends, _ = best_lengths(likely, lambda n: costs.more(len(rows), n), not self.stack.ragged)
        return [Draft(tokens[:end]) for tokens, end in zip(found, ends, strict=True)]

    def _propose(
        self,
        rows: Sequence[Row],
        drafts: list[Draft],
        drawing: list[int],
        processors: list[tuple[Any, ...]],
        logits: Tensor,
    ) -> list[int]:
        """Draw one draft for each row in `drawing`; their processors' states move on. Returns the rows that go on.

        The others end their draft before this token: the exit is not confident enough, no token of the draft head
        is allowed there, or a constraint has no answer for a prefix that the target may never reach. Where it is
        reached, verification asks again and raises.
        """
        head, threshold = self.head, rows[0].choice.confidence
        if threshold:
            sure = (sampling.confidence(logits) >= threshold).tolist()
            drawing, logits = [b for b, yes in zip(drawing, sure, strict=True) if yes], logits[sure]
        if all(rows[b].request.processing.plain_greedy for b in drawing):
            best = logits.argmax(-1)
            for b, token in zip(drawing, (best if head is None else head.ids[best]).tolist(), strict=True):
                drafts[b].tokens.append(token)
            return drawing
        if head is not None:
            logits = head.scatter(logits, self.stack.vocab_size)
        going_on = []
        for b, row_logits in zip(drawing, logits, strict=True):
            row, draft = rows[b], drafts[b]
            prefix, processing = row.tokens + draft.tokens, row.request.processing
            try:
                law, processors[b] = processing.law_logits(row_logits, prefix, processors[b])
            except Exception:  # noqa: BLE001 - it counts only where verification meets that prefix, and raises again
                continue
            q = sampling.warp(law, processing.sampling)  # [V]
            address = (len(prefix), DRAFT, len(row.tokens))
            draft.laws.append(q)
            draft.tokens.append(int(sampling.draw(q, row.numbers(address, device=q.device)[0])))
            going_on.append(b)
        return going_on
