"""Laws of tokens and tests of counts against them, shared by tests that sampling is exact."""

from __future__ import annotations

import itertools

import torch

import tiny
from layerskip.decode.engine import Engine
from layerskip.decode.request import Request
from layerskip.decode.sampling import Processing, Sampling
from layerskip.measure.proof.laws import chi_square_tail as chi_square_tail
from layerskip.measure.proof.laws import p_value as p_value
from layerskip.model.huggingface import HuggingFaceStack

# Seeds are fixed, so a right sampler either always passes or never; 70 tests at 1e-4 leave 0.7 % for an unlucky
# seed. A wrong one is told apart by orders of magnitude.
PASSES, FAILS = 1e-4, 1e-6
PLAIN = Processing(Sampling(temperature=1.0))
ENGINE_VOCAB, PROMPT = 4, [1, 3]


def small_model():
    """A model of four tokens, so that the law of its first few can be enumerated."""
    return tiny.random_model(
        "llama", seed=3, vocab_size=ENGINE_VOCAB, num_hidden_layers=3, hidden_size=16, intermediate_size=16
    )


def first_tokens(
    model, length: int, num_requests: int, device_rounds: bool = False, head=None, **how
) -> torch.Tensor:
    """Count the first `length` new tokens of many requests, each with its own random numbers: [V**length].

    `how` are options of the requests; what can be called makes each request its own. `head` makes a draft head.
    """
    stack = HuggingFaceStack(model)
    more = {"draft_head": head and head(stack), "device_rounds": device_rounds}
    engine = Engine(stack, rows=num_requests, capacity=8, **more)
    new: dict[int, list[int]] = {}
    for index in range(num_requests):
        own = {name: value() if callable(value) else value for name, value in how.items()}
        request = Request(PROMPT, max_new_tokens=6, processing=PLAIN, seed=11, index=index, **own)
        new[engine.add(request)] = []
    while engine.busy:
        for round in engine.step():
            new[round.row] += round.tokens
            if len(new[round.row]) >= length:
                engine.cancel(round.row)
    full = [[*row, *row[-1:] * length][:length] for row in new.values()]  # an end of sequence repeats itself
    codes = [sum(x * ENGINE_VOCAB**i for i, x in enumerate(reversed(row))) for row in full]
    return torch.bincount(torch.tensor(codes), minlength=ENGINE_VOCAB**length)


@torch.no_grad()
def exact_first_tokens(model, length: int, eos: int | None = None) -> torch.Tensor:
    """Enumerate the law of the first new tokens with Hugging Face's own forward pass: [V**length]."""
    continuations = list(itertools.product(range(ENGINE_VOCAB), repeat=length))
    ids = torch.tensor([[*PROMPT, *tokens] for tokens in continuations])
    laws = model(ids).logits[:, len(PROMPT) - 1 : -1].double().softmax(-1)  # [N, length, V]
    if eos is not None:
        ended = (ids[:, len(PROMPT) - 1 : -1] == eos) & (torch.arange(length) > 0)  # [N, length]
        after = torch.nn.functional.one_hot(torch.tensor(eos), ENGINE_VOCAB).double()
        laws = torch.where(ended[..., None], after, laws)
    return laws.gather(-1, torch.tensor(continuations)[..., None])[..., 0].prod(-1)
