"""The work of a run in floating point operations, how long it takes, how many devices it wants. Pure arithmetic.

    work = Work.of(run)
    work.step(0)                                  # operations of the first step, over all its tokens
    hours_measured(seconds, work, first=1)        # from steps that were measured, with an interval

A product of a token with a matrix of P parameters takes 2 P operations, and its backward pass 4 P.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerskip.train.job.curve import Estimate, t95
from layerskip.train.job.plan import states_bytes
from layerskip.train.objective.binding import base_model_of
from layerskip.train.objective.exit_adapter import adapter_of

if TYPE_CHECKING:
    from layerskip.train.job.plan import Run
    from layerskip.train.job.recipe import Recipe
    from layerskip.train.objective.schedule import Schedule

SAMPLES = 200
"""Steps over the run at which its work is counted; schedules change slowly."""
LEAST_ERROR = 0.1
"""Of a time from measured steps: a machine's speed changes by so much over hours."""
PRODUCT_SHARES = Estimate(0.3, 0.1, 0.6)
"""Speed of a training step over that of a large product alone: a guess, and the ends of what is usual."""
GPU_FLOPS, GPU_BYTES, GPU_ROOM = 4e14, 80e9, 0.9
"""A GPU of a fleet: 40% of an H100's products in bfloat16, its memory, and the share of it that can be filled."""
MOST_GPUS, GPUS_EACH = 1024, 8
"""The largest fleet that is looked at, and how many GPUs a machine of it has."""


@dataclass(frozen=True)
class Work:
    """What decides the operations of a step; parameters of one layer, the head, the adapter, and its draft head."""

    recipe: Recipe
    schedule: Schedule
    steps: int
    per_epoch: float
    tokens: float
    """Of a step, in the mean."""
    layer: int
    head: int
    adapter: int
    draft_head: int
    attention: int
    """Operations of a layer's attention per token, beside its matrices."""
    kept: float
    """Share of the rows whose states an adapter reads again after the first epoch."""

    @classmethod
    def of(cls, run: Run) -> Work:
        from layerskip.model.families import parts_of

        hf, recipe, plan = base_model_of(run.model), run.recipe, run.plan
        layers, table = parts_of(hf)[1], hf.get_output_embeddings().weight
        adapter, needed = adapter_of(hf), states_bytes(run)
        rows, width = table.shape
        return cls(
            recipe,
            run.schedule,
            plan["steps"],
            plan["steps"] / plan["epochs"] if plan["epochs"] else plan["steps"],
            plan["tokens"] / plan["steps"],
            sum(p.numel() for layer in layers for p in layer.parameters()) // len(layers),
            table.numel(),
            0 if adapter is None else sum(p.numel() for p in adapter.parameters()),
            min(recipe.exit_vocab or rows, rows) * width,
            4 * width * recipe.length,
            min(1.0, recipe.states_gb * 1e9 / needed) if needed else 0.0,
        )

    def step(self, step: int) -> float:
        """Count the operations of a step."""
        return self.tokens * (self._adapter(step) if self.recipe.exit_adapter else self._exits(step))

    def _exits(self, step: int) -> float:
        recipe, weights = self.recipe, self.schedule.weights(step, self.steps)
        rates, last = self.schedule.drop_rates(step, self.steps), self.schedule.num_layers
        early = [k for k in weights if k < last]
        whole = 1 / recipe.last_every  # the other rows end at the deepest exit that is on
        passes = 4 if recipe.checkpointing else 3
        share = sum(1 - p for p in rates) * whole
        share += sum(1 - p for p in rates[: max(early, default=last)]) * (1 - whole)
        heads = len(early) * (whole * self.head + (1 - whole) * self.draft_head) + whole * self.head
        reference = recipe.last_loss == "kl" and recipe.freeze != "model"
        again = (last * self._forward + 2 * self.head) if reference else 0
        return passes * share * self._forward + 6 * heads + again

    def _adapter(self, step: int) -> float:
        model = self.schedule.num_layers * self._forward * (1 - self.kept if step >= self.per_epoch else 1)
        drafts = 6 * self.recipe.adapter_steps * (self.adapter + self.draft_head)
        return model + 2 * self.draft_head + drafts

    @property
    def _forward(self) -> int:
        return 2 * self.layer + self.attention

    @property
    def total(self) -> float:
        """Operations of the whole run."""
        return self.steps * statistics.fmean(self.step(step) for step in self._sampled())

    def _sampled(self) -> Iterator[int]:
        count = min(SAMPLES, self.steps)
        return (place * self.steps // count for place in range(count))


def hours_measured(seconds: Sequence[float], work: Work, first: int) -> Estimate:
    """Turn the times of some steps, from step `first` on, into hours of the run.

    Other steps do more or less: work is dropped, exits come in, states are read again. The middle is in proportion
    to operations; the interval reaches to where they decide nothing.
    """
    each = statistics.fmean(seconds)
    scatter = statistics.stdev(seconds) / math.sqrt(len(seconds)) if len(seconds) > 1 else 0.0
    error = max(LEAST_ERROR, t95(len(seconds) - 1) * scatter / each if scatter else 0.0)
    flat = each * work.steps
    ratio = work.total / work.steps / statistics.fmean(work.step(first + i) for i in range(len(seconds)))
    low, high = flat * min(1.0, ratio), flat * max(1.0, ratio)
    return Estimate(flat * ratio, low * max(0.0, 1 - error), high * (1 + error)).scaled(1 / 3600)


def hours_derived(work: Work, product_flops: float, devices: int = 1) -> Estimate:
    """Derive hours from operations and the speed of one product, known to a factor of some three either way."""
    shares = PRODUCT_SHARES
    ends = (work.total / (product_flops * devices * s) for s in (shares.middle, shares.high, shares.low))
    return Estimate(*ends).scaled(1 / 3600)


def fleet(work: Work, sharded_bytes: float, other_bytes: float, hours: float) -> int | None:
    """Count the GPUs that hold the run and end it in time: 2, 4, 8, ... that divide a step's rows; else None."""
    recipe, count = work.recipe, 2
    while count <= MOST_GPUS:
        rows = recipe.batch_size * count
        divides = recipe.global_batch is None or recipe.global_batch % rows == 0
        holds = sharded_bytes / count + other_bytes <= GPU_ROOM * GPU_BYTES
        if divides and holds and work.total / (GPU_FLOPS * count) <= 3600 * hours:
            return count
        count *= 2
    return None
