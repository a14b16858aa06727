"""A square map between the final norm and the head, for one early exit, learnt with it and folded away at the end.

    add_map(model)                      # before adapters and optimiser, which then know it
    with as_checkpoint(model, folder, Facts(exits=(2,)), ids):      # now it is rows of a draft head
        model.save_pretrained(folder)

It spares the layers above the exit that its state must look like theirs. Source: the tuned lens (Belrose et al.,
arXiv 2303.08112), put behind the norm, so that drafting pays nothing for it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from layerskip.checkpoint.facts import entry, write_adapter, write_draft_head
from layerskip.errors import UserError
from layerskip.train.objective import exit_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from layerskip.checkpoint.facts import Facts

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


@contextmanager
def as_checkpoint(model: Any, folder: Path, facts: Facts, ids: Sequence[int] | None = None) -> Iterator[None]:
    """Make a model what its checkpoint is to hold, until it is saved: facts in its configuration, nothing of ours.

    With `ids` (exit_vocab, by falling frequency) a draft head is written into `folder`, the map in its rows; an
    adapter gets a file of its own.
    """
    told = getattr(model.config, "layerskip", None)
    named = write_parts(model, folder, ids)
    parts = {
        name: part for name in (NAME, exit_adapter.NAME) if (part := getattr(model, name, None)) is not None
    }
    try:
        model.config.layerskip = entry(facts) | named
        for name in parts:
            delattr(model, name)
        yield
    finally:
        model.config.layerskip = told
        if told is None:
            del model.config.layerskip  # it would be saved as null
        for name, part in parts.items():
            model.add_module(name, part)


def write_parts(model: Any, folder: Path, ids: Sequence[int] | None) -> dict[str, str]:
    """Write what stands beside a model's weights, draft head and adapter, and name the files as `Facts` does."""
    folder.mkdir(parents=True, exist_ok=True)
    named, adapter = {}, exit_adapter.adapter_of(model)
    if ids is not None:
        named = write_draft_head(folder, ids, None if map_of(model) is None else folded(model, ids))
    if adapter is not None:
        named |= write_adapter(folder, adapter.state_dict(), next(model.base_model.parameters()).dtype)
    return named


@torch.no_grad()
def folded(model: Any, ids: Sequence[int]) -> Tensor:
    """Multiply the map of a model into the head's rows `ids`: float32 [len(ids), D]."""
    learnt = map_of(model)
    rows = model.get_output_embeddings().weight.detach()[list(ids)].float().cpu()
    matrix = torch.eye(rows.shape[1]) + learnt.weight.detach().float().cpu()
    weight: Tensor = rows @ matrix
    return weight
