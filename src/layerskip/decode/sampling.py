"""Logits to tokens: process, warp, draw, accept. Pure tensor functions; exactness lives here.

The target law p and the draft law q of a position come from the same `Sampling` and the same processors, each
seeing the prefix that stands before the position. `accept` then keeps drafts so that what is committed follows
p exactly, whatever q was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from layerskip.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Purposes of a uniform. One position has one draft, one keep test and one committing draw at most.
DRAFT, KEEP, NEXT = 0, 1, 2


@dataclass(frozen=True)
class Sampling:
    """How a distribution is shaped before drawing; the defaults leave it alone and decode greedily.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off. Names and order of application are
    those of Hugging Face `generate`: repetition penalty, temperature, top-k, top-p, min-p.
    Raises: UserError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        allowed = {
            "temperature": (
                self.temperature == 0 or 1e-6 <= self.temperature <= 1e6,
                "0 (greedy), or from 1e-6 to 1e6",
            ),
            "top_k": (isinstance(self.top_k, int) and self.top_k >= 0, "a whole number, 0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p < 1, "at least 0 (off) and below 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0; 1 is off"),
        }
        for name, (fits, range_) in allowed.items():
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)}", f"{name} must be {range_}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Turn processed logits into the distribution to draw from.

    Shapes: float32 [..., V] -> probabilities [..., V]; greedy gives all mass to the first largest logit.
    """
    if sampling.greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        tail[..., -1].fill_(False)  # the most probable token always stays
        logits = logits.masked_fill(tail.scatter(-1, order, tail), -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.min_p > 0:
        too_small = probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True)
        probabilities = logits.masked_fill(too_small, -torch.inf).softmax(-1)
    return probabilities


def confidence(logits: Tensor) -> Tensor:
    """Largest probability of raw logits at temperature 1: known before a token is drawn.

    Shapes: float32 [..., V or reduced] -> [...]. Under a reduced head it is the share within that head.
    """
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


def penalised(logits: Tensor, prefix: Sequence[int], penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of tokens already in the prefix.

    Shapes: [V] -> [V], a new tensor. Source: CTRL (arXiv 1909.05858), as in Hugging Face `generate`.
    """
    seen = torch.tensor(sorted(set(prefix)), dtype=torch.long, device=logits.device)
    scores = logits[seen]
    return logits.index_copy(0, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Draw by inverse CDF; a token of probability zero is never returned.

    Shapes: probabilities [..., V] (need not sum to one), uniforms [...] in [0, 1) -> int64 [...].
    """
    cdf = probabilities.double().cumsum(-1)
    reached = (cdf > uniforms.double()[..., None] * cdf[..., -1:]) & (probabilities > 0)
    token = reached.to(torch.uint8).argmax(-1)  # the first that is reached
    return torch.where(reached.any(-1), token, probabilities.argmax(-1))


def accept(
    draft: Tensor, q: Tensor | None, p: Tensor, uniforms: Tensor, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Keep a prefix of the draft and draw the token that follows it, so that both obey p exactly.

    Draft i is kept while u_i q_i(x_i) < p_i(x_i); at the first failure the next token is drawn from
    normalise(max(p_i - q_i, 0)), and from p_K when all are kept. q None: each draft had all the mass of its law; it
    is kept while u_i < p_i(x_i), and the next token is drawn from p_i without x_i.

    Shapes: draft int64 [*, K], q [*, K, V] the laws the drafts were drawn from, p [*, K+1, V] the target's,
    uniforms [*, K+1] in [0, 1): one per keep test, the last for the next token. `counts` [*] gives the real
    number of drafts of each row where rows are padded to K. Returns (kept [*], next [*]).
    Exact: chi-square and closed form in tests/decode/test_accept.py, through the engine in test_engine_laws.py.
    Source: Leviathan et al. (arXiv 2211.17192), algorithm 1; Chen et al. (arXiv 2302.01318).
    """
    length, p = draft.shape[-1], p.double()
    index = draft[..., None]
    p_draft = p[..., :length, :].gather(-1, index)[..., 0]  # [*, K]
    q_draft = 1.0 if q is None else q.double().gather(-1, index)[..., 0]
    keep = uniforms[..., :length].double() * q_draft < p_draft  # [*, K]
    drafted = torch.full(keep.shape[:-1], length, device=p.device) if counts is None else counts  # [*]
    keep = keep & (torch.arange(length, device=p.device) < drafted[..., None])
    kept = keep.long().cumprod(-1).sum(-1)  # [*]
    following = _at(p, kept)  # [*, V]
    if length:  # behind the last draft there is no residual: p itself
        last = kept.clamp(max=length - 1)
        rejected = draft.gather(-1, last[..., None])[..., 0]
        rest = residual(following, None if q is None else _at(q, last), rejected)
        following = torch.where((kept < drafted)[..., None], rest, following)
    return kept, draw(following, uniforms[..., -1])


def residual(p: Tensor, q: Tensor | None, rejected: Tensor) -> Tensor:
    """Say what the token behind a rejected draft is drawn from: max(p - q, 0), or p where that vanishes.

    Shapes: p, q [*, V], rejected int64 [*] -> float64 [*, V], not normalised. q None: all its mass is on the draft.
    """
    p = p.double()
    rest = p.scatter(-1, rejected[..., None], 0.0) if q is None else (p - q.double()).clamp(min=0)
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


def _at(laws: Tensor, place: Tensor) -> Tensor:
    """Pick one law of each row. Shapes: [*, K, V], [*] -> [*, V]."""
    index = place[..., None, None].expand(*place.shape, 1, laws.shape[-1])
    return laws.gather(-2, index)[..., 0, :]


def logprobs_of(
    logits: Tensor | None, tokens: Sequence[int], top: int
) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Log-probabilities of tokens, and of the `top` likeliest in their places, before any processing.

    Shapes: logits [N, V], as many tokens as N or fewer.
    """
    assert logits is not None, "rows that ask for log-probabilities are served by the host"
    laws = logits[: len(tokens)].log_softmax(-1)
    index = torch.tensor(tokens, device=logits.device)[:, None]
    picked = [float(x) for x in laws.gather(-1, index)[:, 0]]
    values, ids = laws.topk(min(top, laws.shape[-1]))
    likeliest = zip(ids.tolist(), values.tolist(), strict=True)
    return picked, [list(zip(*both, strict=True)) for both in likeliest]


def accept_greedy(draft: Tensor, targets: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keep the longest prefix of the draft that agrees with the target's argmax, and add the target's own token.

    Shapes: draft int64 [*, K], targets int64 [*, K+1] -> (kept [*], next [*]).
    """
    keep = draft == targets[..., :-1]
    if counts is not None:
        keep = keep & (torch.arange(draft.shape[-1], device=draft.device) < counts[..., None])
    kept = keep.long().cumprod(-1).sum(-1)
    return kept, targets.gather(-1, kept[..., None])[..., 0]


class Uniforms:
    """Uniform numbers in [0, 1) addressed by (row, position, purpose): a counter-based generator (Philox).

    Nothing is consumed, so batch composition, rewinds and the order of calls cannot change a row's output.
    Drafts are also addressed by the position at which their round began, which no two rounds share: a controller
    may have chosen E and K by what became of an earlier draft, so its numbers must not be met again.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed % 2**64

    def at(self, row: int, position: int, purpose: int, began: int = 0) -> float:
        """The number at one address.

        Source: Philox, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the upper 53 bits.
        """
        key = np.array([self.seed, row], dtype=np.uint64)  # a plain list would round large seeds to float64
        raw = np.random.Philox(counter=[position, purpose, began, 0], key=key).random_raw()
        return float(int(raw) >> 11) * 2.0**-53

    def streak(self, row: int, position: int, drafts: int, chance: float) -> int:
        """Count the first drafts whose keep number, from `position` on, is below `chance`.

        For benchmarks that simulate an acceptance: the verdict is made up, all other work is real.
        """
        at = range(drafts)
        return next((i for i in at if not self.at(row, position + i, KEEP) < chance), drafts)


# Processors of transformers that carry state from call to call or hold a second model.
_STATEFUL = {"SynthIDTextWatermarkLogitsProcessor"}
_REFUSED = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance runs the model a second time",
    "ClassifierFreeGuidanceLogitsProcessor": "guidance doubles the batch",
}


@dataclass(frozen=True)
class Processing:
    """What stands between a row's logits and its law: penalty, Hugging Face processors, sampling.

    Processors are called per row and position on the unpadded prefix, with a copy of the logits. `padding` is
    shown to them before the prompt, for callers whose processors count padded positions. Each call returns
    the state to use at the next position; processors that are not known to be pure are copied, so that a
    rejected draft leaves no trace in them.
    Raises: UserError for a processor that runs the model itself, or that cannot be copied.
    """

    sampling: Sampling = Sampling()
    processors: tuple[Any, ...] = ()
    padding: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "processors", tuple(_flattened(self.processors)))
        for processor in self.processors:
            if (name := type(processor).__name__) in _REFUSED:
                raise UserError(f"{name} cannot be used in speculation: {_REFUSED[name]}", "drop that option")
            if not _pure(processor):
                try:
                    copy.deepcopy(processor)
                except Exception as error:
                    raise UserError(
                        f"{name} keeps state that cannot be copied ({error}), so rejected drafts would change it",
                        "give it a __deepcopy__, or make it a function of (input_ids, scores)",
                    ) from error

    @property
    def plain_greedy(self) -> bool:
        """Whether the argmax of the raw logits is all that is needed."""
        return self.sampling.greedy and not self.processors and self.sampling.repetition_penalty == 1

    def law_logits(
        self, logits: Tensor, prefix: Sequence[int], state: tuple[Any, ...]
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Process the logits [V] of the position after `prefix`; return them with the next state.

        Raises: UserError when every token is forbidden or the processors give NaN; whatever they raise.
        """
        if self.sampling.repetition_penalty != 1:
            logits = penalised(logits, prefix, self.sampling.repetition_penalty)
        if state:
            ids = torch.tensor([[*self.padding, *prefix]], device=logits.device)  # [1, n]
            scores = logits[None].clone()
            state = tuple(p if _pure(p) else copy.deepcopy(p) for p in state)
            for processor in state:
                scores = processor(ids, scores)
            logits = scores[0].float()
        largest = logits.max()  # NaN where any is
        if largest == -torch.inf:
            raise UserError(
                "the logits processors forbid every token", "loosen the constraint, or end the output"
            )
        if not largest.isfinite() and state:
            raise UserError("a logits processor gave NaN or infinite scores", "mend it, or leave it out")
        if not largest.isfinite():
            raise not_finite()
        return logits, state


def _flattened(processors: Iterable[Any]) -> Iterator[Any]:
    """Open nested processor lists, so that each member is judged by its own class."""
    for processor in processors:
        if isinstance(processor, list):
            yield from _flattened(processor)
        else:
            yield processor


def _pure(processor: Any) -> bool:
    kind = type(processor)
    return kind.__module__.startswith("transformers.") and kind.__name__ not in _STATEFUL


def not_finite() -> UserError:
    """The error for logits that are NaN or infinite."""
    return UserError(
        "the model gave NaN or infinite logits",
        "its weights are damaged or overflow in this dtype: try --dtype float32 (or bfloat16 for float16)",
    )
