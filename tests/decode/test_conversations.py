"""Streams and conversations: what is abandoned, reset, too long or closed leaves nothing behind."""

import gc
import weakref

import pytest
import torch
from transformers import LogitsProcessor

import tiny
from layerskip import LanguageModel, UserError
from layerskip.decode import pool
from layerskip.decode.load import stack_of

L, NEW = tiny.NUM_LAYERS, 16
pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
SPECULATIVE = {"mode": "self-speculative", "exit_layer": 2, "draft_length": 3}
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def texts():
    model, tokenizer = tiny.speaking()
    return LanguageModel(stack_of(model), tokenizer, hf=model)


@pytest.fixture
def engines(monkeypatch):
    """Weak references to all engines that are made."""
    made = []

    class Watched(pool.Engine):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(weakref.ref(self))

    monkeypatch.setattr(pool, "Engine", Watched)
    return made


def test_an_abandoned_stream_leaves_nothing_allocated_and_the_next_call_is_right(texts, engines):
    wanted = texts.generate("hello", max_new_tokens=NEW, **SPECULATIVE)
    stream = texts.stream("hello", max_new_tokens=NEW, **SPECULATIVE)
    taken = [next(stream), next(stream)]
    assert [r.tokens for r in taken] == [r.tokens for r in wanted.rounds[:2]]
    engine = engines[-1]()
    stream.close()
    assert not engine.busy
    assert engine.cache.lengths == [0]
    assert engine.has_room
    del engine, stream
    gc.collect()
    assert [engine() for engine in engines] == [None, None]
    rounds = list(texts.stream("hello", max_new_tokens=NEW, **SPECULATIVE))
    assert [token for round in rounds for token in round.tokens] == wanted.tokens


def test_a_stream_refuses_at_once_and_takes_one_prompt(texts):
    with pytest.raises(UserError, match="out of range"):
        texts.stream("hello", exit_layer=L)  # before the first round is asked for
    with pytest.raises(UserError, match="one prompt"):
        texts.stream(["hello", "you"])


def said(chat, text):
    return [token for round in chat.send(text) for token in round.tokens]


def computed(chat):
    return sum(round.prompt_tokens for round in chat.last.rounds)


@pytest.mark.parametrize("options", [{}, SPECULATIVE, {"mode": "early-exit", "exit_layer": 2}], ids=str)
def test_a_second_turn_reuses_the_cache_and_answers_as_a_fresh_conversation(texts, options):
    chat = texts.chat(system="be brief", max_new_tokens=12, **options)
    turns = [{"role": "system", "content": "be brief"}]
    for number, text in enumerate(["hello", "and you?", "why"]):
        before = len(texts.encode(turns)) - len("assistant: ")
        turns.append({"role": "user", "content": text})
        fresh = texts.generate(turns, max_new_tokens=12, **options)
        assert said(chat, text) == fresh.tokens
        assert chat.last.text == fresh.text
        assert chat.last.stats["prompt_tokens"] == len(texts.encode(turns))
        if number:
            assert computed(chat) < len(texts.encode(turns)) - before + 12 * 3
        turns.append({"role": "assistant", "content": fresh.text})
    assert chat.messages == turns


def test_a_conversation_keeps_states_where_they_are_asked_for(texts):
    chat = texts.chat(max_new_tokens=6, states=True)
    for text in ("hello", "go on"):
        said(chat, text)
        alone = texts.generate(chat.messages[:-1], max_new_tokens=6, states=True)
        torch.testing.assert_close(chat.last.states, alone.states)


def test_an_answer_abandoned_midway_stays_in_the_conversation(texts):
    chat = texts.chat(max_new_tokens=20, **SPECULATIVE)
    answer = chat.send("hello")
    next(answer)
    part = next(answer)
    answer.close()
    assert chat.messages[-1]["content"] == chat.last.text
    assert chat.last.tokens[-len(part.tokens) :] == part.tokens
    turns = [*chat.messages, {"role": "user", "content": "go on"}]
    assert said(chat, "go on") == texts.generate(turns, max_new_tokens=20).tokens
    assert computed(chat) < len(texts.encode(turns))


def test_the_pieces_of_a_turn_are_its_text(texts):
    """A turn came as rounds of token ids only."""
    chat = texts.chat(max_new_tokens=12, stop="q", **SPECULATIVE)
    for text in ("hello", "and you?"):
        found = list(chat.send_text(text))
        assert "".join(found) == chat.last.text
        assert len(found) > 1
    answer = chat.send_text("why")
    part = next(answer)
    answer.close()
    assert chat.last.text.startswith(part)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3


def test_an_answer_abandoned_before_its_first_token_leaves_no_turn(texts):
    chat = texts.chat(max_new_tokens=8)
    answer = chat.send("x" * 100)
    answer.close()  # never started
    assert chat.messages == []
    assert said(chat, "hello") == texts.generate(MESSAGES, max_new_tokens=8).tokens


def test_a_message_sent_while_another_is_answered_is_refused(texts):
    chat = texts.chat(max_new_tokens=20)
    answer = chat.send("hello")
    next(answer)
    with pytest.raises(UserError, match="still generating"):
        next(chat.send("hurry"))
    first = [token for round in answer for token in round.tokens]
    assert first == texts.generate(MESSAGES, max_new_tokens=20).tokens[1:]


def test_a_conversation_that_was_reset_is_a_fresh_one(texts):
    chat = texts.chat(system="be brief", max_new_tokens=8)
    first = said(chat, "hello")
    said(chat, "again")
    chat.reset()
    assert (chat.messages, chat.last) == ([{"role": "system", "content": "be brief"}], None)
    assert said(chat, "hello") == first
    assert computed(chat) == chat.last.stats["prompt_tokens"]


def test_a_turn_that_does_not_fit_is_an_error_and_the_conversation_goes_on(texts):
    chat = texts.chat(context=64, max_new_tokens=8)
    said(chat, "hello")
    before = list(chat.messages)
    with pytest.raises(UserError, match="context is 64"):
        said(chat, "x" * 70)
    assert chat.messages == before
    turns = [*before, {"role": "user", "content": "a"}]
    assert said(chat, "a") == texts.generate(turns, max_new_tokens=8).tokens
    assert computed(chat) < len(texts.encode(turns))


def test_an_answer_that_fills_the_context_ends_there(texts):
    chat = texts.chat(context=40, max_new_tokens=200, **SPECULATIVE)
    said(chat, "hello")
    assert chat.last.finish_reason == "length"
    assert chat.last.stats["prompt_tokens"] + chat.last.stats["new_tokens"] <= 41


def test_a_failing_answer_ends_its_row_and_the_conversation_goes_on(texts):
    """A processor that forbids everything cancels the row: the next turn must start a new one."""

    class ForbidAll(LogitsProcessor):
        on = False

        def __call__(self, input_ids, scores):
            return scores.fill_(-torch.inf) if ForbidAll.on else scores

    chat = texts.chat(max_new_tokens=8, logits_processor=[ForbidAll()])
    said(chat, "hello")
    before, ForbidAll.on = list(chat.messages), True
    with pytest.raises(UserError, match="forbid every token"):
        said(chat, "again")
    assert chat.messages == before
    ForbidAll.on = False
    turns = [*before, {"role": "user", "content": "again"}]
    assert said(chat, "again") == texts.generate(turns, max_new_tokens=8).tokens


def test_a_conversation_grows_its_cache_and_says_the_same(texts, monkeypatch):
    """A chat allocated the whole context of the model: 17 GB for an 8 B Llama with 131k positions."""
    monkeypatch.setattr("layerskip.decode.chat.FIRST", 8)
    monkeypatch.setattr("layerskip.decode.pool.LEAST", 8)
    small, large = texts.chat(max_new_tokens=12), texts.chat(max_new_tokens=12)
    large._engine.grow(texts.stack.context)
    assert small._engine.cache.capacity == 8
    for message in ("hello", "again", "and again"):
        assert said(small, message) == said(large, message)
    assert 8 < small._engine.cache.capacity < texts.stack.context
    assert computed(small) < small.last.stats["prompt_tokens"], "what was cached before it grew is used"


def test_the_engine_of_a_conversation_and_of_custom_generate_serves_later_calls(texts):
    """Both threw away an engine, and on CUDA the graphs captured on it, at every call."""
    texts.engines.keep = True
    try:
        chat = texts.chat(max_new_tokens=4)
        said(chat, "hello")
        engine = chat._engine
        chat.close()
        assert texts.engines.last is engine
        assert not engine.busy
    finally:
        texts.engines.keep, texts.engines.last = False, None


def test_an_answer_of_a_conversation_that_was_reset_does_not_come_back(texts):
    chat = texts.chat(max_new_tokens=6)
    old = chat.send("hello")
    next(old)
    chat.reset()
    said(chat, "again")
    messages = list(chat.messages)
    old.close()
    assert chat.messages == messages


def test_a_closed_conversation_lends_its_engine_once(texts):
    """Closed twice, it was lent to two streams, each of which dropped the other's tokens."""
    texts.engines.keep = True
    try:
        chat = texts.chat(max_new_tokens=4)
        chat.close()
        taken = texts.engines.take(1, 8, None)
        chat.close()
        assert texts.engines.last is not taken
        with pytest.raises(UserError, match="the conversation is closed"):
            next(chat.send("hello"))
    finally:
        texts.engines.keep, texts.engines.last = False, None


def test_the_context_of_a_conversation_holds_where_engines_are_rounded_up(texts):
    texts.engines.keep = True
    try:
        chat = texts.chat(context=41, max_new_tokens=400)
        said(chat, "hello")
        assert chat.last.stats["prompt_tokens"] + chat.last.stats["new_tokens"] <= 42
    finally:
        texts.engines.keep, texts.engines.last = False, None
