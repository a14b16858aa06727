"""The lens and the timeline as data: what they say is what the model computes and what the engine did."""

import copy
import json
from dataclasses import asdict

import pytest
import torch

import tiny
from layerskip.decode.language_model import LanguageModel
from layerskip.decode.request import Round
from layerskip.errors import UserError
from layerskip.measure.exits.lens import (
    LONGEST,
    Lens,
    lens,
    settled,
    spelled,
    visible,
)
from layerskip.measure.exits.states import chunks
from layerskip.measure.exits.timeline import Timeline, timeline

L = tiny.NUM_LAYERS
TEXT = "the quick brown fox jumps"


@pytest.fixture(scope="module", params=["llama", "llama+native"])
def model(request):
    """A tiny model over bytes, with the Hugging Face model that it is."""
    tokenizer = tiny.tokenizer()
    reference = tiny.random_model("llama", vocab_size=len(tokenizer))
    for gain in tiny.residual_gains(reference)[0]:
        gain.data.mul_(0.1)
    stack = tiny.stack(request.param, model=copy.deepcopy(reference))  # the native one empties it
    return LanguageModel(stack, tokenizer), reference


def test_the_lens_is_the_head_over_hugging_faces_hidden_states(model):
    lm, reference = model
    tokens = lm.encode(TEXT)
    seen = lens(lm.stack, lm.tokenizer, tokens)
    with torch.no_grad():
        found = reference(torch.tensor([tokens]), output_hidden_states=True)
    assert seen.exits == list(range(1, L + 1))
    assert seen.layers == L
    for k in seen.exits:
        # The last of Hugging Face's states has been through the norm.
        logits = (
            found.logits[0] if k == L else reference.lm_head(reference.model.norm(found.hidden_states[k][0]))
        )
        probability, ids = logits.float().softmax(-1).max(-1)
        assert seen.top[k - 1] == [lm.tokenizer.decode([token]) for token in ids], k
        assert seen.probability[k - 1] == pytest.approx(probability.tolist(), abs=1e-3)
        assert seen.agrees[k - 1] == (ids == found.logits[0].argmax(-1)).tolist()


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_other_families_are_looked_through_too(family):
    """With their own final norm, and the cap on the logits that Gemma 2 has."""
    reference, tokens = tiny.calibrated(family), list(range(5, 30))
    seen = lens(tiny.stack(family), tiny.tokenizer(), tokens, [1])
    with torch.no_grad():
        probability, ids = reference(torch.tensor([tokens])).logits[0].softmax(-1).max(-1)
    assert seen.top[-1] == [spelled(tiny.tokenizer(), [token])[token] for token in ids.tolist()]
    assert seen.probability[-1] == pytest.approx(probability.tolist(), abs=1e-3)
    assert seen.agreement[-1] == 1.0 > seen.agreement[0]


def test_all_layers_agree_with_themselves_and_some_exits_do_not(model):
    lm, _ = model
    seen = lens(lm.stack, lm.tokenizer, lm.encode(TEXT))
    assert seen.agreement[-1] == 1.0
    assert 0 < min(seen.agreement) < 1
    assert "".join(seen.read) == TEXT


def test_settling_is_judged_on_all_layers_however_few_rows_are_kept(model):
    lm, _ = model
    tokens = lm.encode(TEXT)
    whole, few = lens(lm.stack, lm.tokenizer, tokens), lens(lm.stack, lm.tokenizer, tokens, [2], first=3)
    assert few.exits == [2, L]
    assert few.settles == whole.settles[3:]
    assert few.top == [whole.top[1][3:], whole.top[-1][3:]]
    assert few.read == whole.read[3:]
    for t, settles in enumerate(whole.settles):
        column = [row[t] for row in whole.agrees]
        assert all(column[settles - 1 :])
        assert settles == 1 or not column[settles - 2]


def test_a_token_settles_where_no_later_exit_differs():
    agrees = [[True, False, True, False], [True, True, False, False], [True, True, True, True]]
    assert settled(agrees) == [1, 2, 3, 3]


def test_a_lens_survives_a_result_file(model):
    lm, _ = model
    seen = lens(lm.stack, lm.tokenizer, lm.encode("a b"))
    assert Lens(**json.loads(json.dumps(asdict(seen)))) == seen


def test_a_lens_that_cannot_be_is_refused(model):
    lm, _ = model
    for exits, tokens, told in (([L + 1], [5], "out of range"), (None, [5] * (LONGEST + 1), "too many")):
        with pytest.raises(UserError, match=told):
            lens(lm.stack, lm.tokenizer, tokens, exits)
    assert len(lens(lm.stack, lm.tokenizer, [5] * (LONGEST // 2)).read) == LONGEST // 2


def test_the_lens_reads_what_evaluation_reads(model):
    lm, _ = model
    tokens = lm.encode(TEXT)
    seen = lens(lm.stack, lm.tokenizer, tokens)
    with torch.inference_mode():
        [chunk] = chunks(lm.stack, [tokens], [2])
        [(_, logits)] = list(chunk.exits())
    words = spelled(lm.tokenizer, logits.argmax(-1).tolist())
    assert seen.top[1] == [words[token] for token in logits.argmax(-1).tolist()]


class Stripping:
    """A tokenizer that strips the space of a text's first token, as SentencePiece decoders do."""

    words = ("a", " the", "b")

    def encode(self, text, add_special_tokens=True):
        return [self.words.index(text)]

    def decode(self, ids, **options):
        return "".join(self.words[i] for i in ids).lstrip(" ")


def test_tokens_are_spelled_as_they_stand_inside_a_text():
    assert spelled(Stripping(), [1, 2, 2]) == {1: " the", 2: "b"}
    byte = tiny.tokenizer()
    assert spelled(byte, byte.encode("x ")) == dict(zip(byte.encode("x "), "x ", strict=True))
    assert spelled(byte, [byte.eos_token_id]) == {byte.eos_token_id: "<|im_end|>"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [(" the", "·the"), ("\n\t", "↵→"), ("\x1b[31m", "\\x1b[31m"), ("\u202e", "\\u202e"), ("", "∅"),
     ("\u0301", "◌\u0301"), ("$x_1$", "$x_1$"), ("中", "中")],
    ids=ascii,
)  # fmt: skip
def test_nothing_that_is_printed_moves_the_cursor(text, shown):
    assert visible(text) == shown


# -- the timeline --------------------------------------------------------------------------------------------


def made(source, tokens, draft=(), accepted=0, **more):
    return Round(0, list(tokens), list(draft), accepted, 2, 3, source, 0, 0.0, 0, **more)


def test_every_cell_says_what_became_of_it():
    byte = tiny.tokenizer()
    a, b, c, d = byte.encode("abcd")
    rounds = [
        made("prefill", [], prompt_tokens=9),
        made("prefill", [a]),
        made("self-speculative", [a, b, c, d], [a, b, c], 3),
        made("self-speculative", [a, d], [a, b, c], 1),
        made("plain", [d]),
        made("self-speculative", [a], [a, b, c], 1, finish_reason="eos"),
    ]
    shown = timeline(rounds, byte)
    assert [strip.cells for strip in shown.strips] == [
        [("plain", "a")],
        [("kept", "a"), ("kept", "b"), ("kept", "c"), ("bonus", "d")],
        [("kept", "a"), ("rejected", "b"), ("dropped", "c"), ("correction", "d")],
        [("plain", "d")],
        [("kept", "a")],
    ]
    assert shown.summary() == "8 tokens in 4 rounds, 2.00 tokens/round, 5 of 7 drafts kept (71%)"
    assert Timeline.read(json.loads(json.dumps(asdict(shown)))) == shown


def test_a_timeline_counts_as_the_statistics_do(model):
    lm, _ = model
    result = lm.generate(TEXT, mode="self-speculative", exit_layer=2, draft_length=3, max_new_tokens=24)
    shown, stats = timeline(result.rounds, lm.tokenizer), result.stats
    cells = [cell for strip in shown.strips for cell in strip.cells]
    assert len(shown.rounds) == stats["rounds"]
    assert sum(kind == "kept" for kind, _ in cells) == stats["accepted"]
    assert sum(kind in ("kept", "rejected", "dropped") for kind, _ in cells) == stats["drafted"]
    assert sum(kind not in ("rejected", "dropped") for kind, _ in cells) == stats["new_tokens"] > 8
    assert f"{stats['tokens_per_round']:.2f} tokens/round" in shown.summary()
