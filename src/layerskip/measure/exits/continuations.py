"""Plain continuations of prompts, and what every exit says along them: one pass answers for all settings.

found = continuations(lm, prompts, max_new_tokens=64)
seen = observed(lm, found, exits=[4, 8], sizes=[0, 4096], curve=range(1, 31))
seen.bits[4, 4096]          # per continuation: where exit 4 names the next token inside 4096 of them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from layerskip.decode.options import Options
from layerskip.decode.sampling import confidence
from layerskip.measure.exits.states import chunks, own_heads

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from layerskip.decode.language_model import LanguageModel
    from layerskip.watch import Watch

ROWS = 8  # prompts continued side by side


@dataclass(frozen=True)
class Continuation:
    """A prompt and what plain decoding made of it."""

    prompt: list[int]
    tokens: list[int]
    ended: bool  # by an end of sequence, not by the budget


@dataclass
class Seen:
    """What one pass over continuations told. Lists hold an array per continuation: its tokens but the first."""

    bits: dict[
        tuple[int, int], list[np.ndarray]
    ]  # (exit layer, draft vocabulary) -> bool [drafts, N], see `replay`
    confidence: dict[tuple[int, int], list[np.ndarray]]  # float32 [drafts, N]
    agreement: dict[int, float]  # share of positions where an exit has the full model's argmax
    equal: float  # share of positions where this pass repeats what decoding chose
    ties: float  # share of positions whose two best logits are equal
    near_ties: float  # ... or one unit in the last place apart


def continuations(
    lm: LanguageModel, prompts: Sequence[list[int]], max_new_tokens: int, watch: Watch
) -> list[Continuation]:
    """Continue prompts by plain decoding, ends of sequence respected."""
    found = []
    done = lm.each(prompts, mode="ar", max_new_tokens=max_new_tokens, batch_size=ROWS)
    for index, (prompt, made) in enumerate(zip(prompts, done, strict=True)):
        watch("plain decoding", index, len(prompts))
        found.append(Continuation(list(prompt), made.checked().tokens, made.finish_reason != "length"))
    return found


@torch.inference_mode()
def observed(
    lm: LanguageModel,
    found: Sequence[Continuation],
    exits: Sequence[int],
    sizes: Sequence[int],
    curve: Sequence[int],
    watch: Watch,
) -> Seen:
    """Run all layers over the continuations once; read `exits` with every draft vocabulary, `curve` with none."""
    keys = [(e, size) for e in exits for size in sizes]
    heads = {
        (e, size): lm.draft_head(Options.parse({"draft_vocab": size or "off", "exit_layer": e}))
        for e, size in keys
    }
    own = own_heads(lm)
    bits: dict[tuple[int, int], list[list[Tensor]]] = {key: [[] for _ in found] for key in keys}
    sure: dict[tuple[int, int], list[list[Tensor]]] = {key: [[] for _ in found] for key in keys}
    agreeing = dict.fromkeys(sorted({*curve, *exits, lm.stack.num_layers}), 0)
    counted = {"positions": 0, "equal": 0, "ties": 0, "near": 0}
    # The last token is left out: nothing follows it. The prompt's last position tells the first token.
    sequences = [[*one.prompt, *one.tokens[:-1]] for one in found]
    firsts = [len(one.prompt) - 1 for one in found]
    for chunk in chunks(lm.stack, sequences, list(agreeing), firsts, heads=own):
        i = chunk.sequence
        watch("reading exits", i, len(found))
        start = chunk.positions.start - firsts[i]
        wanted = torch.tensor(found[i].tokens, device=lm.stack.device)[start : start + len(chunk.positions)]
        full = chunk.full.argmax(-1)  # [N]
        counted["positions"] += len(full)
        counted["equal"] += int((full == wanted).sum())
        top = chunk.full.topk(2).values  # [N, 2]
        gap = top[:, 0] - top[:, 1]
        counted["ties"] += int((gap == 0).sum())
        counted["near"] += int((gap <= _last_place(top[:, 0], lm.stack.dtype)).sum())
        for e in agreeing:
            if e in own:  # its agreement is told of the head it drafts with
                agreeing[e] += int((chunk.own(e).argmax(-1) == full).sum())
            for size in dict.fromkeys([0, *sizes] if e in exits else [0]):
                logits = torch.stack(chunk.drafts(e, heads.get((e, size))))  # [drafts, N, V or reduced]
                best = logits.argmax(-1)  # [drafts, N], a place in the head
                if (head := heads.get((e, size))) is not None:
                    best = head.ids[best]
                agreeing[e] += 0 if size or e in own else int((best[0] == full).sum())
                if (e, size) in bits:
                    bits[e, size][i].append(best == wanted)
                    sure[e, size][i].append(confidence(logits))
    positions = counted["positions"]
    return Seen(
        bits={key: [_flat(parts) for parts in lists] for key, lists in bits.items()},
        confidence={key: [_flat(parts) for parts in lists] for key, lists in sure.items()},
        agreement={e: count / positions for e, count in agreeing.items()},
        equal=counted["equal"] / positions,
        ties=counted["ties"] / positions,
        near_ties=counted["near"] / positions,
    )


def _last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of numbers of that size: [N] -> [N]."""
    exponent = torch.frexp(values).exponent - 1
    return torch.ldexp(torch.full_like(values, torch.finfo(dtype).eps), exponent)


def _flat(parts: Sequence[Tensor]) -> np.ndarray:
    """Put a continuation's parts together without its first token, which is never drafted."""
    made: np.ndarray = torch.cat(list(parts), 1)[:, 1:].cpu().numpy()
    return made
