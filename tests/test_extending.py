"""The toys of docs/extending.md do what the page says: each is run as it stands there."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers.modeling_outputs import CausalLMOutput

import tiny
from layerskip.decode.drafters import DRAFTERS
from layerskip.errors import UserError
from layerskip.model.families import FAMILIES
from layerskip.model.huggingface import HuggingFaceStack
from layerskip.model.load import load
from layerskip.model.native.formats import FORMATS
from rounds import decode

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
PROMPTS = [[3, 4, 5], [6, 7], [8, 8, 8, 8]]


def run(section, name):
    """Run the section's Python block; return what it calls `name`."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    [block] = re.findall(r"```python\n(.*?)```", text, re.S)
    scope = {}
    exec(compile(block, f"extending.md, {section}", "exec"), scope)
    return scope[name]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3+native"])
def test_a_drafter_that_knows_no_layers_is_verified_from_the_first_one(name, monkeypatch):
    monkeypatch.setitem(DRAFTERS, "parrot", None)  # put back behind the test
    run("A drafter", "Parrot")
    stack = tiny.stack(name)
    plain = decode(stack, PROMPTS, 24)
    drafted = decode(stack, PROMPTS, 24, draft_length=4, drafter="parrot")
    assert drafted.tokens == plain.tokens
    assert sum(drafted.accepted.values())
    assert 0 < drafted.acceptance < 1
    assert stack.counters.layer_tokens
    mixed = decode(stack, PROMPTS, 24, 2, 3, each=lambda i: {"drafter": "parrot"} if i == 1 else {})
    assert mixed.tokens == plain.tokens, "rows of two drafters in one engine"


def test_sampled_rows_of_a_drafter_without_laws_follow_the_model(monkeypatch):
    from laws import PASSES, exact_first_tokens, first_tokens, p_value, small_model

    monkeypatch.setitem(DRAFTERS, "parrot", None)
    run("A drafter", "Parrot")
    model = small_model()
    found = first_tokens(model, 3, 400, draft_length=2, drafter="parrot")
    assert p_value(found, exact_first_tokens(model, 3)) > PASSES


def test_an_unknown_drafter_is_named():
    with pytest.raises(UserError, match="unknown drafter 'parot'"):
        decode(tiny.stack("llama"), PROMPTS, 4, draft_length=2, drafter="parot")


def test_a_weight_format_loads_checks_itself_and_decodes(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "coarse", None)
    run("A weight format", "coarse")
    tiny.calibrated("llama").save_pretrained(tmp_path)
    stack, _ = load(tmp_path, dtype=torch.float32, quantize="coarse")
    assert stack.name == "native"
    assert decode(stack, PROMPTS, 16, 2, 3).tokens == decode(stack, PROMPTS, 16).tokens
    wrong = replace(FORMATS["coarse"], make=lambda weight, bias: FORMATS["int8"].make(-weight, bias))
    monkeypatch.setitem(FORMATS, "coarse", wrong)
    with pytest.raises(UserError, match="parity check"):
        load(tmp_path, dtype=torch.bfloat16, quantize="coarse")


class ToyForCausalLM(hf.LlamaForCausalLM):
    """A Llama that keeps its decoder under another name."""

    base_model_prefix = "core"

    def __init__(self, config):
        super().__init__(config)
        self.core = self.model
        del self.model

    def get_input_embeddings(self):
        return self.core.embed_tokens

    def forward(self, input_ids=None, **named):
        return CausalLMOutput(logits=self.lm_head(self.core(input_ids=input_ids, **named).last_hidden_state))


class ToyConfig(hf.LlamaConfig):
    model_type = "toy"


def test_a_family_is_a_row_and_without_it_the_model_is_refused(monkeypatch):
    torch.manual_seed(0)
    config = ToyConfig(**{**tiny.config_of("llama").to_diff_dict(), "model_type": "toy"})
    model = ToyForCausalLM(config).eval()
    with pytest.raises(UserError, match="'toy' is not supported"):
        HuggingFaceStack(model)
    monkeypatch.setitem(FAMILIES, "toy", None)
    run("A family", "FAMILIES")
    stack = HuggingFaceStack(model)
    assert decode(stack, PROMPTS, 16, 2, 3).tokens == decode(stack, PROMPTS, 16).tokens


def test_a_verb_has_the_options_of_its_dataclasses(folder, monkeypatch):
    from typer.testing import CliRunner

    from layerskip.cli.main import app

    monkeypatch.setattr(app, "registered_commands", [*app.registered_commands])  # put back behind the test
    run("A verb", "depth")
    done = CliRunner().invoke(app, ["depth", str(folder), "--device", "cpu", "--times", "2", "--json"])
    assert json.loads(done.stdout) == {"layers": 2 * tiny.NUM_LAYERS}
    refused = CliRunner().invoke(app, ["depth", str(folder), "--times", "0"])
    assert str(refused.exception).startswith("--times is 0")
