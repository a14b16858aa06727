"""What every exit is worth on texts: agreement with the full model, KL, total variation, perplexity.

    texts = [Text(window, {"text": range(len(window) - 1)}) for window in windows(tokens, 1024)]
    records = list(judged(stack, texts, exits=[2, 4, 8]))    # sums, one record per text
    rows(records, "text")                                    # [{"exit_layer": 2, "agreement": 0.4, ...}, ...]

A text names its parts: the positions, each of them that of the token before the one it predicts, that count for a
source. A prompt and the model's continuation of it are one text of two parts, so all is read in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerskip import reading
from layerskip.errors import UserError
from layerskip.measure.exits.states import chunks

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.measure.exits.states import Chunk
    from layerskip.model.head import Head
    from layerskip.model.stack import Stack

SUMS = ("agreed", "kl", "tv", "nll")
PIECE = 32  # positions compared at once on the CPU: their probabilities stay in its caches
_LARGEST_NLL = 700.0  # its exponential is still a float64


@dataclass(frozen=True)
class Text:
    """A sequence of tokens and the positions that count for each source."""

    tokens: Sequence[int]
    parts: Mapping[str, range]


def read_text(path: Path) -> str:
    """Read a plain text file of any name, possibly .gz. Raises: UserError when it is missing, not text or empty."""
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        raise UserError(f"{path} is not plain text", "--prompts takes JSON lines")
    text = reading.read_text(path, reading.USER_BYTES, pipe=True)
    if "\0" in text or not text.strip():
        raise UserError(f"{path} {'is not text' if text.strip() else 'is empty'}", "give a file with text")
    return text


def windows(tokens: Sequence[int], size: int) -> list[list[int]]:
    """Cut running text into windows of `size` tokens that do not overlap; a single token at the end is dropped."""
    cut = [list(tokens[start : start + size]) for start in range(0, len(tokens), size)]
    return [window for window in cut if len(window) > 1]


def judged(
    stack: Stack,
    texts: Sequence[Text],
    exits: Sequence[int],
    watch: Callable[[int], None] = lambda tokens: None,
    heads: Mapping[int, Head] | None = None,
) -> Iterator[dict[str, Any]]:
    """Judge texts at all exits in one pass, yielding a record of sums per text, in order.

    A record has, by source, the number of tokens and by exit the sums of `SUMS` over them. `watch` is told how many
    tokens were worked off, padding left out. An exit of `heads` is read by that head. It gives other tokens no
    probability, so KL and negative log-likelihood are infinite there and None takes their place.

    Raises: UserError for exits or texts the model cannot take, and for logits that are not numbers.
    """
    heads = heads or {}
    sums = _nothing(texts[0], exits, heads) if texts else {}
    read = [text.tokens[: max(1, len(text.tokens) - 1)] for text in texts]  # the last token is only predicted
    for chunk in chunks(stack, read, exits, heads=heads):
        text = texts[chunk.sequence]
        following = text.tokens[chunk.positions.start + 1 : chunk.positions.stop + 1]
        if following:  # a text of one token has none
            found = measured(chunk, torch.tensor(following, device=stack.device))
            for source, part in text.parts.items():
                start = max(part.start - chunk.positions.start, 0)
                stop = max(part.stop - chunk.positions.start, start)
                sums[source]["tokens"] += len(following[start:stop])
                for exit_layer, values in found.items():
                    at = sums[source]["exits"][str(exit_layer)]
                    for name, value in zip(SUMS, values[:, start:stop].sum(-1).tolist(), strict=True):
                        if at[name] is not None:
                            at[name] += value
        watch(len(chunk.positions))
        if chunk.positions.stop == len(read[chunk.sequence]):
            yield sums
            if chunk.sequence + 1 < len(texts):
                sums = _nothing(texts[chunk.sequence + 1], exits, heads)


def _nothing(text: Text, exits: Iterable[int], heads: Mapping[int, Head]) -> dict[str, Any]:
    absent = {"kl": None, "nll": None}
    zeros = {str(k): dict.fromkeys(SUMS, 0.0) | (absent if k in heads else {}) for k in exits}
    return {source: {"tokens": 0, "exits": {k: dict(v) for k, v in zeros.items()}} for source in text.parts}


@torch.inference_mode()
def measured(chunk: Chunk, following: Tensor) -> dict[int, Tensor]:
    """Compare every exit with the full model at the positions of a chunk, which tokens follow.

    Shapes: following int64 [N] -> by exit float64 [4, N], in the order of `SUMS`: whether the most probable tokens
    are the same, KL(full || exit) in nats, total variation, negative log-likelihood of what follows.
    Exact: 1, 0 and 0 at the last layer (test_the_last_layer_agrees_with_itself_exactly).
    """
    rows_at_once = PIECE if following.device.type == "cpu" else len(following)
    wanted = torch.split(following, rows_at_once)
    whole = [_distribution(logits) for logits in torch.split(chunk.full, rows_at_once)]
    found = {}
    for exit_layer, logits in chunk.exits():
        pieces = zip(whole, torch.split(logits, rows_at_once), wanted, strict=True)
        compared = torch.cat([_compared(*piece) for piece in pieces], dim=1)  # [4, N]
        found[exit_layer] = compared.cpu().double()  # not every device has float64
    return found


def _distribution(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The most probable token [N], the probabilities [N, V] and their negative entropy [N]."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    return logits.argmax(-1), p, _dot(p, log_p)


def _compared(whole: tuple[Tensor, Tensor, Tensor], logits: Tensor, following: Tensor) -> Tensor:
    """See `measured`; logits [N, V] of an exit -> float32 [4, N]."""
    best, p, negative_entropy = whole
    log_q, agreed = logits.log_softmax(-1), logits.argmax(-1) == best
    kl = (negative_entropy - _dot(p, log_q)).clamp_(min=0.0)  # a rounding error may be below zero
    nll = -log_q.gather(-1, following[:, None])[:, 0]
    tv = 0.5 * torch.linalg.vector_norm(log_q.exp_().sub_(p), ord=1, dim=-1)
    return torch.stack([agreed.float(), kl, tv, nll])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum a product over the vocabulary without holding it: [N, V], [N, V] -> [N]."""
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0]


def rows(records: Iterable[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    """Average records over all tokens of a source, an entry per exit; None where there is no token, or no number.

    Units: KL in nats; total variation from 0 to 1; perplexity per token.
    """
    parts = [record[source] for record in records if source in record]
    tokens = sum(part["tokens"] for part in parts)
    table = []
    for exit_layer in sorted({int(key) for part in parts for key in part["exits"]}):
        at = [part["exits"][str(exit_layer)] for part in parts]
        mean = {
            name: sum(sums[name] for sums in at) / tokens
            if tokens and all(sums[name] is not None for sums in at)
            else None
            for name in SUMS
        }
        table.append(
            {
                "exit_layer": exit_layer,
                "agreement": mean["agreed"],
                "kl": mean["kl"],
                "tv": mean["tv"],
                "perplexity": perplexity(mean["nll"]),
                "tokens": tokens,
            }
        )
    return table


def perplexity(nll: float | None) -> float | None:
    """Turn a mean negative log-likelihood into a perplexity; exits far off the mark stay finite."""
    return None if nll is None else math.exp(min(nll, _LARGEST_NLL))
