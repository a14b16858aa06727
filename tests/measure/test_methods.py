"""The compared methods: one counting rule, the settings Hugging Face needs, its config left as it was."""

import itertools

import pytest

import tiny
from layerskip.decode.language_model import LanguageModel
from layerskip.errors import UserError
from layerskip.measure.speed.methods import (
    Run,
    assisting,
    hugging_face,
    hugging_face_model,
    ours,
    parsed,
)
from layerskip.model.huggingface import HuggingFaceStack

PROMPT = [5, 9, 11, 3]


@pytest.fixture(scope="module")
def lm():
    model = tiny.calibrated("llama")
    return LanguageModel(HuggingFaceStack(model), hf=model)


def ticking():
    """A clock that moves one second each time it is read."""
    return itertools.count().__next__


def test_tokens_after_the_first_arrival_are_divided_by_the_seconds_after_it():
    run = Run([1, 2, 3, 4, 5, 6], [(2.0, 1), (3.0, 3), (4.0, 2)])
    assert (run.prefill_s, run.decode_tokens) == (2.0, 5)
    assert run.decode_tokens_per_s == 2.5
    assert run.tokens_per_round == 2.5


def test_all_methods_are_counted_by_the_same_rule_on_the_same_clock(lm):
    """With a clock that ticks once per arrival, the seconds are the number of arrivals."""
    methods = [
        ours(lm, "ar", 1, ticking()),
        ours(lm, "self-speculative", 1, ticking(), exit_layer=2, draft_length=3),
        hugging_face(lm.hf, clock=ticking()),
        hugging_face(lm.hf, 2, 3, clock=ticking()),
    ]
    runs = {method.name: method.decode(0, PROMPT, 24) for method in methods}
    assert list(runs) == ["ar", "self-speculative", "hf", "hf-early-exit"]
    plain = runs["ar"]
    for run in runs.values():
        assert run.tokens == plain.tokens
        assert [at for at, _ in run.arrivals] == list(range(1, len(run.arrivals) + 1))
        assert sum(count for _, count in run.arrivals) == 24
    assert plain.decode_tokens_per_s == runs["hf"].decode_tokens_per_s == 1.0
    assert runs["self-speculative"].decode_tokens_per_s > 1.2
    assert runs["hf-early-exit"].decode_tokens_per_s > 1.2
    assert max(count for _, count in runs["hf-early-exit"].arrivals) <= 3 + 1


def test_the_assistant_is_set_for_the_call_and_everything_is_put_back(lm):
    config, layers = lm.hf.generation_config, lm.hf.config.num_hidden_layers
    before = config.to_dict()

    def interrupted():
        with assisting(lm.hf, 7):
            assert (config.num_assistant_tokens, config.num_assistant_tokens_schedule) == (7, "constant")
            lm.hf.config.num_hidden_layers = 2  # what assisted decoding does, and an exception leaves behind
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert config.to_dict() == before
    assert lm.hf.config.num_hidden_layers == layers


def test_a_second_model_is_loaded_only_for_another_dtype(lm, folder):
    import torch

    import layerskip

    assert hugging_face_model(lm, torch.float32) is lm.hf
    with pytest.raises(UserError, match="no folder"):
        hugging_face_model(lm, torch.bfloat16)
    loaded = layerskip.load(folder, device="cpu")
    assert hugging_face_model(loaded, torch.bfloat16).dtype == torch.bfloat16


def test_methods_are_named_plain_decoding_is_always_among_them(lm):
    assert parsed("hf, self-speculative,hf") == ["ar", "hf", "self-speculative"]
    with pytest.raises(UserError, match="did you mean 'self-speculative'"):
        parsed("selfspeculative")
    with pytest.raises(UserError, match="economize cannot be measured"):
        parsed("ar,economize")
