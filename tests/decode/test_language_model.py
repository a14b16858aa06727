"""The Python face refuses what a newcomer would try, and says what to do instead."""

from dataclasses import fields
from inspect import signature
from typing import get_type_hints

import pytest

import layerskip
import tiny
from layerskip.decode.language_model import LanguageModel
from layerskip.decode.options import Keywords, Options
from layerskip.errors import UserError
from layerskip.model.huggingface import HuggingFaceStack


@pytest.fixture(scope="module")
def lm():
    model = tiny.random_model("llama", vocab_size=260)
    return LanguageModel(HuggingFaceStack(model), tiny.tokenizer(), hf=model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_layer": "six"}, "exit_layer is 'six'"),
        ({"draft_length": 2.5}, "draft_length is 2.5"),
        ({"max_new_tokens": "3"}, "max_new_tokens is '3'"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"draft_vocab": True}, "draft_vocab is True"),
        ({"stop": None}, "stop is None"),
        ({"simulate_acceptance": "most"}, "simulate_acceptance is 'most'"),
        ({"simulate_acceptance": 1.1}, "from 0 to 1"),
        ({"simulate_acceptance": 0.5, "mode": "ar"}, "greedy self-speculation only"),
        ({"simulate_acceptance": 0.5, "drafter": "auto"}, "for exits only"),
        ({"drafter": "lookup", "mode": "ar"}, "mode ar drafts nothing"),
        ({"drafter": "off", "mode": "self-speculative"}, "exclude each other"),
        ({"drafter": "lookup", "exit_layer": 2}, "no exit drafts here"),
        ({"drafter": "exit", "match_min": 2}, "nothing is copied here"),
        ({"drafter": "look-up"}, "unknown drafter 'look-up'"),
        ({"match_min": 0}, "at least 1|from 1"),
        ({"simulate_acceptance": 0.5, "exit_layer": 2, "temperature": 1.0}, "greedy self-speculation only"),
        ({"simulate_acceptance": 0.5, "exit_layer": 2, "draft_length": 0}, "nothing is drafted"),
        ({"max_tokens": 4}, "unknown option 'max_tokens'"),
    ],
)
def test_an_option_of_the_wrong_kind_is_a_user_error(lm, options, message):
    with pytest.raises(UserError, match=message):
        lm.generate("hello", **options)


def test_keywords_that_editors_complete_are_the_options_with_their_types():
    """generate, each, stream and chat took **keywords: Any, of which an editor knows nothing."""
    hints = get_type_hints(Options)
    assert get_type_hints(Keywords) == {field.name: hints[field.name] for field in fields(Options)}
    for method in ("generate", "each", "stream", "stream_text", "chat"):
        assert (
            signature(getattr(LanguageModel, method)).parameters["keywords"].annotation == "Unpack[Keywords]"
        )
    assert signature(layerskip.generate).parameters["keywords"].annotation == "Unpack[Keywords]"


@pytest.mark.parametrize("stop", [(), "e", ("zz", " a")])
def test_streamed_pieces_are_the_text_of_generate(lm, stop):
    keywords = {"max_new_tokens": 24, "exit_layer": 2, "draft_length": 3, "stop": stop}
    found = list(lm.stream_text("hello", **keywords))
    assert "".join(found) == lm.generate("hello", **keywords).text
    assert all(found)


def test_a_stop_from_a_generator_is_kept(lm):
    """It was read once, by the check, and then nothing stopped."""
    options = Options(stop=(letter for letter in "ab"), logits_processor=iter([]))
    assert options.stops == options.stops == ("a", "b")
    assert options.processing is not None
    with pytest.raises(UserError, match="stop is"):
        Options(stop=(letter for letter in [1, 2]))


def test_load_sets_threads_and_warns_of_busy_cores(folder, monkeypatch, recwarn):
    """From Python nothing said why decoding was ten times slower, nor what to do."""
    found = []
    monkeypatch.setattr("torch.set_num_threads", found.append)
    layerskip.load(folder, dtype="float32")
    assert (found, list(recwarn)) == ([], [])
    layerskip.load(folder, dtype="float32", threads=1)
    assert found == [1]
    with pytest.raises(UserError, match="threads must be a whole number, at least 1"):
        layerskip.load(folder, threads=0)
    monkeypatch.setattr("layerskip.model.threads.busy_cores", lambda: 1.0)
    with pytest.warns(UserWarning, match="others keep 1.0 cores busy"):
        layerskip.load(folder, dtype="float32", stack="hf")


def test_load_without_progress_shows_no_bar_of_transformers(folder, monkeypatch):
    from transformers.utils import logging

    seen = []
    original = layerskip.decode.load.models.load
    monkeypatch.setattr(
        "layerskip.model.load.load",
        lambda *a, **k: seen.append(logging.is_progress_bar_enabled()) or original(*a, **k),
    )
    logging.enable_progress_bar()
    try:
        for progress in (True, False):
            layerskip.load(folder, dtype="float32", progress=progress)
            assert logging.is_progress_bar_enabled()
    finally:
        logging.disable_progress_bar()
    assert seen == [True, False]


def test_streaming_text_reads_its_options_once(lm, monkeypatch):
    parse, parsed = Options.parse, []
    monkeypatch.setattr(Options, "parse", lambda keywords: parsed.append(keywords) or parse(keywords))
    list(lm.stream_text("hello", max_new_tokens=2))
    assert len(parsed) == 1


def test_text_is_streamed_as_it_comes_and_needs_a_tokenizer(lm):
    assert len(list(lm.stream_text("hello", max_new_tokens=24, mode="ar"))) > 1
    bare = LanguageModel(lm.stack, None)
    with pytest.raises(UserError, match="no tokenizer, so there is no text"):
        bare.stream_text([3, 4, 5])


def test_a_model_and_a_name_are_told_apart(lm):
    with pytest.raises(UserError, match="expected a Hugging Face model"):
        layerskip.generate("smollm2-135m", "hello")
    with pytest.raises(UserError, match="load takes a name"):
        layerskip.load(lm.hf)
    with pytest.raises(UserError, match="cannot read a prompt of type int"):
        lm.generate(123)


def test_a_folder_without_tokenizer_files_has_no_tokenizer(tmp_path):
    """transformers makes up an empty tokenizer there, and every text encodes to nothing."""
    tiny.random_model("qwen2").save_pretrained(tmp_path)
    lm = layerskip.load(tmp_path, device="cpu")
    assert lm.tokenizer is None
    assert len(lm.generate([3, 4], max_new_tokens=2).tokens) == 2
    with pytest.raises(UserError, match="no tokenizer"):
        lm.generate("hello", max_new_tokens=2)


def test_a_stop_that_names_a_special_token_ends_by_its_id(lm):
    plain = lm.generate([5, 6], max_new_tokens=40, eos_token_id=[]).tokens
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(plain[3])]})
    stop = tokenizer.convert_ids_to_tokens(plain[3])
    special = LanguageModel(lm.stack, tokenizer, hf=lm.hf)
    wanted = plain[: plain.index(plain[3]) + 1]
    assert special.generate([5, 6], max_new_tokens=40, eos_token_id=[], stop=stop).tokens == wanted


def test_no_prompts_give_no_results_and_a_context_must_be_positive(lm):
    assert list(lm.each([])) == []
    with pytest.raises(UserError, match="context is -5"):
        lm.chat(context=-5)


def test_a_negative_token_is_named(lm):
    with pytest.raises(UserError, match="token -1"):
        lm.generate([3, -1], max_new_tokens=2)


def test_an_engine_kept_for_its_graphs_is_lent_to_one_stream_at_a_time(monkeypatch):
    """On CUDA graphs are captured on an engine's cache; two streams that start together must not share it."""
    own = LanguageModel(tiny.stack("llama"), hf=tiny.calibrated("llama"))
    own.engines.keep = True
    alone = [own.generate(prompt, max_new_tokens=6).tokens for prompt in ([5, 6], [7, 8])]
    kept = own.engines.last
    assert kept is not None
    assert own.generate([9, 9], max_new_tokens=6).tokens
    assert own.engines.last is kept, "the same engine served again"
    streams = [own.stream(prompt, max_new_tokens=6) for prompt in ([5, 6], [7, 8])]
    rounds = list(zip(*streams, strict=True))
    assert [[t for r in own_rounds for t in r.tokens] for own_rounds in zip(*rounds, strict=True)] == alone
