"""Spec-Bench's form: what its scripts call and read, counted as they count, and questions answered once."""

import json
from types import SimpleNamespace

import pytest
import torch

import tiny
from layerskip import LanguageModel, UserError
from layerskip.decode.load import stack_of
from layerskip.measure.tasks.spec_bench import Method, answers

pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
NEW = 24
EXIT = {"exit_layer": 2, "draft_length": 3}
WAYS = [{}, EXIT, {"drafter": "lookup"}]


@pytest.fixture(scope="module")
def lm():
    model, tokenizer = tiny.speaking()
    return LanguageModel(stack_of(model), tokenizer, hf=model)


@pytest.fixture
def questions(tmp_path):
    asked = [
        {
            "question_id": 81,
            "category": "writing",
            "turns": ["say abc", "again, but abcabc"],
            "reference": [1],
        },
        {"question_id": 82, "category": "qa", "turns": ["why?"]},
        {"question_id": "x", "category": "rag", "turns": ["abc abc abc"]},
    ]
    file = tmp_path / "question.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in asked))
    return file


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("options", WAYS)
def test_a_method_gives_the_ids_of_plain_decoding_and_step_lengths_that_sum_to_them(lm, options):
    inputs = SimpleNamespace(input_ids=torch.tensor([lm.encode("say abc abc abc")]))
    plain, count, steps, ones = Method(lm, drafter="off")(inputs, None, lm.tokenizer, NEW)
    ids, new, decoding_steps, lengths = Method(lm, **options)(inputs, None, lm.tokenizer, NEW)
    assert ids.tolist() == plain.tolist()
    assert ids[0, : inputs.input_ids.shape[1]].tolist() == inputs.input_ids[0].tolist()
    assert ids.shape == (1, inputs.input_ids.shape[1] + NEW)
    assert (count, steps, ones) == (NEW, NEW, [1] * NEW)
    assert sum(lengths) == new == NEW
    assert len(lengths) == decoding_steps
    assert options != EXIT or decoding_steps < NEW


def test_a_method_stands_in_for_the_model_and_takes_options_at_each_call(lm):
    method = Method(lm, **EXIT)
    assert method.eval() is method
    assert method.training is False
    assert method.config is lm.config
    ids = torch.tensor([lm.encode("say abc")])
    drawn = [method(ids, max_new_tokens=NEW, temperature=1.0, seed=seed)[0].tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(UserError, match="shape"):
        method(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(UserError, match="do_sample"):
        method(ids, do_sample=True)


@pytest.mark.parametrize("options", WAYS)
def test_answers_have_the_texts_of_plain_decoding_turn_by_turn(lm, questions, tmp_path, options):
    ours, plain = (
        answers(lm, questions, tmp_path / f"{name}.jsonl", name, max_new_tokens=NEW, **how)
        for name, how in (("ours", options), ("plain", {"drafter": "off"}))
    )
    assert lines(tmp_path / "ours.jsonl") == ours
    assert [one["question_id"] for one in ours] == [81, 82, "x"]
    assert [one["category"] for one in ours] == ["writing", "qa", "rag"]
    for one, other in zip(ours, plain, strict=True):
        [choice], [beside] = one["choices"], other["choices"]
        assert choice["turns"] == beside["turns"]
        assert choice["new_tokens"] == beside["new_tokens"] == beside["decoding_steps"]
        assert beside["accept_lengths"] == [1] * sum(beside["new_tokens"])
        assert sum(choice["accept_lengths"]) == sum(choice["new_tokens"])
        assert len(choice["accept_lengths"]) == sum(choice["decoding_steps"])
        assert len(choice["wall_time"]) == len(choice["turns"])
        assert min(choice["wall_time"]) > 0


def test_a_later_turn_sees_what_was_said(lm, questions, tmp_path):
    first, *_ = answers(lm, questions, tmp_path / "a.jsonl", "a", max_new_tokens=NEW)
    [choice] = first["choices"]
    one, two = json.loads(questions.read_text().splitlines()[0])["turns"]
    said = [("user", one), ("assistant", choice["turns"][0]), ("user", two)]
    messages = [{"role": role, "content": content} for role, content in said]
    assert lm.generate(messages, drafter="off", max_new_tokens=NEW).text == choice["turns"][1]


def test_questions_that_have_an_answer_are_left_out(lm, questions, tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    whole = answers(lm, questions, file, "a", max_new_tokens=4)
    first, second, _ = file.read_text().splitlines(keepends=True)
    file.write_text(first + second[:40])  # killed while the second was written
    opened, chat = [], lm.chat
    monkeypatch.setattr(lm, "chat", lambda **options: opened.append(options) or chat(**options))
    again = answers(lm, questions, file, "a", max_new_tokens=4)
    assert len(opened) == 2
    assert again[0] == whole[0]
    assert [one["choices"][0]["turns"] for one in again] == [one["choices"][0]["turns"] for one in whole]
    assert lines(file) == again == answers(lm, questions, file, "a", max_new_tokens=4)
    assert len(opened) == 2


def test_answers_of_another_method_or_other_options_are_not_mixed(lm, questions, tmp_path):
    file = tmp_path / "a.jsonl"
    answers(lm, questions, file, "a", max_new_tokens=2)
    for name, options in (("b", {"max_new_tokens": 2}), ("a", {"max_new_tokens": 3})):
        with pytest.raises(UserError, match="another method or other options"):
            answers(lm, questions, file, name, **options)


def test_what_cannot_be_read_or_answered_is_named(lm, questions, tmp_path):
    with pytest.raises(UserError, match=r"a.txt is no file of answers"):
        answers(lm, questions, tmp_path / "a.txt", "a")
    (tmp_path / "bad.jsonl").write_text('{"question_id": 1, "category": "qa", "turn": ["why?"]}\n')
    with pytest.raises(UserError, match=r"(?s)bad.jsonl, line 1: turns.*did you mean 'turns'"):
        answers(lm, tmp_path / "bad.jsonl", tmp_path / "a.jsonl", "a")
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"question_id": 7, "category": "qa", "turns": ["a" * 999]}) + "\n"
    )
    with pytest.raises(UserError, match="question 7: the prompt has"):
        answers(lm, tmp_path / "long.jsonl", tmp_path / "a.jsonl", "a")
    assert not (tmp_path / "a.jsonl").exists()
