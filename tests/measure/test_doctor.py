"""The doctor: a verdict in words for every case, and checks that find what is wrong."""

from types import SimpleNamespace

import numpy as np
import pytest

import tiny
from layerskip.checkpoint.facts import Facts
from layerskip.decode.language_model import LanguageModel
from layerskip.measure.advice import doctor
from layerskip.measure.advice.cells import Cell, Predicted
from layerskip.measure.advice.prediction import analyse
from layerskip.measure.exits.replay import replay
from layerskip.measure.proof.equality import DIFFERS, HOLDS, Finding
from layerskip.measure.speed import round_times

PROMPTS = [[65, 66, 67], [70, 71]]


@pytest.fixture
def lm(monkeypatch):
    monkeypatch.setattr(round_times, "TURNS", 1)
    tokenizer = tiny.tokenizer()
    model = tiny.random_model("llama", vocab_size=len(tokenizer))
    made = LanguageModel(tiny.stack("llama", model=model), tokenizer)
    made.generation_config = SimpleNamespace(eos_token_id=tokenizer.eos_token_id)
    return made


@pytest.fixture
def analysis(lm):
    return analyse(lm, PROMPTS, 12, exits=[2, 3], draft_vocab="off")


EXIT, LOOKUP = Cell(2, 3, 0), Cell(match_min=1, copy_length=16)
BOTH = Cell(2, 3, 0, 1, 16)


def earning(analysis, exit, lookup=0.99, both=0.98, spread=0.1):
    """The analysis with these predicted speed-ups in front."""
    rounds = replay(np.ones(4, bool), 2)

    def made(cell, speedup):
        return Predicted(cell, speedup, (speedup - spread, speedup + spread), rounds, 1.0)

    analysis.cells = [made(EXIT, exit), *analysis.cells]
    analysis.copies = [made(BOTH, both), made(LOOKUP, lookup)]
    return analysis


def test_a_gain_is_told_with_the_options_that_give_it(analysis):
    text = doctor.verdict(earning(analysis, 1.9), "m", True, None)
    assert text.startswith(
        "You will get 1.90 x [1.80, 2.00] with --exit-layer 2 --draft-length 3 --draft-vocab off"
    )
    assert "layerskip tune m --save" in text
    assert text.endswith("Predicted: copies alone (lookup) 0.99 x, exit 2 alone 1.90 x, both (auto) 0.98 x.")
    already = doctor.verdict(analysis, "m", True, EXIT)
    assert "by default, which is --exit-layer 2" in already
    assert "tune" not in already
    text = doctor.verdict(analysis, "m", True, Cell(3, 1, 0))
    assert "(the default, exit, E 3, K 1, vocabulary off, is predicted" in text
    text = doctor.verdict(earning(analysis, 1.5, both=1.9), "m", True, LOOKUP)
    assert "with --drafter auto --exit-layer 2 --draft-length 3 --draft-vocab off --guard" in text
    assert "(the default, lookup, match 1, copy 16, is predicted 0.99 x)" in text


def test_lookup_that_pays_is_recommended_though_exits_do_not(analysis):
    """Doctor used to say of every base model that nothing pays."""
    text = doctor.verdict(earning(analysis, 0.6, lookup=1.24), "m", False, LOOKUP)
    assert text.startswith("You will get 1.24 x [1.14, 1.34] by default, which is --drafter lookup.")
    assert "exit 2 alone 0.60 x" in text
    assert "not trained; to gain from them" in text
    assert "plain decoding" not in text
    trained = doctor.verdict(analysis, "m", True, None)
    assert "with --drafter lookup; layerskip tune m --save" in trained
    assert "like those it was trained for" in " ".join(trained.split())


def test_a_loss_is_told_with_what_to_do_about_it(analysis):
    losing = earning(analysis, 0.4)
    text = doctor.verdict(losing, "m", False, None)
    assert "0.99 x [0.89, 1.09] at best, with --drafter lookup" in text
    assert "use plain decoding (--drafter off). It is the default already." in text
    assert "layerskip train exit-adapter model=m" in text
    trained = doctor.verdict(losing, "m", True, LOOKUP)
    assert "makes that the default" in trained
    assert "like those it was trained for" in trained


def test_what_may_go_either_way_says_so(analysis):
    unsure = "does not exclude a loss"
    assert unsure in doctor.verdict(earning(analysis, 0.5, lookup=1.05), "m", False, None)
    assert unsure not in doctor.verdict(earning(analysis, 0.5, lookup=1.05, spread=0.01), "m", False, None)
    assert unsure not in doctor.verdict(earning(analysis, 0.5), "m", False, None)


@pytest.mark.parametrize(
    ("exit", "lookup", "both", "expected"),
    [
        (0.6, 1.02, 1.02, "off"),
        (0.6, 1.04, 1.05, "lookup"),
        (1.5, 1.04, 1.51, "exit"),
        (1.5, 1.2, 1.7, "auto"),
        (1.02, 1.02, 1.04, "auto"),
        (1.24, 1.22, 1.23, "lookup"),
    ],
)
def test_the_simplest_source_that_none_is_clearly_faster_than_is_recommended(
    lm, analysis, monkeypatch, exit, lookup, both, expected
):
    monkeypatch.setattr(doctor, "sameness", lambda *given: {})
    result = doctor.examine(lm, earning(analysis, exit, lookup, both), chat=True, name="m")
    assert result["recommended_drafter"] == expected
    assert result["recommended_mode"] == ("ar" if expected == "off" else "self-speculative")
    told = {name: row["predicted_speedup"] for name, row in result["sources"].items()}
    assert told == {"lookup": lookup, "exit": exit, "auto": both}


def test_everything_asked_of_a_diagnosis_is_in_it(lm, analysis):
    result = doctor.examine(lm, analysis, chat=True, name="m")
    assert {
        "trained_exits", "agreement", "step_s", "best", "recommended_mode", "verdict", "surface",
        "acceptance_by_position", "checks", "memory", "sources", "recommended_drafter",
    } <= set(result)  # fmt: skip
    checks = result["checks"]
    assert checks["deterministic"]
    assert checks["self_speculative_equal"]
    assert checks["equality_promised"]
    assert checks["first_difference"] is None
    assert (checks["eos_ids"], checks["end_of_turn_id"], checks["warnings"]) == ([2], 2, [])
    assert result["memory"]["cache_bytes_per_token"] == tiny.NUM_LAYERS * 2 * 2 * 8 * 4
    assert result["memory"]["draft_head_bytes"] == 0
    assert checks["settings"] == 6, "copies are compared too"
    assert (result["recommended_mode"] == "ar") == (result["recommended_drafter"] == "off")
    for name, row in result["sources"].items():
        assert row["drafter"] == name
        assert row["tokens_per_round"] >= 1
        assert 0 <= row["plain_share"] <= 1
        assert set(row["by_source"]) <= {"auto": {"lookup", "exit"}}.get(name, {name})


def test_exits_count_as_trained_by_what_the_checkpoint_says_or_by_how_they_agree(lm, analysis):
    assert doctor.examine(lm, analysis, True, "m")["trained_exits"] is False
    analysis.seen.agreement[2] = 0.9
    assert doctor.examine(lm, analysis, True, "m")["trained_exits"] is True
    analysis.seen.agreement[2] = 0.1
    lm.facts = Facts(exits=(2,))
    assert doctor.examine(lm, analysis, True, "m")["trained_exits"] is True


def test_an_end_that_ends_nothing_is_found_and_the_cure_is_told(lm, analysis):
    lm.generation_config.eos_token_id = 7
    told = doctor.ending(lm, analysis, chat=True)
    assert told["eos_ids"] == [7]
    assert len(told["warnings"]) == 2, "the tokenizer's, and the template's"
    assert all("<|im_end|> (id 2)" in warning for warning in told["warnings"])
    assert "--stop '<|im_end|>'" in told["warnings"][0]
    lm.generation_config.eos_token_id = []
    assert "no end-of-sequence token is known" in doctor.ending(lm, analysis, chat=True)["warnings"][0]


def test_templates_without_an_end_and_tokenizers_without_a_template_are_found(lm, analysis):
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    assert "no token of its own" in doctor.ending(lm, analysis, chat=True)["warnings"][0]
    assert doctor.ending(lm, analysis, chat=False)["warnings"] == []
    lm.tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert doctor.end_of_turn(lm.tokenizer) is None
    lm.tokenizer.chat_template = None
    told = doctor.ending(lm, analysis, chat=False)
    assert told["warnings"] == ["there is no chat template: prompts are continued as plain text"]


def test_outputs_that_end_by_themselves_are_counted(lm):
    tokens = lm.generate(PROMPTS[0], mode="ar", max_new_tokens=12).tokens
    lm.generation_config.eos_token_id = tokens[4]
    analysis = analyse(lm, PROMPTS[:1], 12, exits=[2], draft_vocab="off")
    told = doctor.ending(lm, analysis, chat=False)
    assert (told["ended"], told["continuations"]) == (1, 1)


def test_a_difference_is_found_with_its_place(lm, analysis, monkeypatch):
    gaps = [{"prompt": 0, "position": at, "relative": 0.5} for at in (7, 2)]
    found = [
        Finding("the same twice", HOLDS, ""),
        Finding("greedy", DIFFERS, "", numbers={"gaps": gaps, "settings": 1}),
    ]
    monkeypatch.setattr(doctor, "shortly", lambda *given: found)
    told = doctor.sameness(lm, analysis)
    assert told["deterministic"]
    assert not told["self_speculative_equal"]
    assert told["first_difference"] == 2
