"""A layer of the native decoder: norms and fused products, taken from a Hugging Face layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from layerskip.model.native.linear import Linear

    Pack = Callable[[str, Tensor, Tensor | None], Linear]
    """Lay out the weight of this name; biases stand beside it."""


ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""By Hugging Face's name: ours, of `GATES` in kernels.py and below."""
BY_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def activation_of(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


@dataclass
class Norm:
    """RMS norm in torch; a gain in float32 beside 16-bit states is Gemma's, which multiplies before rounding."""

    gain: Tensor  # [D]
    eps: float

    def __post_init__(self) -> None:
        self._signs = torch.tensor([[1.0], [-1.0]], dtype=self.gain.dtype, device=self.gain.device)
        self._gains = self.gain.expand(2, -1).contiguous()  # [2, D]

    def __call__(self, h: Tensor) -> Tensor:
        """Shapes: [..., D] -> [..., D]."""
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
    out: Linear  # its inputs in the order (place in their group, key head)
    before_mlp: Norm
    gate_up: Linear
    down: Linear
    window: int | None
    rotary: bool

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    @classmethod
    def of(cls, module: Any, window: int | None, kv_heads: int, pack: Pack, name: str) -> Layer:
        """Fuse and pack a Hugging Face layer's weights: copies, so that the layer can be emptied."""
        attention, mlp = module.self_attn, module.mlp

        def fused(into: str, owner: Any, whole: str, *parts: str) -> Linear:
            linears = [getattr(owner, whole)] if hasattr(owner, whole) else [getattr(owner, n) for n in parts]
            biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
            weight = torch.cat([linear.weight.detach() for linear in linears])
            return pack(f"{name}.{into}", weight, torch.cat(biases) if biases else None)

        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        out = regrouped(attention.o_proj.weight, attention.head_dim, kv_heads)
        return cls(
            Norm.of(module.input_layernorm),
            fused("qkv", attention, "qkv_proj", "q_proj", "k_proj", "v_proj"),
            None if q_norm is None else Norm.of(q_norm),
            None if k_norm is None else Norm.of(k_norm),
            pack(f"{name}.out", out, attention.o_proj.bias),
            Norm.of(module.post_attention_layernorm),
            fused("gate_up", mlp, "gate_up_proj", "gate_proj", "up_proj"),
            pack(f"{name}.down", mlp.down_proj.weight, mlp.down_proj.bias),
            window,
            bool(getattr(attention, "use_rope", True)),
        )


def regrouped(weight: Tensor, size: int, kv_heads: int) -> Tensor:
    """Reorder the inputs of the output projection from (key head, place in its group) to (place, key head).

    That is how attention's result lies in memory when the heads that share keys are rows of one block.
    Shapes: [D, heads d] -> [D, heads d].
    """
    out, width = weight.shape
    return (
        weight.detach()
        .view(out, kv_heads, width // (kv_heads * size), size)
        .transpose(1, 2)
        .reshape(out, width)
    )
