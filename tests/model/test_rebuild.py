"""What the built-in model's GGUF file becomes: a plain checkpoint with the same numbers and tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layerskip.checkpoint import builtin as making
from layerskip.checkpoint import resolve as hub


def write_gguf(path: Path, model: object) -> None:
    """Write a tiny Llama as llama.cpp's converter would: its names, its order of rotary pairs, its tokens."""
    from gguf import GGUFWriter
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    config, weights = model.config, model.state_dict()  # type: ignore[attr-defined]
    letters = list(bytes_to_unicode().values())
    merges = ["Ġ Ġ", "ĠĠ Ġ", "h i"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *letters, *(merge.replace(" ", "") for merge in merges)]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    names = {"self_attn.": "attn_", "_proj": "", "attn_o.": "attn_output.", "mlp.": "ffn_"}
    names |= {"model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    names |= {"post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm"}
    for name, weight in weights.items():
        if name == "lm_head.weight":
            continue  # tied
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(name[-13:-12], 0)
        if "self_attn" in name and heads:
            weight = weight.view(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, Path]:
    """A tiny Llama, and the folder that the rebuild makes of its GGUF file."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=262,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    root = tmp_path_factory.mktemp("rebuild")
    write_gguf(root / "tiny.gguf", model)
    (root / "model").mkdir()
    making.rebuild(root / "tiny.gguf", root / "model")
    return model, root / "model"


def test_the_rebuilt_folder_is_a_plain_checkpoint_with_the_same_numbers(rebuilt: tuple[object, Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    original, folder = rebuilt
    hub.check_folder(folder)
    settings = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in settings
    assert settings["architectures"] == ["LlamaForCausalLM"]
    assert settings["tie_word_embeddings"] is True
    assert settings["dtype"] == "float32"
    assert settings["rope_parameters"]["rope_theta"] == 5000.0
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
        assert torch.equal(again, original(tokens).logits)  # type: ignore[operator]


def test_the_rebuilt_tokenizer_cuts_numbers_into_digits_before_anything_else(
    rebuilt: tuple[object, Path],
) -> None:
    """transformers' conversion of the file ignores its `smollm` rule, which moves spaces before a number."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(rebuilt[1])
    assert tokenizer.tokenize("x = 123") == ["x", "Ġ", "=", "Ġ", "1", "2", "3"]
    assert tokenizer.tokenize("hi   5") == ["hi", "ĠĠĠ", "5"]
    assert tokenizer.tokenize("hi   a") == ["hi", "ĠĠ", "Ġ", "a"]


def test_the_rebuilt_tokenizer_gives_back_what_it_was_given(rebuilt: tuple[object, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(rebuilt[1])
    text = "naïve 日本語 🎉 e\u0301\n\n\tdef f(x): return x  # 12,345.67 don't .  ,\r\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"
    ids = tokenizer(chat)["input_ids"]
    assert (ids[0], ids[-2]) == (1, 2), "control tokens are single tokens, and nothing is put before them"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.model_max_length == 64


@pytest.mark.model
def test_the_built_in_model_answers_and_ends_its_turn() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = hub.cached("smollm2-135m-base")
    if folder is None:
        pytest.skip("the built-in model is not in the cache folder")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.tokenize("x = 12345") == ["x", "Ġ=", "Ġ", "1", "2", "3", "4", "5"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(written[0, prompt["input_ids"].shape[1] :]) == (
        "The capital of France is Paris.<|im_end|>"
    )
