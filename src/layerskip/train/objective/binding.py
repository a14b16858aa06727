"""Bind an objective to a model: freeze and extend it, and keep of it what training is held to.

objective = bound(Objective(last_loss="kl", freeze="embeddings"), model, schedule)
optimizer = AdamW(p for p in model.parameters() if p.requires_grad)      # after it: it decides what learns
exits = ExitTraining(model, schedule, objective)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from layerskip.errors import UserError
from layerskip.model.families import ADDING_A_MODEL, parts_of
from layerskip.model.parity import PARITY, probe_tokens
from layerskip.train.data.packing import most_frequent
from layerskip.train.objective import exit_map
from layerskip.train.objective.anchor import anchor_of
from layerskip.train.objective.exit_adapter import adapter_of, add_adapter
from layerskip.train.objective.reference import evaluating, reference_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from layerskip.train.objective.anchor import Anchor
    from layerskip.train.objective.objective import Objective
    from layerskip.train.objective.schedule import Schedule


@dataclass(frozen=True)
class Bound:
    """An objective and what it took from one model before training."""

    objective: Objective
    vocabulary: tuple[int, ...] | None = None
    """Ids of exit_vocab, by falling frequency."""
    reference: Callable[..., Tensor] | None = None
    """From inputs, what the head read before training, [B, T, D]: last_loss kl."""
    anchor: Anchor | None = None
    """Last_loss anchor, in place of a loss of the last layer."""


def bound(
    objective: Objective,
    model: Any,
    schedule: Schedule,
    batches: Sequence[Mapping[str, Tensor]] | None = None,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Bound:
    """Bind an objective to a model that no training has changed yet, before there is an optimiser.

    `batches` are rows of the training data with labels, one row each: the anchor's Fisher information is measured
    on some of them, with `seed`, and exit_vocab counts all. `dtype` is that of autocast, where it is used. The
    model goes to `device` for what is measured there; None leaves it where it is.
    Raises: UserError for settings that exclude one another, and where the data are needed and not given.
    """
    hf = base_model_of(model)
    if (reason := objective.contradiction(schedule, hf is not model)) is not None:
        raise UserError(f"the settings contradict each other: {reason}", "docs/training.md explains the keys")
    if (other := getattr(hf.forward, "exit_training", None)) is not None:
        other.detach()  # a copy of the model must not hold another trainer
    shape(objective, model, schedule)
    vocabulary = objective.exit_vocab
    if isinstance(vocabulary, int):
        rows = _needed(batches, "exit_vocab counts tokens")
        labels = torch.cat([torch.as_tensor(row["labels"]).flatten().cpu() for row in rows])
        vocabulary = most_frequent(labels.numpy(), vocabulary, _ends(hf))
    reference = anchor = None
    if objective.last_loss == "kl" and objective.freeze != "model":  # a frozen one stays without being told
        reference = reference_of(model, dtype)
    elif objective.last_loss == "anchor":
        device = next(hf.parameters()).device if device is None else device
        rows = _needed(batches, "last_loss anchor measures the model")
        with torch.autocast(device.type, dtype or torch.bfloat16, dtype is not None):
            anchor = anchor_of(hf.to(device), max(schedule.trained), rows, seed)
    return Bound(objective, None if vocabulary is None else tuple(vocabulary), reference, anchor)


def shape(objective: Objective, model: Any, schedule: Schedule) -> None:
    """Add the map of the exit and exclude from training what stays as it is; again changes nothing.

    Adapters freeze what they leave alone themselves, and must be put on after the map.
    Raises: UserError for adapters that know no map.
    """
    hf = base_model_of(model)
    if hf is not model:
        learnt = exit_map.map_of(hf)
        if objective.exit_map and not any(p.requires_grad for p in (learnt.parameters() if learnt else ())):
            raise UserError(
                "the adapters were put on before exit_map, so they would neither train nor save it",
                f'exit_map.add_map(model) first, and modules_to_save=["{exit_map.NAME}"] in LoraConfig',
            )
        return
    if objective.exit_map and exit_map.map_of(hf) is None:
        exit_map.add_map(hf)
    if objective.exit_adapter and adapter_of(hf) is None:
        add_adapter(hf, max(schedule.trained), objective.adapter_blocks, objective.adapter_hidden)
    if objective.freeze == "embeddings":
        for module in (hf.get_input_embeddings(), hf.get_output_embeddings()):
            module.requires_grad_(False)
    elif objective.freeze != "nothing":
        hf.requires_grad_(False)
        learning = parts_of(hf)[1][: max(schedule.trained)] if objective.freeze == "above" else []
        for module in (*learning, exit_map.map_of(hf), adapter_of(hf)):
            if module is not None:
                module.requires_grad_(True)


def base_model_of(model: Any) -> Any:
    """Look below PEFT's adapters, where a model has some."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _needed(batches: Sequence[Mapping[str, Tensor]] | None, what: str) -> Sequence[Mapping[str, Tensor]]:
    if batches is None:
        raise UserError(
            f"{what} on rows of the training data, and there are none to be had by number",
            "give data that have a length",
        )
    return batches


def _ends(hf: Any) -> set[int]:
    """Tokens that end what the model writes."""
    ids = getattr(getattr(hf, "generation_config", None), "eos_token_id", None)
    if ids is None:
        return set()
    return {ids} if isinstance(ids, int) else {*ids}


@torch.no_grad()
def check_logits(hf: Any, finish: list[Any], softcap: float | None) -> None:
    """Compare head(final norm(x)), as exits will be read, with the model's own logits on eight tokens.

    Raises: UserError when they differ.
    """
    head = hf.get_output_embeddings()
    if head.weight.device.type == "meta":
        return
    seen: list[Tensor] = []
    hook = finish[0].register_forward_pre_hook(lambda module, args: seen.append(args[0])) if finish else None
    try:
        tokens = probe_tokens(head.weight.shape[0], head.weight.device)
        with evaluating(hf):
            reference = hf(input_ids=tokens, use_cache=False).logits.float()
    finally:
        if hook is not None:
            hook.remove()
    x = seen[-1]
    for module in finish:
        x = module(x)
    ours = head(x).float()
    if softcap is not None:
        ours = torch.tanh(ours / softcap) * softcap
    if (ours - reference).abs().max() > PARITY[hf.dtype] * reference.abs().max():
        raise UserError(
            f"model type {hf.config.model_type!r}: its logits are not head(norm(x)), exits would be misread",
            ADDING_A_MODEL,
        )
