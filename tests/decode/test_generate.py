"""The Python face: `layerskip.generate` and `LanguageModel`, in any form of prompt, one or many."""

import numpy as np
import pytest
import torch

import layerskip
import tiny
from layerskip import LanguageModel, UserError
from layerskip.decode.load import stack_of
from layerskip.decode.text import final_text

L, NEW = tiny.NUM_LAYERS, 16
SPECULATIVE = {"mode": "self-speculative", "exit_layer": 2, "draft_length": 3}
MESSAGES = [{"role": "user", "content": "hello"}]
KEYS = [
    "mode",
    "drafter",
    "exit_layer",
    "draft_length",
    "policy",
    "prompt_tokens",
    "new_tokens",
    "prefill_s",
    "decode_s",
]
KEYS += [
    "decode_tokens_per_s",
    "rounds",
    "plain_rounds",
    "by_source",
    "drafted",
    "accepted",
    "acceptance",
    "tokens_per_round",
    "layer_passes",
    "seed",
]
pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")


@pytest.fixture(scope="module")
def model():
    return tiny.calibrated("llama")


@pytest.fixture(scope="module")
def texts():
    model, tokenizer = tiny.speaking()
    return LanguageModel(stack_of(model), tokenizer, hf=model)


def test_generate_takes_a_model_in_memory_and_any_form_of_prompt(texts):
    lm, tokenizer = texts, texts.tokenizer
    ids = tokenizer.encode("hello")
    alone = layerskip.generate(lm.hf, ids, max_new_tokens=NEW, **SPECULATIVE)
    assert (
        alone.tokens
        == lm.hf.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, 5:].tolist()
    )
    assert (alone.text, alone.finish_reason) == ("", "length")
    for prompt in ("hello", ids, torch.tensor(ids), np.array(ids)):
        got = layerskip.generate(lm.hf, prompt, tokenizer=tokenizer, max_new_tokens=NEW, **SPECULATIVE)
        assert got.tokens == alone.tokens
        assert got.text == final_text(tokenizer, got.tokens)
        assert [token for round in got.rounds for token in round.tokens] == got.tokens
    chats = [(MESSAGES, None), ("hello", True), ("user: hello<|im_end|>assistant: ", None)]
    wrapped = [lm.generate(prompt, chat=chat, max_new_tokens=NEW) for prompt, chat in chats]
    assert wrapped[0].tokens == wrapped[1].tokens == wrapped[2].tokens != alone.tokens


def test_a_list_comes_back_in_input_order_whatever_the_batch_size(texts):
    prompts = ["hello", MESSAGES, "a", [5, 9, 20], "how are you?", "x" * 30]
    for sampling in ({}, {"temperature": 0.9, "top_p": 0.9, "seed": 3}):
        alone = texts.generate(prompts, max_new_tokens=12, batch_size=1, **SPECULATIVE, **sampling)
        for batch_size in (2, 50):
            batch = texts.generate(
                prompts, max_new_tokens=12, batch_size=batch_size, **SPECULATIVE, **sampling
            )
            assert [g.tokens for g in batch] == [g.tokens for g in alone]
    assert [g.stats["prompt_tokens"] for g in alone] == [5, len(texts.encode(MESSAGES)), 1, 3, 12, 30]
    assert texts.generate(["hello"], max_new_tokens=2)[0].stats["new_tokens"] == 2
    rows = texts.generate(torch.tensor([[5, 9], [7, 8]]), max_new_tokens=3)
    assert [len(g.tokens) for g in rows] == [3, 3]


def test_statistics_have_exactly_these_keys_and_count_the_work_of_the_method(texts):
    speculative = texts.generate("hello", max_new_tokens=NEW, **SPECULATIVE)
    stats = speculative.stats
    rounds = [round for round in speculative.rounds if round.source == "exit"]
    assert list(stats) == KEYS
    assert (stats["mode"], stats["exit_layer"], stats["draft_length"]) == ("self-speculative", 2, 3)
    assert (stats["prompt_tokens"], stats["new_tokens"], stats["rounds"]) == (5, NEW, len(rounds))
    assert stats["layer_passes"] == sum((len(round.draft) + 1) * L for round in rounds)
    assert stats["accepted"] == sum(round.accepted for round in rounds) == NEW - 1 - len(rounds)
    assert stats["acceptance"] == stats["accepted"] / stats["drafted"]
    assert stats["tokens_per_round"] == (NEW - 1) / len(rounds)
    assert stats["decode_tokens_per_s"] == (NEW - 1) / stats["decode_s"]
    assert stats["prefill_s"] > 0
    ar = texts.generate("hello", max_new_tokens=NEW, mode="ar").stats
    assert list(ar) == KEYS
    assert (ar["exit_layer"], ar["draft_length"], ar["rounds"]) == (L, 0, NEW - 1)
    assert (ar["drafted"], ar["acceptance"], ar["layer_passes"]) == (0, None, L * (NEW - 1))
    early = texts.generate("hello", max_new_tokens=NEW, mode="early-exit", exit_layer=2).stats
    assert (early["exit_layer"], early["draft_length"], early["layer_passes"]) == (2, 0, 2 * early["rounds"])
    one = texts.generate("hello", max_new_tokens=1, **SPECULATIVE).stats
    assert (one["new_tokens"], one["rounds"], one["tokens_per_round"], one["decode_s"]) == (1, 0, None, 0)


def test_the_mode_follows_what_was_chosen(texts):
    modes = [{}, {"exit_layer": 1}, {"draft_length": 2}, {"mode": "ar", "exit_layer": 1}]
    chosen = [texts.generate("a", max_new_tokens=1, **options).stats["mode"] for options in modes]
    assert chosen == ["self-speculative", "self-speculative", "self-speculative", "ar"]


def test_a_sampled_call_without_a_seed_follows_torchs_global_one(texts):
    def draw():
        return texts.generate("hello", temperature=1.0, max_new_tokens=12).tokens

    torch.manual_seed(4)
    first, second = draw(), draw()
    torch.manual_seed(4)
    assert [draw(), draw()] == [first, second]
    assert first != second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 5}, "max_new_tokens"),
        ({"mode": "self-speculate"}, "self-speculative"),
        ({"exit_layer": 0}, "out of range"),
        ({"exit_layer": L}, "out of range"),
        ({"draft_length": -1}, "from 0 to 31"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"stop": [""]}, "stop string is empty"),
        ({"policy": "dynamic"}, "policy"),
        ({"policy": "fixed", "confidence": 0.5}, "fixed policy"),
        ({"confidence": 0.0}, "above 0"),
        ({"confidence": "high"}, "number"),
        ({"policy": "adaptive", "simulate_acceptance": 0.5}, "simulated"),
        ({"draft_vocab": "many"}, "a whole number, auto or off"),
        ({"draft_vocab": 10_000, "exit_layer": 2}, "draft vocabulary"),
    ],
)
def test_bad_options_are_user_errors(texts, options, message):
    with pytest.raises(UserError, match=message):
        texts.generate("hello", **options)


@pytest.mark.parametrize("prompt", [[], "", [[]], "x" * 300, [300], [-1], None, [{"role": "user"}]])
def test_bad_prompts_are_user_errors(model, texts, prompt):
    lm = LanguageModel(stack_of(model)) if prompt == "" else texts
    with pytest.raises(UserError):
        lm.generate(prompt)
