"""Rounds that stay on the device: one copy in, one graph, one copy out, which is the only synchronisation.

    rounds = DeviceRounds(stack, cache, draft_head)
    outcomes = rounds.round(rows)       # rows share source, exit layer, depth and `device_law`

The host path (`host.py`) looks at every token as it is drawn; here the whole round is one
pure function of fixed shape. An exit always drafts the full K: budget, room and the end of a sequence cut the draft
afterwards, so tokens and statistics are those of the host path, and only the work differs. Copies go in with the
last token, and all layers are run over them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from layerskip.decode import sampling
from layerskip.decode.control import LOOKUP
from layerskip.decode.drafters.lookup import copied
from layerskip.decode.rounds.graphs import CudaCapture, Graphs
from layerskip.decode.row import Outcome, Verdict
from layerskip.decode.sampling import DRAFT, KEEP, NEXT, Sampling
from layerskip.model.head import adapter_of
from layerskip.model.stack import Counters
from layerskip.model.step import Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from layerskip.decode.request import Request
    from layerskip.decode.row import Row
    from layerskip.model.cache import Cache
    from layerskip.model.head import Head
    from layerskip.model.stack import Stack

SHORTEST_KV = 64  # slots read at least: below, attention costs nothing and buckets would only multiply


@dataclass(frozen=True)
class Shape:
    """All that a captured round cannot change: the key of its graph."""

    exit_layer: int | None  # None: the drafts are given
    depth: int
    draft_length: int
    law: Sampling
    simulated: float | None  # keep each draft with this probability, whatever it is; for timing
    confidence: float  # judge no draft from the first on whose law has no probability that large
    batch: int
    kv_len: int
    in_place: bool  # row b of the batch is row b of the cache

    @property
    def num_given(self) -> int:
        """Drafts per row that go in."""
        return self.draft_length if self.exit_layer is None else 0

    @property
    def num_uniforms(self) -> int:
        """Uniforms per row: K for drawing, K for keeping, 1 for the next token; greedy rows need none."""
        return 2 * self.draft_length + 1 if not self.law.greedy or self.simulated is not None else 0


def device_round(stack: Stack, cache: Cache, head: Head | None, packed: Tensor, shape: Shape) -> Tensor:
    """Draft K tokens or take those given, run the other layers, verify and accept, in tensor operations only.

    Shapes: packed int64 [B, 4 + given + uniforms]: cache row, last token, its position, live positions (drafts to
    judge + 1; 0 for a dead row), drafts that are given, the bits of the float64 uniforms. Returns int64 [B, K + 4]:
    draft, how many drafts stand before low confidence, number kept, next token, number of leading positions whose
    logits are finite.
    Writes keys and values behind the last token, so running it twice is running it once.
    Exact: equals the host path, tests/decode/test_device_rounds.py.
    """
    length, law = shape.draft_length, shape.law
    index, token, starts, counts = packed[:, :4].unbind(-1)  # [B] each
    uniforms = packed[:, 4 + shape.num_given :].view(torch.float64)  # [B, 2K + 1] or [B, 0]
    judged = (counts - 1).clamp(min=0)  # [B], drafts

    def step(first: int, width: int) -> Step:
        offsets = torch.arange(first, first + width, device=packed.device)
        return Step.on_device(index, starts, counts, offsets, shape.kv_len, cache.capacity, shape.in_place)

    span, laws, confident = step(0, length + 1), None, torch.full_like(judged, length)  # [B]
    if shape.exit_layer is not None:
        hidden, draft, laws, confident = _exit_drafts(
            stack, cache, head, token, uniforms, shape, step, index, starts
        )
        judged = torch.minimum(judged, confident)
    else:
        draft = packed[:, 4 : 4 + length]  # [B, K]
        hidden = stack.embed(torch.cat([token[:, None], draft], 1), span)  # [B, K + 1, D]
    h, _ = stack.run(hidden, shape.exit_layer or 0, shape.depth, span, cache)  # [B, K + 1, D]
    logits = stack.logits(h)  # [B, K + 1, V]
    largest, targets = logits.max(-1)  # [B, K + 1]
    sound = largest.isfinite().long().cumprod(-1).sum(-1)  # [B]
    if shape.simulated is not None:
        pretended = targets[:, :-1].masked_fill(uniforms[:, length:-1] >= shape.simulated, -1)
        kept, following = sampling.accept_greedy(pretended, targets, judged)
    elif law.greedy:
        kept, following = sampling.accept_greedy(draft, targets, judged)
    else:
        kept, following = sampling.accept(
            draft, laws, sampling.warp(logits, law), uniforms[:, length:], judged
        )
    return torch.cat([draft, torch.stack([confident, kept, following, sound], 1)], 1)


def _exit_drafts(
    stack: Stack,
    cache: Cache,
    head: Head | None,
    token: Tensor,
    uniforms: Tensor,
    shape: Shape,
    step: Callable[[int, int], Step],
    index: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Draft K tokens with the layers [0, E), and run the last draft's early pass.

    Returns the states after layer E [B, K + 1, D], the draft [B, K], its laws [B, K, V] where rows sample, and how
    many drafts stand before low confidence [B].
    """
    hidden, drafts, laws, sure = [], [], [], []
    exit_layer = shape.exit_layer or 0
    adapter = adapter_of(head, exit_layer)
    before: Tensor | None = None  # [B, D], the last layer's normed state before, or its stand-in
    if adapter is not None:
        before = stack.finished(cache.finals_at(index, (starts - 1).clamp(min=0)))
    for i in range(shape.draft_length + 1):  # the last turn is the last draft's early pass and draws nothing
        at = step(i, 1)
        h, _ = stack.run(stack.embed(token[:, None], at), 0, exit_layer, at, cache)  # [B, 1, D]
        hidden.append(h)
        if i == shape.draft_length:
            break
        read = h[:, 0]  # [B, D]
        if adapter is not None and before is not None:
            read = adapter(read, before)
            before = stack.finished(read)
        logits = stack.logits(read, head)  # [B, V or reduced]
        if shape.confidence:
            sure.append(sampling.confidence(logits) >= shape.confidence)  # [B]
        if shape.law.greedy:
            token = logits.argmax(-1) if head is None else head.ids[logits.argmax(-1)]
        else:
            full = logits if head is None else head.scatter(logits, stack.vocab_size)
            laws.append(sampling.warp(full, shape.law))  # [B, V]
            token = sampling.draw(laws[-1], uniforms[:, i])
        drafts.append(token)
    confident = torch.full_like(token, shape.draft_length)
    if sure:
        confident = torch.stack(sure, 1).long().cumprod(-1).sum(-1)
    return torch.cat(hidden, 1), torch.stack(drafts, 1), torch.stack(laws, 1) if laws else None, confident


class Program:
    """`device_round` at one shape, with its work counted apart: captures count nothing, replays count it again."""

    def __init__(self, stack: Stack, cache: Cache, head: Head | None, shape: Shape) -> None:
        self.stack, self.cache, self.head, self.shape = stack, cache, head, shape
        self.work = Counters()

    def __call__(self, inputs: Tensor) -> Tensor:
        counters, self.stack.counters = self.stack.counters, self.work
        self.work.reset()
        try:
            return device_round(self.stack, self.cache, self.head, inputs, self.shape)
        finally:
            self.stack.counters = counters

    def count(self) -> None:
        self.stack.counters.add(self.work)


class DeviceRounds:
    """Serve groups of rows on the device: lay them out, run or replay their round, read its one answer."""

    def __init__(self, stack: Stack, cache: Cache, head: Head | None) -> None:
        self.stack, self.cache, self.head = stack, cache, head
        self.graphs = Graphs(stack.device, CudaCapture(stack.device) if stack.device.type == "cuda" else None)

    def round(self, rows: list[Row]) -> list[Outcome]:
        """Do one round of rows that share source, exit layer, depth and law; nothing is committed yet.

        Raises: UserError when the model gives NaN or infinite logits.
        """
        copies = None
        if rows[0].choice.source == LOOKUP:
            copies = [copied(row, row.drafts_allowed(self.cache.capacity)) for row in rows]
        shape, places, packed = self._layout(rows, copies)
        answers = fetched(self.graphs.run(shape, Program(self.stack, self.cache, self.head, shape), packed))
        outcomes, passes = [], (shape.draft_length + 1) * shape.depth
        for b, (row, place) in enumerate(zip(rows, places, strict=True)):
            *draft, confident, kept, following, sound = answers[place]
            if copies is None:
                allowed = min(confident, row.drafts_allowed(self.cache.capacity))
                draft = _until_end(draft[:allowed], row.request.eos)
            else:
                draft = copies[b]
            kept = min(kept, len(draft))
            ended = kept > 0 and draft[kept - 1] in row.request.eos  # what follows is not committed
            if sound < kept + (not ended):
                raise sampling.not_finite()
            outcomes.append(Outcome(draft, Verdict(kept, following, row.state), passes, None))
        return outcomes

    def _layout(self, rows: list[Row], copies: list[list[int]] | None) -> tuple[Shape, list[int], Tensor]:
        """Choose the shape, each row's place in the batch, and pack the inputs, `copies` being the drafts given.

        Rows stand at their own place in the cache when the bucket reaches that far: attention then reads the cache
        where it lies. Other rows are gathered. The rest of the bucket is dead and writes to a spill slot.
        """
        cache, first = self.cache, rows[0]
        batch = min(_bucket(len(rows)), len(cache.lengths))
        slots = [row.slot for row in rows]
        in_place = max(slots) < batch
        places = slots if in_place else list(range(len(rows)))
        law = device_law(first.request)
        assert law is not None, "rows that the host must serve are never sent here"
        if copies is None:
            counts = [row.drafts_allowed(cache.capacity) + 1 for row in rows]
            length = max(row.choice.draft_length for row in rows)
        else:
            counts = [len(draft) + 1 for draft in copies]
            length = _bucket(max(counts) - 1) if max(counts) > 1 else 0
        for row, count in zip(rows, counts, strict=True):
            assert cache.lengths[row.slot] == len(row.tokens) - 1, "all tokens but the last are cached"
            cache.touch(row.slot, len(row.tokens) - 1 + count)
        needed = max(len(row.tokens) - 1 + count for row, count in zip(rows, counts, strict=True))
        shape = Shape(
            exit_layer=first.exit_layer if copies is None else None,
            depth=first.depth,
            draft_length=length,
            law=law[0],
            simulated=law[1],
            confidence=first.choice.confidence if copies is None else 0.0,
            batch=batch,
            kv_len=min(max(SHORTEST_KV, _bucket(needed)), cache.capacity),
            in_place=in_place,
        )
        given = shape.num_given
        numbers = [[b if in_place else slots[0], 0, 0, 0] + [0] * given for b in range(batch)]  # dead
        uniforms = [[0.0] * shape.num_uniforms for _ in range(batch)]
        for b, (row, place, count) in enumerate(zip(rows, places, counts, strict=True)):
            numbers[place][:4] = row.slot, row.tokens[-1], len(row.tokens) - 1, count
            if copies is not None:
                numbers[place][4 : 3 + count] = copies[b]
            if shape.num_uniforms:
                uniforms[place] = _uniforms(row, count - 1, shape.draft_length)
        bits = torch.tensor(uniforms, dtype=torch.float64).view(torch.int64)  # [B, uniforms]
        packed = torch.cat([torch.tensor(numbers), bits], 1)
        return shape, places, packed.pin_memory() if self.stack.device.type == "cuda" else packed


def device_law(request: Request) -> tuple[Sampling, float | None] | None:
    """The law, and the simulated acceptance, that rows must share to be served together on the device.

    None: the host has to look at each token. Processors and the repetition penalty are functions of the prefix,
    log-probabilities need the logits.
    """
    processing = request.processing
    if (
        processing.processors
        or processing.sampling.repetition_penalty != 1
        or request.logprobs
        or request.top_logprobs
    ):
        return None
    if processing.sampling.greedy:
        return Sampling(), request.simulated
    return processing.sampling, None


def fetched(outputs: Tensor) -> list[list[int]]:
    """Copy a round's answer to the host: the one place of this path that waits for the device."""
    answers: list[list[int]] = outputs.tolist()
    return answers


def _bucket(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _until_end(draft: list[int], eos: frozenset[int]) -> list[int]:
    """Cut a draft behind its first end of sequence, where the host path would have stopped drafting."""
    return draft[: next((i + 1 for i, token in enumerate(draft) if token in eos), len(draft))]


def _uniforms(row: Row, num_judged: int, length: int) -> list[float]:
    """Look up the row's numbers at the addresses the host path uses; places that are not judged get 0."""
    n, padding = len(row.tokens), [0.0] * (length - num_judged)
    purposes = [
        [row.uniforms.at(row.request.index, n + i, purpose, began) for i in range(num_judged)] + padding
        for purpose, began in ((DRAFT, n), (KEEP, 0))
    ]
    return [*purposes[0], *purposes[1], row.uniforms.at(row.request.index, n, NEXT)]
