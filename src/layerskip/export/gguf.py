"""A Hugging Face folder as a GGUF file, through the `gguf` package: byte-level Llama-shaped models.

    write_gguf(folder, Path("model-f16.gguf"), "f16")

Matrices are stored in the type asked for, vectors in float32. `q4_1` are blocks of 32 between a least and a largest
value, with embeddings and head in 8 bits: a model that was made from such a file (the built-in one) gets its own
blocks again. What was written is read back by transformers, and every parameter and the logits are compared.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from layerskip.checkpoint.tokenizer import tokenizer_in
from layerskip.errors import UserError, nearest
from layerskip.export.names import TYPES
from layerskip.model.load import load_model
from layerskip.model.native.int4 import grouped
from layerskip.model.parity import probe_tokens

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Array = np.ndarray[Any, Any]

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
TURNED = ("llama",)  # architectures in which llama.cpp turns neighbours, not halves, by a position's angle
GROUP = 32
CONVERTER = "llama.cpp's own convert_hf_to_gguf.py reads the folder of `--to hf`"
REPORT = "please report it with the model's config.json"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # llama.cpp's names for how text is cut before pairs of bytes are merged
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
}


def write_gguf(folder: Path, file: Path, kind: str, name: str) -> None:
    """Write a checkpoint as a GGUF file called `name` inside, read it again and compare it.

    Raises: UserError for a model, a tokenizer or a kind that we cannot write, or a file that says something else.
    """
    from gguf import GGUFWriter

    if kind not in TYPES:
        raise UserError(f"unknown type {kind!r}", nearest(kind, TYPES))
    hf = load_model(folder, dtype=torch.float32, device="cpu")
    config = hf.config.get_text_config()
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise UserError(
            f"no GGUF is written for model type {config.model_type!r}, only for " + ", ".join(ARCHITECTURES),
            CONVERTER,
        )
    writer = GGUFWriter(file, architecture, use_temp_file=True)
    writer.add_name(name)
    _add_sizes(writer, config, kind)
    _add_tokenizer(writer, folder, hf.get_input_embeddings().weight.shape[0])
    for ours, theirs, weight in _tensors(hf, architecture):
        raw, data = _stored(weight, _kind_of(ours, weight, kind))
        writer.add_tensor(theirs, data, raw_dtype=raw)
    if (factors := _rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _compare(hf, file, kind)


# -- what the file says ------------------------------------------------------------------------------------------


def _add_sizes(writer: Any, config: Any, kind: str) -> None:
    from gguf import LlamaFileType, RopeScalingType

    head = _head_dim(config)
    context, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    if config.model_type == "mistral" and window:
        # llama.cpp's layers of this kind have no window: up to it they are alike.
        context = min(context, window)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if (scaling := rope.get("rope_type", "default")) == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif scaling not in ("default", "llama3"):
        raise UserError(
            f"no GGUF is written for positions of type {scaling!r}",
            CONVERTER,
        )
    types = {"f32": "ALL_F32"} | {one: f"MOSTLY_{one.upper()}" for one in TYPES[1:]}
    writer.add_file_type(LlamaFileType[types[kind]])


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)


def _rope_factors(config: Any) -> Array | None:
    """By how much Llama 3 slows each frequency down, [head size / 2]; None for other models."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if config.rope_parameters.get("rope_type") != "llama3":
        return None
    slowed = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    head = 2 * len(slowed)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, head, 2).float() / head)
    factors: Array = (plain / slowed).float().numpy()
    return factors


def _add_tokenizer(writer: Any, folder: Path, size: int) -> None:
    from gguf import SpecialVocab, TokenType

    tokenizer, file = tokenizer_in(folder), folder / "tokenizer.json"
    if tokenizer is None or not file.is_file():
        raise UserError(f"{folder} has no tokenizer.json", "add the model's tokenizer")
    told = json.loads(file.read_text(encoding="utf-8"))
    tokens, types = [f"[PAD{i}]" for i in range(size)], [TokenType.UNUSED] * size
    added = tokenizer.added_tokens_decoder
    for token, i in tokenizer.get_vocab().items():
        if i < size:
            tokens[i] = token
            special = i in added and (TokenType.CONTROL if added[i].special else TokenType.USER_DEFINED)
            types[i] = special or TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(told))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    vocabulary = SpecialVocab(folder, load_merges=True, n_vocab=size)
    vocabulary.chat_template = vocabulary.chat_template or tokenizer.chat_template
    vocabulary.add_special_token.setdefault("bos", False)
    vocabulary.add_to_gguf(writer, quiet=True)


def _split_name(told: dict[str, Any]) -> str:
    """Name the way a byte-level tokenizer cuts text, as llama.cpp calls it. Raises: UserError for others."""
    pre = told.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers") or [pre]
    kinds = [part.get("type") for part in parts]
    name = None
    if told["model"].get("type") == "BPE" and kinds and kinds[-1] == "ByteLevel":
        if kinds == ["ByteLevel"]:
            name = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
            name = "smollm"
        elif kinds == ["Split", "ByteLevel"]:
            name = SPLITS.get(str(parts[0]["pattern"].get("Regex")))
    if name is None:
        raise UserError(
            "no GGUF is written for a tokenizer of this kind: " + ", ".join(filter(None, kinds or ["none"])),
            CONVERTER,
        )
    return name


# -- tensors -----------------------------------------------------------------------------------------------------


def _tensors(hf: Any, architecture: str) -> list[tuple[str, str, Tensor]]:
    """Our name, theirs and the float32 weight of every tensor, queries and keys laid as llama.cpp turns them."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    config = hf.config.get_text_config()
    names = get_tensor_name_map(MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    tied, found = set(getattr(hf, "all_tied_weights_keys", ())), []
    for ours, weight in hf.state_dict().items():
        if ours in tied:
            continue
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise UserError(f"GGUF has no name for {ours}", "is it a plain model of its kind?")
        heads = config.num_attention_heads if ".q_proj." in ours else config.num_key_value_heads
        if architecture in TURNED and (".q_proj." in ours or ".k_proj." in ours):
            halves = weight.view(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        found.append((ours, theirs, weight.detach().contiguous()))
    return found


def _kind_of(ours: str, weight: Tensor, kind: str) -> str:
    """What a tensor is stored as: vectors are never rounded, tables and odd widths not to 4 bits."""
    if weight.dim() < 2:
        return "f32"
    if kind in ("q8_0", "q4_1") and weight.shape[1] % GROUP:
        return "f16"
    return "q8_0" if kind == "q4_1" and ".layers." not in ours else kind


def _stored(weight: Tensor, kind: str) -> tuple[Any, Array]:
    from gguf import GGMLQuantizationType, quantize

    raw = GGMLQuantizationType[kind.upper()]
    if kind != "q4_1":
        return raw, quantize(weight.numpy(), raw)
    whole, scale, least = grouped(weight)  # [out, groups, 32], [out, groups]
    nibbles = whole[..., : GROUP // 2] | whole[..., GROUP // 2 :] << 4
    parts = [part.view(torch.uint8).view(*part.shape, 2) for part in (scale, least)]
    return raw, torch.cat((*parts, nibbles), -1).flatten(1).numpy()


# -- read again --------------------------------------------------------------------------------------------------


def _compare(hf: Any, file: Path, kind: str) -> None:
    """Read the file as transformers does; hold parameters and logits against the model. Raises: UserError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    with contextlib.redirect_stderr(io.StringIO()):  # bars that no argument switches off
        config = AutoConfig.from_pretrained(file.parent, **where)
        config.head_dim = _head_dim(hf.config.get_text_config())  # transformers reads no head size of Qwen 3
        again = AutoModelForCausalLM.from_pretrained(
            file.parent, config=config, dtype=torch.float32, **where
        ).eval()
    found = again.state_dict()
    for name, weight in hf.state_dict().items():
        if name not in found or found[name].shape != weight.shape:
            raise UserError(f"{file.name} lacks {name}", REPORT)
        if not ((found[name] - weight).abs() <= _allowed(weight, _kind_of(name, weight, kind))).all():
            raise UserError(f"{file.name}: {name} is another", REPORT)
    tokens = probe_tokens(hf.config.get_text_config().vocab_size, torch.device("cpu"))
    with torch.inference_mode():
        theirs = again(tokens, use_cache=False).logits
        hf.load_state_dict(found)
        ours = hf(tokens, use_cache=False).logits
    if not (theirs - ours).abs().max() <= 1e-4 * ours.abs().max():
        raise UserError(
            f"{file.name} has the weights but computes otherwise",
            REPORT,
        )


def _allowed(weight: Tensor, kind: str) -> Tensor | float:
    """By how much rounding may change each value."""
    if kind == "f32":
        return 0.0
    if kind in ("f16", "bf16"):
        return weight.abs() * 2.0 ** (-11 if kind == "f16" else -8) + 2.0**-24
    by = weight.view(len(weight), -1, GROUP)
    step = by.abs().amax(-1) / 127 if kind == "q8_0" else (by.amax(-1) - by.amin(-1)) / 15
    # Scales have 11 bits themselves, and least values too.
    room = 0.51 * step + by.abs().amax(-1) * 2.0**-10
    return room[..., None].expand_as(by).reshape(weight.shape)
