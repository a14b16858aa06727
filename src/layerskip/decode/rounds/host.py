"""Rounds that the host leads: it looks at every token as it is drawn, and does no work for drafts that are cut off.

    outcomes = HostRounds(stack, cache, draft_head).round(rows)     # rows share depth and choice

The definition of a round: draft, run the rest of the layers, judge. `device.py` does the same in one piece, for
those requests it can serve. Nothing is committed here, so a round may be done again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from layerskip.decode import sampling
from layerskip.decode.drafters import DRAFTERS
from layerskip.decode.row import Draft, Outcome, Verdict, span
from layerskip.decode.sampling import KEEP, NEXT
from layerskip.model.head import adapter_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from layerskip.decode.drafters.drafter import Drafter
    from layerskip.decode.row import Row
    from layerskip.model.cache import Cache
    from layerskip.model.head import Head
    from layerskip.model.stack import Stack


class HostRounds:
    """Draft, verify and judge groups of rows, token by token."""

    def __init__(self, stack: Stack, cache: Cache, head: Head | None) -> None:
        self.stack, self.cache, self.head = stack, cache, head
        self._drafters: dict[str, Drafter] = {}

    def drafter(self, name: str) -> Drafter:
        """Find the drafter of that name, made at its first use."""
        if name not in self._drafters:
            self._drafters[name] = DRAFTERS[name](self.stack, self.cache, self.head)
        return self._drafters[name]

    def round(self, rows: Sequence[Row]) -> list[Outcome]:
        """Do one round of rows that share depth and choice.

        Raises: UserError when the model gives NaN or infinite logits, or processors forbid everything; whatever
        processors raise.
        """
        depth, choice = rows[0].depth, rows[0].choice
        starts = [len(row.tokens) - 1 for row in rows]  # of the last committed token
        assert all(self.cache.lengths[row.slot] == start for row, start in zip(rows, starts, strict=True))
        limits = [row.drafts_allowed(self.cache.capacity) for row in rows]
        proposal = self.drafter(choice.source).draft(rows, limits)
        drafts = proposal.drafts
        counts = [len(draft.tokens) + 1 for draft in drafts]
        above = [k for k in choice.probes if k not in proposal.taps]
        if proposal.states is None:
            given = [[row.tokens[-1], *draft.tokens] for row, draft in zip(rows, drafts, strict=True)]
            live, taps = self._run_given(rows, starts, given, depth, above)
        else:
            step = span(rows, starts, counts, self.stack, self.cache)
            h, taps = self.stack.run(proposal.states, proposal.layers, depth, step, self.cache, taps=above)
            live = [h[b, :count] for b, count in enumerate(counts)]
        logits = self.stack.logits(torch.cat(live) if len(live) > 1 else live[0])  # [N, V]
        verdicts = self.judge(rows, drafts, logits)
        own = torch.split(logits, counts)
        agreements: list[dict[int, tuple[float, int]]] = [{} for _ in rows]
        for k, states in {**proposal.taps, **taps}.items():  # [B, T, D]
            for found, told in zip(agreements, self._agreements(rows, verdicts, own, k, states), strict=True):
                found[k] = told
        return [
            Outcome(draft.tokens, verdict, (len(draft.tokens) + 1) * depth, part, found)
            for draft, verdict, part, found in zip(drafts, verdicts, own, agreements, strict=True)
        ]

    def _run_given(
        self, rows: Sequence[Row], starts: Sequence[int], given: list[list[int]], depth: int, taps: list[int]
    ) -> tuple[list[Tensor], dict[int, Tensor]]:
        """Run all layers over tokens that are known: [T_b, D] of each row, and the taps [B, T, D].

        Rows of unequal length are not padded where the stack takes each position as a row of its own.
        """
        counts = [len(tokens) for tokens in given]
        if self.stack.ragged and not taps and len(set(counts)) > 1:
            places = [
                (row, start + i)
                for row, start, count in zip(rows, starts, counts, strict=True)
                for i in range(count)
            ]
            step = span(
                [row for row, _ in places],
                [at for _, at in places],
                [1] * len(places),
                self.stack,
                self.cache,
            )
            tokens = torch.tensor([[token] for tokens in given for token in tokens], device=self.stack.device)
            h, _ = self.stack.run(self.stack.embed(tokens, step), 0, depth, step, self.cache)  # [N, 1, D]
            return [*torch.split(h[:, 0], counts)], {}
        step = span(rows, starts, counts, self.stack, self.cache)
        padded = [tokens + tokens[-1:] * (step.width - len(tokens)) for tokens in given]
        states = self.stack.embed(torch.tensor(padded, device=self.stack.device), step)  # [B, T, D]
        h, tapped = self.stack.run(states, 0, depth, step, self.cache, taps=taps)
        return [h[b, :count] for b, count in enumerate(counts)], tapped

    def judge(self, rows: Sequence[Row], drafts: Sequence[Draft], logits: Tensor) -> list[Verdict]:
        """Accept each row's draft against the target's logits [N, V], N = sum of drafts + 1.

        Raises: UserError where a position that counts has a NaN or infinite logit; one behind a rejected draft does
        not count.
        """
        best, largest = self.stack.best(logits)
        counts = [len(draft.tokens) + 1 for draft in drafts]
        targets, sound = best.tolist(), [math.isfinite(x) for x in largest.tolist()]
        verdicts, first = [], 0
        for row, draft, count, row_logits in zip(
            rows, drafts, counts, torch.split(logits, counts), strict=True
        ):
            if row.request.processing.plain_greedy:
                own = targets[first : first + count]
                kept = next((i for i, x in enumerate(draft.tokens) if x != own[i]), count - 1)
                if (chance := row.request.simulated) is not None:
                    kept = row.uniforms.streak(row.request.index, len(row.tokens), count - 1, chance)
                verdicts.append(Verdict(kept, own[kept], row.state))
            else:
                verdicts.append(self._judged_law(row, draft, row_logits, sound[first : first + count]))
            kept = verdicts[-1].kept
            ended = kept > 0 and draft.tokens[kept - 1] in row.request.eos  # what follows is not committed
            if not all(sound[first : first + kept + (not ended)]):
                raise sampling.not_finite()
            first += count
        return verdicts

    def _judged_law(self, row: Row, draft: Draft, logits: Tensor, sound: Sequence[bool]) -> Verdict:
        """Accept draft by draft, building each target law only once its prefix is certain.

        A law behind a rejected draft or an end of sequence is never asked for: processors may rightly have
        no answer there.
        """
        processing, n, state = row.request.processing, len(row.tokens), row.state
        for i, token in enumerate([*draft.tokens, None]):
            if not sound[i]:
                raise sampling.not_finite()
            law, state = processing.law_logits(logits[i], row.tokens + draft.tokens[:i], state)
            p = sampling.warp(law, processing.sampling)  # [V]
            keep, following = row.numbers((n + i, KEEP), (n, NEXT), device=torch.device("cpu"))
            if token is None:
                return Verdict(i, int(sampling.draw(p, following.to(p.device))), state)
            q = draft.laws[i] if draft.laws else None  # [V]
            # The rule of `accept`, which would build a residual for every draft that is kept too.
            if not float(keep) * (1.0 if q is None else float(q[token])) < float(p[token]):
                rest = sampling.residual(p, q, torch.tensor(token, device=p.device))
                return Verdict(i, int(sampling.draw(rest, following.to(p.device))), state)
            if token in row.request.eos:
                return Verdict(i + 1, token, state)  # the row ends here; what follows is not committed
        raise AssertionError("the last turn has returned")

    def _agreements(
        self, rows: Sequence[Row], verdicts: Sequence[Verdict], own: Sequence[Tensor], k: int, states: Tensor
    ) -> Iterator[tuple[float, int]]:
        """Say how far a probed exit agrees with the target where it is right to ask: to the first rejected draft.

        Shapes: own [T_b, V] of each row, states [B, T, D]. Agreement is the probability that the exit's draft would
        be kept, the overlap of both laws; processors are left out.
        """
        counts = [verdict.kept + 1 for verdict in verdicts]
        asked, head = torch.cat([states[b, :seen] for b, seen in enumerate(counts)]), self.head  # [N, D]
        targets = torch.cat([logits[:seen] for logits, seen in zip(own, counts, strict=True)])  # [N, V]
        if (adapter := adapter_of(head, k)) is not None:
            # Verification has just written what stands behind the first position.
            each = [(row, i) for row, seen in zip(rows, counts, strict=True) for i in range(seen)]
            places = [len(row.tokens) - 2 + i for row, i in each]
            before = self.cache.finals_at([row.slot for row, _ in each], places)
            asked = adapter(asked, self.stack.finished(before))
        read = self.stack.logits(asked, head)
        shapes = [row.request.processing.sampling for row in rows]
        if all(shape.greedy for shape in shapes):
            best = read.argmax(-1) if head is None else head.ids[read.argmax(-1)]
            overlaps = (best == self.stack.best(targets)[0]).float()
        else:
            read = read if head is None else head.scatter(read, self.stack.vocab_size)
            laws = zip(torch.split(read, counts), torch.split(targets, counts), shapes, strict=True)
            overlaps = torch.cat(
                [torch.minimum(sampling.warp(q, one), sampling.warp(p, one)).sum(-1) for q, p, one in laws]
            )
        hits = torch.stack([part.sum() for part in torch.split(overlaps, counts)]).tolist()
        return zip(hits, counts, strict=True)
