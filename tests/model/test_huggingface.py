"""The Hugging Face stack: what it accepts, what it refuses, and that a moved part is noticed."""

import json

import pytest
import torch
import transformers as hf

import tiny
from conftest import CLOSE
from layerskip.errors import UserError
from layerskip.model import families
from layerskip.model import load as models
from layerskip.model.families import FAMILIES, Family
from layerskip.model.huggingface import HuggingFaceStack
from layerskip.model.step import Step


def test_every_family_of_the_table_is_tested():
    assert set(FAMILIES) == set(tiny.FAMILIES)


@pytest.mark.parametrize("family", tiny.STACKS)
def test_logits_equal_those_of_the_model_at_every_position(family):
    """On rows of several lengths in one padded call, past the sliding window."""
    model, ours = tiny.calibrated(family.partition("+")[0]), tiny.stack(family)
    rows = [list(range(3, 17)), list(range(30, 35))]
    tokens = torch.tensor([row + [0] * (14 - len(row)) for row in rows])
    step = Step.span([0, 1], [0, 0], [14, 5], ours.device, spill=20)
    with torch.inference_mode():
        h, _ = ours.run(ours.embed(tokens, step), 0, ours.num_layers, step, ours.new_cache(2, 20))
        logits = ours.logits(h)
        for row, given in zip(rows, logits, strict=True):
            wanted = model(torch.tensor([row])).logits[0].float()
            torch.testing.assert_close(given[: len(row)], wanted, rtol=0, atol=CLOSE[torch.float32])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_eager_attention_gives_the_same_logits(family):
    model = tiny.random_model(family)
    tokens = torch.arange(2, 14)[None]
    outputs = []
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        ours = HuggingFaceStack(model)
        step = Step.span([0], [0], [12], ours.device, spill=12)
        with torch.inference_mode():
            h, _ = ours.run(ours.embed(tokens, step), 0, ours.num_layers, step, ours.new_cache(1, 12))
            outputs.append(ours.logits(h))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=CLOSE[torch.float32])


def test_a_wrong_row_of_the_table_is_refused_by_the_parity_check(monkeypatch):
    """The check is what stands between a moved attribute and silently wrong text."""
    for family, wrong in (
        ("gemma3_text", Family(window="layer_types", rotary_per_kind=False)),
        ("gpt2", Family("transformer", "h", (), rotary=None, embed=families._gpt2_embedding)),
        ("gpt2", Family("transformer", "h", ("ln_f",), rotary=None)),
    ):
        monkeypatch.setitem(FAMILIES, family, wrong)
        with pytest.raises((UserError, TypeError)):
            HuggingFaceStack(tiny.random_model(family))


def test_a_model_that_computes_something_else_than_its_layers_is_refused(monkeypatch):
    model = tiny.random_model("llama")
    original = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, **k: (o := original(self, **k), setattr(o, "logits", o.logits * 1.01))[0],
    )
    with pytest.raises(UserError, match="parity check"):
        HuggingFaceStack(model)


def test_an_unknown_family_of_the_common_shape_is_tried_and_checked():
    config = hf.OlmoConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    torch.manual_seed(0)
    assert HuggingFaceStack(hf.OlmoForCausalLM(config).eval()).num_layers == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            hf.MixtralConfig(num_hidden_layers=2, hidden_size=32, num_local_experts=2, vocab_size=64),
            "mixture of experts",
        ),
        (hf.MambaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=64), "cannot be rolled back"),
        (hf.BloomConfig(n_layer=2, hidden_size=32, n_head=4, vocab_size=64), "not supported"),
    ],
    ids=["moe", "recurrent", "unknown shape"],
)
def test_what_cannot_be_decoded_exactly_is_refused_by_name(config, message):
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match=message) as error:
        HuggingFaceStack(model)
    assert "extending" in error.value.hint


def test_a_rotary_table_that_changes_with_length_ends_the_context_where_it_would_change():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    model = tiny.random_model("llama", rope_parameters=rope, max_position_embeddings=128)
    assert HuggingFaceStack(model).context == 64
    assert HuggingFaceStack(tiny.random_model("llama")).context == tiny.CONTEXT


def test_work_is_counted_in_layers_times_live_tokens(llama):
    _, ours = llama
    ours.counters.reset()
    step = Step.span([0, 1], [0, 0], [3, 1], ours.device, spill=8)
    with torch.inference_mode():
        h = ours.embed(torch.ones(2, 3, dtype=torch.long), step)
        ours.run(h, 0, 2, step, ours.new_cache(2, 8))
        assert ours.run(h, 2, 2, step, ours.new_cache(2, 8))[0] is h, "an empty slice is free"
    assert ours.counters.layer_tokens == 2 * 4
    assert ours.counters.runs == {(0, 2, 3): 1}


def test_a_reduced_head_gives_the_same_numbers_for_its_tokens():
    for family in ("llama", "gemma2", "opt"):
        ours = HuggingFaceStack(tiny.random_model(family))
        ids = [3, 9, 40, 63]
        head = ours.reduced_head(ids)
        h = torch.randn(2, ours.width)
        with torch.inference_mode():
            full, reduced = ours.logits(h), ours.logits(h, head)
        torch.testing.assert_close(reduced, full[:, ids], rtol=0, atol=CLOSE[torch.float32])
        spread = head.scatter(reduced, ours.vocab_size)
        assert torch.equal(spread[:, ids], reduced)
        assert spread.isinf().sum() == 2 * (ours.vocab_size - 4)


def test_a_folder_loads_as_a_stack_and_a_broken_one_is_a_user_error(tmp_path):
    tiny.random_model("qwen2").save_pretrained(tmp_path)
    ours, model = models.load(tmp_path, dtype=torch.float32)
    assert ours.num_layers == tiny.NUM_LAYERS
    assert not model.training
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))
    with pytest.raises(UserError, match="cannot load"):
        models.load(tmp_path, dtype=torch.float32)


def test_a_folder_with_missing_or_damaged_weights_is_refused(tmp_path):
    """transformers fills missing weights with random numbers and a warning."""
    from safetensors.torch import load_file, save_file

    tiny.random_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights .*layers.3.mlp.up_proj"):
        models.load(tmp_path, dtype=torch.float32)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot load"):
        models.load(tmp_path, dtype=torch.float32)


def test_layers_on_several_devices_work_through_the_stack(tmp_path):
    """accelerate's hooks move what each layer is given; half of this model is offloaded to the disk."""
    pytest.importorskip("accelerate")
    from rounds import decode

    model = tiny.random_model("llama")
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" if i < 3 else "disk" for i in range(tiny.NUM_LAYERS)}
    split = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    ).eval()
    prompts = [[5, 6, 7], [8]]
    plain = decode(HuggingFaceStack(model), prompts, 12).tokens
    assert decode(HuggingFaceStack(split), prompts, 12, 2, 3).tokens == plain


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_stack_tells_the_bytes_of_its_layers_head_and_table(family):
    model = tiny.random_model(family)
    stack = HuggingFaceStack(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    told = stack.num_layers * stack.layer_bytes + stack.head_bytes + stack.table_bytes
    assert stack.name == "hf"
    assert 0.8 * weights < told <= weights, "the rest are norms and learned positions"
