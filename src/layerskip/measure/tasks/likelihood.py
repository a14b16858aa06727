"""Log-likelihood tasks at an exit, beside the full model: responses, and multiple choice.

    items = read_likelihoods(path)
    pairs = [pairs_of(lm, item, separator="", chat=False) for item in items]
    records = list(scored(lm.stack, items, pairs, exits=[6, 30]))
    summary(records, 6)                          # {"accuracy": 0.41, ...}

A context and what continues it are tokenised together, and the tokens after what they share with the context alone
are scored: a space at the end of a context then belongs to the first scored token, as in lm-eval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from layerskip.errors import UserError
from layerskip.measure.exits.evaluation import perplexity
from layerskip.measure.exits.states import chunks

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.decode.language_model import LanguageModel
    from layerskip.measure.exits.states import Chunk
    from layerskip.measure.lines import LikelihoodLine
    from layerskip.model.head import Head
    from layerskip.model.stack import Stack

# Context and continuation in tokens, and how many of them are scored, from the end.
Pair = tuple[list[int], int]


def pairs_of(lm: LanguageModel, item: LikelihoodLine, separator: str = "", chat: bool = False) -> list[Pair]:
    """Tokenise an item, a pair per continuation; what exceeds the model's context is cut off the front.

    Raises: UserError for a continuation that does not fit, or is nothing in tokens.
    """
    before = item.before if chat else item.before + separator
    start = lm.encode(before, chat=chat) if before else []
    pairs = []
    for text in item.continuations:
        if chat:
            whole, shared = start + lm.tokenizer.encode(text, add_special_tokens=False), len(start)
        else:
            whole = lm.encode(before + text)
            shared = _shared(start, whole)
        if shared == 0:  # a first token is scored too, after what starts a text
            first = [_start(lm)]
            whole = whole if whole[:1] == first else first + whole  # some tokenizers put it there themselves
            shared = 1
        count = len(whole) - shared
        if count < 1:
            raise UserError(f"the response {text!r} is nothing in tokens", "leave it out")
        if lm.stack.context is not None and count > lm.stack.context:
            raise UserError(
                f"a response of {count} tokens does not fit the context of {lm.stack.context}", "leave it out"
            )
        pairs.append((whole if lm.stack.context is None else whole[-lm.stack.context - 1 :], count))
    return pairs


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _start(lm: LanguageModel) -> int:
    ids = (lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id)
    found = next((token for token in ids if token is not None), None)
    if found is None:
        raise UserError(
            "an empty context, and this tokenizer has no start token", "give every line a context"
        )
    return int(found)


def scored(
    stack: Stack,
    items: Sequence[LikelihoodLine],
    pairs: Sequence[Sequence[Pair]],
    exits: Sequence[int],
    watch: Callable[[int], None] = lambda tokens: None,
    heads: Mapping[int, Head] | None = None,
) -> Iterator[dict[str, Any]]:
    """Score items at several exits in one pass, yielding a record per item, in order. `heads` bring adapters.

    By exit and continuation: the log-likelihood of every scored token, and whether all are the exit's own choice.
    """
    flat = [(i, *pair) for i, of_item in enumerate(pairs) for pair in of_item]
    firsts = [len(tokens) - count - 1 for _, tokens, count in flat]
    exits = sorted({*exits})
    tried: dict[int, list[dict[str, Any]]] = {k: [] for k in exits}
    read = [tokens[:-1] for _, tokens, _ in flat]  # the last token is only predicted
    for chunk in chunks(stack, read, exits, firsts, heads=heads):
        i, tokens, _ = flat[chunk.sequence]
        start, stop = chunk.positions.start, chunk.positions.stop
        following = torch.tensor(tokens[start + 1 : stop + 1], device=stack.device)
        for exit_layer, (likelihoods, greedy) in _read(chunk, following).items():
            if start == firsts[chunk.sequence]:
                tried[exit_layer].append({"tokens": [], "greedy": True})
            at = tried[exit_layer][-1]
            at["tokens"] += likelihoods
            at["greedy"] = at["greedy"] and greedy
        watch(len(following))
        if stop == len(tokens) - 1 and len(tried[exits[0]]) == len(pairs[i]):
            yield _record(items[i], tried)
            tried = {k: [] for k in exits}


@torch.inference_mode()
def _read(chunk: Chunk, following: Tensor) -> dict[int, tuple[list[float], bool]]:
    """By exit: log-likelihoods of the tokens that follow, and whether each is the exit's most probable one.

    All are read by the model's head, which has a probability for every token.
    """
    found = {}
    for exit_layer in sorted(chunk.states):
        logits = chunk.logits(exit_layer)
        likelihoods = logits.log_softmax(-1).gather(-1, following[:, None])[:, 0]  # [N]
        found[exit_layer] = (likelihoods.tolist(), bool((logits.argmax(-1) == following).all()))
    return found


def _record(item: LikelihoodLine, tried: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    return {
        "answer": item.answer,
        "characters": [len(text) for text in item.continuations],
        "exits": {str(exit_layer): found for exit_layer, found in tried.items()},
    }


def summary(records: Sequence[dict[str, Any]], exit_layer: int) -> dict[str, Any]:
    """Sum up an exit: responses by log-likelihood, choices by accuracy; whichever kind there is.

    `accuracy_per_character` divides a choice's log-likelihood by its length first, as lm-eval's acc_norm does.
    """
    told: dict[str, Any] = {"exit_layer": exit_layer}
    found = [(record, record["exits"][str(exit_layer)]) for record in records]
    responses = [tried[0] for record, tried in found if record["answer"] is None]
    choices = [(record, [sum(one["tokens"]) for one in tried])
               for record, tried in found if record["answer"] is not None]  # fmt: skip
    if responses:
        total = sum(sum(one["tokens"]) for one in responses)
        tokens = sum(len(one["tokens"]) for one in responses)
        told |= {
            "responses": len(responses),
            "tokens": tokens,
            "loglikelihood": total,
            "loglikelihood_per_token": total / tokens,
            "perplexity": perplexity(-total / tokens),
            "greedy": sum(one["greedy"] for one in responses) / len(responses),
        }
    if choices:
        right = [_best(scores) == record["answer"] for record, scores in choices]
        fair = [
            _best([s / n for s, n in zip(scores, record["characters"], strict=True)]) == record["answer"]
            for record, scores in choices
        ]
        told |= {
            "choices": len(choices),
            "accuracy": sum(right) / len(choices),
            "accuracy_per_character": sum(fair) / len(choices),
        }
    return told


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)
