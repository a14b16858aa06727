"""What every exit says about a text, in one pass of all layers: the base of evaluation, tuning and pictures.

    for chunk in chunks(stack, sequences, exits=[2, 4, 8], heads=own_heads(lm)):
        chunk.full                                  # float32 [N, V], the whole model
        for exit_layer, logits in chunk.exits():    # float32 [N, V], one exit at a time

Sequences are run side by side, as many as `BATCH_TOKENS` allows; the states after every exit are kept by taps, and
the head reads them `CHUNK` positions at a time, so no [exits, N, V] is ever held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from layerskip.decode.options import Options
from layerskip.errors import UserError
from layerskip.model.step import Step

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.decode.language_model import LanguageModel
    from layerskip.model.head import Head
    from layerskip.model.stack import Stack

BATCH_TOKENS = 2048  # positions of one pass, padding included
DISTANCES = 6  # drafts of a round that an adapter is read as; later ones count as the last of them
CHUNK = 256  # positions whose logits are held at once


@dataclass(frozen=True)
class Chunk:
    """Some consecutive positions of one sequence, and what can be read from them.

    Position t is that of a token; its logits predict token t + 1.
    """

    stack: Stack
    sequence: int  # its place in the input
    positions: range
    states: dict[int, Tensor]  # exit layer -> [N, D]
    full: Tensor  # float32 [N, V], all layers
    heads: Mapping[int, Head] = field(default_factory=dict)  # of exits that have one of their own
    chains: Mapping[int, list[Tensor]] = field(
        default_factory=dict
    )  # of exits with an adapter, see `drafts_of`

    @torch.inference_mode()  # a norm with a gradient could not save the states, which are inference tensors
    def logits(self, exit_layer: int, head: Head | None = None) -> Tensor:
        """Read one exit: float32 [N, V], or [N, head.size] with a draft head; the last layer is `full` itself.

        Raises: UserError for logits that are not numbers.
        """
        if head is None and exit_layer == self.stack.num_layers:
            return self.full
        return _finite(self.stack.logits(self.states[exit_layer], head), exit_layer)

    def drafts(self, exit_layer: int, head: Head | None = None) -> list[Tensor]:
        """Read an exit as the drafts of a round: float32 [N, size] of the first, the second, ...

        One, which tells of all, where drafts do not depend on where their round began.
        """
        states = self.chains.get(exit_layer, [self.states[exit_layer]])
        with torch.inference_mode():
            return [_finite(self.stack.logits(x, head), exit_layer) for x in states]

    def own(self, exit_layer: int) -> Tensor:
        """Read one exit by the head it drafts with: float32 [N, V], -inf where a head of its own has no row.

        Raises: UserError for logits that are not numbers.
        """
        head = self.heads.get(exit_layer)
        logits = self.logits(exit_layer, head)
        return logits if head is None else head.scatter(logits, self.stack.vocab_size)

    def exits(self, head: Head | None = None) -> Iterator[tuple[int, Tensor]]:
        """Read one exit after the other, by ascending layer: all by this head, else each as `own` does.

        Raises: UserError for logits that are not numbers.
        """
        for exit_layer in sorted(self.states):
            yield exit_layer, self.own(exit_layer) if head is None else self.logits(exit_layer, head)


def own_heads(lm: LanguageModel) -> dict[int, Head]:
    """The heads of exits that have rows of their own: the shared head says nothing of what such an exit learnt."""
    size = lm.facts.draft_vocab_size or len(lm.ranked_vocabulary or ())
    owners = [k for k in lm.facts.exits if lm.facts.owns_head(k)]
    found = {k: lm.draft_head(Options(exit_layer=k, draft_vocab=size)) for k in owners}
    return {k: head for k, head in found.items() if head is not None}


def chunks(
    stack: Stack,
    sequences: Sequence[Sequence[int]],
    exits: Sequence[int],
    firsts: Sequence[int] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    size: int = CHUNK,
    heads: Mapping[int, Head] | None = None,
) -> Iterator[Chunk]:
    """Run sequences of token ids through all layers and hand out their positions, chunk by chunk, in input order.

    `firsts[i]` is the first position of sequence i that is wanted (default 0): the last token of its prompt, say,
    where its continuation is judged. The last position is handed out too; it predicts what is not there yet.
    Raises: UserError for an exit that is no layer of the model, an empty sequence, one beyond the context, and for
    logits that are not numbers.
    """
    adapted = 0 in (heads or {})
    check_exits(exits, stack.num_layers, 0 if adapted else 1)
    _check(stack, sequences)
    firsts = [0] * len(sequences) if firsts is None else firsts
    for group in batches([len(tokens) for tokens in sequences], batch_tokens):
        states = _states(stack, [sequences[i] for i in group], exits)
        chains = {
            k: drafts_of(stack, head, states)
            for k, head in (heads or {}).items()
            if head.adapts(k) and k in states
        }
        states |= {k: chain[0] for k, chain in chains.items()}
        for row, i in enumerate(group):
            for start in range(firsts[i], len(sequences[i]), size):
                positions = range(start, min(start + size, len(sequences[i])))
                own = {k: h[row, positions.start : positions.stop] for k, h in states.items()}  # [N, D]
                with torch.inference_mode():
                    full = _finite(stack.logits(own[stack.num_layers]), stack.num_layers)
                part = slice(positions.start, positions.stop)
                said = {k: [x[row, part] for x in chain] for k, chain in chains.items()}
                yield Chunk(stack, i, positions, {k: own[k] for k in exits}, full, heads or {}, said)


@torch.inference_mode()
def drafts_of(stack: Stack, head: Head, states: Mapping[int, Tensor]) -> list[Tensor]:
    """What an adapter makes of each position as the first, the second, ... draft of its round: [B, T, D] each.

    Along a text that the model itself goes on with; the first of them reads the last layer's own state.
    """
    adapter, made = head.adapter, []
    assert adapter is not None
    h, c = states[adapter.layers], stack.finished(states[stack.num_layers])
    for _ in range(DISTANCES):
        before = torch.cat([torch.zeros_like(c[:, :1]), c[:, :-1]], 1)
        z = adapter(h.flatten(0, 1), before.flatten(0, 1)).view(h.shape)
        made.append(z)
        c = stack.finished(z)
    return made


def check_exits(exits: Iterable[int], layers: int, first: int = 1) -> None:
    """Refuse what is no exit of a model of `layers`; `first` is 0 where an adapter reads it. Raises: UserError."""
    for exit_layer in exits:
        if not first <= exit_layer <= layers:
            raise UserError(
                f"exit layer {exit_layer} is out of range", f"exits are layers {first} to {layers}"
            )


def _finite(logits: Tensor, exit_layer: int) -> Tensor:
    if not torch.stack(logits.aminmax()).isfinite().all():  # one pass, no copy; NaN is passed on
        raise UserError(
            f"the logits at exit {exit_layer} are not all finite", "try --dtype float32 or bfloat16"
        )
    return logits


def _check(stack: Stack, sequences: Sequence[Sequence[int]]) -> None:
    for number, tokens in enumerate(sequences, 1):
        if not tokens:
            raise UserError(f"text {number} is empty", "leave it out")
        if stack.context is not None and len(tokens) > stack.context:
            raise UserError(
                f"text {number} has {len(tokens)} tokens, the context is {stack.context}", "cut it into parts"
            )


def batches(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Group neighbours as long as rows times the longest of them stay within `limit`; one is always taken."""
    group: list[int] = []
    for i, length in enumerate(lengths):
        longest = max([length, *(lengths[j] for j in group)])
        if group and longest * (len(group) + 1) > limit:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


@torch.inference_mode()
def _states(stack: Stack, sequences: Sequence[Sequence[int]], exits: Sequence[int]) -> dict[int, Tensor]:
    """Hidden states after every exit and after the last layer: {k: [B, T, D]}, T the longest; padding is junk."""
    counts = [len(tokens) for tokens in sequences]
    width, rows = max(counts), list(range(len(sequences)))
    cache = stack.new_cache(len(rows), width)
    for row in rows:
        cache.set_length(row, 0, stack.num_layers)
    step = Step.span(rows, [0] * len(rows), counts, stack.device, spill=cache.capacity)
    padded = [[*tokens, *[tokens[-1]] * (width - len(tokens))] for tokens in sequences]
    tokens = torch.tensor(padded, device=stack.device)  # [B, T]
    h, taps = stack.run(stack.embed(tokens, step), 0, stack.num_layers, step, cache, taps=exits)
    return {**taps, stack.num_layers: h}
