"""Greedy output under every setting against plain decoding: equal, or apart at a near tie where 16 bit allows it.

found = Equality(lm, prompts, 32).check(cases(lm), Clock(60))
found.verdict, found.failure
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from layerskip.measure.proof.cases import Case, Clock, Counterexample, decoded
from layerskip.model.parity import PARITY
from layerskip.model.step import Step
from layerskip.watch import Watch, silent

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.decode.language_model import LanguageModel
    from layerskip.model.stack import Stack

EXACT = (torch.float32, torch.float64)
NO_TIE = 2.0  # as far apart as logits can be, in units of the largest one
CHUNK = 16  # positions of a call; rows of many are not computed as single ones are
HOLDS, NEAR_TIES, DIFFERS, NOT_RUN = "holds", "near ties only", "differs", "not run"
NO_POWER = "shows nothing"  # a wrong law would have passed too
NO_CLAIM = "not claimed"  # nothing is promised here, so what was seen is told and judged by nobody


@dataclass
class Finding:
    """What a check found. `told` is a line in plain words; `command` are options that show a failure again."""

    check: str
    verdict: str
    cases: str
    told: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    failure: dict[str, Any] | None = None
    command: list[str] = field(default_factory=list)
    cut: bool = False  # the time was over before all of it was done

    @property
    def lost(self) -> bool:
        """Whether outputs differ where they must be equal."""
        return self.verdict == DIFFERS


def equality_promised(lm: LanguageModel) -> bool:
    """Whether self-speculation must give plain decoding's tokens here: else near ties may turn over."""
    return lm.stack.row_exact or lm.stack.dtype in EXACT


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_difference(plain: Sequence[int], other: Sequence[int]) -> int | None:
    """Find the place where two outputs part, the end of the shorter one included; None for equal ones."""
    if list(plain) == list(other):
        return None
    shorter = min(len(plain), len(other))
    return next((i for i in range(shorter) if plain[i] != other[i]), shorter)


@torch.inference_mode()
def logits_behind(stack: Stack, rows: Sequence[Sequence[int]], exit_layer: int | None = None) -> Tensor:
    """Read the states behind the last tokens of rows of one length, in calls so short that they are row-exact.

    Shapes: float32 [B, V]; with an exit layer the states behind it are returned instead, [B, D].
    """
    tokens = torch.tensor([list(row) for row in rows], device=stack.device)  # [B, T]
    count, length = tokens.shape
    last = stack.num_layers if exit_layer is None else exit_layer
    cache = stack.new_cache(count, length)
    for start in range(0, length, CHUNK):
        part = tokens[:, start : start + CHUNK]
        lengths = [part.shape[1]] * count
        step = Step.span(range(count), [start] * count, lengths, stack.device, spill=length)
        h, _ = stack.run(stack.embed(part, step), 0, last, step, cache)  # [B, T, D]
    return h[:, -1] if exit_layer is not None else stack.logits(h[:, -1])


@dataclass(frozen=True)
class Gap:
    """How far the two tokens at which outputs part lie below the best logit, in units of the largest one."""

    prompt: int
    position: int
    relative: float

    @classmethod
    def of(
        cls, stack: Stack, index: int, prompt: Sequence[int], plain: Sequence[int], own: Sequence[int]
    ) -> Gap:
        """Measure the place at which an output parts from the plain one, by logits of the plain prefix."""
        at = first_difference(plain, own)
        assert at is not None
        if at >= min(len(plain), len(own)):
            return cls(index, at, NO_TIE)  # one ended, the other went on
        logits = logits_behind(stack, [[*prompt, *plain[:at]]])[0]  # [V]
        lower = torch.minimum(logits[plain[at]], logits[own[at]])
        return cls(index, at, float((logits.max() - lower) / logits.abs().max()))


@dataclass
class Equality:
    """One loaded model: plain outputs are decoded once, row by row, and compared with those of all cases.

    `allowed` is the relative gap of the two best logits up to which a difference is a near tie; 0 demands equality.
    """

    lm: LanguageModel
    prompts: list[list[int]]
    budget: int
    watch: Watch = silent
    _plain: dict[int, list[int]] = field(default_factory=dict)

    @property
    def allowed(self) -> float:
        return 0.0 if equality_promised(self.lm) else PARITY[self.lm.stack.dtype]

    @property
    def name(self) -> str:
        """What is checked: the weight format, else the dtype."""
        quantize = getattr(self.lm.stack, "quantize", None)
        return quantize or dtype_name(self.lm.stack.dtype)

    def plain(self, index: int) -> list[int]:
        """Decode a prompt plainly and alone, once."""
        if index not in self._plain:
            self.watch(f"{self.name}: plain decoding", len(self._plain), len(self.prompts))
            self._plain[index] = decoded(self.lm, [self.prompts[index]], self.budget)[0]
        return self._plain[index]

    def check(self, cases: Sequence[Case], clock: Clock) -> Finding:
        """Compare case by case, prompts in turn, until one differs or the time is over; one case is always run."""
        gaps: list[Gap] = []
        drafts = Counter[str]()
        done = outputs = tokens = 0
        failure = None
        for case in cases:
            if done and clock.over:
                break
            chosen = [(outputs + i) % len(self.prompts) for i in range(case.rows)]
            plain = [self.plain(index) for index in chosen]
            self.watch(f"{self.name}: speculative = plain", done, len(cases))
            own = decoded(
                self.lm, [self.prompts[index] for index in chosen], self.budget, case, drafts=drafts
            )
            done, outputs = done + 1, outputs + len(chosen)
            tokens += sum(map(len, own))
            parted = [
                Gap.of(self.lm.stack, index, self.prompts[index], a, b)
                for index, a, b in zip(chosen, plain, own, strict=True)
                if a != b
            ]
            gaps += parted
            if any(gap.relative > self.allowed or not self.allowed for gap in parted):
                failure = self.smallest(case, chosen, parted)
                break
        return self._finding(cases, done, outputs, tokens, drafts, gaps, failure)

    def _finding(
        self,
        cases: Sequence[Case],
        done: int,
        outputs: int,
        tokens: int,
        drafts: Counter[str],
        gaps: list[Gap],
        failure: Counterexample | None,
    ) -> Finding:
        largest = max((gap.relative for gap in gaps), default=0.0)
        told = f"{outputs - len(gaps)} of {outputs} outputs are plain decoding's, token for token"
        told += f"; {drafts['kept']:,} of {drafts['judged']:,} drafts kept"
        if failure is not None:
            told += f"; it differs with {failure.case.told()}"
        elif gaps:
            told += f"; {len(gaps)} part at near ties, the two best logits at most {100 * largest:.2g}% apart"
        return Finding(
            f"greedy, {self.name}",
            DIFFERS if failure else NEAR_TIES if gaps else HOLDS,
            f"{done} of {len(cases)} settings, {tokens:,} tokens",
            told,
            {
                "settings": done, "of": len(cases), "outputs": outputs, "tokens": tokens,
                "drafts": dict(drafts), "differing": len(gaps),
                "promised": not self.allowed, "row_exact": self.lm.stack.row_exact, "largest_gap": largest,
                "gaps": [vars(gap) for gap in gaps], "cases": [vars(case) for case in cases[:done]],
            },
            None if failure is None else failure.record(),
            [] if failure is None else ["--case", failure.spelled()],
            cut=done < len(cases) and failure is None,
        )  # fmt: skip

    def smallest(self, case: Case, chosen: Sequence[int], parted: Sequence[Gap]) -> Counterexample:
        """Look for the shortest prompt prefix and the fewest tokens that still differ, alone if it can be."""
        prompts = [self.prompts[index] for index in chosen]
        alone = [self.prompts[max(parted, key=lambda gap: gap.relative).prompt]]
        if len(prompts) > 1 and self._differ(case, alone, self.budget):
            prompts = alone

        def cut(length: int) -> list[list[int]]:
            return [prompt[:length] for prompt in prompts]

        longest = max(map(len, prompts))
        if self._differ(case, prompts, self.budget):  # else it does not repeat: told as it was seen
            length = bisected(longest, lambda n: self._differ(case, cut(n), self.budget))
            prompts = cut(length)
            budget = bisected(self.budget, lambda n: self._differ(case, prompts, n), least=2)
        else:
            budget = self.budget
        plain = [decoded(self.lm, [prompt], budget)[0] for prompt in prompts]
        return Counterexample(case, prompts, budget, plain, decoded(self.lm, prompts, budget, case))

    def _differ(self, case: Case, prompts: list[list[int]], budget: int) -> bool:
        self.watch(f"{self.name}: the smallest case that differs", 0, 0)
        own = decoded(self.lm, prompts, budget, case)
        for index, (prompt, made) in enumerate(zip(prompts, own, strict=True)):
            plain = decoded(self.lm, [prompt], budget)[0]
            if plain == made:
                continue
            if not self.allowed or Gap.of(self.lm.stack, index, prompt, plain, made).relative > self.allowed:
                return True
        return False


def bisected(fails_at: int, fails: Callable[[int], bool], least: int = 1) -> int:
    """Find a small number that fails, given one that does; the answer itself was tried, or is `fails_at`."""
    low, high = min(least, fails_at), fails_at
    while low < high:
        middle = (low + high) // 2
        if fails(middle):
            high = middle
        else:
            low = middle + 1
    return high
