"""The fast decoder for Llama-shaped families, behind the same contract as the Hugging Face stack.

One class; families differ by what their modules have (biases, per-head norms, windows, layers without rotary
angles, a scaled embedding). Query, key and value are one product, gate and up another; residuals are added inside
the products; the regions between them are compiled on the CPU where a compiler is at hand. Build it with
`native_load.native_stack`, which checks the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from layerskip.model.cache import Cache, KVShape
from layerskip.model.families import FAMILIES, context_of, device_of, parts_of, tied, windows_of
from layerskip.model.head import Head
from layerskip.model.native.attention import MOST_COMPILED, MOST_EXACT_ROWS, SLOTS, Attention, repeated
from layerskip.model.native.bfloat16 import Bfloat16
from layerskip.model.native.chain import Chain
from layerskip.model.native.formats import FORMATS, packed
from layerskip.model.native.kernels import SUFFIXES, kernels
from layerskip.model.native.layer import ACTIVATIONS, BY_TORCH, Layer, Norm, activation_of
from layerskip.model.native.linear import Linear, Plain, row_exact
from layerskip.model.native.slices import Slices
from layerskip.model.parity import probe_tokens
from layerskip.model.stack import Counters, Stack
from layerskip.model.step import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


HEAD = "head"
DRAFTS = "int8"  # what weights are held in that draft and do not verify, where there is a kernel for it


class NativeStack(Stack):
    """Run a Llama-shaped decoder on fused, packed weights.

    `source` gives weights to a model that has none, and lays them out; without one they are taken from it. `empty`
    frees each Hugging Face layer once it is taken. `compiled` False keeps to torch's operations.
    Exact: with `row_exact`, the bits of a token do not depend on how many a call brings (tests/test_row_exact.py).
    """

    name = "native"

    def __init__(
        self,
        hf: Any,
        *,
        quantize: str | None = None,
        empty: bool = False,
        compiled: bool = True,
        source: Source | None = None,
    ) -> None:
        source, empty = source or Source(quantize, compiled), empty or source is not None
        config = hf.config.get_text_config()
        family = FAMILIES[config.model_type]
        _, modules, rotary, finish = parts_of(hf)
        self.model_type, self.num_layers, self.width = config.model_type, len(modules), config.hidden_size
        self.dtype, self.device = hf.dtype, device_of(hf)
        self.context = context_of(config)
        self.quantize = quantize = source.quantize
        self.counters = Counters()
        table, head = hf.get_input_embeddings(), hf.get_output_embeddings()
        tied_head = table.weight is head.weight
        self.table = source.table(table)
        scale = getattr(table, "scalar_embed_scale", None)  # rounded to the dtype, as Hugging Face does
        self.embed_scale = None if scale is None else torch.tensor(scale, dtype=self.dtype).item()
        self.vocab_size = head.weight.shape[0]
        self.tied = tied_head or tied(table.weight, head.weight)
        attention, kv_heads = modules[0].self_attn, config.num_key_value_heads
        self.layers: list[Layer] = []
        windows = windows_of(config, family, self.num_layers)
        for index, (module, window) in enumerate(zip(modules, windows, strict=True)):
            source.fill(module)
            self.layers.append(Layer.of(module, window, kv_heads, source.pack, f"layers.{index}"))
            if empty:
                _empty(module)
        source.fill(finish[0])
        self.finish = Norm.of(finish[0])
        source.fill(head)
        self.head = source.pack(HEAD, table.weight if tied_head else head.weight, head.bias)
        if empty and not self.tied:
            _empty(head)
        self.layer_bytes = sum(linear.num_bytes for linear in self.layers[0].linears)
        self.head_bytes = self.head.num_bytes
        aliased = self.tied and isinstance(self.head, Plain)
        self.table_bytes = 0 if aliased else self.table.numel() * self.table.element_size()
        shape = KVShape(kv_heads, attention.head_dim, attention.head_dim, self.dtype, self.device)
        self.kv_shapes = [shape] * self.num_layers
        self.kernels = (
            kernels() if compiled and self.device.type == "cpu" and self.dtype in SUFFIXES else None
        )
        self.ragged = self.kernels is not None
        if self.kernels is not None:
            self.prefill_chunk = MOST_COMPILED
        few = self.kernels is not None and self.dtype in FORMATS[DRAFTS].dtypes
        self.draft_format = quantize or (DRAFTS if few else None)
        self.activation = ACTIVATIONS[activation_of(config)]
        self.attention = Attention(
            config.num_attention_heads, kv_heads, attention.head_dim, attention.scaling, self.dtype, self.device,
            rotary, self.context, exact=False, kernels=self.kernels,
        )  # fmt: skip
        self.slices = Slices.of(
            self.layers, self.attention, self.kernels if self.activation == "silu" else None
        )
        linears = [*self.layers[0].linears, self.head]
        self.least_rows = max(linear.least_rows for linear in linears)
        self.attention.exact = (
            all(linear.can_be_exact for linear in linears)
            and self.attention.can_be_exact
            and row_exact(linears, self.dtype)
        )
        self.row_exact = self.attention.exact = self.attention.exact and self._is_row_exact()

    @torch.inference_mode()
    def _is_row_exact(self) -> bool:
        """Try the first layers and the head whole: nine positions in calls of several sizes against one by one."""
        tokens = probe_tokens(self.vocab_size, self.device, length=9)
        depth, outputs = min(2, self.num_layers), []
        for counts in ([1] * 9, [9], [2, 3, 4], [5, 4], [7, 2], [8, 1]):
            cache, start, parts = Cache(self.kv_shapes, 1, 9, SLOTS), 0, []
            for count in counts:
                step = Step.span([0], [start], [count], self.device, spill=9)
                h = self.embed(tokens[:, start : start + count], step)
                parts.append(self.logits(self.run(h, 0, depth, step, cache)[0]))
                start += count
            outputs.append(torch.cat(parts, 1))
        self.counters.reset()
        return all(torch.equal(outputs[0], other) for other in outputs[1:])

    def embed(self, tokens: Tensor, step: Step) -> Tensor:
        h = F.embedding(tokens, self.table)
        return h if self.embed_scale is None else h * self.embed_scale

    def _run(
        self, h: Tensor, layers: range, step: Step, cache: Cache, taps: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        if self.slices is not None and step.width <= MOST_COMPILED:
            return self._run_slices(self.slices, h, layers, step, cache, taps)
        live, padded = step.width, 0
        if h.shape[0] == 1 and live < self.least_rows:
            h, padded = repeated(h, self.least_rows), self.least_rows  # [1, 4, D]: see `Packed`
        tapped = {}
        for index in layers:
            layer = self.layers[index]
            h = layer.out.added_to(h, self._attended(layer, index, h, step, cache, padded))
            gate_up = layer.gate_up(self._normed(layer.before_mlp, h, live if padded else None))
            h = layer.down.added_to(h, self._activated(gate_up, live if padded else None))
            if index + 1 in taps:
                tapped[index + 1] = h[:, : step.width]
        return h[:, : step.width], tapped

    @staticmethod
    def _run_slices(
        slices: Slices, h: Tensor, layers: range, step: Step, cache: Cache, taps: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Do what `_run` says in as few calls as there are states to tap."""
        tapped, start = {}, layers.start
        for stop in sorted({*taps, layers.stop}):
            h = slices(h, range(start, stop), step, cache)
            tapped[stop], start = h, stop
        return h, {k: tapped[k] for k in taps}

    def _attended(self, layer: Layer, index: int, h: Tensor, step: Step, cache: Cache, padded: int) -> Tensor:
        """Attend in one layer; write its keys and values. Shapes: h [B, T', D] -> [B, T', heads d]."""
        heads, kv_heads, width = self.attention.heads, self.attention.kv_heads, step.width
        normed = self._normed(layer.before_attention, h, width if padded else None)
        qkv = layer.qkv(normed)  # [B, T', (heads + 2 H) d]
        qkv = qkv[:, :width].view(-1, width, heads + 2 * kv_heads, self.attention.size)
        if layer.q_norm is not None and layer.k_norm is not None:
            query, key, value = torch.split(qkv, [heads, kv_heads, kv_heads], 2)
            qkv = torch.cat((self._normed(layer.q_norm, query), self._normed(layer.k_norm, key), value), 2)
        return self.attention(qkv, index, step, cache, layer.window, layer.rotary, padded)

    def _normed(self, norm: Norm, h: Tensor, live: int | None = None) -> Tensor:
        """Shapes: [..., D] -> [..., D]; rows behind the first `live` are padding."""
        if self.kernels is not None and norm.gain.dtype == h.dtype:
            return self.kernels.norm(h, norm.gain, norm.eps, live)
        return norm(h)

    def _activated(self, gate_up: Tensor, live: int | None) -> Tensor:
        """Shapes: [B, T', 2 F] -> [B, T', F], F the width of the MLP."""
        if self.kernels is not None:
            return self.kernels.glu(self.activation, gate_up, live)
        gate, up = gate_up.chunk(2, -1)
        if self.attention.exact and gate.shape[1] <= MOST_EXACT_ROWS:  # torch's bits depend on where rows lie
            rows = [BY_TORCH[self.activation](row.contiguous()) for row in gate.flatten(0, 1)]
            return torch.stack(rows).view_as(gate) * up
        return BY_TORCH[self.activation](gate) * up

    def logits(self, h: Tensor, head: Head | None = None) -> Tensor:
        size, project = (self.vocab_size, self.head) if head is None else (head.size, head.project)
        shape, rows = h.shape[:-1], h[..., 0].numel()
        self.counters.head_rows[size] += rows
        if rows < self.least_rows:
            h = repeated(h.reshape(1, rows, -1), self.least_rows)
        return project(self._normed(self.finish, h)).float().view(-1, size)[:rows].view(*shape, size)

    def finished(self, h: Tensor) -> Tensor:
        return self._normed(self.finish, h)

    def best(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return super().best(logits) if self.kernels is None else self.kernels.best(logits)

    def chain(self, head: Head | None) -> Chain | None:
        return Chain.of(head, self.table, self.embed_scale, self.finish, self.counters)

    def products(self) -> None:
        """Run every matrix product of a plain step and nothing else: the floor of its time."""
        inputs = {
            size: torch.zeros(1, self.least_rows, size, dtype=self.dtype, device=self.device)
            for linear in (*self.layers[0].linears, self.head)
            for size in (linear.in_features, linear.out_features)
        }
        for layer in self.layers:
            for linear in (layer.qkv, layer.gate_up):
                linear(inputs[linear.in_features])
            for linear in (layer.out, layer.down):
                linear.added_to(inputs[linear.out_features], inputs[linear.in_features])
        self.head(inputs[self.head.in_features])

    def reduced_head(self, ids: Sequence[int], weight: Tensor | None = None) -> Head:
        index = torch.tensor(list(ids), device=self.device)
        if weight is not None:
            rows = packed(weight.to(self.device, self.dtype), quantize=self.draft_format, head=True)
        elif self.tied and self.quantize is None:
            rows = packed(self.table[index], quantize=self.draft_format, head=True)
        else:
            rows = self.head.rows(index)
            if self.quantize is None and isinstance(rows, Bfloat16):
                rows = packed(rows.whole, rows.bias, self.draft_format, head=True)
        return Head(index, rows, rows.num_bytes)

    def new_cache(self, rows: int, capacity: int) -> Cache:
        return Cache(self.kv_shapes, rows, capacity, SLOTS if self.row_exact else 1)


class Source:
    """Where a stack's weights come from: here the model itself."""

    def __init__(self, quantize: str | None = None, compiled: bool = True) -> None:
        self.quantize, self._compiled = quantize, compiled

    def fill(self, module: Any) -> None:
        """Give a module what it lacks."""

    def table(self, module: Any) -> Tensor:
        weight: Tensor = module.weight.detach()
        return weight

    def pack(self, name: str, weight: Tensor, bias: Tensor | None) -> Linear:
        """Lay a weight out. Shapes: weight [out, in], bias [out]."""
        return packed(weight, bias, self.quantize, head=name == HEAD, compiled=self._compiled)


def _empty(module: Any) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
