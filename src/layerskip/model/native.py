"""The fast decoder for Llama-shaped families, behind the same contract as the Hugging Face stack.

One class; families differ by what their modules have (biases, per-head norms, windows, layers without rotary
angles, a scaled embedding). Query, key and value are one product, gate and up another; residuals are added inside
the products; rotary tables are computed once; keys and values are written in place and read up to the length in
use; query heads that share keys are folded into rows, so keys are never expanded.

A stack of these takes its weights from a loaded Hugging Face model and, when told to, empties that model as it
goes. `native_reason` says why a model cannot be taken; a tiny random model of the same kind is compared with
Hugging Face's own code once per process before any real one is trusted.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from layerskip.errors import UserError
from layerskip.model import huggingface as hfs
from layerskip.model.cache import Cache, KVShape
from layerskip.model.head import Head
from layerskip.model.linear import SINGLE_ROW, Linear, Packed, packed, packs, require_quantizable, row_exact
from layerskip.model.stack import Counters, Stack, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma")
SLOTS = 32  # lengths read are rounded up to this where rows must be exact; what is read too much is masked
ROWS_PER_CALL = 32  # query rows of one attention call where rows must be exact
MOST_EXACT_ROWS = 32  # positions of one call that are kept exact: a verification, not a prompt
_gelu_tanh: Callable[[Tensor], Tensor] = lambda x: F.gelu(x, approximate="tanh")  # noqa: E731
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
}


@dataclass
class Norm:
    """RMS norm; a gain in float32 beside 16-bit states is Gemma's, which multiplies before rounding."""

    gain: Tensor  # [D]
    eps: float

    def __post_init__(self) -> None:
        self._signs = torch.tensor([[1.0], [-1.0]], dtype=self.gain.dtype, device=self.gain.device)
        self._gains = self.gain.expand(2, -1).contiguous()  # [2, D]

    def __call__(self, h: Tensor) -> Tensor:
        if self.gain.dtype != h.dtype:
            return F.rms_norm(h.float(), self.gain.shape, self.gain, self.eps).to(h.dtype)
        if h.device.type != "cpu":
            return F.rms_norm(h, self.gain.shape, self.gain, self.eps)
        # On the CPU torch's RMS norm is ten operations, its layer norm is one: that of (h, -h), whose mean is 0.
        both = h.unsqueeze(-2) * self._signs  # [..., 2, D]
        return torch.native_layer_norm(both, self._gains.shape, self._gains, None, self.eps)[0].select(-2, 0)

    @classmethod
    def of(cls, module: Any) -> Norm:
        gain = module.weight.detach()
        if type(module).__name__.startswith("Gemma"):
            return cls(1.0 + gain.float() if gain.dtype.itemsize == 2 else 1.0 + gain, module.eps)
        return cls(gain.clone(), module.variance_epsilon)


@dataclass
class Layer:
    """Weights of one layer, fused."""

    before_attention: Norm
    qkv: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    out: Linear
    before_mlp: Norm
    gate_up: Linear
    down: Linear
    window: int | None
    rotary: bool

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.out, self.gate_up, self.down


class NativeStack(Stack):
    """Run a Llama-shaped decoder on fused, packed weights. Build it with `native_stack`."""

    name = "native"

    def __init__(self, hf: Any, *, quantize: str | None = None, empty: bool = False) -> None:
        config = hf.config.get_text_config()
        _, modules, self._rotary, finish = hfs.parts_of(hf, hfs.FAMILIES[config.model_type])
        self.model_type: str = config.model_type
        self.num_layers, self.width = len(modules), config.hidden_size
        self.dtype, self.device = hf.dtype, hfs.device_of(hf)
        self.context = hfs.context_of(config)
        self.quantize = quantize
        self.counters = Counters()
        attention = modules[0].self_attn
        self.heads, self.head_size = config.num_attention_heads, attention.head_dim
        self.kv_heads = config.num_key_value_heads
        self.scale: float = attention.scaling
        self.activation = ACTIVATIONS[_activation(config)]
        table, head = hf.get_input_embeddings(), hf.get_output_embeddings()
        self.table: Tensor = table.weight.detach()
        self.embed_scale = getattr(table, "scalar_embed_scale", None)
        self.vocab_size = head.weight.shape[0]
        self.tied = head.weight.data_ptr() == self.table.data_ptr()
        windows = hfs.windows_of(config, hfs.FAMILIES[config.model_type], self.num_layers)
        self.layers: list[Layer] = []
        for module, window in zip(modules, windows, strict=True):
            self.layers.append(_layer(module, window, self.kv_heads, quantize))
            if empty:
                _empty(module)
        self.finish = Norm.of(finish[0])
        self.head = packed(head.weight, head.bias, quantize)
        if self.head_aliases_table:
            self.table = head.weight.detach()
        elif empty and not self.tied:
            _empty(head)
        shape = KVShape(self.kv_heads, self.head_size, self.head_size, self.dtype, self.device)
        self.kv_shapes = [shape] * self.num_layers
        self._tables: tuple[Tensor, Tensor] | None = None
        self._order: Tensor | None = None
        self.single_row = SINGLE_ROW if isinstance(self.head, Packed) else 1
        self.padded_group = -(-self.heads // self.kv_heads // 4) * 4
        beyond = self.padded_group - self.heads // self.kv_heads  # rows read beyond the last query head
        self.row_exact = (
            packs(self.dtype, self.device)
            and beyond <= 2 * self.kv_heads
            and row_exact([*self.layers[0].linears, self.head], self.dtype, self.single_row)
        )

    # -- sizes -----------------------------------------------------------------------------------------------

    @property
    def head_aliases_table(self) -> bool:
        """Whether the head reads the embedding table itself (tied and not packed)."""
        return self.tied and getattr(self.head, "weight", None) is not None and self.quantize is None

    @property
    def layer_bytes(self) -> int:
        return sum(linear.num_bytes for linear in self.layers[0].linears)

    @property
    def head_bytes(self) -> int:
        return self.head.num_bytes

    @property
    def table_bytes(self) -> int:
        return 0 if self.head_aliases_table else self.table.numel() * self.table.element_size()

    # -- the contract ----------------------------------------------------------------------------------------

    def embed(self, tokens: Tensor, step: Step) -> Tensor:
        h = F.embedding(tokens, self.table)
        if self.embed_scale is not None:
            h = h * torch.tensor(self.embed_scale, dtype=h.dtype, device=h.device)
        return h

    def run(
        self, h: Tensor, start: int, stop: int, step: Step, cache: Cache, taps: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        if start == stop:
            return h, {}
        cache.bind(step)
        self.counters.count_run(start, stop, step)
        rotary = self._rotation(step, cache)
        single = h.shape[:2] == (1, 1)
        if single:
            h = h.repeat(1, self.single_row, 1)
        tapped = {}
        for index in range(start, stop):
            layer = self.layers[index]
            h = self._attend(layer, index, h, step, cache, rotary)
            gate, up = layer.gate_up(layer.before_mlp(h)).chunk(2, -1)  # [B, T, width of the MLP] each
            h = layer.down.added_to(h, self.activation(gate) * up)
            if index + 1 in taps:
                tapped[index + 1] = h[:, :1] if single else h
        return h[:, :1] if single else h, tapped

    def _attend(
        self, layer: Layer, index: int, h: Tensor, step: Step, cache: Cache, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Add one layer's attention to h; write its keys and values. Shapes: [B, T, D] -> [B, T, D]."""
        heads, kv_heads = self.heads, self.kv_heads
        qkv = layer.qkv(layer.before_attention(h))  # [B, T, (heads + 2 H) d]
        qkv = qkv[:, : step.width].view(-1, step.width, heads + 2 * kv_heads, self.head_size)
        if layer.q_norm is not None and layer.k_norm is not None:
            query, key, value = torch.split(qkv, [heads, kv_heads, kv_heads], 2)
            qkv = torch.cat((layer.q_norm(query), layer.k_norm(key), value), 2)
        if layer.rotary:
            cos, signed_sin = rotary  # ones and zeros for the values, so that one product turns all heads
            qkv = torch.addcmul(qkv * cos, self._swapped(qkv), signed_sin)
        cache.write_both(index, qkv[:, :, heads:].transpose(1, 2), step)
        mixed = self._mixed(qkv, index, step, cache, layer.window)
        return layer.out.added_to(
            h, mixed if mixed.shape[1] == h.shape[1] else mixed.repeat(1, h.shape[1], 1)
        )

    def _mixed(self, qkv: Tensor, index: int, step: Step, cache: Cache, window: int | None) -> Tensor:
        """Attend over the slots in use. Shapes: qkv [B, T, heads + 2 H, d] -> [B, T, heads d].

        Query heads that share keys are rows of one block, so keys are never expanded; the result's heads are in
        the order (place in their group, key head), which is how `out` was laid out. Where rows must be exact,
        the kernel is given what makes it sum every row alike (tried with torch 2.11 to 2.13): each position's
        rows padded to a multiple of four by reading on into the next heads, at most 32 rows a call, and a number
        of slots that is a multiple of 32.
        """
        rows, width, _, size = qkv.shape
        group, heads = self.heads // self.kv_heads, self.kv_heads
        exact = self.row_exact and width <= MOST_EXACT_ROWS
        padded = self.padded_group if exact else group
        most = max(1, ROWS_PER_CALL // padded) if exact else width
        keys, values = cache.read(index, step, self._length(step))
        masks = self._masks(step, window, padded, most)
        along = qkv.stride()
        strides = (along[0], group * size, along[1], size, 1)
        query = qkv.as_strided((rows, heads, width, padded, size), strides, qkv.storage_offset())
        blocks = [query] if most >= width else torch.split(query, most, 2)
        mixed = [
            F.scaled_dot_product_attention(
                block.reshape(rows, heads, -1, size), keys, values, attn_mask=mask, scale=self.scale
            ).transpose(1, 2)  # [B, T' g, H, d], as the kernel writes it
            for block, mask in zip(blocks, masks, strict=True)
        ]
        whole = mixed[0] if len(mixed) == 1 else torch.cat(mixed, 1)
        if padded != group:
            whole = whole.view(rows, width, padded, heads, size)[:, :, :group]
        return whole.reshape(rows, width, -1)

    def logits(self, h: Tensor, head: Head | None = None) -> Tensor:
        project = self.head if head is None else head.project
        size = self.vocab_size if head is None else head.size
        self.counters.head_rows[size] += h[..., 0].numel()
        h = self.finish(h)
        if h.numel() == self.width and self.single_row > 1:
            logits = project(h.view(1, -1).repeat(self.single_row, 1))[:1].view(*h.shape[:-1], size)
        else:
            logits = project(h)
        return logits.float()  # [..., size]

    def reduced_head(self, ids: Sequence[int]) -> Head:
        index = torch.tensor(list(ids), device=self.device)
        if self.tied and self.quantize is None:
            return Head(index, packed(self.table[index]))
        return Head(index, self.head.rows(index))

    def new_cache(self, rows: int, capacity: int) -> Cache:
        return Cache(self.kv_shapes, rows, capacity, SLOTS if self.row_exact else 1)

    # -- what a step shares between its layers ---------------------------------------------------------------

    def _length(self, step: Step) -> int:
        return -(-step.kv_len // SLOTS) * SLOTS if self.row_exact else step.kv_len

    def _masks(self, step: Step, window: int | None, group: int, most: int) -> list[Tensor | None]:
        """Build, once per step and window, what is added to the scores: 0 or -inf, None where all is seen.

        Shapes: one [B, 1, T' group, n] for every `most` positions ([B, 1, 1, n] for one position).
        """
        key = ("native masks", window, group)
        if key not in step.shared:
            length, width = self._length(step), step.width
            masks: list[Tensor | None] = [None] * -(-width // most)
            if not (step.sees_everything(window) and length == step.kv_len):
                seen = step.mask(window)[:, 0]  # [B, T, kv_len]
                added = torch.full(
                    (*seen.shape[:2], length), -torch.inf, dtype=self.dtype, device=seen.device
                )
                added[..., : step.kv_len].masked_fill_(seen, 0.0)
                added = added[:, None] if width == 1 else added.repeat_interleave(group, 1)[:, None]
                masks = list(torch.split(added, most * group, 2))
            step.shared[key] = masks
        shared: list[Tensor | None] = step.shared[key]
        return shared

    def _rotation(self, step: Step, cache: Cache) -> tuple[Tensor, Tensor]:
        """Look the step's rotary angles up: cosines and signed sines for all heads, [B, T, heads + 2 H, d]."""
        if "native rotation" not in step.shared:
            if self._tables is None or len(self._tables[0]) < cache.capacity:
                self._tables = self._rotary_tables(cache.capacity)
            turned, kept = self.heads + self.kv_heads, self.kv_heads
            cos, sin = (table[step.positions][:, :, None] for table in self._tables)  # [B, T, 1, d]
            ones, zeros = torch.ones_like(cos), torch.zeros_like(sin)
            step.shared["native rotation"] = (
                torch.cat((cos.expand(-1, -1, turned, -1), ones.expand(-1, -1, kept, -1)), 2),
                torch.cat((sin.expand(-1, -1, turned, -1), zeros.expand(-1, -1, kept, -1)), 2),
            )
        rotation: tuple[Tensor, Tensor] = step.shared["native rotation"]
        return rotation

    def _rotary_tables(self, capacity: int) -> tuple[Tensor, Tensor]:
        """Compute the angles of positions [0, n), n >= capacity, with Hugging Face's own module: [n, d] each.

        The first half of the sines is negative: x cos + swapped(x) sin then turns both halves. Dimensions that a
        family leaves alone (partial rotary) get 1 and 0.
        """
        length = 1 << max(6, (capacity - 1).bit_length())
        positions = torch.arange(length, device=self.device)[None]
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        cos, sin = (table[0] for table in self._rotary(like, positions))  # [n, r]
        half, rest = cos.shape[-1] // 2, self.head_size - cos.shape[-1]
        self._order = None if rest == 0 else torch.arange(self.head_size, device=self.device)
        if self._order is not None:
            self._order[: 2 * half] = self._order[: 2 * half].roll(half)
        return F.pad(cos, (0, rest), value=1.0), F.pad(
            torch.cat((-sin[:, :half], sin[:, half:]), -1), (0, rest)
        )

    def _swapped(self, x: Tensor) -> Tensor:
        """Swap the halves of every head's rotary dimensions. Shapes: [..., d] -> [..., d]."""
        return x.roll(self.head_size // 2, -1) if self._order is None else x.index_select(-1, self._order)


# -- taking a Hugging Face model ----------------------------------------------------------------------------------


def _layer(module: Any, window: int | None, kv_heads: int, quantize: str | None) -> Layer:
    attention, mlp = module.self_attn, module.mlp

    def fused(owner: Any, whole: str, parts: tuple[str, ...]) -> Linear:
        linears = [getattr(owner, whole)] if hasattr(owner, whole) else [getattr(owner, n) for n in parts]
        weight = torch.cat([linear.weight.detach() for linear in linears])
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        return packed(weight, torch.cat(biases) if biases else None, quantize)

    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return Layer(
        Norm.of(module.input_layernorm),
        fused(attention, "qkv_proj", ("q_proj", "k_proj", "v_proj")),
        None if q_norm is None else Norm.of(q_norm),
        None if k_norm is None else Norm.of(k_norm),
        packed(
            regrouped(attention.o_proj.weight, attention.head_dim, kv_heads), attention.o_proj.bias, quantize
        ),
        Norm.of(module.post_attention_layernorm),
        fused(mlp, "gate_up_proj", ("gate_proj", "up_proj")),
        packed(mlp.down_proj.weight, mlp.down_proj.bias, quantize),
        window,
        bool(getattr(attention, "use_rope", True)),
    )


def regrouped(weight: Tensor, size: int, kv_heads: int) -> Tensor:
    """Reorder the inputs of the output projection from (key head, place in its group) to (place, key head)."""
    out, width = weight.shape
    return (
        weight.detach()
        .view(out, kv_heads, width // (kv_heads * size), size)
        .transpose(1, 2)
        .reshape(out, width)
    )


def _empty(module: Any) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def native_reason(hf: Any, placed: bool = False) -> str | None:
    """Say why this model cannot run natively, or None when it can. `placed`: spread over devices by accelerate."""
    config = hf.config.get_text_config()
    if config.model_type not in FAMILIES:
        return f"model type {config.model_type!r} is not among {', '.join(FAMILIES)}"
    if placed:
        return "the model is spread over devices"
    if _activation(config) not in ACTIVATIONS:
        return f"activation {_activation(config)!r} is not among {', '.join(ACTIVATIONS)}"
    if hf.config._attn_implementation != "sdpa":
        return "another attention implementation than sdpa was asked for"
    key = config.to_json_string(use_diff=False)
    if key not in _verdicts:
        try:
            _compare_tiny(config, type(hf))
            _verdicts[key] = None
        except (UserError, RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            _verdicts[key] = f"a tiny model of its kind does not give what Hugging Face's does ({error})"
    return _verdicts[key]


_verdicts: dict[str, str | None] = {}  # by configuration, for this process


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
    """Compare with Hugging Face's code on a random model of this kind, past its window. Raises: UserError."""
    small = shrunken(config)
    small._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = model_class(small).float().eval()
        for parameter in hf.parameters():  # gains near one, biases and all else visible
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.1 * noise)
    tokens = hfs.probe_tokens(hf, length=12)
    hfs.check_slices(NativeStack(hf), tokens, hf(input_ids=tokens, use_cache=False).logits)


def native_stack(hf: Any, *, quantize: str | None = None) -> NativeStack:
    """Take the weights of a Hugging Face model, emptying it, and check the result on eight tokens.

    Raises: UserError when the result differs from the model beyond rounding (int8 is not compared: it rounds
    its weights).
    """
    require_quantizable(quantize, hf.dtype, hfs.device_of(hf))
    tokens = hfs.probe_tokens(hf)
    with torch.inference_mode():
        reference = hf(input_ids=tokens, use_cache=False).logits.float()
        stack = NativeStack(hf, quantize=quantize, empty=True)
        if quantize is None:
            hfs.check_slices(stack, tokens, reference, other_kernels=True)
    stack.counters.reset()
    return stack
