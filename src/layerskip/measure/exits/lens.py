"""The logit lens: what every layer would say at every position of a text, and from which layer on it is settled.

    seen = lens(lm.stack, lm.tokenizer, tokens)
    seen.top[i][t], seen.probability[i][t]      # the best token of exit seen.exits[i] after reading seen.read[t]
    seen.settles[t]                             # from this layer on, every exit agrees with the full model

`Lens` is plain data: the terminal, the picture and --json all show it, and a result file holds it whole.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from layerskip.decode.sampling import confidence
from layerskip.errors import UserError
from layerskip.measure.exits.states import check_exits, chunks

if TYPE_CHECKING:
    from layerskip.model.head import Head
    from layerskip.model.stack import Stack

LONGEST = 256  # positions of one lens: a picture of more is read by nobody
SHOWN = {" ": "·", "\n": "↵", "\r": "␍", "\t": "→"}


@dataclass(frozen=True)
class Lens:
    """What exits say, row by row; rows and columns as they were asked for, settling judged on all layers."""

    layers: int
    first: int  # position of the first column in the text
    read: list[str]  # [T] the token at each position
    exits: list[int]  # ascending; the last is all layers
    top: list[list[str]]  # [exits][T] most probable next token
    probability: list[list[float]]  # [exits][T] and how probable it is
    agrees: list[list[bool]]  # [exits][T] whether it is the full model's, compared by id
    settles: list[int]  # [T]

    @property
    def agreement(self) -> list[float]:
        """Share of the positions at which each exit agrees with the full model."""
        return [sum(row) / len(row) for row in self.agrees]


def lens(
    stack: Stack,
    tokenizer: Any,
    tokens: Sequence[int],
    exits: Sequence[int] | None = None,
    first: int = 0,
    heads: Mapping[int, Head] | None = None,
) -> Lens:
    """Look through every layer at the positions `first`.. of a text; keep the rows `exits` (default: all).

    An exit of `heads` is read by that head, all others by the model's.

    Exact: the best token of exit k is the argmax of the head over k layers (tests/measure/test_lens.py).
    Raises: UserError for an exit that is no layer of the model, or more than `LONGEST` positions.
    """
    count = len(tokens) - first
    if count > LONGEST:
        raise UserError(
            f"{count} positions are too many to look at", f"give a text of up to {LONGEST} tokens"
        )
    layers = stack.num_layers
    check_exits(exits or (), layers)
    ids: dict[int, list[int]] = {k: [] for k in range(1, layers + 1)}
    probability: dict[int, list[float]] = {k: [] for k in ids}
    with torch.inference_mode():
        for chunk in chunks(stack, [tokens], [*ids], firsts=[first], heads=heads):
            for exit_layer, logits in chunk.exits():
                ids[exit_layer] += logits.argmax(-1).tolist()  # [N]
                probability[exit_layer] += confidence(logits).tolist()
    agrees = {k: [a == b for a, b in zip(ids[k], ids[layers], strict=True)] for k in ids}
    kept = sorted({*(exits or ids), layers})
    text = spelled(tokenizer, [*tokens[first:], *(token for k in kept for token in ids[k])])
    return Lens(
        layers=layers,
        first=first,
        read=[text[token] for token in tokens[first:]],
        exits=kept,
        top=[[text[token] for token in ids[k]] for k in kept],
        probability=[[round(p, 4) for p in probability[k]] for k in kept],
        agrees=[agrees[k] for k in kept],
        settles=settled(list(agrees.values())),
    )


def settled(agrees: Sequence[Sequence[bool]]) -> list[int]:
    """Find for every column the first layer from which on all agree: [L][T] -> [T]."""
    found = []
    for column in zip(*agrees, strict=True):
        differing = [layer for layer, same in enumerate(column, 1) if not same]
        found.append(max(differing, default=0) + 1)
    return found


def spelled(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """Spell tokens as they stand inside a text: decoders strip the space of a text's first token."""
    plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = tokenizer.decode(anchor, **plain)
    words = {}
    for token in set(ids):
        both = tokenizer.decode([*anchor, token], **plain)
        inside = both.startswith(before) and len(both) > len(before)
        words[token] = both[len(before) :] if inside else tokenizer.decode([token], **plain)
    return words


def visible(text: str) -> str:
    """Make spaces and control characters visible, so that a token is what it looks like."""
    shown = "".join(
        SHOWN.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text
    )
    lone = bool(shown) and unicodedata.combining(shown[0]) > 0  # it would sit on whatever stands before it
    return "◌" + shown if lone else shown or "∅"
