"""The loss at several exits as one autograd function, flat in memory.

The logits of all exits never stand in memory together: tokens come in chunks, inside a chunk the exits follow
one another, and the gradient of the head has a single accumulator. Gradients are worked out in the forward
pass, where the logits are, and handed over in the backward pass.

Source: LayerSkip (arXiv 2404.16710), eq. 3; the KL variants are ours. Accumulating chunk by chunk in the forward
pass is what fused cross entropies of the field do for one exit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Logits held at a time (float32). On a CPU more does not help; a GPU wants larger products.
CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}


@dataclass(frozen=True)
class Sums:
    """What the exits of one call did, summed over its tokens; columns in the order of `exits`."""

    exits: tuple[int, ...]
    ce: Tensor  # [exits] cross entropy with the labels, nats
    kl: Tensor  # [exits] KL(final || exit), nats; zero where the loss does not need it
    agreement: Tensor  # [exits] tokens whose argmax equals the final layer's
    tokens: int


def multi_exit_loss(
    states: dict[int, Tensor],
    labels: Tensor,
    weights: dict[int, float],
    head: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    exit_loss: str = "ce",
    divisor: Tensor | int | None = None,
    reference: Tensor | None = None,
) -> tuple[Tensor, Sums]:
    """Weighted loss of several exits over the same tokens, and each exit's figures at no extra cost.

    `states` holds, by exit layer, what the head reads (after the final norm); the largest exit is the final layer:
    it is trained by cross entropy and teaches the others, detached, where `exit_loss` has `kl`. `reference` is what
    the head read at the final layer before training: the final layer then learns that law, not the labels.
    Shapes: states and reference [N, D], labels [N] of valid token ids, head [V, D], bias [V].
    Units: nats; the sum over tokens divided by `divisor` (N without one), times the weights.
    """
    order = sorted(states, reverse=True)  # the final layer first: the others are compared with it
    num = max(1, len(labels)) if divisor is None else divisor
    config = _Config(tuple(weights.get(k, 0.0) for k in order), softcap, exit_loss)
    apply: Any = _MultiExit.apply
    loss, figures = apply(config, labels, num, head, bias, reference, *(states[k] for k in order))
    back = [order.index(k) for k in sorted(order)]
    ce, kl, agreement = figures[:, back]
    return loss, Sums(tuple(sorted(order)), ce, kl, agreement, len(labels))


@dataclass(frozen=True)
class _Config:
    weights: tuple[float, ...]
    softcap: float | None
    exit_loss: str


class _MultiExit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        config: _Config,
        labels: Tensor,
        divisor: Tensor | int,
        head: Tensor,
        bias: Tensor | None,
        reference: Tensor | None,
        *states: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device = head.device
        dtype = (
            torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else head.dtype
        )
        wants_states = any(ctx.needs_input_grad[6:])
        with torch.autocast(device.type, enabled=False):
            work = _Work(config, head.detach().to(dtype), bias, ctx.needs_input_grad[3], wants_states)
            rows = max(1, CHUNK.get(device.type, CHUNK["cuda"]) // head.shape[0])
            d_states = [torch.empty_like(x) if wants_states else None for x in states]
            figures = torch.zeros(3, len(states), device=device, dtype=torch.float32)
            for start in range(0, len(labels), rows):
                part = slice(start, start + rows)
                work.chunk(
                    [x[part] for x in states],
                    labels[part],
                    figures,
                    [None if d is None else d[part] for d in d_states],
                    None if reference is None else reference[part],
                )
            weights = torch.tensor(config.weights, device=device)
            ce, kl = figures[0], figures[1]
            parts = {"ce": ce, "kl": kl, "ce+kl": ce + kl}[config.exit_loss]
            last = ce[:1] if reference is None else kl[:1]
            loss = (torch.cat([last, parts[1:]]) * weights).sum() / divisor
        ctx.save_for_backward(
            *(d for d in d_states if d is not None), *(g for g in (work.d_head, work.d_bias) if g is not None)
        )
        ctx.layout = (len(states) if wants_states else 0, work.d_head is not None, work.d_bias is not None)
        ctx.divisor, ctx.dtypes = divisor, (head.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(figures)
        return loss, figures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        num_states, has_head, has_bias = ctx.layout
        scale = d_loss / ctx.divisor
        d_states = [d * scale.to(d.dtype) for d in saved[:num_states]]
        rest = saved[num_states:]
        d_head = (rest.pop(0) * scale).to(ctx.dtypes[0]) if has_head else None
        d_bias = (rest.pop(0) * scale).to(ctx.dtypes[1]) if has_bias else None
        return None, None, None, d_head, d_bias, None, *d_states


class _Work:
    """The head, its gradient, and what is done with one chunk of tokens."""

    def __init__(
        self, config: _Config, head: Tensor, bias: Tensor | None, wants_head: bool, wants_states: bool
    ) -> None:
        self.config, self.head = config, head
        self.bias = None if bias is None else bias.detach().float()
        self.wants_states, self.wants_any = wants_states, wants_states or wants_head
        self.d_head = torch.zeros(head.shape, device=head.device, dtype=torch.float32) if wants_head else None
        self.d_bias = torch.zeros_like(self.bias) if wants_head and self.bias is not None else None

    def chunk(
        self,
        states: Sequence[Tensor],
        labels: Tensor,
        figures: Tensor,
        d_states: Sequence[Tensor | None],
        reference: Tensor | None,
    ) -> None:
        """Add one chunk's figures and gradients (undivided); the final layer comes first."""
        teacher: Tensor | None = None
        self_information: Tensor | None = None
        best: Tensor | None = None
        if reference is not None:
            teacher = self._logits(reference.to(self.head.dtype))[0].log_softmax(-1)
            logarithm, teacher = teacher, teacher.exp()
            self_information = torch.linalg.vecdot(teacher, logarithm)
        distils = "kl" in self.config.exit_loss and len(states) > 1
        for place, (x, weight) in enumerate(zip(states, self.config.weights, strict=True)):
            x = x.to(self.head.dtype)
            z, slope = self._logits(x)  # [C, V]
            top, argmax = z.max(-1, keepdim=True)
            best = argmax if best is None else best
            figures[2, place] += (argmax == best).sum()
            z -= top
            wanted = z.gather(-1, labels[:, None])[:, 0]
            dot = None if teacher is None else torch.linalg.vecdot(teacher, z)
            shifted = z.clone() if distils and place == 0 else None
            z.exp_()
            total = z.sum(-1)
            log_total = total.log()
            figures[0, place] += (log_total - wanted).sum()
            z /= total[:, None]  # probabilities
            if dot is not None and self_information is not None:
                figures[1, place] += (self_information - (dot - log_total)).sum()
            taught_by = teacher
            if shifted is not None:
                teacher = z.clone()
                self_information = torch.linalg.vecdot(teacher, shifted) - log_total
            elif place == 0:
                teacher = None
            if self.wants_any and weight > 0.0:
                loss = self.config.exit_loss if place else "ce" if reference is None else "kl"
                self._gradient(z, x, labels, taught_by, loss, weight, slope, d_states[place])
            elif (d := d_states[place]) is not None:
                d.zero_()

    def _logits(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits in float32 [C, V], and the slope of the soft cap where there is one."""
        z = (x @ self.head.T).float()
        if self.bias is not None:
            z += self.bias
        if (cap := self.config.softcap) is None:
            return z, None
        bent = torch.tanh(z / cap)
        return bent * cap, 1.0 - bent * bent

    def _gradient(
        self,
        p: Tensor,
        x: Tensor,
        labels: Tensor,
        teacher: Tensor | None,
        loss: str,
        weight: float,
        slope: Tensor | None,
        d_state: Tensor | None,
    ) -> None:
        """Turn probabilities into the gradient of the logits, in place, and push it to states and head."""
        if loss == "ce+kl":
            p *= 2.0
        if "kl" in loss:
            assert teacher is not None
            p -= teacher
        if "ce" in loss:
            p.scatter_add_(-1, labels[:, None], torch.full_like(p[:, :1], -1.0))
        if slope is not None:
            p *= slope
        p *= weight
        d = p.to(self.head.dtype)
        if d_state is not None:
            d_state.copy_(d @ self.head)
        if self.d_head is not None:
            self.d_head += d.T @ x
        if self.d_bias is not None:
            self.d_bias += p.sum(0)
