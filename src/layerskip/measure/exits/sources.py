"""The rounds that decoding takes where a controller chooses between an exit, a copy and a plain step.

    rounds = replay_sources(found, call.controller(), said, seconds, budget=64, eos=call.eos)
    rounds.tokens_per_round, rounds.plain_share, rounds.by_source

Greedy output is the plain continuation whatever is drafted, so a round is worked out without the model: the real
controller chooses, a real `History` gives the copy, the exit drafts what one pass has shown it to say.

Exact: rounds and accepted drafts, by source, are the engine's own where the controller is not timed
(tests/measure/test_sources.py), with the limits that `replay` names. Where drafts are cut by what positions cost,
those behind a wrong one are taken to be as likely as they would be behind the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from layerskip.decode.control import EXIT, Drafted
from layerskip.decode.copies import best_lengths
from layerskip.decode.drafters.lookup import copied
from layerskip.decode.history import History
from layerskip.decode.request import Request
from layerskip.decode.row import Row
from layerskip.decode.sampling import Uniforms
from layerskip.measure.exits.replay import Replayed, runs

if TYPE_CHECKING:
    from layerskip.decode.control import Choice, Controller
    from layerskip.measure.exits.continuations import Continuation


class Said(NamedTuple):
    """What an exit says along a continuation, its first token apart: see `continuations.Seen`."""

    bits: np.ndarray  # bool [drafts, N]: it names the token that follows
    confidence: np.ndarray  # float [drafts, N]


def replay_sources(
    found: Continuation,
    controller: Controller,
    said: Mapping[int, Said],
    seconds: Callable[[Choice, int], float],
    budget: int,
    eos: frozenset[int],
    num_rows: int = 1,
) -> Replayed:
    """Play the rounds of one continuation, and let the controller learn from them.

    `said` has every exit that the controller may use or probe. `seconds` is what a round of a choice takes with so
    many drafts. `budget` is how many tokens were allowed. Of several rows all are taken to do the same.
    """
    prompt, told = found.prompt, found.tokens
    request = Request(prompt, budget, eos=eos)
    tokens, history = [*prompt, *told[:1]], History(counted_from=len(prompt))
    row = Row(0, request, controller.plain.exit_layer, controller.plain, tokens, Uniforms(0), (), history)
    capacity, copying = len(prompt) + budget - 1, controller.copying
    right = {e: runs(own.bits) for e, own in said.items()}
    rounds = []
    while (at := len(row.tokens) - len(prompt)) < len(told):
        chances: list[float] = []
        if copying is not None:
            most = min(copying.longest, row.room(capacity))
            chances = history.chances(row.tokens, most, copying.shortest)
        row.choice = choice = controller.choose([chances] * num_rows)[0]
        drafted = limit = row.drafts_allowed(capacity)
        if choice.source == EXIT:
            sure = said[choice.exit_layer].confidence
            if choice.confidence:
                drafted = min(limit, int(runs(sure[..., at - 1 :] >= choice.confidence)[0]))
            elif choice.costs is not None:
                likely = [
                    sure[min(i, len(sure) - 1), at - 1 + i] for i in range(min(limit, sure.shape[1] - at + 1))
                ]
                more = partial(choice.costs.more, num_rows)
                drafted = best_lengths([likely] * num_rows, more, copying is not None and copying.padded)[0][
                    0
                ]
            kept = min(drafted, int(right[choice.exit_layer][at - 1]))
        else:
            copy = copied(row, limit)
            drafted, pairs = len(copy), zip(copy, told[at:], strict=False)
            kept = next((i for i, (own, other) in enumerate(pairs) if own != other), drafted)
        ended = at + kept == len(told)  # the last token was drafted: an end of sequence, none follows it
        committed = kept + (not ended)
        looked = choice.source == EXIT and drafted < limit and not ended
        drafted = kept if ended else drafted
        probed = {k: np.atleast_2d(said[k].bits)[0, at - 1 : at + kept] for k in choice.probes}
        agreements = {k: (float(bits.sum()), kept + 1) for k, bits in probed.items()}
        drafts = Drafted(drafted, kept, committed, agreements)
        controller.learn(choice, seconds(choice, drafted), [drafts] * num_rows)
        rounds.append((drafted, kept, committed, int(looked), int(choice.source != EXIT and drafted > 0)))
        row.tokens += told[at : at + committed]
    return Replayed.of(rounds)
