"""Self-speculation inside `model.generate` of transformers.

    model.generate(**inputs, custom_generate=layerskip.custom_generate, assistant_early_exit=4)

transformers hands such a callable neither `streamer` nor `tokenizer`; where you need them:

    model.generate(**inputs, assistant_early_exit=4, custom_generate=layerskip.custom_generate_with(
        streamer=streamer, tokenizer=tokenizer, stop_strings=["\\n\\n"], draft_length=6))

Logits processors and stopping criteria are called with one row at a time, on ids that start with the row's padding.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from layerskip.decode.load import wrapped
from layerskip.decode.options import Options
from layerskip.decode.pool import EnginePool
from layerskip.decode.request import Request
from layerskip.decode.sampling import Processing, Sampling
from layerskip.decode.scheduler import Scheduler, raising
from layerskip.decode.text import StopStrings, split_stops
from layerskip.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.model.stack import Stack

# What `generate` may be asked for and this loop does not do: (attribute, value that means "not asked").
_UNSUPPORTED = {
    "num_beams": (None, 1),
    "penalty_alpha": (None,),
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
    "use_mtp": (None, False),
    "num_assistant_tokens_schedule": (None, "constant"),
    "assistant_confidence_threshold": (None, 0, 0.4),  # 0.4 is the default; drafts are never cut short here
}
# What transformers fills in when the caller leaves `num_assistant_tokens` unset (GenerationConfig of 5.17 to 5.23).
_NO_CHOICE = 20
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
    """Decode as `generate` would, with drafts of the first `assistant_early_exit` layers, else the default ones.

    `num_assistant_tokens` is the draft length (transformers fills in 20 where it is unset, so 20 means the
    checkpoint's own, else 4). Without `assistant_early_exit` drafts are copied from the text so far, at most
    `prompt_lookup_num_tokens` a round, beside the exit where it is trained and pays. Sampling draws its seed from
    torch's global generator, so `torch.manual_seed` repeats it; the law is that of `generate`, the draws are
    not. Returns what `generate` returns.
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
    drafter: str | None = None,
) -> Callable[..., Any]:
    """Bind what transformers does not pass on to a `custom_generate` callable.

    The streamer sees the prompt and then each round's committed tokens (one row only, as in transformers).
    `drafter` is auto, exit, lookup or off.
    Raises: UserError for stop strings without a tokenizer.
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
        return _generate(
            model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer,
            model_kwargs, tokenizer, stops, {"draft_length": draft_length, "drafter": drafter},
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
    bound: dict[str, Any] | None = None,
) -> Any:
    _refuse(config, model_kwargs, synced_gpus)
    if streamer is not None and input_ids.shape[0] > 1:
        raise UserError("a streamer shows one row", "generate rows one by one to stream them")
    lm = wrapped(model, tokenizer)
    options = _options(config, bound or {})
    plan = lm.plan(options)
    head = lm.draft_head(options) if lm.facts.owns_head(plan.exit_layer) else None
    controller = lm.controllers_of(plan, head) if plan.controlled else None
    sampling = Sampling(temperature=1.0) if config.do_sample else Sampling()  # warpers come as processors
    seed = int(torch.randint(2**62, ())) if config.do_sample else 0
    ends = _Ends(config, criteria, tokenizer, stops)
    if ends.asks and not ends.eos and len(input_ids) > 1:
        raise UserError(
            "stopping criteria cannot end the rows of a batch one by one without an end-of-sequence token",
            "set eos_token_id (and pad_token_id), or generate rows one by one",
        )
    requests = []
    prompts = _prompts(input_ids, model_kwargs)
    for index, (row, prompt) in enumerate(zip(input_ids.tolist(), prompts, strict=True)):
        padding = tuple(row[: len(row) - len(prompt)])
        own = tuple(_for_row(processor, index) for processor in processors or ())
        requests.append(
            Request(
                prompt=prompt,
                max_new_tokens=max(1, ends.max_length - len(row)),
                exit_layer=plan.exit_layer,
                draft_length=plan.draft_length,
                confidence=plan.confidence,
                controller=None if controller is None else controller(),
                eos=frozenset(ends.eos),
                processing=Processing(sampling, own, padding),
                seed=seed,
                index=index,
                stop=ends.of_row(row, input_ids.device),
            )
        )
    capacity = max(map(len, prompts)) + requests[0].max_new_tokens - 1  # the last token is never cached
    if lm.stack.context is not None and capacity > lm.stack.context:
        raise UserError(
            f"prompt and new tokens may take {capacity} positions, the model's context is {lm.stack.context}",
            "lower max_new_tokens (or max_length), or shorten the prompt",
        )
    engines = _engines(model, lm.stack)
    engine = engines.take(len(requests), capacity, head)
    new: list[list[int]] = [[] for _ in requests]
    if streamer is not None and bound is not None:  # else transformers has shown the prompt
        streamer.put(input_ids.cpu())
    try:
        for place, round in raising(Scheduler(engine).run(requests)):
            new[place] += round.tokens
            if streamer is not None and round.tokens:
                streamer.put(torch.tensor(round.tokens))
    finally:
        engines.give_back(engine)
    if streamer is not None:
        streamer.end()
    return _result(config, input_ids, new, ends.eos)


def _options(config: Any, bound: dict[str, Any]) -> Options:
    """Read who drafts, and how much. Raises: UserError for what excludes each other."""
    exit_layer, asked = config.assistant_early_exit, config.num_assistant_tokens
    drafts = bound.get("draft_length")
    if drafts is None and exit_layer is not None and asked != _NO_CHOICE:
        drafts = asked
    return Options(
        exit_layer=exit_layer,
        draft_length=drafts,
        drafter=bound.get("drafter"),
        copy_length=config.prompt_lookup_num_tokens,
        temperature=1.0 if config.do_sample else 0.0,
    )


_pools: WeakKeyDictionary[Any, EnginePool] = WeakKeyDictionary()


def _engines(model: Any, stack: Stack) -> EnginePool:
    """Find the engines of a model, which is wrapped anew at each call; a pool goes when its model does."""
    pool = _pools.get(model)
    if pool is None or pool.stack is not stack:
        pool = _pools[model] = EnginePool(stack)
    return pool


class _Ends:
    """When rows end. Read from the criteria: a caller's own length or eos criterion replaces the config's."""

    def __init__(self, config: Any, criteria: Any, tokenizer: Any, stops: tuple[str, ...]) -> None:
        # Length and end of sequence are the engine's own; asking again would cost a tensor per token.
        kinds: dict[str, list[Any]] = {"MaxLengthCriteria": [], "EosTokenCriteria": []}
        self.others: list[Any] = []
        for criterion in criteria or ():
            kinds.get(type(criterion).__name__, self.others).append(criterion)
        lengths, eos = kinds.values()
        self.max_length: int = min((c.max_length for c in lengths), default=config.max_length)
        self.eos: list[int] = [token for c in eos for token in c.eos_token_id.tolist()]
        self.tokenizer, (self.stops, named) = tokenizer, split_stops(tokenizer, stops)
        self.eos += sorted(named)

    @property
    def asks(self) -> bool:
        return bool(self.others or self.stops)

    def of_row(self, row: list[int], device: torch.device) -> Callable[[int], bool] | None:
        """Build the question asked after every committed token of a row."""
        if not self.asks:
            return None
        strings = StopStrings(self.tokenizer, self.stops)
        tokens = list(row)

        def stop(token: int) -> bool:
            found = strings.push(token)
            if not self.others:
                return found
            tokens.append(token)
            ids = torch.tensor([tokens], device=device)  # [1, n]
            return found or any(bool(torch.as_tensor(c(ids, None)).any()) for c in self.others)

        return stop


def _prompts(input_ids: Tensor, model_kwargs: dict[str, Any]) -> list[list[int]]:
    """Take the padding off each row. Raises: UserError for a mask or positions that are not those of padding."""
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    if (mask[:, :-1] & ~mask[:, 1:]).any():
        raise UserError(
            "attention_mask hides tokens that are not at the start of their row",
            "pad on the left: tokenizer.padding_side = 'left'",
        )
    if positions is not None and ((positions != mask.cumsum(-1) - 1) & mask).any():
        raise UserError(
            "position_ids of your own cannot be honoured by layerskip", "leave position_ids unset"
        )
    return [row[seen].tolist() for row, seen in zip(input_ids, mask, strict=True)]


def _for_row(processor: Any, index: int) -> Any:
    """Bind a processor that holds something for every row of the batch to one row: it is called with that alone."""
    name = type(processor).__name__
    if not type(processor).__module__.startswith("transformers."):
        return processor
    own = copy.copy(processor)
    if name == "PrefixConstrainedLogitsProcessor":
        allowed = processor._prefix_allowed_tokens_fn
        own._prefix_allowed_tokens_fn = lambda _, ids: allowed(index, ids)
    elif name == "EncoderRepetitionPenaltyLogitsProcessor":
        own.encoder_input_ids = processor.encoder_input_ids[index : index + 1]
    elif name == "EncoderNoRepeatNGramLogitsProcessor":
        own.generated_ngrams, own.batch_size = processor.generated_ngrams[index : index + 1], 1
    elif name == "RepetitionPenaltyLogitsProcessor":
        ignored = getattr(processor, "prompt_ignore_length", None)  # from 5.23: the padding of every row
        if isinstance(ignored, torch.Tensor) and len(ignored) > 1:
            own.prompt_ignore_length = ignored[index : index + 1]
    return own


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


def _result(config: Any, input_ids: Tensor, new: list[list[int]], eos: list[int]) -> Any:
    """Lay rows side by side, padded on the right, and wrap them as the generation config asks."""
    longest = max(len(tokens) for tokens in new)
    pad = config.pad_token_id if config.pad_token_id is not None else (eos or [0])[0]
    padded = [tokens + [pad] * (longest - len(tokens)) for tokens in new]
    sequences = torch.cat([input_ids, torch.tensor(padded, device=input_ids.device)], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)
