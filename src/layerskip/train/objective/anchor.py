"""Keep the whole model what it was by the state at its exit, without running the layers above.

    anchor = anchor_of(model, exit_layer, rows, seed)         # before training
    anchor.price(anchor.unmoved(**inputs), states, live)      # nats, summed over tokens

Training moves the state that the layers above read by d. To second order, what they then say diverges from what
they said by KL = d F d / 2, where F is the Fisher information of the model's own predictions about that state: the
mean of g g' over tokens, g the gradient of the log-likelihood of continuations drawn from the model itself. Most
directions of the state matter little to it, and there the exit can write what it knows. Source: the quadratic
penalty of elastic weight consolidation (Kirkpatrick et al., arXiv 1612.00796), here on a state in place of weights,
with all of F.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from layerskip.model.families import parts_of
from layerskip.train.data.encoding import IGNORED
from layerskip.train.objective.reference import evaluating

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

ROWS = 40  # of the training data, for the Fisher information


@dataclass
class Anchor:
    """The first layers as they were, and what moving their result costs."""

    unmoved: Callable[..., Tensor]  # inputs of the model -> state at the exit before training, [B, T, D]
    fisher: Tensor  # float32 [D, D]

    def price(self, unmoved: Tensor, now: Tensor, live: Tensor) -> Tensor:
        """Estimate KL(unmoved || now) at the output: nats, summed over live tokens.

        Shapes: unmoved and now [B, T, D], live bool [B, T].
        """
        self.fisher = self.fisher.to(now.device)
        with torch.autocast(now.device.type, enabled=False):
            moved = now[live].float() - unmoved[live].float()  # [N, D]
            total: Tensor = 0.5 * torch.linalg.vecdot(moved @ self.fisher, moved).sum()
        return total


def live_tokens(labels: Tensor, positions: Tensor | None) -> Tensor:
    """Say which tokens count, bool [B, T]: not padding, which no label follows, nor an example's first.

    The first token's state is an outlier that everything else leans on; a price per direction does not suit it.
    """
    learnt = (labels != IGNORED).flip(1).cummax(1).values.flip(1)
    started = torch.arange(labels.shape[1], device=labels.device) if positions is None else positions
    return learnt & (started > 0)


def anchor_of(hf: Any, exit_layer: int, rows: Sequence[Mapping[str, Tensor]], seed: int = 0) -> Anchor:
    """Copy the layers up to an exit and measure the Fisher information there, on some rows of the training data."""
    chosen = [int(row) for row in torch.linspace(0, len(rows) - 1, min(ROWS, len(rows)))]
    batches = [rows[row] for row in chosen]
    return Anchor(_first_layers(hf, exit_layer), fisher_information(hf, exit_layer, batches, seed))


def fisher_information(
    hf: Any, exit_layer: int, batches: Sequence[Mapping[str, Tensor]], seed: int = 0
) -> Tensor:
    """Mean of g g' over live tokens, float32 [D, D]; a batch has input_ids, labels and perhaps position_ids."""
    _, layers, _, _ = parts_of(hf)
    device = next(hf.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    frozen = [(p, p.requires_grad) for p in hf.parameters()]
    caught: list[Tensor] = []

    def leaf(layer: Any, args: Any, out: Any) -> Any:
        whole = out if isinstance(out, tuple) else (out,)
        caught[:] = [whole[0].detach().requires_grad_()]
        return (caught[0], *whole[1:]) if isinstance(out, tuple) else caught[0]

    hook = layers[exit_layer - 1].register_forward_hook(leaf)
    total, count = torch.zeros(()), 0  # [D, D] from the first batch on
    try:
        hf.requires_grad_(False)
        for batch in batches:
            inputs = {k: v.to(device) for k, v in batch.items()}
            live = live_tokens(inputs.pop("labels"), inputs.get("position_ids"))
            with evaluating(hf):
                logs = hf(**inputs, use_cache=False).logits.float().log_softmax(-1)  # [B, T, V]
            drawn = torch.multinomial(logs.detach().exp().flatten(0, 1), 1, generator=generator)  # [B * T, 1]
            said = logs.flatten(0, 1).gather(1, drawn).view(live.shape)
            (gradient,) = torch.autograd.grad((said * live).sum(), caught[0])
            g = gradient[live].float()  # [N, D]
            with torch.autocast(device.type, enabled=False):
                total, count = total.to(device) + g.T @ g, count + len(g)
    finally:
        hook.remove()
        for parameter, wanted in frozen:
            parameter.requires_grad_(wanted)
    return total / max(1, count)


def _first_layers(hf: Any, exit_layer: int) -> Callable[..., Tensor]:
    """A frozen copy of the first layers: inputs -> state after them, [B, T, D]."""
    cut = copy.deepcopy(hf).eval().requires_grad_(False)
    _, layers, _, _ = parts_of(cut)
    for layer in layers[exit_layer:]:
        layer.forward = _pass_on
        for parameter in layer.parameters():
            parameter.data = parameter.data.new_empty(0)
    caught: list[Tensor] = []

    def catch(layer: Any, args: Any, out: Any) -> None:
        caught[:] = [out[0] if isinstance(out, tuple) else out]

    layers[exit_layer - 1].register_forward_hook(catch)

    @torch.no_grad()
    def unmoved(**inputs: Any) -> Tensor:
        device = next(iter(inputs.values())).device
        cut.to(device).base_model(**inputs, use_cache=False)
        return caught.pop()

    return unmoved


def _pass_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden
