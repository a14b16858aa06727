"""Without a word on the dtype a CPU decodes in bfloat16 where that is fast and exact, else in float32."""

import json

import pytest
import torch

import layerskip
from layerskip.model.native.bfloat16 import compiles_bfloat16, fast_bfloat16

PROMPTS = ["say 1", "count: 1, 2, 3, 4", "x"]
NEW = 40


@pytest.fixture
def own(monkeypatch):
    """The machine's own answer, which other tests do without."""
    monkeypatch.setattr("layerskip.decode.load.fast_bfloat16", fast_bfloat16)


@pytest.fixture
def fast(monkeypatch):
    """As on a machine where bfloat16 is fast."""
    monkeypatch.setattr("layerskip.decode.load.fast_bfloat16", lambda: True)


def lossless(lm):
    """Decode plainly and with drafts, alone and in company; returns how many drafts were kept."""
    plain = lm.generate(PROMPTS, mode="ar", max_new_tokens=NEW)
    kept = 0
    for exit_layer, draft_length in ((1, 2), (2, 4), (2, 8)):
        how = {"mode": "self-speculative", "exit_layer": exit_layer, "draft_length": draft_length}
        for prompts in (PROMPTS, PROMPTS[:1]):
            done = lm.generate(prompts, max_new_tokens=NEW, **how)
            assert [one.tokens for one in done] == [one.tokens for one in plain[: len(prompts)]]
            kept += sum(round.accepted for one in done for round in one.rounds)
    return kept


def test_the_choice_of_this_machine_is_lossless(own, folder):
    lm = layerskip.load(folder)
    chosen = torch.bfloat16 if fast_bfloat16() and lm.stack.row_exact else torch.float32
    assert lm.stack.dtype == chosen
    assert lossless(lm) > 20


def test_the_command_line_makes_the_same_choice(own, folder, run):
    found = []
    for mode in ("ar", "self-speculative"):
        asked = ("--mode", mode, *(("--exit-layer", 2, "--draft-length", 4) if mode != "ar" else ()))
        code, printed, message = run("generate", folder, "say 1", *asked, "--max-new-tokens", NEW, "--json")
        assert code == 0, message
        found.append(json.loads(printed)["tokens"])
    assert len(found[0]) > 10
    assert found[0] == found[1]


@pytest.mark.skipif(not compiles_bfloat16(), reason="no compiled product")
def test_fast_products_and_a_row_exact_stack_give_bfloat16(fast, folder):
    lm = layerskip.load(folder)
    assert lm.stack.row_exact
    assert lm.stack.dtype == torch.bfloat16
    assert lossless(lm) > 20


@pytest.mark.skipif(not compiles_bfloat16(), reason="no compiled product")
def test_a_stack_that_is_not_row_exact_falls_back_to_float32(fast, folder, monkeypatch):
    tried = []

    def inexact(linears, dtype):
        tried.append(dtype)
        return False

    monkeypatch.setattr("layerskip.model.native.stack.row_exact", inexact)
    lm = layerskip.load(folder)
    assert [dtype for dtype in tried if dtype == torch.bfloat16], "bfloat16 was tried"
    assert lm.stack.dtype == torch.float32
    assert lossless(lm) > 20
    assert layerskip.load(folder, dtype="bfloat16").stack.dtype == torch.bfloat16, "asked for, it stays"


def test_the_models_own_modules_decode_in_float32(fast, folder):
    assert layerskip.load(folder, stack="hf").stack.dtype == torch.float32
