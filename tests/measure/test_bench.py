"""The benchmark: equality before speed, interleaved work, the promised result, simulated acceptance."""

import dataclasses
import json
from collections import Counter

import pytest
import torch

import tiny
from layerskip.decode.language_model import LanguageModel
from layerskip.decode.request import Request, Round
from layerskip.decode.sampling import Processing, Sampling
from layerskip.errors import UserError
from layerskip.measure.speed import card as cards
from layerskip.measure.speed import draft_sizes
from layerskip.measure.speed.bench import (
    NotLossless,
    bench,
    by_position,
    divergences,
    require_equality,
    schedule,
)
from layerskip.measure.speed.methods import Run
from layerskip.measure.speed.settings import Prompt, Settings
from layerskip.model.huggingface import HuggingFaceStack

L = tiny.NUM_LAYERS
PROMPTS = [Prompt("code", [5, 9, 11, 3]), Prompt(None, [7, 8])]
SETTINGS = Settings(exit_layer=2, draft_length=3, max_new_tokens=16, trials=2)


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(cards, "BUFFER_BYTES", 2**16)


@pytest.fixture(scope="module")
def lm():
    model = tiny.calibrated("llama")
    return LanguageModel(HuggingFaceStack(model), hf=model)


def test_methods_take_turns_on_every_prompt_and_each_leads():
    order = list(schedule(num_trials=3, num_prompts=2, num_methods=3))
    assert len(order) == len(set(order)) == 18
    for at in range(0, 18, 3):
        block = order[at : at + 3]
        assert len({(trial, prompt) for trial, prompt, _ in block}) == 1
        assert {method for *_, method in block} == {0, 1, 2}
    assert {order[at][2] for at in range(0, 18, 3)} == {0, 1, 2}
    assert [trial for trial, *_ in order] == sorted(trial for trial, *_ in order)


def test_the_result_has_exactly_the_promised_keys(lm):
    every = ("ar", "self-speculative", "early-exit", "hf", "hf-early-exit")
    seen = []
    result = bench(
        lm,
        PROMPTS,
        dataclasses.replace(SETTINGS, methods=every),
        announce=lambda card: seen.append("card"),
        watch=lambda what, done, of: seen.append(what),
    )
    assert list(result) == ["card", "methods", "speedup", "predicted_speedup", "per_prompt"]
    assert {"bandwidth_gb_s", "weight_bytes", "roofline_tokens_per_s"} <= set(result["card"])
    assert list(result["methods"]) == list(every)
    wanted = {
        "decode_tokens_per_s",
        "prefill_tokens_per_s",
        "ci95",
        "tokens_per_round",
        "acceptance",
        "acceptance_by_position",
        "peak_bytes",
        "setup_s",
        "equal_to_ar",
        "equal_outputs",
        "of",
        "first_divergences",
    }
    for name, figures in result["methods"].items():
        assert wanted <= set(figures), name
        assert figures["ci95"][0] <= figures["decode_tokens_per_s"] <= figures["ci95"][1]
        if name != "early-exit":
            assert (figures["equal_to_ar"], figures["equal_outputs"], figures["of"]) == (True, 2, 2)
    own = result["methods"]["self-speculative"]
    assert 0 < own["acceptance"] < 1
    assert len(own["acceptance_by_position"]) == 3
    assert own["tokens_per_round"] > 1
    assert result["methods"]["ar"]["tokens_per_round"] == 1
    assert result["methods"]["ar"]["roofline_share"] > 0
    assert set(result["speedup"]) == {
        *(f"{name}/ar" for name in every[1:]),
        "ar/hf",
        "self-speculative/hf",
        "self-speculative/hf-early-exit",
        "hf-early-exit/hf",
    }
    assert all(set(ratio) == {"median", "ci95"} for ratio in result["speedup"].values())
    assert result["predicted_speedup"] > 0
    assert [line["task"] for line in result["per_prompt"]] == ["code", None]
    assert set(result["per_prompt"][0]["hf"]) == {"decode_tokens_per_s", "acceptance", "equal_to_ar"}
    assert seen[0] == "card"
    assert seen.index("equality: hf-early-exit") < seen.index("timing: ar"), (
        "nothing is timed before equality"
    )
    json.dumps(result)


def test_plain_decoding_alone_has_no_prediction(lm):
    result = bench(lm, PROMPTS[:1], dataclasses.replace(SETTINGS, methods=("ar",), trials=1))
    assert (result["speedup"], result["predicted_speedup"]) == ({}, None)


def test_a_request_that_samples_has_no_simulated_acceptance():
    with pytest.raises(UserError, match="plain greedy drafts only"):
        Request([5], 4, 2, 3, processing=Processing(Sampling(temperature=1.0)), simulated=0.5)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_simulated_acceptance_is_met_and_all_work_is_real(lm, share):
    """Four binomial standard deviations, as if a round's drafts were one: they stop together."""
    stack = lm.stack
    rounds = []
    for seed in range(3):
        stack.counters.reset()
        options = {"mode": "self-speculative", "exit_layer": 2, "draft_length": 4, "draft_vocab": "off"}
        done = lm.generate(
            [5, 9], **options, max_new_tokens=200, eos_token_id=[], seed=seed, simulate_acceptance=share
        )
        decode = [r for r in done.rounds if r.source != "prefill"]
        drafts = sum(len(r.draft) for r in decode)
        assert stack.counters.head_rows == {tiny.VOCAB: 1 + drafts + drafts + len(decode)}
        assert stack.counters.layer_tokens == L * (2 + drafts + len(decode))
        assert sum(stack.counters.runs.values()) == 1 + drafts + len(decode) + len(decode)
        rounds += [r for r in decode if len(r.draft) == 4]
    acceptance = sum(r.accepted for r in rounds) / (4 * len(rounds))
    assert abs(acceptance - share) < 4 * (share * (1 - share) / len(rounds)) ** 0.5


def test_a_simulated_output_continues_with_the_targets_own_token_after_the_kept_drafts(lm):
    options = {"mode": "self-speculative", "exit_layer": 2, "draft_length": 3, "max_new_tokens": 20}
    done = lm.generate([5, 9], **options, eos_token_id=[], simulate_acceptance=0.6)
    for round in done.rounds[1:-1]:
        assert round.tokens[:-1] == round.draft[: round.accepted]
        assert len(round.tokens) == round.accepted + 1
    nothing = lm.generate([5, 9], **options, eos_token_id=[], simulate_acceptance=0.0)
    assert nothing.tokens == lm.generate([5, 9], mode="ar", max_new_tokens=20, eos_token_id=[]).tokens
    everything = lm.generate([5, 9], **options, eos_token_id=[], simulate_acceptance=1.0)
    assert everything.stats["acceptance"] == 1.0


def test_a_simulated_result_is_labelled_and_claims_no_equality(lm):
    result = bench(lm, PROMPTS, dataclasses.replace(SETTINGS, simulate_acceptance=0.7))
    own = result["methods"]["self-speculative"]
    assert own["simulated"] == 0.7
    assert (own["equal_to_ar"], own["equal_outputs"], own["first_divergences"]) == (None, None, None)
    assert all(line["self-speculative"]["equal_to_ar"] is None for line in result["per_prompt"])
    assert "simulated" not in result["methods"]["ar"]


@dataclasses.dataclass
class Pass:
    """What `require_equality` looks at."""

    method: object
    runs: list


def test_a_difference_is_an_error_where_arithmetic_is_exact_and_counted_in_16_bit():
    named = {name: type("M", (), {"name": name}) for name in ("ar", "self-speculative", "early-exit")}
    plain = Pass(named["ar"], [Run([1, 2, 3]), Run([4, 5, 6])])
    other = [Run([1, 2, 3]), Run([4, 9, 6])]
    assert divergences(plain.runs, other) == [{"prompt": 1, "position": 1}]
    require_equality(torch.float32, False, [plain, Pass(named["self-speculative"], plain.runs)])
    require_equality(torch.float32, False, [plain, Pass(named["early-exit"], other)])
    require_equality(torch.bfloat16, False, [plain, Pass(named["self-speculative"], other)])
    with pytest.raises(NotLossless, match=r"1 of 2 .* prompt 2 first at token 1"):
        require_equality(torch.float64, False, [plain, Pass(named["self-speculative"], other)])
    with pytest.raises(NotLossless, match="differ in bfloat16"):  # a row-exact stack promises it there too
        require_equality(torch.bfloat16, True, [plain, Pass(named["self-speculative"], other)])


def test_acceptance_by_position_counts_only_what_was_judged_there():
    def round(draft, accepted, tokens, reason=None):
        return Round(0, tokens, draft, accepted, 2, 3, "self-speculative", 0, 0.0, 0, finish_reason=reason)

    rounds = [
        round([1, 2, 3], 3, [1, 2, 3, 4]),
        round([1, 2, 3], 1, [1, 9]),
        round([1, 2, 3], 1, [1], "length"),  # cut off after its first draft: the others were not judged
    ]
    assert by_position(rounds, 4) == [1.0, 0.5, 0.5, None]


def test_the_automatic_draft_vocabulary_is_a_candidate_or_the_whole_head(lm, monkeypatch):
    monkeypatch.setattr(draft_sizes, "DRAFT_VOCABULARIES", (4, 16, 1024))
    tried = Counter()
    original = draft_sizes.head_times
    monkeypatch.setattr(
        draft_sizes, "head_times", lambda table, heads: tried.update(heads) or original(table, heads)
    )
    result = bench(lm, PROMPTS, dataclasses.replace(SETTINGS, draft_vocab="auto", trials=1))
    assert set(tried) == {4, 16, tiny.VOCAB}
    assert result["methods"]["self-speculative"]["draft_vocab"] in (4, 16, "off")
    assert result["methods"]["self-speculative"]["equal_to_ar"] is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 1}, "at least two tokens"),
        ({"trials": 0}, "one trial"),
        ({"max_new_tokens": tiny.CONTEXT}, "passes the context"),
        ({"exit_layer": L}, "out of range"),
        ({"simulate_acceptance": 1.5}, "from 0 to 1"),
        ({"simulate_acceptance": 0.5, "methods": ("ar",)}, "self-speculation only"),
        ({"simulate_acceptance": 0.5, "draft_length": 0}, "nothing is drafted"),
        ({"policy": "dynamic"}, "unknown policy"),
        ({"draft_vocab": 0}, "the model has 64"),
        ({"draft_length": 0, "methods": ("ar", "hf-early-exit")}, "at least one token"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(lm, changes, message):
    lm.stack.counters.reset()
    with pytest.raises(UserError, match=message):
        bench(lm, PROMPTS, dataclasses.replace(SETTINGS, **changes))
    assert lm.stack.counters.layer_tokens == 0


def test_no_prompts_are_an_error(lm):
    with pytest.raises(UserError, match="no prompts"):
        bench(lm, [], SETTINGS)
