"""The cost model: what a round costs in layers, what it yields in tokens, when it pays. Pure arithmetic.

Source: LayerSkip (arXiv 2404.16710) measured against layer counts; expected tokens per round as in
Leviathan et al. (arXiv 2211.17192). On a device, put measured step times in place of layer counts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Cost:
    """Costs in any one unit: layers (`head` = V*D / parameters of a layer) or seconds.

    `layers` is one full pass without the head, `early` the slice [0, E), `head` the full head,
    `draft_head` the head used for drafting, `verify` the slice [E, L) over K+1 positions (None: as one row),
    `verify_head` the full head over K+1 positions (None: as one row; both are bound by reading their weights).
    """

    layers: float
    early: float
    head: float
    draft_head: float
    verify: float | None = None
    verify_head: float | None = None

    def round(self, draft_length: int) -> float:
        """Price K drafts and their verification: (K+1) early passes, K draft heads, one late pass, the head."""
        late = self.layers - self.early if self.verify is None else self.verify
        head = self.head if self.verify_head is None else self.verify_head
        return (draft_length + 1) * self.early + draft_length * self.draft_head + late + head

    def speedup(self, draft_length: int, tokens_per_round: float) -> float:
        """Compare with plain decoding: seconds per token of the one over the other."""
        return tokens_per_round * (self.layers + self.head) / self.round(draft_length)


LEAST_EXTRA = 0.001  # of a plain step for each position, whatever the costs say


@dataclass(frozen=True)
class RowCosts:
    """What a pass over several positions costs, in passes over one: (positions, cost), both rising from (1, 1).

    Linear between the points, and behind the last one as before it.
    """

    points: tuple[tuple[int, float], ...]

    def __call__(self, positions: int) -> float:
        """Price a pass over so many positions."""
        return _between(self.points, positions)

    def more(self, rows: int, positions: int) -> float:
        """Price positions beside those of a plain step of so many rows, in such steps."""
        return max(self(rows + positions) / self(rows) - 1, LEAST_EXTRA * positions)


@functools.lru_cache(maxsize=4096)
def _between(points: tuple[tuple[int, float], ...], positions: int) -> float:
    after = next((i for i, (t, _) in enumerate(points) if t >= positions), len(points) - 1)
    (t0, c0), (t1, c1) = points[max(0, after - 1)], points[max(1, after)]
    return c0 + (c1 - c0) * (positions - t0) / (t1 - t0)


# Guesses until a machine was measured. CPU: SmolLM2-135M in bfloat16 on two Zen 4 cores. Other devices read weights
# for far longer than they multiply.
ROW_COSTS = {"cpu": RowCosts(((1, 1.0), (6, 1.12), (8, 1.25), (16, 1.7), (32, 2.7)))}
FLAT_ROW_COSTS = RowCosts(((1, 1.0), (16, 1.1), (64, 1.2), (128, 1.6)))


def row_costs(device_type: str) -> RowCosts:
    """Guess what several positions cost on a kind of device."""
    return ROW_COSTS.get(device_type, FLAT_ROW_COSTS)


def tokens_per_round(draft_length: int, acceptance: float) -> float:
    """Expected tokens of a round from accepted/drafted: 1 + a K."""
    return 1.0 + acceptance * draft_length


def expected_tokens(draft_length: int, per_token: float) -> float:
    """Expected tokens of a round when each draft is kept with probability `per_token`, independently.

    Source: Leviathan et al. (arXiv 2211.17192), eq. 1: (1 - alpha^(K+1)) / (1 - alpha).
    """
    if per_token >= 1.0:
        return draft_length + 1.0
    return float((1.0 - per_token ** (draft_length + 1)) / (1.0 - per_token))


def acceptance_from(per_token: float, draft_length: int) -> float:
    """Turn a per-token probability into accepted/drafted, a: a K = sum of alpha^i, i from 1 to K."""
    return 0.0 if draft_length == 0 else (expected_tokens(draft_length, per_token) - 1.0) / draft_length


def per_token_from(acceptance: float, draft_length: int) -> float:
    """Invert `acceptance_from` by bisection (it is monotone)."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if acceptance_from(middle, draft_length) < acceptance else (low, middle)
    return (low + high) / 2


def break_even(cost: Cost) -> float:
    """Acceptance (accepted/drafted) at which speculation stops losing: (E + h_d) / (L + h).

    h and h_d are the costs of the full and the draft head in layers. The draft length does not matter.
    """
    return (cost.early + cost.draft_head) / (cost.layers + cost.head)


def draft_vocabulary_speedups(
    cost: Cost,
    draft_length: int,
    per_token: float,
    heads: Mapping[int, float],
    coverage: Mapping[int, float],
) -> dict[int, float]:
    """Predict the speed-up of each candidate draft vocabulary.

    `heads` prices the draft head of each size, `coverage` is the expected share of target tokens inside the
    subset, `per_token` the agreement of the exit with the full head. A target token outside the subset is never
    drafted, so a draft is kept with probability coverage x per_token at most; that bound is what is used.
    """
    return {
        size: replace(cost, draft_head=head).speedup(
            draft_length, expected_tokens(draft_length, per_token * coverage[size])
        )
        for size, head in heads.items()
    }


def best_draft_vocabulary(speedups: Mapping[int, float]) -> int:
    """Choose the size with the largest predicted speed-up; the smaller one of equals."""
    return max(sorted(speedups), key=lambda size: speedups[size])
