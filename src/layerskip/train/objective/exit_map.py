"""A square map between the final norm and the head, for one early exit, learnt with it and folded away at the end.

    add_map(model)                      # before adapters and optimiser, which then know it
    weight = folded(model, ids)         # takes it out again: rows of a draft head of its own

It spares the layers above the exit that its state must look like theirs. Source: the tuned lens (Belrose et al.,
arXiv 2303.08112), put behind the norm, so that drafting pays nothing for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from layerskip.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

NAME = "exit_map"


class ExitMap(torch.nn.Module):
    """The identity at first; [..., D] -> [..., D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(width, width))  # what is added to the identity

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.nn.functional.linear(x, self.weight)


def add_map(model: Any) -> None:
    """Make a map part of a Hugging Face model. Raises: UserError for a head with a bias, which rows cannot hold."""
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError("the head has a bias, which a draft head of its own would lose", "exit_map=false")
    model.add_module(NAME, ExitMap(head.weight.shape[1]))


def map_of(model: Any) -> Any:
    """Find the map of a model, None where it has none."""
    return getattr(model, NAME, None)


@torch.no_grad()
def folded(model: Any, ids: Sequence[int]) -> Tensor:
    """Take the map out of a model and multiply it into the head's rows `ids`: float32 [len(ids), D]."""
    learnt = map_of(model)
    delattr(model, NAME)
    rows = model.get_output_embeddings().weight.detach()[list(ids)].float().cpu()
    matrix = torch.eye(rows.shape[1]) + learnt.weight.detach().float().cpu()
    weight: Tensor = rows @ matrix
    return weight
