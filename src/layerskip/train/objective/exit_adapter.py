"""Train a drafter on the exit's state and what the last layer said one position before; the model stays as it is.

    add_adapter(model, exit_layer=2, blocks=1, hidden=None, seed=0)
    states = chained(adapter, read, early, final, places, steps=3)     # of drafts 1, 2, 3 at the same positions

One pass of the model gives the exit's states, the last layer's and its law for every position at once. Draft i of a
round reads, in place of the last layer's state, what draft i - 1 made at the position before; so all drafts of all
rounds that could begin are `steps` passes of the adapter, each shifted by one position.

Source: `model/adapter.py`; training on its own output as in HASS (arXiv 2408.15766) and EAGLE-3 (arXiv 2503.01840).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from layerskip.model.adapter import adapted
from layerskip.model.families import FAMILIES, Family, parts_of
from layerskip.train.objective.dropout import sliced
from layerskip.train.objective.loss import Sums, multi_exit_loss
from layerskip.train.objective.reference import evaluating

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


NAME = "exit_adapter"
STEP_WEIGHT = 0.8
"""What draft i + 1 counts against draft i: it is asked for only where draft i was kept."""
DRAFTS = 4
"""Drafts of a round that evaluation looks at."""


class Taught(Protocol):
    """What an adapter's loss asks of `exits.ExitTraining`."""

    hf: Any
    store: Any
    answers: Any
    schedule: Any
    bound: Any
    head: Any
    softcap: float | None

    def states_of(self, inputs: dict[str, Any], wanted: set[int]) -> tuple[Tensor, dict[int, Tensor]]: ...
    def draft_head(self, wanted: Tensor) -> tuple[Tensor, Tensor | None, Tensor]: ...
    def token_of(self, places: Tensor) -> Tensor: ...
    def read(self, x: Tensor) -> Tensor: ...


class ExitAdapter(torch.nn.Module):
    """The layers of an `Adapter`, by the names they have in its file; shapes [..., D], [..., D] -> [..., D]."""

    def __init__(
        self, width: int, exit_layer: int, blocks: int, hidden: int, seed: int = 0, known: int | None = None
    ) -> None:
        super().__init__()
        self.exit_layer = exit_layer
        self.begun = False  # `least_squares` found where to start from, or a checkpoint was loaded
        self.join = torch.nn.Linear(width + (known or width), width, bias=False)
        self.blocks = torch.nn.ModuleList(_Block(width, hidden) for _ in range(blocks))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                weight.normal_(
                    0.0, 0.0 if name.endswith("down.weight") else weight.shape[1] ** -0.5, generator=generator
                )

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        blocks: Any = self.blocks
        return adapted(h, c, self.join, [(block.gate_up, block.down) for block in blocks])


class _Block(torch.nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = torch.nn.Linear(width, 2 * hidden, bias=False)
        self.down = torch.nn.Linear(hidden, width, bias=False)


def add_adapter(model: Any, exit_layer: int, blocks: int, hidden: int | None = None, seed: int = 0) -> None:
    """Make an adapter part of a Hugging Face model; `hidden` null is the width of its own MLPs."""
    config = model.config.get_text_config()
    hidden = hidden or getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    known = model.get_output_embeddings().weight.shape[
        1
    ]  # a head may read another width than the layers have
    made = ExitAdapter(config.hidden_size, exit_layer, blocks, hidden, seed, known)
    model.add_module(NAME, made.to(next(model.parameters()).device))


def adapter_of(model: Any) -> Any:
    """Find the adapter of a model, None where it has none."""
    return getattr(model, NAME, None)


def chained(
    adapter: Callable[[Tensor, Tensor], Tensor],
    read: Callable[[Tensor], Tensor],
    early: Tensor,
    final: Tensor,
    places: Tensor,
    steps: int,
) -> list[Tensor]:
    """What the head reads of drafts 1 .. steps at `places`, each as if its round had begun so many tokens before.

    Shapes: early and final (behind the final norm, `read`) [B, T, D], places [N] in B * T; [N, D] each. A place has
    at least `steps` positions of its own text before it.
    """
    early, final = early.flatten(0, 1), final.flatten(0, 1)
    needed = torch.zeros(len(early), dtype=torch.bool, device=early.device)
    for back in range(steps):
        needed[places - back] = True
    where = needed.nonzero()[:, 0]  # [M]
    row_of = torch.zeros(len(early), dtype=torch.long, device=early.device)
    row_of[where] = torch.arange(len(where), device=early.device)
    at, before = row_of[places], row_of[(where - 1).clamp(min=0)]
    h, c, states = early[where], final[(where - 1).clamp(min=0)], []
    for _ in range(steps):
        normed = read(adapter(h, c))  # [M, D]
        states.append(normed[at])
        c = normed[before]
    return states


def places_of(learnt: Tensor, positions: Tensor | None, steps: int) -> Tensor:
    """Positions [N] in B * T whose next token is learnt and that have `steps` positions of their text before them.

    Shapes: learnt bool [B, T - 1], positions [B, T], counted anew in every text of a row.
    """
    rows, width = learnt.shape
    if positions is None:
        positions = torch.arange(width + 1, device=learnt.device).expand(rows, -1)
    whole = torch.nn.functional.pad(learnt & (positions[:, :-1] >= steps), (0, 1))  # [B, T]
    return whole.flatten().nonzero()[:, 0]


def runs_of(bits: list[Tensor], places: Tensor, size: int) -> Tensor:
    """Count the rounds whose first i drafts are all right, [steps]; of len(places) that could begin.

    Shapes: bits bool [N] of each draft, places [N] ascending in `size`.
    """
    counts, before = [], None
    for own in bits:
        right = torch.zeros(size, dtype=torch.bool, device=places.device)
        right[places] = own
        if before is not None:
            right[1:] &= before[:-1]
        counts.append(right.sum())
        before = right
    return torch.stack(counts)


@torch.no_grad()
def best_of(states: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    """Name the most probable token of each state, ids [N]; logits are held for a part of them at a time."""
    parts = torch.split(states.to(head.dtype), max(1, (1 << 24) // head.shape[0]))
    return torch.cat([torch.nn.functional.linear(part, head, bias).argmax(-1) for part in parts])


@torch.no_grad()
def frozen_states(exits: Taught, inputs: dict[str, Any], rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """States of a model that is not trained: after the exit, and behind the final norm, [B, T, D] each.

    `rows` [B, 2] are the numbers of the data's rows and their lengths, by which states are known that were kept, or
    came with the data. The model runs over the other rows alone.
    """
    tokens, told = inputs.get("input_ids"), [] if rows is None else rows.tolist()
    known = [_known(exits, *one) for one in told]
    left = [place for place, states in enumerate(known) if states is None]
    if tokens is None or len(left) == len(known):
        return _computed(exits, inputs, told)
    exit_layer, positions = adapter_of(exits.hf).exit_layer, inputs.get("position_ids")
    found = [states for states in known if states is not None]
    both = found[0].new_zeros(
        len(known), len(found[0]), *tokens.shape[1:], found[0].shape[-1]
    )  # [B, P, T, D]
    for place, states in enumerate(known):
        if states is not None:
            both[place, :, : states.shape[1]] = states
    both = both.to(exits.hf.device)
    early = both[:, 0] if exit_layer else embedded(exits.hf, tokens, positions)
    final = both[:, -1]
    if left:
        index = torch.tensor(left, device=tokens.device)
        part = _computed(exits, sliced(inputs, index, len(known)), [told[place] for place in left])
        final[index] = part[1].to(final.dtype)
        early[index] = part[0].to(early.dtype)
    return early, final


def _known(exits: Taught, row: int, length: int) -> Tensor | None:
    """States [P, T, D] of a row: of the exit, if it runs a layer, and of the last layer."""
    for source in (exits.answers, exits.store):
        if source is not None and (states := source.get(row, length)) is not None:
            return states  # type: ignore[no-any-return]
    return None


def _computed(exits: Taught, inputs: dict[str, Any], told: list[list[int]]) -> tuple[Tensor, Tensor]:
    exit_layer = adapter_of(exits.hf).exit_layer
    with evaluating(exits.hf.base_model):
        final, caught = exits.states_of(inputs, {exit_layer})
    early = caught[exit_layer]
    if exits.store is not None:
        for place, (row, length) in enumerate(told):
            kept = (early, final)[0 if exit_layer else 1 :]
            exits.store.put(row, torch.stack([states[place, :length] for states in kept]))
    return early, final


def embedded(hf: Any, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """What the first layer reads. Shapes: [B, T] -> [B, T, D]."""
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    family = FAMILIES.get(hf.config.get_text_config().model_type, Family())
    return family.embed(parts_of(hf)[0], hf.get_input_embeddings(), tokens, positions)


def adapter_loss(
    exits: Taught,
    early: Tensor,
    final: Tensor,
    labels: Tensor,
    divisor: Tensor | int | None,
    positions: Tensor | None,
) -> tuple[Tensor, Sums, Tensor | int]:
    """Loss of the drafts, figures of the exit (its first draft) and of the last layer, and rounds by right drafts.

    In training drafts are compared with what the last layer says of the draft vocabulary. In evaluation losses are
    those of the whole vocabulary, and rounds are counted, see `runs_of`.
    Shapes: early, final [B, T, D], labels [B, T].
    """
    adapter, last, training = adapter_of(exits.hf), exits.schedule.num_layers, exits.hf.training
    steps = exits.bound.objective.adapter_steps if training else DRAFTS
    head, bias, placed = exits.draft_head(labels[:, 1:])
    places = places_of((placed if training else labels[:, 1:]) >= 0, positions, steps)
    runs: Tensor | int = 0
    states, known = chained(adapter, exits.read, early, final, places, steps), final.flatten(0, 1)[places]
    if training:
        weights = {steps - i: STEP_WEIGHT**i for i in range(steps)}
        weights = {key: weight / sum(weights.values()) for key, weight in weights.items()}
        wanted = torch.nn.functional.pad(placed, (0, 1)).flatten()[places]
        by_key = {steps + 1: known, **{steps - i: x for i, x in enumerate(states)}}  # the largest key teaches
        kind = exits.bound.objective.exit_loss
        loss, sums = multi_exit_loss(by_key, wanted, weights, head, bias, exits.softcap, kind, divisor)
        own = [sums.exits.index(steps), sums.exits.index(steps + 1)]
    else:
        wanted, whole = labels.roll(-1, 1).flatten()[places], (exits.head.weight, exits.head.bias)
        by_key = {last: known, adapter.exit_layer: states[0]}
        loss, sums = multi_exit_loss(by_key, wanted, {}, *whole, exits.softcap)
        best, own = best_of(known, *whole), [0, 1]
        bits = [exits.token_of(best_of(x, head, bias)) == best for x in states]
        sums.agreement[0] = bits[0].sum()  # by the head that drafts
        runs = runs_of(bits, places, labels.numel())
    told = Sums((adapter.exit_layer, last), sums.ce[own], sums.kl[own], sums.agreement[own], sums.tokens)
    return loss, told, runs
