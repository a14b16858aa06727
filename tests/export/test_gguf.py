"""GGUF files: every parameter comes back, as other software reads it."""

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize

import tiny
from layerskip.errors import UserError
from layerskip.export import gguf as written
from layerskip.export.gguf import write_gguf
from layerskip.export.names import TYPES

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "layer_types": None, "sliding_window": None},
    "qwen3": {},
}


def saved(folder, family, **changes):
    words = tiny.tokenizer()
    model = tiny.random_model(family, vocab_size=len(words) + 5, **(FAMILIES[family] | changes))
    for part in (model, words):
        part.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_comes_back(family, kind, tmp_path):
    """`write_gguf` reads the file by transformers and compares; here its own words are read."""
    model = saved(tmp_path / "hf", family)
    write_gguf(tmp_path / "hf", tmp_path / "it.gguf", kind, "it")
    read = GGUFReader(tmp_path / "it.gguf")
    types = {tensor.tensor_type.name for tensor in read.tensors}
    assert types == {"F32"} | ({"Q4_1", "Q8_0"} if kind == "q4_1" else {kind.upper()})
    field = lambda name: read.fields[name].contents()  # noqa: E731
    arch = field("general.architecture")
    assert arch == {"mistral": "llama"}.get(family, family)
    assert field(f"{arch}.block_count") == tiny.NUM_LAYERS
    assert field(f"{arch}.rope.freq_base") == model.config.rope_parameters["rope_theta"]
    tokens = field("tokenizer.ggml.tokens")
    assert tokens[:3] == ["<pad>", "<s>", "<|im_end|>"]
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
    assert field("tokenizer.ggml.pre") == "gpt-2"
    assert "assistant" in field("tokenizer.chat_template")
    assert field("tokenizer.ggml.eos_token_id") == 2


def test_llama_3_slows_frequencies_as_transformers_does(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = saved(tmp_path / "hf", "llama", rope_parameters=rope)
    factors = written._rope_factors(model.config)
    plain = 10000.0 ** -(np.arange(0, 8, 2) / 8)
    assert np.allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)


def test_blocks_of_a_file_are_found_again(tmp_path):
    """A model whose matrices were 4-bit blocks gets these very blocks, and nothing is rounded twice."""
    saved(tmp_path / "hf", "llama")
    write_gguf(tmp_path / "hf", tmp_path / "one.gguf", "q4_1", "it")
    first = GGUFReader(tmp_path / "one.gguf")
    model = tiny.random_model("llama", vocab_size=264)
    with torch.no_grad():
        for ours, theirs, weight in written._tensors(model, "llama"):
            tensor = next(t for t in first.tensors if t.name == theirs)
            values = torch.from_numpy(
                dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape).copy()
            )
            raw, data = written._stored(values, written._kind_of(ours, weight, "q4_1"))
            assert raw == tensor.tensor_type
            assert np.array_equal(data.view(np.uint8).ravel(), tensor.data.view(np.uint8).ravel())


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_other_families_are_refused_with_what_to_do(family, tmp_path):
    tiny.random_model(family).save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match=r"convert_hf_to_gguf"):
        write_gguf(tmp_path / "hf", tmp_path / "it.gguf", "f16", "it")


def test_tokenizers_are_named_by_how_they_cut_text():
    level = {"type": "ByteLevel"}
    split = lambda regex: {"type": "Split", "pattern": {"Regex": regex}}  # noqa: E731
    cases = {
        "gpt-2": level,
        "smollm": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, level],
        },
    } | {
        name: {"type": "Sequence", "pretokenizers": [split(regex), level]}
        for regex, name in written.SPLITS.items()
    }
    for name, told in cases.items():
        assert written._split_name({"model": {"type": "BPE"}, "pre_tokenizer": told}) == name
    for told in ({"type": "Metaspace"}, None, {"type": "Sequence", "pretokenizers": [split("x"), level]}):
        with pytest.raises(UserError, match="tokenizer of this kind"):
            written._split_name({"model": {"type": "BPE"}, "pre_tokenizer": told})


def test_a_file_that_says_something_else_is_noticed(tmp_path, monkeypatch):
    saved(tmp_path / "hf", "llama")
    monkeypatch.setattr(written, "TURNED", ())
    with pytest.raises(UserError, match="is another"):
        write_gguf(tmp_path / "hf", tmp_path / "it.gguf", "f16", "it")
