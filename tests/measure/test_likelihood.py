"""Log-likelihood at an exit: the exit's own, not the full model's; at all layers that of Hugging Face."""

import re
from types import SimpleNamespace

import pytest
import torch

import layerskip
import tiny
from layerskip.errors import UserError
from layerskip.measure.lines import LikelihoodLine, read_likelihoods
from layerskip.measure.tasks.likelihood import pairs_of, scored, summary

L = tiny.NUM_LAYERS


def item(context, *texts, answer=None):
    if answer is None:
        return LikelihoodLine(context=context, response=texts[0])
    return LikelihoodLine(context=context, choices=list(texts), answer=answer)


def log_softmax_at(stack, model, tokens, exit_layer):
    """Straight from Hugging Face's model: log-probabilities [T, V] at an exit, in float64."""
    with torch.no_grad():
        told = model(torch.tensor([tokens]), output_hidden_states=True)
        logits = told.logits[0] if exit_layer == L else stack.logits(told.hidden_states[exit_layer][0])
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("name", ["llama", "llama+native", "gemma2", "gpt2"])
def test_an_exit_scores_by_itself_and_all_layers_as_hugging_face_does(name):
    """The classic mistake is that an exit's log-likelihood is the full model's."""
    model, stack = tiny.calibrated(name.partition("+")[0]), tiny.stack(name)
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randint(2, tiny.VOCAB, (n,), generator=draw).tolist() for n in (12, 300 - 60, 9)]
    counts = (5, 230, 1)
    items = [item("", "abc")] * 3
    records = list(scored(stack, items, [[pair] for pair in zip(texts, counts, strict=True)], [2, L]))
    for record, tokens, count in zip(records, texts, counts, strict=True):
        for exit_layer in (2, L):
            expected = log_softmax_at(stack, model, tokens, exit_layer)[-count - 1 : -1]
            likelihoods = expected.gather(-1, torch.tensor(tokens[-count:])[:, None])[:, 0].tolist()
            [found] = record["exits"][str(exit_layer)]
            assert found["tokens"] == pytest.approx(likelihoods, abs=1e-4)
            assert not found["greedy"]
        [early], [full] = record["exits"]["2"], record["exits"][str(L)]
        assert sum(early["tokens"]) != pytest.approx(sum(full["tokens"]), abs=1e-2)


def test_greedy_says_whether_the_exit_would_have_written_it(llama):
    model, stack = llama
    tokens, prompt = [5, 6, 7], 3
    for _ in range(6):
        tokens.append(int(log_softmax_at(stack, model, tokens, L)[-1].argmax()))
    [record] = scored(stack, [item("", "abc")], [[(tokens, len(tokens) - prompt)]], [1, L])
    assert record["exits"][str(L)][0]["greedy"] is True
    assert record["exits"]["1"][0]["greedy"] is False
    tokens[5] = (tokens[5] + 1) % tiny.VOCAB
    [record] = scored(stack, [item("", "abc")], [[(tokens, len(tokens) - prompt)]], [L])
    assert record["exits"][str(L)][0]["greedy"] is False


def test_items_of_several_choices_come_back_whole_and_in_order(llama):
    pairs = [[([5, 6, 7], 1), ([5, 6, 8, 9], 2)], [([3, 4], 1)], [([2, 3, 4], 2)] * 3]
    items = [item("", "ab", "c", answer=1), item("", "a"), item("", "a", "b", "c", answer=0)]
    told = []
    records = list(scored(llama[1], items, pairs, [2, L], told.append))
    assert [len(record["exits"]["2"]) for record in records] == [2, 1, 3]
    assert [[len(one["tokens"]) for one in r["exits"][str(L)]] for r in records] == [[1, 2], [1], [2, 2, 2]]
    assert [record["answer"] for record in records] == [1, None, 0]
    assert records[0]["characters"] == [2, 1]
    assert sum(told) == 3 + 1 + 6, "progress counts scored tokens"


def test_accuracy_with_and_without_the_length_of_a_choice():
    def record(answer, characters, *likelihoods):
        tried = [{"tokens": [x], "greedy": False} for x in likelihoods]
        return {"answer": answer, "characters": characters, "exits": {"2": tried}}

    records = [
        record(0, [1, 10], -2.0, -5.0),  # the short one by sum, the long one by character
        record(1, [1, 10], -2.0, -5.0),
        record(1, [1, 1], -2.0, -1.0),
    ]
    told = summary(records, 2)
    assert told == {"exit_layer": 2, "choices": 3, "accuracy": 2 / 3, "accuracy_per_character": 2 / 3}
    responses = [
        {"answer": None, "characters": [3], "exits": {"2": [{"tokens": [-1.0, -2.0], "greedy": True}]}},
        {"answer": None, "characters": [3], "exits": {"2": [{"tokens": [-3.0], "greedy": False}]}},
    ]
    told = summary([*records, *responses], 2)
    assert told["choices"] == 3
    assert (told["responses"], told["tokens"], told["loglikelihood"]) == (2, 3, -6.0)
    assert told["loglikelihood_per_token"] == -2.0
    assert told["perplexity"] == pytest.approx(7.389, abs=1e-3)
    assert told["greedy"] == 0.5


def test_an_exit_whose_logits_are_not_numbers_has_no_score():
    model = tiny.random_model("gpt2")
    stack = tiny.stack("gpt2", model=model)
    with torch.no_grad():
        model.transformer.h[3].mlp.c_fc.weight[0, 0] = torch.inf
    with pytest.raises(UserError, match="not all finite"):
        list(scored(stack, [item("", "abc")], [[([5, 6, 7], 1)]], [4]))


# -- tokens --------------------------------------------------------------------------------------------------


def words(context=None, bos=None):
    """A tokenizer that merges a space with the word behind it, as byte-pair vocabularies do."""
    known = {}
    ids = lambda text, **_: [known.setdefault(w, len(known) + 1) for w in re.findall(r" ?\w+|\s", text)]  # noqa: E731
    tokenizer = SimpleNamespace(encode=ids, bos_token_id=bos, eos_token_id=None)
    return SimpleNamespace(
        encode=lambda text, chat=None: ids(text), tokenizer=tokenizer, stack=SimpleNamespace(context=context)
    )


@pytest.fixture
def bos_lm(folder):
    """A checkpoint whose tokenizer puts a start token in front, as Llama's does."""
    lm = layerskip.load(str(folder), dtype="float32")
    plain, bos = lm.tokenizer.encode, lm.tokenizer.bos_token_id
    lm.tokenizer.encode = lambda text, **_: [bos, *plain(text)]
    return lm


def test_a_space_at_the_end_of_the_context_belongs_to_the_response():
    lm = words()
    [(apart, one)] = pairs_of(lm, item("a b", " c d"))
    [(ending, two)] = pairs_of(lm, item("a b ", "c d"))
    assert apart == ending
    assert one == two == 2
    [(_, lines)] = pairs_of(lm, item("a b", "c"), separator="\n")
    assert lines == 1


def test_each_choice_is_scored_behind_the_same_context():
    pairs = pairs_of(words(), item("a b", " c", " d e f", answer=0))
    assert [count for _, count in pairs] == [1, 3]
    assert pairs[0][0][:2] == pairs[1][0][:2]


def test_a_context_that_is_too_long_loses_its_front_and_a_response_too_long_is_refused():
    [(tokens, count)] = pairs_of(words(context=4), item("a b c d e", " f g"))
    [(whole, _)] = pairs_of(words(), item("a b c d e", " f g"))
    assert tokens == whole[-5:], "the last one is predicted, never read"
    assert count == 2
    with pytest.raises(UserError, match="does not fit the context of 4"):
        pairs_of(words(context=4), item("a", " b c d e f"))


def test_an_empty_context_starts_with_the_start_token():
    assert pairs_of(words(bos=99), item("", "a b")) == [([99, 1, 2], 2)]
    with pytest.raises(UserError, match="no start token"):
        pairs_of(words(), item("", "a b"))


def test_a_start_token_that_the_tokenizer_adds_itself_stands_there_once(bos_lm):
    [(alone, count)] = pairs_of(bos_lm, item("", "yes"))
    assert alone == bos_lm.encode("yes")
    assert alone[0] == bos_lm.tokenizer.bos_token_id != alone[1]
    assert count == 3
    [(behind, count)] = pairs_of(bos_lm, item("a", "yes"))
    assert (behind, count) == (bos_lm.encode("ayes"), 3)


def test_a_response_that_is_nothing_in_tokens_is_refused():
    with pytest.raises(UserError, match="is nothing in tokens"):
        pairs_of(words(), item("a", "!"))


def test_a_context_can_be_wrapped_as_a_message(folder):
    lm = layerskip.load(str(folder), dtype="float32")
    [(tokens, count)] = pairs_of(lm, item("hi", "yes"), chat=True)
    assert count == 3
    assert tokens[:-3] == lm.encode("hi", chat=True)


# -- lines ---------------------------------------------------------------------------------------------------


def test_lines_may_hold_responses_and_choices_and_other_columns(tmp_path):
    file = tmp_path / "items.jsonl"
    file.write_text(
        '{"prompt": "a", "response": "b", "answer": "not read"}\n\n'
        '{"context": "", "choices": ["x", "y"], "answer": 1, "id": 7}\n'
    )
    found = [(line.before, line.continuations, line.answer) for line in read_likelihoods(file)]
    assert found == [("a", ["b"], None), ("", ["x", "y"], 1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "has nothing to score"),
        ("nonsense", "line 1 is not JSON"),
        ("[1]", "line 1"),
        ('{"response": "b"}', "give either prompt or context"),
        ('{"prompt": "a", "context": "a", "response": "b"}', "give either prompt or context"),
        ('{"prompt": "a"}', "give either response or choices"),
        ('{"prompt": "a", "response": ""}', "nothing to score"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "at least two"),
        ('{"prompt": "a", "choices": ["b", "c"]}', "answer is None"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "answer is 2"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "answer is True"),
        ('{"prompt": "a", "choices": ["b", 1], "answer": 0}', "choices.1"),
    ],
)
def test_a_line_that_cannot_be_scored_is_an_error_that_names_it(tmp_path, line, message):
    file = tmp_path / "items.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        read_likelihoods(file)
