"""Policies through the public face: chosen as asked, refused where nothing is drafted, and always lossless."""

import dataclasses
import functools

import pytest
import torch
import transformers

import tiny
from conftest import FULL
from layerskip.checkpoint.facts import Facts
from layerskip.decode.control import TRAINED
from layerskip.decode.language_model import LanguageModel
from layerskip.decode.options import DEFAULT_CONFIDENCE, Options
from layerskip.errors import UserError
from pairwise import matrix

pytestmark = pytest.mark.matrix
L = tiny.NUM_LAYERS
POLICIES = {
    "fixed, guarded": {"policy": "fixed", "guard": True},
    "confidence": {"confidence": 0.5},
    "confidence, unguarded": {"policy": "confidence", "confidence": 0.9, "guard": False},
    "adaptive": {"policy": "adaptive"},
    "by tokens alone": {"policy": "fixed"},
    "adaptive, exits alone": {"policy": "adaptive", "drafter": "exit"},
    "copies": {"drafter": "lookup"},
    "copies by tokens alone": {"drafter": "lookup", "policy": "fixed"},
    "adaptive, confident, unguarded": {"policy": "adaptive", "confidence": 0.5, "guard": False},
}
PROMPTS = [[5, 9, 20, 33], list(range(7, 18)), [40]]


FAMILIES = ["llama", "llama+native", "gemma2"]
NEW = 40 if FULL else 24


@functools.cache
def model_of(family):
    made = LanguageModel(tiny.stack(family), hf=tiny.calibrated(family.partition("+")[0]))
    made.facts = Facts(exits=(1, 2, 3), exit_layer=2, draft_length=3)
    return made


@pytest.fixture(params=FAMILIES)
def lm(request):
    return model_of(request.param)


@pytest.mark.parametrize(("family", "name", "draft_vocab"), matrix(FAMILIES, POLICIES, ("off", 24)))
def test_every_policy_decodes_greedily_as_plain_decoding_does(family, name, draft_vocab):
    lm = model_of(family)
    how = {**POLICIES[name], "mode": "self-speculative", "draft_vocab": draft_vocab}
    plain = lm.generate(PROMPTS, mode="ar", max_new_tokens=NEW)
    for _ in range(2):  # what the controller learnt is kept
        for prompts, wanted in ((PROMPTS, plain), (PROMPTS[:1], plain[:1])):
            done = lm.generate(prompts, max_new_tokens=NEW, **how)
            assert [one.tokens for one in done] == [one.tokens for one in wanted]
    eos = plain[1].tokens[20]
    for limits in (
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"eos_token_id": eos, "max_new_tokens": NEW},
    ):
        wanted = lm.generate(PROMPTS, mode="ar", **limits)
        done = lm.generate(PROMPTS, **limits, **how)
        assert [one.tokens for one in done] == [one.tokens for one in wanted]
        assert [one.finish_reason for one in done] == [one.finish_reason for one in wanted]


@pytest.mark.parametrize("name", POLICIES)
def test_processors_penalties_and_log_probabilities_see_the_right_prefix_under_every_policy(lm, name):
    ngrams = transformers.NoRepeatNGramLogitsProcessor(2)
    common = {"repetition_penalty": 1.3, "logits_processor": [ngrams], "logprobs": True, "max_new_tokens": 30}
    plain = lm.generate(PROMPTS, mode="ar", **common)
    done = lm.generate(PROMPTS, mode="self-speculative", **POLICIES[name], **common)
    assert [one.tokens for one in done] == [one.tokens for one in plain]
    for one, wanted in zip(done, plain, strict=True):
        found, told = (torch.tensor([x for r in g.rounds for x in r.logprobs or ()]) for g in (one, wanted))
        assert torch.allclose(found, told, atol=1e-4)


@pytest.mark.parametrize("name", POLICIES)
def test_stop_strings_and_conversations_work_under_every_policy(name):
    model = tiny.random_model("llama", num_hidden_layers=8, vocab_size=260)
    lm = LanguageModel(tiny.stack("llama", model=model), tiny.tokenizer(), hf=model)
    plain = lm.generate("hello", mode="ar", max_new_tokens=60)
    stop = plain.text[20:22]
    wanted = lm.generate("hello", mode="ar", max_new_tokens=60, stop=stop)
    done = lm.generate("hello", max_new_tokens=60, stop=stop, **POLICIES[name])
    assert (done.text, done.finish_reason) == (wanted.text, "stop")
    talks = [lm.chat(mode="ar", max_new_tokens=12), lm.chat(max_new_tokens=12, **POLICIES[name])]
    for message in ("hi", "and then?"):
        answers = [[t for r in talk.send(message) for t in r.tokens] for talk in talks]
        assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("facts", "given", "expected"),
    [
        ({}, {}, ("lookup", "adaptive", 0.0, True)),
        ({}, {"policy": "adaptive"}, ("lookup", "adaptive", 0.0, True)),
        ({}, {"confidence": 0.3}, ("exit", "confidence", 0.3, True)),
        ({}, {"guard": True}, ("lookup", "adaptive", 0.0, True)),
        ({}, {"policy": "fixed"}, ("lookup", "fixed", 0.0, True)),
        ({}, {"temperature": 0.8}, ("lookup", "fixed", 0.0, True)),
        ({}, {"drafter": "off"}, ("off", "fixed", 0.0, False)),
        ({"drafter": "off"}, {}, ("off", "fixed", 0.0, False)),
        ({"drafter": "off"}, {"drafter": "lookup"}, ("lookup", "adaptive", 0.0, True)),
        ({"exit_layer": 2, "exits": (2,)}, {}, ("auto", "fixed", 0.0, True)),
        ({"exit_layer": 2, "exits": (2,)}, {"drafter": "lookup"}, ("lookup", "adaptive", 0.0, True)),
        ({}, {"drafter": "auto", "exit_layer": 2}, ("auto", "fixed", 0.0, True)),
        (
            {"exit_layer": 2, "exits": (2,), "policy": "adaptive"},
            {},
            ("auto", "adaptive", DEFAULT_CONFIDENCE, True),
        ),
        (
            {"exit_layer": 2, "exits": (2,), "policy": "adaptive"},
            {"exit_layer": 1},
            ("exit", "fixed", 0.0, False),
        ),
        (
            {"exit_layer": 2, "exits": (2,), "policy": "fixed"},
            {"confidence": 0.5},
            ("exit", "confidence", 0.5, True),
        ),
        (
            {"exit_layer": 2, "exits": (2,), "policy": "confidence", "confidence": 0.7},
            {},
            ("auto", "confidence", 0.7, True),
        ),
        (
            {"exit_layer": 2, "exits": (2,), "policy": "adaptive"},
            {"temperature": 0.8},
            ("auto", "fixed", 0.0, True),
        ),
        (
            {"exit_layer": 2, "exits": (2,), "policy": "adaptive"},
            {"policy": "confidence", "guard": False},
            ("auto", "confidence", DEFAULT_CONFIDENCE, False),
        ),
        (
            {"exit_layer": 2, "exits": (2,), "mode": "ar", "policy": "adaptive"},
            {},
            ("lookup", "adaptive", 0.0, True),
        ),
    ],
)
def test_a_plan_follows_what_is_given_then_the_checkpoint(facts, given, expected):
    plan = Options.parse(given).plan(Facts(**facts), L)
    assert (plan.drafter, plan.policy, plan.confidence, plan.guard) == expected
    again = Options.parse(plan.keywords).plan(Facts(drafter="exit", exit_layer=3), L)
    assert again == plan, "what a plan says can be given back: `bench` does"


@pytest.mark.parametrize(
    "nothing", [{"mode": "ar"}, {"mode": "early-exit", "exit_layer": 2}, {"draft_length": 0}]
)
@pytest.mark.parametrize("how", [{"policy": "adaptive"}, {"confidence": 0.4}, {"guard": True}])
def test_a_policy_where_nothing_is_drafted_is_refused(nothing, how):
    with pytest.raises(UserError, match="nothing is drafted"):
        Options.parse({**nothing, **how}).plan(Facts(), L)


def test_a_controller_is_kept_per_plan_and_draft_head(lm):
    lm.controllers.clear()
    how = {"mode": "self-speculative", "policy": "adaptive", "max_new_tokens": 8}
    for more in ({}, {}, {"draft_vocab": 24}, {"exit_layer": 1}):
        lm.generate(PROMPTS[0], **how, **more)
    assert len(lm.controllers) == 3
    first = next(iter(lm.controllers.values()))
    assert {arm.exit_layer for arm in first.arms} == set(lm.facts.exits)
    assert first.prior == TRAINED, "these exits are trained"
    assert dataclasses.asdict(first.plain)["exit_layer"] == L
