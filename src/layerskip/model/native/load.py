"""Which models run natively, and proof that each does what Hugging Face's code does.

`native_reason` says why a model cannot be taken. A tiny random model of the same kind (same flags, all kinds of
layers, past its window) is compared in float32 once per kind, machine and version of the code before any real one
is trusted, and the real one's logits are compared on eight tokens once its weights are packed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers

from layerskip.checkpoint.configuration import read_configuration
from layerskip.checkpoint.kept import MACHINE, decoders, keep, kept_file
from layerskip.errors import UserError
from layerskip.model.families import device_of
from layerskip.model.native.formats import FORMATS, require_format
from layerskip.model.native.kernels import kernels_reason
from layerskip.model.native.layer import ACTIVATIONS, activation_of
from layerskip.model.native.stack import NativeStack
from layerskip.model.parity import OTHER_KERNELS, PARITY, check_slices, probe_tokens

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma")


def native_family(path: Path) -> bool:
    """Whether a checkpoint's configuration names a family that may run natively."""
    return read_configuration(path / "config.json").get("model_type") in FAMILIES


_verdicts: dict[
    str, str | None
] = {}  # by configuration, for this process; those that agree are kept on disk too


def native_reason(hf: Any, placed: bool = False) -> str | None:
    """Say why this model cannot run natively, or None when it can. `placed`: spread over devices by accelerate."""
    config = hf.config.get_text_config()
    if config.model_type not in FAMILIES:
        return f"model type {config.model_type!r} is not among {', '.join(FAMILIES)}"
    if getattr(hf.config, "quantization_config", None):
        return "its weights are quantised"
    if placed:
        return "the model is spread over devices"
    if activation_of(config) not in ACTIVATIONS:
        return f"activation {activation_of(config)!r} is not among {', '.join(ACTIVATIONS)}"
    if hf.config._attn_implementation != "sdpa":
        return "another attention implementation than sdpa was asked for"
    key = config.to_json_string(use_diff=False)
    if key not in _verdicts:
        file = _agreed(key, type(hf))
        try:
            if file is None or not file.exists():
                _compare_tiny(config, type(hf))
                keep(file, True)
            _verdicts[key] = None
        except (UserError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            _verdicts[key] = f"a tiny model of its kind does not give what Hugging Face's does ({error})"
    return _verdicts[key]


def _agreed(key: str, model_class: type) -> Path | None:
    """Name the file that says that a kind was compared, by this code on this machine; None without a folder."""
    code = [decoders(), torch.__version__, transformers.__version__, kernels_reason()]
    return kept_file("native", [key, model_class.__name__, code, MACHINE])


def shrunken(config: Any) -> Any:
    """Make a small configuration of the same kind: four layers of all kinds, short windows, same head size."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.num_attention_heads = 4, 4
    small.num_key_value_heads = 4 if config.num_key_value_heads == config.num_attention_heads else 2
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    small.hidden_size, small.intermediate_size, small.vocab_size = 4 * size, 96, 128
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    for name in ("layer_types", "no_rope_layers"):
        if kinds := getattr(config, name, None):
            setattr(small, name, (list(dict.fromkeys(kinds)) * 4)[:4])
    if getattr(config, "sliding_window", None):
        small.sliding_window = 5
    return small


@torch.inference_mode()
def _compare_tiny(config: Any, model_class: Any) -> None:
    """Compare with Hugging Face's code on a random model of this kind. Raises: UserError where they differ."""
    small = shrunken(config)
    small._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = model_class(small).float().eval()
        for parameter in hf.parameters():  # gains near one, biases and all else visible
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.1 * noise)
    tokens = probe_tokens(
        small.vocab_size, device_of(hf), length=40
    )  # past the windows, and a prefill longer than kernels take
    reference = hf(input_ids=tokens, use_cache=False).logits
    for compiled in (True, False):
        check_slices(NativeStack(hf, compiled=compiled), tokens, reference)


def native_stack(hf: Any, *, quantize: str | None = None) -> NativeStack:
    """Take the weights of a Hugging Face model, emptying it, and check the result on eight tokens.

    Raises: UserError when the result differs from the model beyond rounding, that of the weight format included.
    """
    require_format(quantize, hf.dtype, device_of(hf))
    vocab_size = hf.get_output_embeddings().weight.shape[0]
    tokens = probe_tokens(vocab_size, device_of(hf))
    with torch.inference_mode():
        reference = hf(input_ids=tokens, use_cache=False).logits.float()
        stack = NativeStack(hf, quantize=quantize, empty=True)
        within = PARITY[stack.dtype] * OTHER_KERNELS if stack.dtype.itemsize == 2 else None
        if quantize is not None:
            within = FORMATS[quantize].tolerance
        try:
            check_slices(stack, tokens, reference, within)
        except UserError as error:
            raise UserError(error.message, 'use --stack hf (stack="hf"), without --quantize') from error
    stack.counters.reset()
    return stack
