"""Figures out of the sums of a run: loss and agreement of each exit over all ranks, the speed-up they promise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from layerskip.model.cost import Cost, expected_tokens
from layerskip.train.objective.exits import Totals

if TYPE_CHECKING:
    from layerskip.train.objective.exits import ExitTraining

DRAFT_LENGTHS = range(1, 13)
DRAFT_VOCABULARY = 8192
"""What predictions assume: the engine drafts with a head of the most frequent tokens."""


def predicted(exits: ExitTraining, agreement: dict[int, float]) -> tuple[int, int, float] | None:
    """Best (E, K, speed-up) by the cost model in layers, from each exit's agreement per token.

    Source: the cost model of `model/cost.py`; a device's step times tell more.
    """
    layers = len(exits.layers)
    head = head_layers(exits)
    draft_head = head * min(1.0, DRAFT_VOCABULARY / exits.head.weight.shape[0])
    cells = [
        (Cost(layers, k, head, draft_head).speedup(n, expected_tokens(n, alpha)), k, n)
        for k, alpha in agreement.items()
        if k < layers
        for n in DRAFT_LENGTHS
    ]
    if not cells:
        return None
    best, k, n = max(cells)
    return k, n, best


def head_layers(exits: ExitTraining) -> float:
    """h: parameters of the head over those of a layer."""
    per_layer = sum(p.numel() for layer in exits.layers for p in layer.parameters()) / len(exits.layers)
    return float(exits.head.weight.numel() / per_layer)


def by_exit(totals: Totals) -> dict[str, float]:
    figures: dict[str, float] = {}
    for k in sorted(totals.ce):
        if not (count := totals.tokens[k]):
            continue  # rows that end early are not counted, and here was no other
        figures[f"exit_{k}_loss"] = float(totals.ce[k]) / count
        if float(totals.kl[k]):
            figures[f"exit_{k}_kl"] = float(totals.kl[k]) / count
        figures[f"exit_{k}_agreement"] = float(totals.agreement[k]) / count
    return figures


def reduced(totals: Totals, world_size: int) -> Totals:
    """Sum over ranks; the schedule gives all of them the same exits."""
    if world_size == 1:
        return totals
    order = sorted(totals.ce)
    device = totals.ce[order[0]].device
    counts = [totals.layer_rows, totals.dropped, totals.seen, *(totals.tokens[k] for k in order)]
    sums = torch.cat([torch.stack([d[k] for k in order]) for d in (totals.ce, totals.kl, totals.agreement)])
    flat = torch.cat([sums.double(), torch.tensor(counts, device=device, dtype=torch.float64)])
    dist.all_reduce(flat)
    n = len(order)
    ce, kl, agreement, whole = flat.split([n, n, n, 3 + n])  # type: ignore[no-untyped-call]
    rows, dropped, seen, *tokens = (int(count) for count in whole.tolist())
    return Totals(
        dict(zip(order, ce, strict=True)),
        dict(zip(order, kl, strict=True)),
        dict(zip(order, agreement, strict=True)),
        dict(zip(order, tokens, strict=True)),
        rows,
        dropped,
        seen,
    )
