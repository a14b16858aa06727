"""Any Hugging Face decoder behind the `Stack` contract: a table of attribute paths, no file per family.

The layers are Hugging Face's own modules, called one by one with our cache in place of theirs. Loading checks
that the slices reproduce the model's own logits (`check_parity`) and refuses a model where they do not, so a
wrong row of the table, or a new release that moves something, is an error and never a wrong answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from layerskip.errors import UserError
from layerskip.model.cache import Cache, KVShape
from layerskip.model.families import (
    FAMILIES,
    Family,
    context_of,
    device_of,
    parts_of,
    refuse_unsupported,
    tied,
    windows_of,
)
from layerskip.model.head import Head
from layerskip.model.parity import check_slices, probe_tokens
from layerskip.model.stack import Counters, Stack
from layerskip.model.step import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


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

    def _run(
        self, h: Tensor, layers: range, step: Step, cache: Cache, taps: Sequence[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        tapped = {}
        for index in layers:
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
        h = self.finished(h)
        out = self.head(h) if head is None else head.project(h)
        if self.softcap is not None:
            out = torch.tanh(out / self.softcap) * self.softcap
        return out.to(self.device, torch.float32)  # [..., size]

    def finished(self, h: Tensor) -> Tensor:
        for module in self.finish:
            h = module(h)
        return h

    def reduced_head(self, ids: Sequence[int], weight: Tensor | None = None) -> Head:
        """Keep rows of the head, see `Stack`. Raises: UserError for a head that is offloaded."""
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


def _num_bytes(*modules: Any) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def _kinds(config: Any, family: Family, num_layers: int) -> list[str]:
    types = getattr(config, "layer_types", None)
    return list(types[:num_layers]) if family.rotary_per_kind and types else ["full_attention"] * num_layers


class _Probe:
    """Stand in for a cache during the first check, to see what each layer would store."""

    def __init__(self) -> None:
        self.shapes: dict[int, KVShape] = {}

    def bind(self, step: Step) -> None:
        pass

    def write_finals(self, h: Tensor, step: Step) -> None:
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
