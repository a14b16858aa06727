"""Rounds that the host leads: it looks at every token as it is drawn, and does no work for drafts that are cut off.

    outcomes = HostRounds(stack, cache, draft_head).round(rows)     # rows share exit layer, depth and choice

The definition of a round: `device_rounds.py` does the same in one piece, for those requests it can serve.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from layerskip.decode import sampling
from layerskip.decode.row import Outcome
from layerskip.decode.sampling import DRAFT, KEEP, NEXT
from layerskip.errors import UserError
from layerskip.model.step import Step

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.decode.row import Row
    from layerskip.model.cache import Cache
    from layerskip.model.head import Head
    from layerskip.model.stack import Stack


class HostRounds:
    """Draft, verify and judge groups of rows, token by token."""

    def __init__(self, stack: Stack, cache: Cache, head: Head | None) -> None:
        self.stack, self.cache, self.head = stack, cache, head

    def round(self, rows: list[Row]) -> list[Outcome]:
        """Do one round of rows that share exit layer, depth and choice; nothing is committed yet.

        Raises: UserError when the model gives NaN or infinite logits, or processors forbid everything.
        """
        positions = [len(row.tokens) - 1 for row in rows]  # of the last committed token
        exit_layer, depth, probes = rows[0].exit_layer, rows[0].depth, rows[0].choice.probes
        drafted = self._draft(rows, positions)  # [1 + probes below, B, T, D]
        counts = [len(row.proposal) + 1 for row in rows]
        step = self.span(rows, positions, counts)
        h, above = self.stack.run(drafted[0], exit_layer, depth, step, self.cache, taps=probes)
        live = [h[b, :count] for b, count in enumerate(counts)]
        logits = self.stack.logits(torch.cat(live) if len(live) > 1 else live[0])  # [N, V]
        verdicts = self.judge(rows, logits)
        own = torch.split(logits, counts)
        outcomes = [
            Outcome(row.proposal, *verdict, count, part)
            for row, verdict, count, part in zip(rows, verdicts, counts, own, strict=True)
        ]
        if not probes:
            return outcomes
        below = [k for k in probes if k <= exit_layer]
        states = {**dict(zip(below, drafted[1:], strict=True)), **above}  # {k: [B, T, D]}
        return [
            outcome._replace(agreements=self._agreements(row, outcome, {k: x[b] for k, x in states.items()}))
            for b, (row, outcome) in enumerate(zip(rows, outcomes, strict=True))
        ]

    def _draft(self, rows: list[Row], positions: list[int]) -> Tensor:
        """Draft every row's proposal; return all its positions' states after the exit, and after probes below it.

        Shapes: [1 + probes up to the exit, B, max K' + 1, D].
        Pass i runs the last committed token (i = 0) or draft i-1. A row leaves after the pass of its last
        draft, which draws nothing: verification needs that position's early keys, values and state too.
        """
        limits = []
        for row, position in zip(rows, positions, strict=True):
            assert self.cache.lengths[row.slot] == position, "all tokens but the last are cached"
            row.proposal, row.laws = [], []
            limits.append(row.drafts_allowed(self.cache.capacity))
        exit_layer = rows[0].exit_layer
        below = [k for k in rows[0].choice.probes if k <= exit_layer]
        hidden: Tensor | None = None
        states = [row.state for row in rows]
        inputs = [row.tokens[-1] for row in rows]
        active, index = list(range(len(rows))), 0
        while True:
            group = [rows[b] for b in active]
            step = self.span(group, [positions[b] + index for b in active], [1] * len(active))
            tokens = torch.tensor([[inputs[b]] for b in active], device=self.stack.device)  # [B', 1]
            embedded = self.stack.embed(tokens, step)
            h, taps = self.stack.run(embedded, 0, exit_layer, step, self.cache, taps=below)  # [B', 1, D]
            kept = torch.stack([h, *(taps[k] for k in below)]) if below else h[None]  # [1 + probes, B', 1, D]
            if hidden is None:
                hidden = h.new_zeros(len(kept), len(rows), max(limits) + 1, h.shape[-1])
            hidden[:, active if len(active) < len(rows) else slice(None), index] = kept[:, :, 0]
            drawing = [
                (at, b)
                for at, b in enumerate(active)
                if index < limits[b] and not (index and inputs[b] in rows[b].request.eos)
            ]
            if not drawing:
                return hidden[:, :, : index + 1]
            chosen = h[:, 0] if len(drawing) == len(active) else h[[at for at, _ in drawing], 0]
            logits = self.stack.logits(chosen, self.head)  # [B', V or reduced]
            proposed = self._propose(rows, [b for _, b in drawing], states, logits)
            for b, token in proposed.items():
                rows[b].proposal.append(token)
                inputs[b] = token
            active = list(proposed)
            index += 1
            if not active:
                return hidden[:, :, :index]

    def _propose(
        self, rows: list[Row], drawing: list[int], states: list[tuple[Any, ...]], logits: Tensor
    ) -> dict[int, int]:
        """Draw one draft for each row in `drawing`; `states` of the processors move on.

        A row that is missing in the result ends its draft before this token: its exit is not confident enough, no
        token of the draft head is allowed there, or a constraint has no answer for a prefix that the target may
        never reach. Where it is reached, verification asks again and raises.
        """
        head, threshold = self.head, rows[0].choice.confidence
        if threshold:
            sure = (sampling.confidence(logits) >= threshold).tolist()
            drawing, logits = [b for b, yes in zip(drawing, sure, strict=True) if yes], logits[sure]
        if all(rows[b].request.processing.plain_greedy for b in drawing):
            best = logits.argmax(-1)
            return dict(zip(drawing, (best if head is None else head.ids[best]).tolist(), strict=True))
        if head is not None:
            logits = head.scatter(logits, self.stack.vocab_size)
        proposed: dict[int, int] = {}
        for b, row_logits in zip(drawing, logits, strict=True):
            row = rows[b]
            prefix = row.tokens + row.proposal
            try:
                law, states[b] = row.request.processing.law_logits(row_logits, prefix, states[b])
            except (UserError, ValueError):  # ValueError: how transformers' constraints report a dead end
                continue
            q = sampling.warp(law, row.request.processing.sampling)  # [V]
            row.laws.append(q)
            address = (len(prefix), DRAFT, len(row.tokens))
            proposed[b] = int(sampling.draw(q, self._uniforms(row, [address])[0]))
        return proposed

    def _agreements(
        self, row: Row, outcome: Outcome, states: dict[int, Tensor]
    ) -> dict[int, tuple[float, int]]:
        """Say how far probed exits agree with the target where it was right to ask: up to the first draft rejected.

        Shapes: states {k: [T, D]}. Agreement is the probability that the exit's draft would be kept, the overlap of
        both laws; processors are left out.
        """
        seen, shape = outcome.kept + 1, row.request.processing.sampling
        assert outcome.logits is not None
        p = sampling.warp(outcome.logits[:seen], shape)  # [m + 1, V]
        read = self.stack.logits(torch.cat([h[:seen] for h in states.values()]), self.head)
        read = read if self.head is None else self.head.scatter(read, self.stack.vocab_size)
        overlaps = [torch.minimum(q, p).sum() for q in torch.split(sampling.warp(read, shape), seen)]
        return {k: (hits, seen) for k, hits in zip(states, torch.stack(overlaps).tolist(), strict=True)}

    def judge(self, rows: list[Row], logits: Tensor) -> list[tuple[int, int]]:
        """Accept each row's proposal against the target's logits [N, V], N = sum of drafts + 1."""
        best = logits.max(-1)
        sampling.check_finite(best.values)
        counts = [len(row.proposal) + 1 for row in rows]
        targets = best.indices.tolist()
        verdicts, first = [], 0
        for row, count, row_logits in zip(rows, counts, torch.split(logits, counts), strict=True):
            if row.request.processing.plain_greedy:
                own = targets[first : first + count]
                kept = next((i for i, x in enumerate(row.proposal) if x != own[i]), count - 1)
                if (chance := row.request.simulated) is not None:
                    kept = row.uniforms.streak(row.request.index, len(row.tokens), count - 1, chance)
                verdicts.append((kept, own[kept]))
            else:
                verdicts.append(self._judge_law(row, row_logits))
            first += count
        return verdicts

    def _judge_law(self, row: Row, logits: Tensor) -> tuple[int, int]:
        """Accept draft by draft, building each target law only once its prefix is certain.

        A law behind a rejected draft or an end of sequence is never asked for: processors may rightly have
        no answer there.
        """
        processing, n = row.request.processing, len(row.tokens)
        for i, token in enumerate([*row.proposal, None]):
            law, row.state = processing.law_logits(logits[i], row.tokens + row.proposal[:i], row.state)
            p = sampling.warp(law, processing.sampling)[None]  # [1, V]
            if token is None:
                return i, int(sampling.draw(p[0], self._uniforms(row, [(n, NEXT)])[0]))
            draft, q = torch.tensor([token], device=p.device), row.laws[i][None]
            uniforms = self._uniforms(row, [(n + i, KEEP), (n, NEXT)])
            kept, following = sampling.accept(draft, q, p.expand(2, -1), uniforms)
            if not kept:
                return i, int(following)
            if token in row.request.eos:
                return i + 1, token  # the row ends with this draft; what follows is not committed
        raise AssertionError("the last turn has returned")

    def span(self, rows: list[Row], starts: list[int], counts: list[int]) -> Step:
        slots = [row.slot for row in rows]
        return Step.span(slots, starts, counts, self.stack.device, spill=self.cache.capacity)

    def _uniforms(self, row: Row, addresses: list[tuple[int, ...]]) -> Tensor:
        """Look up the row's float64 numbers at (position, purpose[, beginning of the round, for drafts])."""
        numbers = [row.uniforms.at(row.request.index, *address) for address in addresses]
        return torch.tensor(numbers, dtype=torch.float64, device=self.stack.device)
