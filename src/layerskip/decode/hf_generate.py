"""Self-speculation inside `model.generate` of transformers.

    model.generate(**inputs, custom_generate=layerskip.custom_generate, assistant_early_exit=4)

transformers hands such a callable neither `streamer` nor `tokenizer`; where you need them:

    model.generate(**inputs, assistant_early_exit=4, custom_generate=layerskip.custom_generate_with(
        streamer=streamer, tokenizer=tokenizer, stop_strings=["\\n\\n"], draft_length=6))
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from layerskip.decode.engine import Engine
from layerskip.decode.language_model import LanguageModel, stack_of
from layerskip.decode.options import Options
from layerskip.decode.round import Request
from layerskip.decode.sampling import Processing, Sampling
from layerskip.decode.text import StopStrings
from layerskip.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# What `generate` may be asked for and this loop does not do: (attribute, value that means "not asked").
_UNSUPPORTED = {
    "num_beams": (None, 1),
    "penalty_alpha": (None,),
    "prompt_lookup_num_tokens": (None,),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "cache_implementation": (None, "dynamic"),
    "guidance_scale": (None, 1, 1.0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "use_cache": (None, True),
}
# Bookkeeping of `generate` for a forward it expects us to call; ours builds its own.
_OWN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"}


def custom_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Decode as `generate` would, drafting with the first `assistant_early_exit` layers.

    `num_assistant_tokens` is the draft length; without `assistant_early_exit` decoding is plain. Sampling
    draws its seed from torch's global generator, so `torch.manual_seed` repeats it; the law is that of
    `generate`, the draws are not. Returns what `generate` returns.
    Raises: UserError for an option that cannot be honoured.
    """
    return _generate(
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus,
        streamer,
        model_kwargs,
    )


def custom_generate_with(
    *,
    streamer: Any = None,
    tokenizer: Any = None,
    stop_strings: str | Sequence[str] | None = None,
    draft_length: int | None = None,
) -> Callable[..., Any]:
    """Bind what transformers does not pass on to a `custom_generate` callable.

    The streamer sees the prompt and then each round's committed tokens (one row only, as in transformers).
    """
    if stop_strings and tokenizer is None:
        raise UserError(
            "stop strings need a tokenizer", "custom_generate_with(tokenizer=..., stop_strings=...)"
        )
    stops = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings or ())

    @functools.wraps(custom_generate)
    def bound(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        if streamer is not None:
            streamer.put(input_ids.cpu())
        return _generate(
            model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer,
            model_kwargs, tokenizer, stops, draft_length,
        )  # fmt: skip

    # transformers reads the signature to find extra arguments; the wrapped one would offer `streamer`.
    del bound.__wrapped__
    return bound


def _generate(
    model: Any,
    input_ids: Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    synced_gpus: bool,
    streamer: Any,
    model_kwargs: dict[str, Any],
    tokenizer: Any = None,
    stops: tuple[str, ...] = (),
    draft_length: int | None = None,
) -> Any:
    _refuse(config, model_kwargs, synced_gpus)
    if streamer is not None and input_ids.shape[0] > 1:
        raise UserError("a streamer shows one row", "generate rows one by one to stream them")
    lm = LanguageModel(stack_of(model), tokenizer, hf=model)
    mode = "self-speculative" if config.assistant_early_exit is not None else "ar"
    drafts = draft_length if draft_length is not None else config.num_assistant_tokens
    plan = lm.plan(Options(mode=mode, exit_layer=config.assistant_early_exit, draft_length=drafts))
    sampling = Sampling(temperature=1.0) if config.do_sample else Sampling()  # warpers come as processors
    seed = int(torch.randint(2**62, ()))
    eos = lm.eos_ids(Options(eos_token_id=_as_ids(config.eos_token_id)))
    engine: Engine | None = None
    requests = []
    mask = model_kwargs.get("attention_mask")
    for index, row in enumerate(input_ids):
        real = row if mask is None else row[mask[index].bool()]
        padding = tuple(row[: len(row) - len(real)].tolist())
        requests.append(
            Request(
                prompt=real.tolist(),
                max_new_tokens=config.max_length - len(row),
                exit_layer=plan.exit_layer,
                draft_length=plan.draft_length,
                eos=eos if config.eos_token_id is not None else frozenset(),
                processing=Processing(sampling, tuple(processors or ()), padding),
                seed=seed,
                index=index,
                stop=_Stopping(row, criteria, StopStrings(tokenizer, stops) if stops else None),
            )
        )
    longest = max(len(request.prompt) for request in requests)
    engine = Engine(lm.stack, rows=len(requests), capacity=longest + requests[0].max_new_tokens)
    rows = {engine.add(request): request.index for request in requests}
    new: list[list[int]] = [[] for _ in requests]
    while engine.busy:
        for round in engine.step():
            new[rows[round.row]] += round.tokens
            if streamer is not None and round.tokens:
                streamer.put(torch.tensor(round.tokens))
    if streamer is not None:
        streamer.end()
    return _result(config, input_ids, new, eos)


class _Stopping:
    """Ask a row's stop strings and stopping criteria after every committed token."""

    def __init__(self, row: Tensor, criteria: Any, strings: StopStrings | None) -> None:
        # Length and end of sequence are the engine's own; asking again would cost a tensor per token.
        builtin = ("MaxLengthCriteria", "EosTokenCriteria")
        self.criteria = [c for c in criteria or () if type(c).__name__ not in builtin]
        self.strings = strings
        self.tokens = row.tolist()
        self.device = row.device

    def __call__(self, token: int) -> bool:
        found = self.strings is not None and self.strings.push(token)
        if not self.criteria:
            return found
        self.tokens.append(token)
        ids = torch.tensor([self.tokens], device=self.device)  # [1, n]
        return bool(found or any(torch.as_tensor(c(ids, None)).any() for c in self.criteria))


def _refuse(config: Any, model_kwargs: dict[str, Any], synced_gpus: bool) -> None:
    for name, allowed in _UNSUPPORTED.items():
        if (value := getattr(config, name, None)) not in allowed:
            raise UserError(f"{name}={value!r} cannot be honoured by layerskip", f"leave {name} unset")
    if synced_gpus:
        raise UserError(
            "synced_gpus cannot be honoured by layerskip", "generate on one process per model copy"
        )
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise UserError("a filled past_key_values cannot be continued", "pass the whole prompt as input_ids")
    if extra := [name for name, value in model_kwargs.items() if name not in _OWN and value is not None]:
        raise UserError(
            f"{', '.join(extra)} cannot be honoured by layerskip", "pass input_ids and attention_mask only"
        )


def _as_ids(eos: Any) -> int | list[int] | None:
    ids: int | list[int] | None = eos.tolist() if isinstance(eos, torch.Tensor) else eos
    return ids


def _result(config: Any, input_ids: Tensor, new: list[list[int]], eos: frozenset[int]) -> Any:
    """Lay rows side by side, padded on the right, and wrap them as the generation config asks."""
    longest = max(len(tokens) for tokens in new)
    pad = config.pad_token_id if config.pad_token_id is not None else min(eos, default=0)
    padded = [tokens + [pad] * (longest - len(tokens)) for tokens in new]
    sequences = torch.cat([input_ids, torch.tensor(padded, device=input_ids.device)], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)
