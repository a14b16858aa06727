"""The first E layers as a smaller model: what it says is what the exit says, in every family."""

import json

import pytest
import torch
import transformers

import tiny
from layerskip.checkpoint.facts import Facts, write_draft_head
from layerskip.decode.load import load
from layerskip.errors import UserError
from layerskip.export.prefix import write_prefix
from layerskip.model.step import Step

E = 2
TOKENS = torch.tensor([[5, 9, 20, 33, 7, 8, 40, 3]])


def exit_logits(family, model, exit_layer=E):
    stack = tiny.stack(family, model=model)
    step = Step.span([0], [0], [TOKENS.shape[1]], stack.device, spill=TOKENS.shape[1])
    with torch.inference_mode():
        h, _ = stack.run(stack.embed(TOKENS, step), 0, exit_layer, step, stack.new_cache(1, TOKENS.shape[1]))
        return stack.logits(h)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_draft_says_what_the_exit_says(family, tmp_path):
    model = tiny.calibrated(family)
    model.save_pretrained(tmp_path / "whole")
    told = write_prefix(tmp_path / "whole", E, tmp_path / "draft")
    assert told == {"exit_layer": E, "layers": tiny.NUM_LAYERS, "own_head": False}
    draft = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "draft").eval()
    assert draft.config.num_hidden_layers == E
    with torch.inference_mode():
        assert torch.allclose(draft(TOKENS).logits, exit_logits(family, model), atol=1e-4)
    assert load(tmp_path / "draft").stack.num_layers == E


def test_tied_heads_stay_tied(tmp_path):
    model = tiny.random_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "whole")
    write_prefix(tmp_path / "whole", E, tmp_path / "draft")
    draft = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    assert draft.config.tie_word_embeddings
    assert draft.lm_head.weight is draft.model.embed_tokens.weight


@pytest.fixture
def with_rows(tmp_path):
    """A checkpoint whose exit 2 has rows of its own for 20 tokens."""
    whole, model = tmp_path / "whole", tiny.random_model("llama", tie_word_embeddings=True)
    ids, rows = list(range(40, 20, -1)), torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    whole.mkdir()
    entry = write_draft_head(whole, ids, rows)
    model.config.layerskip = {"exits": [E], "exit_layer": E, "draft_length": 3, **entry}
    model.save_pretrained(whole)
    del model.config.layerskip
    return whole, model, ids, rows


def test_rows_of_an_exits_own_become_a_head_of_the_whole_vocabulary(with_rows, tmp_path):
    whole, model, ids, rows = with_rows
    assert write_prefix(whole, None, tmp_path / "draft")["own_head"]
    draft = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "draft").eval()
    assert not hasattr(draft.config, "layerskip")
    assert not draft.config.tie_word_embeddings
    with torch.inference_mode():
        found = draft(TOKENS).logits
        stack = tiny.stack("llama", model=model)
        stack.head = torch.nn.Linear(32, 20, bias=False)
        stack.head.weight = torch.nn.Parameter(rows)
        step = Step.span([0], [0], [8], stack.device, spill=8)
        h, _ = stack.run(stack.embed(TOKENS, step), 0, E, step, stack.new_cache(1, 8))
        assert torch.allclose(found[..., ids], stack.logits(h), atol=1e-4)
    assert not found[..., :21].any()


def test_what_no_other_engine_has_is_refused(tmp_path):
    model = tiny.random_model("llama")
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(UserError, match="names no exit"):
        write_prefix(tmp_path / "whole", None, tmp_path / "draft")
    with pytest.raises(UserError, match="out of range"):
        write_prefix(tmp_path / "whole", tiny.NUM_LAYERS, tmp_path / "draft")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    entry = {"exits": [0], "exit_layer": 0, "draft_length": 2, "exit_adapter": "exit_adapter.safetensors"}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config | {"layerskip": entry}))
    with pytest.raises(UserError, match="through an adapter"):
        write_prefix(tmp_path / "whole", None, tmp_path / "draft")
    write_prefix(tmp_path / "whole", 3, tmp_path / "draft")
    assert Facts() == load(tmp_path / "draft").facts


def test_a_draft_that_says_something_else_is_noticed(tmp_path, monkeypatch):
    tiny.random_model("llama").save_pretrained(tmp_path / "whole")
    monkeypatch.setattr("layerskip.export.prefix._cut", lambda hf, exit_layer, own: None)
    with pytest.raises(UserError, match="other logits than exit 2"):
        write_prefix(tmp_path / "whole", E, tmp_path / "draft")
