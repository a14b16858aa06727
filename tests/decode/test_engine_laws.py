"""The engine draws by the model's own law, by chi-square: first tokens, and all positions of long outputs."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch

from laws import (
    ENGINE_VOCAB,
    FAILS,
    PASSES,
    PROMPT,
    chi_square_tail,
    exact_first_tokens,
    first_tokens,
    p_value,
    small_model,
)
from layerskip.decode.engine import Engine
from layerskip.decode.request import Request
from layerskip.decode.sampling import Processing, Sampling, warp
from layerskip.model.huggingface import HuggingFaceStack
from layerskip.model.step import Step

if TYPE_CHECKING:
    from layerskip.model.head import Head


def one_hot(tokens: torch.Tensor, vocab: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(tokens, vocab).double()


@pytest.fixture(scope="module")
def model():
    return small_model()


def test_self_speculation_samples_from_the_models_law(model):
    found = first_tokens(model, 3, 200, exit_layer=2, draft_length=3)
    assert p_value(found, exact_first_tokens(model, 3)) > PASSES


def test_plain_decoding_samples_from_the_models_law(model):
    assert p_value(first_tokens(model, 2, 120), exact_first_tokens(model, 2)) > PASSES


def test_believing_the_exit_is_seen(model):
    """Control: unverified early exits sample from another law, and this many requests suffice to tell."""
    assert (
        p_value(first_tokens(model, 2, 80, exit_layer=2, unverified=True), exact_first_tokens(model, 2))
        < FAILS
    )


SHAPES = {
    "penalty and top-p": (Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.4), None),
    "draft vocabulary, top-k and min-p": (Sampling(temperature=1.4, top_k=3, min_p=0.1), [0, 2]),
}


LONG_EXIT, LONG_DRAFT = 2, 3


@torch.inference_mode()
def exit_logits(stack, ids: torch.Tensor, head: Head | None) -> torch.Tensor:
    """The draft's logits at every position of known sequences: [B, T] -> [B, T, V]."""
    num_rows, length = ids.shape
    step = Step.span(range(num_rows), [0] * num_rows, [length] * num_rows, stack.device, spill=length)
    h, _ = stack.run(stack.embed(ids, step), 0, LONG_EXIT, step, stack.new_cache(num_rows, length))
    logits = stack.logits(h, head)
    return logits if head is None else head.scatter(logits, ENGINE_VOCAB)


def long_outputs(stack, processing: Processing, head: Head | None) -> torch.Tensor:
    """Prompts and self-speculative outputs of some rows served together: [B, T]."""
    num_rows, num_new = 20, 40
    engine = Engine(stack, rows=num_rows, capacity=64, draft_head=head)
    rows: dict[int, list[int]] = {}
    for index in range(num_rows):
        request = Request(PROMPT, num_new, LONG_EXIT, LONG_DRAFT, processing=processing, seed=7, index=index)
        rows[engine.add(request)] = list(PROMPT)
    while engine.busy:
        for round in engine.step():
            rows[round.row] += round.tokens
    assert {len(row) for row in rows.values()} == {len(PROMPT) + num_new}
    return torch.tensor(list(rows.values()))


@pytest.mark.parametrize("name", SHAPES)
def test_long_outputs_of_the_engine_follow_the_shaped_law_at_every_position(model, name):
    """Given its own past, each token is drawn from the law that Hugging Face's logits give there.

    For every previous token, sum (one-hot of the token - its law) over all positions that follow it. That is a
    martingale, and its covariance the sum of diag(law) - law law^T: a chi-square with the covariance's rank.
    The same for the event that the draft law gives the token too little, where leaks of the draft law show most.
    """
    sampling, subset = SHAPES[name]
    processing, stack = Processing(sampling), HuggingFaceStack(model)
    head = stack.reduced_head(subset) if subset else None
    ids = long_outputs(stack, processing, head)
    places = list(itertools.product(range(len(ids)), range(len(PROMPT), ids.shape[1])))

    def laws(logits: torch.Tensor) -> torch.Tensor:
        rows = [processing.law_logits(logits[b, n - 1], ids[b, :n].tolist(), ())[0] for b, n in places]
        return warp(torch.stack(rows), sampling).double()  # [N, V]

    with torch.no_grad():
        p, q = laws(model(ids).logits), laws(exit_logits(stack, ids, head))
    drawn = one_hot(torch.stack([ids[at] for at in places]), ENGINE_VOCAB)
    assert (p[drawn.bool()] > 0).all()
    surprise, covariance = drawn - p, p.diag_embed() - p[:, :, None] * p[:, None, :]
    previous = torch.stack([ids[b, n - 1] for b, n in places])
    statistic, degrees = 0.0, 0
    for token in range(ENGINE_VOCAB):
        total, spread = surprise[previous == token].sum(0), covariance[previous == token].sum(0)
        statistic += float(total @ torch.linalg.pinv(spread, rtol=1e-6, hermitian=True) @ total)
        degrees += int(torch.linalg.matrix_rank(spread, rtol=1e-6, hermitian=True))
    assert chi_square_tail(statistic, degrees) > PASSES
    neglected = (p > q).double()
    total, spread = (surprise * neglected).sum(), torch.einsum("nv,nvw,nw", neglected, covariance, neglected)
    assert chi_square_tail(float(total**2 / spread), 1) > PASSES
