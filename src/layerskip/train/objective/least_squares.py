"""The best linear adapter, in closed form: where training begins.

    weight = solved(exits, batches, seed=0)      # of the two maps, [D, 2 D]; None where it cannot be had
    calm(exits, optimizer)                       # so that steps from there are as large as the head allows

The head reads norm(z) as it reads the last layer's state. So the two maps should make of the exit's state, and of
the last layer's one position before, what the last layer has before its norm. This linear regression has one
solution. A pass of the model over some positions finds it; gradient steps need several times the data to get there
(docs/notebook.md).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from layerskip.model.adapter import scaled
from layerskip.train.objective.exit_adapter import adapter_of, frozen_states, places_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from layerskip.train.objective.exit_adapter import Taught

POSITIONS = 65_536
"""That the regression looks at; 26 times the unknowns of an output at a width of 576."""
RIDGE = 0.01
"""Added to the inputs' mean squares, which are 1."""
STRENGTH = 4.6
"""Of the head that the recipe's learning rate was found with (SmolLM2-135M), see `calm`."""
TOLD = 0.99  # a factor below this is told
ROWS = 8192
"""Of a head, enough to know its strength."""


@torch.no_grad()
def solved(exits: Taught, batches: Sequence[Mapping[str, Tensor]], seed: int = 0) -> Tensor | None:
    """Regress the last layer's state on the exit's and the one before; some of the rows, drawn with `seed`.

    Shapes: a batch is one row, [1, T] each; gives float32 [D, 2 D]. None where rows have no label, or where the
    head reads another width than the layers have.
    """
    device, squares, products, count = exits.hf.device, None, None, 0
    gain = shift = None
    for row in np.random.default_rng(seed).permutation(len(batches)):
        batch = {key: value.to(device) for key, value in batches[int(row)].items()}
        labels, numbers = batch.pop("labels"), batch.pop("rows", None)
        places = places_of(labels[:, 1:] >= 0, batch.get("position_ids"), 1)
        if not len(places):
            continue
        early, final = (x.flatten(0, 1).float() for x in frozen_states(exits, batch, numbers))
        if early.shape[-1] != final.shape[-1]:
            return None
        if gain is None or shift is None:
            gain, shift = affine(exits.read, early)
        inputs = torch.cat((scaled(early[places]), scaled(final[places - 1])), -1)
        wanted = (final[places] - shift) / gain
        squared, product = inputs.T @ inputs, inputs.T @ wanted
        squares = squared if squares is None else squares + squared
        products = product if products is None else products + product
        count += len(places)
        if count >= POSITIONS:
            break
    return None if squares is None or products is None else solution(squares, products, count)


def solution(squares: Tensor, products: Tensor, count: int) -> Tensor:
    """Solve for the map from sums over `count` positions.

    Shapes: inputs by inputs [I, I], inputs by outputs [I, D] -> [D, I].
    """
    ridge = RIDGE * count * torch.eye(len(squares), dtype=torch.float64)
    solved: Tensor = torch.linalg.solve(squares.cpu().double() + ridge, products.cpu().double())
    return solved.T.float()


@torch.no_grad()
def calm(exits: Taught, optimizer: Any) -> None:
    """Lower the learning rate of an adapter before a head that is stronger than the one the rate suits, and say so.

    The strength of a head is how far its logits move apart, in nats, for a state that is moved by its own size. A
    step of the same size is felt ten times as much behind Gemma's final norm, whose gains are large.
    """
    adapter, head = adapter_of(exits.hf), exits.head.weight
    if adapter is None or head.shape[1] != adapter.join.weight.shape[0]:
        return
    head = head[:ROWS].float()
    rows = head * affine(exits.read, head)[0]
    strength = float((rows - rows.mean(0)).square().sum(1).mean().sqrt())
    factor = min(1.0, STRENGTH / max(strength, 1e-9))
    for group in optimizer.param_groups:
        group["lr"] *= factor
    if factor < TOLD:
        told = f"the head is strong: the learning rate is lowered to {factor:.2g} of what is given"
        warnings.warn(told, stacklevel=3)


def affine(read: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and shift of a norm, found by what it makes of two opposite states of mean 0 and mean square 1.

    Shapes: `like` [..., D] -> [D] each. A gain next to 0 is taken for 1: nothing is to be learnt there.
    """
    probe = torch.ones(like.shape[-1], device=like.device)
    probe[1::2] = -1.0
    plus, minus = read(probe).float(), read(-probe).float()
    gain, shift = (plus - minus) / 2 * probe, (plus + minus) / 2
    return torch.where(gain.abs() < 1e-3, 1.0, gain), shift
