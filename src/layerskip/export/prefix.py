"""The prefix draft: the first E layers, the final norm and the head as an ordinary, smaller checkpoint.

    write_prefix(folder, 4, output)         # what `assistant_model=` or a draft model of another engine may be

It reads what an exit reads: the same layers, norm and head, so its most probable token is the exit's. An exit with
rows of its own (a draft vocabulary that was trained) has them put into a head of the full vocabulary; tokens
outside get the logit 0, so where all its own are negative one of those is said, which the exit would not say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerskip.checkpoint.contents import LICENCES, TOKENIZER, matching
from layerskip.checkpoint.facts import draft_rows, facts_of, ranked_vocabulary
from layerskip.errors import UserError
from layerskip.export.folders import carry
from layerskip.model.families import FAMILIES, Family, parts_of, tied
from layerskip.model.huggingface import HuggingFaceStack
from layerskip.model.load import load_model
from layerskip.model.parity import PARITY, probe_tokens
from layerskip.model.step import Step

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

LENGTH = 24  # tokens on which the reloaded draft is compared


def write_prefix(source: Path, exit_layer: int | None, output: Path) -> dict[str, Any]:
    """Write the draft of an exit (None: the checkpoint's own) into a folder, load it again and compare it.

    Raises: UserError where there is no such exit, it has an adapter, or what was written says something else.
    """
    hf = load_model(source, dtype=_dtype(source), device="cpu")
    facts, layers = facts_of(hf.config, source.name), len(parts_of(hf)[1])
    exit_layer = _exit(facts, exit_layer, layers)
    stack = HuggingFaceStack(hf)
    tokens = probe_tokens(stack.vocab_size, stack.device, min(LENGTH, stack.context or LENGTH))
    states = _states(stack, tokens, exit_layer)
    rows, own = draft_rows(source, facts) if facts.owns_head(exit_layer) else None, None
    if rows is not None:
        own = _full_head(stack, rows, ranked_vocabulary(source, facts))
    with torch.no_grad():
        if own is not None:
            stack.head = own
        wanted = stack.logits(states)
        _cut(hf, exit_layer, own)
    hf.save_pretrained(output)
    carry(matching(source, (*TOKENIZER, *LICENCES)), output)
    _compare(output, tokens, wanted, exit_layer)
    return {"exit_layer": exit_layer, "layers": layers, "own_head": own is not None}


def _dtype(source: Path) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    stored = getattr(config.get_text_config(), "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _exit(facts: Any, given: int | None, layers: int) -> int:
    exit_layer: int | None = facts.exit_layer if given is None else given
    if exit_layer is None:
        raise UserError("the checkpoint names no exit", f"--exit-layer E, from 1 to {layers - 1}")
    if given is None and facts.owns_head(exit_layer) and facts.exit_adapter is not None:
        raise UserError(
            "this checkpoint drafts through an adapter that reads the last layer's states; no other engine has it",
            f"--exit-layer E exports the first E layers with the model's own head, from 1 to {layers - 1}",
        )
    if not 1 <= exit_layer < layers:
        raise UserError(f"exit layer {exit_layer} is out of range", f"choose one from 1 to {layers - 1}")
    return exit_layer


def _states(stack: HuggingFaceStack, tokens: Tensor, exit_layer: int) -> Tensor:
    length = tokens.shape[1]
    with torch.inference_mode():
        step = Step.span([0], [0], [length], stack.device, spill=length)
        h, _ = stack.run(stack.embed(tokens, step), 0, exit_layer, step, stack.new_cache(1, length))
    return h


def _full_head(stack: HuggingFaceStack, rows: Tensor, ranked: list[int] | None) -> nn.Linear:
    """A head of an exit's own rows, zeros where it has none."""
    head = nn.Linear(rows.shape[1], stack.vocab_size, bias=False, dtype=stack.dtype)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[torch.tensor(ranked) if ranked is not None else slice(len(rows))] = rows.to(stack.dtype)
    return head


def _cut(hf: Any, exit_layer: int, own: nn.Linear | None) -> None:
    """Shorten a model in memory, and every list of its configuration that has an entry for each layer."""
    text = hf.config.get_text_config()
    family, layers = FAMILIES.get(text.model_type, Family()), text.num_hidden_layers
    decoder = hf.get_submodule(family.decoder)
    setattr(decoder, family.layers, getattr(decoder, family.layers)[:exit_layer])
    for config in {id(one): one for one in (hf.config, text)}.values():
        for name, value in list(vars(config).items()):
            if isinstance(value, (list, tuple)) and len(value) == layers:
                setattr(config, name, value[:exit_layer])
        if hasattr(config, "layerskip"):
            del config.layerskip
        config.num_hidden_layers = exit_layer
        if getattr(config, "max_window_layers", None) is not None:
            config.max_window_layers = min(config.max_window_layers, exit_layer)
    if own is not None:
        if tied(hf.get_input_embeddings().weight, hf.get_output_embeddings().weight):
            text.tie_word_embeddings = hf.config.tie_word_embeddings = False
        hf.set_output_embeddings(own)


def _compare(output: Path, tokens: Tensor, wanted: Tensor, exit_layer: int) -> None:
    again = load_model(output, dtype=wanted.dtype, device="cpu")
    with torch.inference_mode():
        found = again(tokens, use_cache=False).logits
    scale = wanted.abs().max().item()
    difference = (found.float() - wanted.float()).abs().max().item()
    if not difference <= PARITY.get(wanted.dtype, 1e-4) * max(scale, 1e-6):
        raise UserError(
            f"what was written gives other logits than exit {exit_layer}: they differ by {difference:.3g}",
            "please report it with the model's config.json",
        )
