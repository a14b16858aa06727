"""Any Hugging Face decoder behind the `Stack` contract: a table of attribute paths, no file per family.

The layers are Hugging Face's own modules, called one by one with our cache in place of theirs. Loading checks
that the slices reproduce the model's own logits (`check_parity`) and refuses a model where they do not, so a
wrong row of the table, or a new release that moves something, is an error and never a wrong answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from layerskip.errors import UserError
from layerskip.model.cache import Cache, KVShape
from layerskip.model.head import Head
from layerskip.model.stack import Counters, Stack, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

ADDING_A_MODEL = "docs/adding-a-model.md says what a family must provide"

# Largest relative difference between our slices and the model's own forward that rounding explains: the same
# modules run, only the attention kernel may differ (masked against causal, other tiles). In float64 too some of
# Hugging Face's own steps (rotary tables, RMS norms, the eager softmax) are done in float32.
PARITY = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def _token_embedding(decoder: Any, table: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    embedded: Tensor = table(tokens)
    return embedded


def _gpt2_embedding(decoder: Any, table: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    embedded: Tensor = decoder.wte(tokens) + decoder.wpe(positions)
    return embedded


def _opt_embedding(decoder: Any, table: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    embedded = decoder.embed_tokens(tokens)
    if decoder.project_in is not None:
        embedded = decoder.project_in(embedded)
    summed: Tensor = embedded + decoder.embed_positions(None, 0, position_ids=positions)
    return summed


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts; paths are attributes of the causal model's decoder."""

    decoder: str = "model"
    layers: str = "layers"
    finish: tuple[str, ...] = ("norm",)  # applied in order before the head; a missing (None) part is skipped
    rotary: str | None = "rotary_emb"
    rotary_per_kind: bool = False  # one table for full, one for sliding attention
    window: str = "none"  # which layers slide: none, all (when the config sets a window), layer_types
    cache_argument: str = "past_key_values"
    embed: Callable[[Any, Any, Tensor, Tensor], Tensor] = _token_embedding


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(window="all"),
    "qwen2": Family(window="layer_types"),
    "qwen3": Family(window="layer_types"),
    "phi3": Family(window="all"),
    "smollm3": Family(window="layer_types"),
    "olmo2": Family(),
    "gemma": Family(),
    "gemma2": Family(window="layer_types"),
    "gemma3_text": Family(window="layer_types", rotary_per_kind=True),
    "gpt2": Family("transformer", "h", ("ln_f",), rotary=None, embed=_gpt2_embedding),
    "opt": Family(
        "model.decoder", finish=("final_layer_norm", "project_out"), rotary=None, embed=_opt_embedding
    ),
    "gpt_neox": Family("gpt_neox", finish=("final_layer_norm",), cache_argument="layer_past"),
}


class HuggingFaceStack(Stack):
    """Run a Hugging Face causal model slice by slice; its modules and weights are used in place.

    The model object itself is not kept, so that a stack never keeps a model alive that its owner dropped.
    """

    name = "hf"

    def __init__(self, hf: Any) -> None:
        config = hf.config.get_text_config()
        refuse_unsupported(hf)
        self.model_type = config.model_type
        self.family = FAMILIES.get(config.model_type, Family())
        self.decoder, self.layers, self.rotary, self.finish = parts_of(hf)
        self.table, self.head = hf.get_input_embeddings(), hf.get_output_embeddings()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.num_layers = len(self.layers)
        self.width = config.hidden_size
        self.vocab_size = self.head.weight.shape[0]
        self.layer_bytes = _num_bytes(*self.layers) // self.num_layers
        self.head_bytes = _num_bytes(self.head)
        self.table_bytes = 0 if tied(self.table.weight, self.head.weight) else _num_bytes(self.table)
        self.context = context_of(config)
        self.dtype = hf.dtype
        self.device = device_of(hf)
        self.eager = (
            hf.config._attn_implementation == "eager"
        )  # wants an additive mask, never the causal flag
        self.windows = windows_of(config, self.family, self.num_layers)
        self.kinds = _kinds(config, self.family, self.num_layers)
        self.counters = Counters()
        self.kv_shapes: list[KVShape] = []
        check_parity(self, hf)
        self.counters.reset()

    def fits(self, hf: Any) -> bool:
        """Whether this is still the stack of `hf`: nothing moved, cast, replaced or reconfigured since."""
        _, layers, rotary, finish = parts_of(hf)
        ours = [self.table, self.head, self.rotary, *self.finish, *self.layers]
        theirs = [hf.get_input_embeddings(), hf.get_output_embeddings(), rotary, *finish, *layers]
        same = len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))
        state = (hf.dtype, device_of(hf), hf.config._attn_implementation == "eager")
        return (
            same
            and not any(m.training for m in hf.modules())
            and state == (self.dtype, self.device, self.eager)
        )

    def embed(self, tokens: Tensor, step: Step) -> Tensor:
        return self.family.embed(self.decoder, self.table, tokens, step.positions)

    def run(
        self, h: Tensor, start: int, stop: int, step: Step, cache: Cache, taps: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        if start == stop:
            return h, {}
        cache.bind(step)
        self.counters.count_run(start, stop, step)
        tapped = {}
        for index in range(start, stop):
            h = self.layers[index](
                h, **self._arguments(index, h, step), **{self.family.cache_argument: cache}
            )
            if index + 1 in taps:
                tapped[index + 1] = h
        return h, tapped

    def _arguments(self, index: int, h: Tensor, step: Step) -> dict[str, Any]:
        """Build, once per step and kind of layer, what all its layers are called with."""
        key = (self.kinds[index], self.windows[index])
        if key not in step.shared:
            arguments = {
                "attention_mask": self._mask(self.windows[index], h.dtype, step),
                "position_ids": step.positions,
                "use_cache": True,
            }
            if self.rotary is not None:
                kind = (self.kinds[index],) if self.family.rotary_per_kind else ()
                arguments["position_embeddings"] = self.rotary(h, step.positions, *kind)
            step.shared[key] = arguments
        shared: dict[str, Any] = step.shared[key]
        return shared

    def _mask(self, window: int | None, dtype: torch.dtype, step: Step) -> Tensor | None:
        if step.sees_everything(window) or (not self.eager and step.from_empty(window)):
            return None
        mask = step.mask(window)
        if not self.eager:
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)

    def logits(self, h: Tensor, head: Head | None = None) -> Tensor:
        size = self.vocab_size if head is None else head.size
        self.counters.head_rows[size] += h[..., 0].numel()
        for module in self.finish:
            h = module(h)
        out = self.head(h) if head is None else head.project(h)
        if self.softcap is not None:
            out = torch.tanh(out / self.softcap) * self.softcap
        return out.to(self.device, torch.float32)  # [..., size]

    def reduced_head(self, ids: Sequence[int], weight: Tensor | None = None) -> Head:
        if weight is not None:
            own = weight.to(self.device, self.dtype)
            index = torch.tensor(list(ids), device=self.device)
            return Head(index, lambda h: F.linear(h.to(own.device), own), own.nbytes)
        weight, bias = self.head.weight, getattr(self.head, "bias", None)
        if weight.device.type == "meta":
            raise UserError(
                "the head is offloaded, a draft vocabulary needs it in memory", "use --draft-vocab off"
            )
        index = torch.tensor(list(ids), device=weight.device)
        rows, offsets = weight.detach()[index], None if bias is None else bias.detach()[index]
        num_bytes = rows.numel() * rows.element_size()
        return Head(index.to(self.device), lambda h: F.linear(h.to(rows.device), rows, offsets), num_bytes)

    def new_cache(self, rows: int, capacity: int) -> Cache:
        return Cache(self.kv_shapes, rows, capacity)


def parts_of(hf: Any) -> tuple[Any, list[Any], Any, list[Any]]:
    """Find decoder, layers, rotary module and finishing modules by the family's paths. Raises: UserError."""
    kind = hf.config.get_text_config().model_type
    family = FAMILIES.get(kind, Family())
    try:
        decoder = hf.get_submodule(family.decoder)
        rotary = getattr(decoder, family.rotary) if family.rotary else None
        finish = [module for name in family.finish if (module := getattr(decoder, name)) is not None]
        return decoder, list(getattr(decoder, family.layers)), rotary, finish
    except AttributeError as error:
        raise UserError(f"model type {kind!r} is not supported: {error}", ADDING_A_MODEL) from None


def _num_bytes(*modules: Any) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def tied(table: Tensor, head: Tensor) -> bool:
    return table is head or (table.device.type != "meta" and table.data_ptr() == head.data_ptr())


def device_of(hf: Any) -> torch.device:
    """Where tokens go in; a table offloaded by accelerate takes them from the CPU through its hooks."""
    device: torch.device = hf.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def refuse_unsupported(hf: Any) -> None:
    """Refuse by name what the rounds cannot decode exactly, before anything is computed."""
    refuse_architecture(hf)
    if any(module.training for module in hf.modules()):
        raise UserError(
            "the model is in training mode: dropout would change its output", "call model.eval() first"
        )
    if (attention := hf.config._attn_implementation) not in ("sdpa", "eager"):
        raise UserError(
            f"attention implementation {attention!r} is not supported (sdpa and eager are)",
            'load the model with attn_implementation="sdpa"',
        )


def refuse_architecture(hf: Any) -> None:
    """Refuse kinds of models that neither decoding nor training knows. Raises: UserError."""
    config = hf.config
    text = config.get_text_config()
    kind = text.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{kind!r} is an encoder-decoder; layerskip decodes decoder-only models")
    if any(hasattr(config, name) for name in ("vision_config", "audio_config")):
        raise UserError(
            f"{config.model_type!r} is multimodal and not supported", "export its text decoder and load that"
        )
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if any(getattr(text, name, None) for name in experts):
        raise UserError(f"{kind!r} is a mixture of experts and not supported yet", ADDING_A_MODEL)
    kinds = set(getattr(text, "layer_types", None) or ())
    if (unknown := kinds - {"full_attention", "sliding_attention"}) or not hasattr(
        text, "num_attention_heads"
    ):
        what = ", ".join(sorted(unknown)) or "recurrent"
        raise UserError(
            f"{kind!r} has layers of a kind whose state cannot be rolled back ({what})", ADDING_A_MODEL
        )
    if hf.get_output_embeddings() is None:
        raise UserError(
            f"{type(hf).__name__} has no language-model head", "load it with AutoModelForCausalLM"
        )


def context_of(config: Any) -> int | None:
    """Find how long a sequence may get.

    Rotary tables that are recomputed beyond the original length (dynamic, longrope) would give draft and
    verification other angles than plain decoding, so such models stop at the original length.
    """
    context: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            context = parameters.get("original_max_position_embeddings") or context
    return context


def windows_of(config: Any, family: Family, num_layers: int) -> list[int | None]:
    window: int | None = getattr(config, "sliding_window", None)
    if family.window == "all":
        return [window] * num_layers
    if family.window == "layer_types":
        types = config.layer_types[:num_layers]
        return [window if kind == "sliding_attention" else None for kind in types]
    return [None] * num_layers


def _kinds(config: Any, family: Family, num_layers: int) -> list[str]:
    types = getattr(config, "layer_types", None)
    return list(types[:num_layers]) if family.rotary_per_kind and types else ["full_attention"] * num_layers


class _Probe:
    """Stand in for a cache during the first check, to see what each layer would store."""

    def __init__(self) -> None:
        self.shapes: dict[int, KVShape] = {}

    def bind(self, step: Step) -> None:
        pass

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        heads, key_size, value_size = key.shape[1], key.shape[-1], value.shape[-1]
        self.shapes[layer_idx] = KVShape(heads, key_size, value_size, key.dtype, key.device)
        return key, value


@torch.inference_mode()
def check_parity(stack: HuggingFaceStack, hf: Any) -> None:
    """Compare eight tokens with the model's own forward; note on the way what each layer stores per token.

    Raises: UserError when the logits differ.
    """
    tokens = probe_tokens(stack.vocab_size, stack.device)
    reference = hf(input_ids=tokens, use_cache=False).logits
    probe: Any = _Probe()
    step = Step.span([0], [0], [8], stack.device, spill=8)
    stack.run(stack.embed(tokens, step), 0, stack.num_layers, step, probe)
    stack.kv_shapes = [probe.shapes[index] for index in range(stack.num_layers)]
    check_slices(stack, tokens, reference)


def probe_tokens(vocab_size: int, device: torch.device, length: int = 8) -> Tensor:
    """Make a prompt that hits no special pattern: [1, length]."""
    return ((torch.arange(length, device=device) * 7919 + 11) % vocab_size)[None]


def check_slices(stack: Stack, tokens: Tensor, reference: Tensor, other_kernels: bool = False) -> None:
    """Compare a stack's logits for tokens [1, n] with a reference [1, n, V]: whole, then sliced and cached.

    `other_kernels` in 16 bit: rounding then differs at every step, and a prompt of random tokens amplifies it at
    some positions, so it is the middle one of the positions that has to agree, and less closely.

    Raises: UserError when they differ beyond rounding.
    """
    middle, length = max(1, stack.num_layers // 2), tokens.shape[1]
    reference = reference.to(stack.device, torch.float32)
    prefill, plain, verification = (0, length - 3), (length - 3, 1), (length - 2, 2)
    for what, chunks in (
        ("its layers one by one", [(0, length)]),
        ("its layers sliced and cached", [prefill, plain, verification]),
    ):
        cache, logits = stack.new_cache(1, length), []
        for start, count in chunks:
            step = Step.span([0], [start], [count], stack.device, spill=length)
            h, _ = stack.run(stack.embed(tokens[:, start : start + count], step), 0, middle, step, cache)
            h, _ = stack.run(h, middle, stack.num_layers, step, cache)
            logits.append(stack.logits(h))
        _compare(stack, torch.cat(logits, 1), reference, what, other_kernels and stack.dtype.itemsize == 2)


def _compare(stack: Stack, ours: Tensor, reference: Tensor, what: str, loosely: bool) -> None:
    scale = reference.abs().max().item()
    differences = (ours - reference).abs().amax(-1).flatten()  # [n]
    difference = (differences.median() if loosely else differences.max()).item()
    difference = difference if ours.isfinite().all() else math.nan
    allowed = PARITY.get(stack.dtype, 1e-4) * (5 if loosely else 1)
    if not math.isfinite(scale):
        raise UserError(
            "the model gives NaN or infinite logits: its weights are damaged, or overflow in this dtype",
            "download it again, or try --dtype float32",
        )
    if not difference <= allowed * max(scale, 1e-6):  # also catches our own NaN
        raise UserError(
            f"model type {stack.model_type!r} fails the parity check: {what} give logits that differ "
            f"from the model's own by {difference:.3g} (their largest is {scale:.3g})",
            ADDING_A_MODEL,
        )


def load_model(path: Path, *, dtype: torch.dtype, device: str | torch.device, device_map: Any = None) -> Any:
    """Load a checked folder with `AutoModelForCausalLM` (safetensors only, no remote code)."""
    from transformers import AutoModelForCausalLM

    placement = {"device_map": device_map} if device_map is not None else {}
    try:
        hf, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **placement,
        )
        hf = hf.eval() if device_map is not None else hf.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"not enough memory on {device} for the weights of {path}", "use a 16-bit --dtype"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load {path} as a causal language model: {error}") from error
    if missing := sorted(report["missing_keys"]):  # transformers would fill them with random numbers
        raise UserError(
            f"{path} lacks {len(missing)} weights of {type(hf).__name__}, the first is {missing[0]}",
            "is the download complete, and config.json that of these weights?",
        )
    return hf
