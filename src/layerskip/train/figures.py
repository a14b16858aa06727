"""Figures out of the sums of a run: loss and agreement of each exit over all ranks, the speed-up they promise."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from layerskip.model.cost import Cost, expected_tokens, per_token_from
from layerskip.model.head import DRAFT_VOCABULARIES
from layerskip.train.data.encoding import IGNORED
from layerskip.train.objective.exit_adapter import DRAFTS, adapter_of
from layerskip.train.objective.exits import Totals

if TYPE_CHECKING:
    from layerskip.train.data.packing import Rows
    from layerskip.train.objective.exits import ExitTraining

DRAFT_LENGTHS = range(1, 13)
DRAFT_VOCABULARY = 8192
"""What predictions during training assume: the engine drafts with a head of the most frequent tokens."""


class Setting(NamedTuple):
    """A setting of drafting and what the cost model predicts for it."""

    speedup: float
    exit_layer: int
    draft_length: int
    draft_vocab: int
    """Tokens of the draft head; all of them is the whole head."""


def predicted(
    exits: ExitTraining, agreement: Mapping[int, float], coverage: Mapping[int, float] | None = None
) -> Setting | None:
    """Choose E, K and the draft vocabulary by the cost model in layers, from each exit's agreement per token.

    `coverage` is the share of unseen tokens within each size of draft vocabulary; a token outside is never drafted.
    Source: the cost model of `model/cost.py`; a device's step times tell more.
    """
    layers, head, full = len(exits.layers), head_layers(exits), exits.head.weight.shape[0]
    adapter = adapter_layers(exits)
    sizes = {min(DRAFT_VOCABULARY, full): 1.0} if coverage is None else coverage
    cells = [
        Setting(
            Cost(layers, k, head, head * size / full + adapter).speedup(n, expected_tokens(n, alpha * share)),
            k,
            n,
            size,
        )
        for k, alpha in agreement.items()
        if k < layers
        for n in DRAFT_LENGTHS
        for size, share in sizes.items()
    ]
    return max(cells, default=None)


def coverage(trained: Rows, unseen: Rows, ends: Collection[int], vocab_size: int) -> dict[int, float]:
    """Share of the tokens of unseen rows that the n most frequent tokens of the training data cover, by n."""
    sizes = [size for size in DRAFT_VOCABULARIES if size < vocab_size]
    return {size: covered(unseen, trained.frequent(size, ends)) for size in sizes} | {vocab_size: 1.0}


def covered(rows: Rows, ids: Collection[int]) -> float:
    """Share of the tokens to be learnt in rows that are among `ids`; NaN where there are none."""
    written = rows.labels[rows.labels != IGNORED]
    return float(np.isin(written, [*ids]).mean())


def head_layers(exits: ExitTraining) -> float:
    """h: parameters of the head over those of a layer."""
    return float(exits.head.weight.numel() / _per_layer(exits))


def _per_layer(exits: ExitTraining) -> float:
    return float(sum(p.numel() for layer in exits.layers for p in layer.parameters()) / len(exits.layers))


def adapter_layers(exits: ExitTraining) -> float:
    """Parameters of the exit's adapter over those of a layer."""
    adapter = adapter_of(exits.hf)
    own = 0 if adapter is None else sum(p.numel() for p in adapter.parameters())
    return float(own / _per_layer(exits))


def of_runs(totals: Totals, exit_layer: int) -> dict[str, float]:
    """Agreement of each draft where those before it were right, tokens per round; nothing without an adapter."""
    if not isinstance(totals.runs, torch.Tensor) or not (count := totals.tokens.get(exit_layer, 0)):
        return {}
    shares = [1.0, *(totals.runs / count).tolist()]
    pairs = itertools.pairwise(shares)
    figures = {
        f"draft_{i}_agreement": after / before if before else 0.0
        for i, (before, after) in enumerate(pairs, 1)
    }
    return figures | {"tokens_per_round": sum(shares)}


def per_token(tokens_per_round: float) -> float:
    """The agreement per token that would give so many tokens with `DRAFTS` drafts, each as often right."""
    return per_token_from((tokens_per_round - 1) / DRAFTS, DRAFTS)


def by_exit(totals: Totals) -> dict[str, float]:
    """Average the sums per token, as `exit_k_loss` and `exit_k_kl` (nats) and `exit_k_agreement` (0 to 1)."""
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
    runs = totals.runs if isinstance(totals.runs, torch.Tensor) else torch.zeros(DRAFTS, device=device)
    flat = torch.cat([sums.double(), torch.tensor(counts, device=device, dtype=torch.float64), runs.double()])
    dist.all_reduce(flat)
    n = len(order)
    ce, kl, agreement, whole, runs = flat.split([n, n, n, 3 + n, DRAFTS])  # type: ignore[no-untyped-call]
    rows, dropped, seen, *tokens = (int(count) for count in whole.tolist())
    return Totals(
        dict(zip(order, ce, strict=True)),
        dict(zip(order, kl, strict=True)),
        dict(zip(order, agreement, strict=True)),
        runs if isinstance(totals.runs, torch.Tensor) else 0,
        dict(zip(order, tokens, strict=True)),
        rows,
        dropped,
        seen,
    )
