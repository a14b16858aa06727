"""How large a draft vocabulary should be: measured head times and coverage into the cost model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from layerskip.measure.speed import methods as ways
from layerskip.measure.speed.methods import SELF_SPECULATIVE
from layerskip.measure.speed.steps import Workbench, head_times, step_cost
from layerskip.model import cost as costs
from layerskip.model.head import DRAFT_VOCABULARIES, draft_ids

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel
    from layerskip.decode.options import Plan
    from layerskip.measure.speed.settings import Prompt, Settings

ASSUMED_AGREEMENT = 0.8  # of an exit with the whole head, per token: a guess, and printed as one


def chosen_vocabulary(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    settings: Settings,
    plan: Plan,
    table: Workbench,
    targets: Sequence[Sequence[int]],
) -> int | str:
    """Resolve the draft vocabulary; auto measures the heads and asks the cost model.

    `targets` are plain decoding's own tokens on these prompts: the share of them inside a subset is its coverage.
    The agreement per token comes from a run with the whole head, or from the acceptance that is simulated. An exit
    with a trained head of its own keeps that one.
    """
    if settings.draft_vocab != "auto":
        return "auto" if settings.draft_vocab is None else settings.draft_vocab
    if SELF_SPECULATIVE not in settings.methods or plan.draft_length == 0:
        return "off"
    if lm.facts.owns_head(plan.exit_layer):
        return "auto"
    acceptance = settings.simulate_acceptance
    if acceptance is None:
        trial = ways.ours(
            lm,
            SELF_SPECULATIVE,
            0,
            exit_layer=plan.exit_layer,
            draft_length=plan.draft_length,
            draft_vocab="off",
        )
        rounds = [
            round
            for index, prompt in enumerate(prompts[:3])
            for round in trial.decode(index, prompt.tokens, settings.max_new_tokens).rounds
        ]
        acceptance = sum(r.accepted for r in rounds) / max(1, sum(r.drafted for r in rounds))
    full = lm.stack.vocab_size
    sizes = [size for size in DRAFT_VOCABULARIES if size < full]
    tokens = [token for target in targets for token in target]
    coverage = {}
    for size in sizes:
        subset = set(draft_ids(size, full, lm.ranked_vocabulary, ()))
        coverage[size] = sum(token in subset for token in tokens) / len(tokens)
    per_token = costs.per_token_from(acceptance, plan.draft_length)
    size = costs.best_draft_vocabulary(_predicted(lm, table, plan, coverage, per_token))
    return "off" if size == full else size


def predicted_sizes(lm: LanguageModel, plan: Plan, coverage: Mapping[int, float]) -> dict[int, float]:
    """Predict the speed-up of draft vocabularies of known coverage, for a model not run yet.

    The whole head is one of them. The agreement per token is assumed; step times are measured.
    """
    table = Workbench(lm.stack, [0] * 32, plan.draft_length)
    return _predicted(lm, table, plan, coverage, ASSUMED_AGREEMENT)


def _predicted(
    lm: LanguageModel, table: Workbench, plan: Plan, coverage: Mapping[int, float], per_token: float
) -> dict[int, float]:
    full = lm.stack.vocab_size
    heads = {
        size: lm.stack.reduced_head(draft_ids(size, full, lm.ranked_vocabulary, ())) for size in coverage
    }
    seconds = head_times(table, {**heads, full: None})
    cost = step_cost(table, plan.exit_layer, None)
    shares = {**coverage, full: 1.0}
    return costs.draft_vocabulary_speedups(cost, plan.draft_length, per_token, seconds, shares)
