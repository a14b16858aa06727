"""The Python face: load a model, generate, stream, chat. Thin loops over the scheduler.

lm = layerskip.load("smollm2-135m")
lm.generate("def fibonacci(n):", mode="self-speculative", exit_layer=2, draft_length=2).text
for round in lm.stream([{"role": "user", "content": "Hello"}]): ...
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from layerskip.checkpoint import facts as checkpoint
from layerskip.decode import control
from layerskip.decode import text as texts
from layerskip.decode.call import Call, encoded
from layerskip.decode.chat import Chat
from layerskip.decode.control import Controller
from layerskip.decode.options import Options, Plan, seeded
from layerskip.decode.pool import EnginePool
from layerskip.decode.scheduler import Scheduler, raising
from layerskip.errors import UserError
from layerskip.model.cost import RowCosts, row_costs
from layerskip.model.row_costs import measured_row_costs

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Unpack

    from layerskip.checkpoint.facts import Facts
    from layerskip.decode.engine import Engine
    from layerskip.decode.generation import Generation
    from layerskip.decode.options import Keywords
    from layerskip.decode.request import Request, Round
    from layerskip.model.adapter import Adapter
    from layerskip.model.head import Head
    from layerskip.model.stack import Stack


class LanguageModel:
    """A loaded model with its tokenizer and defaults; `layerskip.load` makes one.

    Raises: UserError for a checkpoint whose `layerskip` entry is not valid.
    """

    def __init__(
        self,
        stack: Stack,
        tokenizer: Any = None,
        path: Path | None = None,
        hf: Any = None,
        heads: dict[Any, Head] | None = None,  # draft heads of the stack made before
    ) -> None:
        self.stack = stack
        self.tokenizer = tokenizer
        self.path = path
        self.hf = None if stack.name == "native" else hf  # the native stack has emptied it
        self.config = getattr(hf, "config", None)
        self.generation_config = getattr(hf, "generation_config", None)
        self.facts: Facts = (
            checkpoint.facts_of(hf.config, str(path or "")) if hf is not None else checkpoint.Facts()
        )
        self._heads: dict[Any, Head] = {} if heads is None else heads
        self.controllers: dict[tuple[Plan, int | None], Controller] = {}
        self.engines = EnginePool(stack)

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer can wrap messages."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    # -- the three ways to decode ----------------------------------------------------------------------------

    def generate(self, prompt: Any, **keywords: Unpack[Keywords]) -> Any:
        """Continue a prompt (text, messages or token ids), or a list of them.

        Returns a `Generation`, or a list of them in input order. Keywords: fields of `Options`, which docs/usage.md
        lists.
        Exact: self-speculative output equals plain decoding (tests/test_lossless.py says in which sense).
        Raises: UserError for a request that cannot be honoured; an error that ended a prompt, once all have ended.
        """
        prompts, single = _as_batch(prompt)
        done = [generation.checked() for generation in list(self.each(prompts, **keywords))]
        return done[0] if single else done

    def each(
        self, prompts: Sequence[Any], *, indices: Sequence[int] | None = None, **keywords: Unpack[Keywords]
    ) -> Iterator[Generation]:
        """Continue many prompts together, yielding each result, in input order, as soon as it is there.

        A prompt's index, by default its place, decides with the seed what is sampled for it: a job that was
        interrupted gives the indices of the prompts left. A prompt that ends by an error has it in `error`, beside
        what was said until then; the others go on.

        Raises: UserError, at the first `next` and before any work, for an option or prompt that cannot be honoured.
        """
        call = self.call(Options.parse(keywords))
        numbered = zip(range(len(prompts)) if indices is None else indices, prompts, strict=True)
        requests = [call.request(prompt, index) for index, prompt in numbered]
        if not requests:
            return
        rounds: list[list[Round]] = [[] for _ in requests]
        errors: list[Exception | None] = [None] * len(requests)
        place = 0
        for of, event in self._rounds(call, requests, min(call.options.batch_size, len(requests))):
            if isinstance(event, Exception):
                errors[of] = event
            else:
                rounds[of].append(event)
            while place < len(requests) and (errors[place] or _ended(rounds[place])):
                yield call.generation(rounds[place], len(requests[place].prompt), errors[place])
                place += 1

    def stream(self, prompt: Any, **keywords: Unpack[Keywords]) -> Iterator[Round]:
        """Yield the rounds of one prompt as they happen; abandoning the iterator frees everything.

        Raises: UserError for a request that cannot be honoured, at the call; while iterating, the error that ended
        it.
        """
        return self._streamed(self.call(Options.parse(keywords)), prompt)

    def stream_text(self, prompt: Any, **keywords: Unpack[Keywords]) -> Iterator[str]:
        """Yield the text that continues one prompt in pieces, as it comes; see `stream`.

        Exact: joined they are the text of `generate` (test_streamed_pieces_are_the_text_of_generate).
        Raises: UserError as `stream` does, and without a tokenizer.
        """
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer, so there is no text", "`stream` yields token ids")
        call = self.call(Options.parse(keywords))
        rounds = self._streamed(call, prompt)
        return texts.pieces(self.tokenizer, (round.tokens for round in rounds), call.options.stops)

    def chat(
        self, system: str | None = None, context: int | None = None, **keywords: Unpack[Keywords]
    ) -> Chat:
        """Open a conversation that keeps its cache between turns, of `context` tokens at most.

        Raises: UserError for options that cannot be honoured.
        """
        call = self.call(Options.parse(keywords))
        if context is not None and context < 1:
            raise UserError(f"context is {context}", "give a number of tokens, at least 1")
        limit = min(filter(None, (context, self.stack.context)), default=4096)
        return Chat(call, self.engines, limit, system)

    # -- from options to requests ----------------------------------------------------------------------------

    def call(self, options: Options) -> Call:
        """Resolve options once, for all requests of a call. Raises: UserError when they cannot be honoured."""
        options, plan = seeded(options), self.plan(options)
        if plan.unverified and self.facts.owns_head(plan.exit_layer):
            warnings.warn(
                f"exit {plan.exit_layer} was trained for a draft head of its own, but mode early-exit reads it by "
                "the model's head, so the text is worse than its drafts; mode self-speculative reads its own",
                stacklevel=1,
            )
        strings, ends = texts.split_stops(self.tokenizer, options.stops)
        head, eos = self._draft_head(options, plan), self.eos_ids(options) | ends
        controller = self.controllers_of(plan, head) if plan.controlled else None
        return Call(options, plan, self.tokenizer, head, controller, eos, strings)

    def plan(self, options: Options) -> Plan:
        """Resolve mode, E and K of options against this checkpoint, see `Options.plan`. Raises: UserError."""
        return options.plan(self.facts, self.stack.num_layers)

    def encode(self, prompt: Any, chat: bool | None = None, control_tokens: bool = False) -> list[int]:
        """Turn text, messages or token ids into token ids; see `encode_prompt`. Raises: UserError."""
        return encoded(self.tokenizer, prompt, chat, control_tokens)

    def eos_ids(self, options: Options) -> frozenset[int]:
        """All end-of-sequence ids: of the options, else the generation config, else config and tokenizer."""
        sources = [options.eos_token_id]
        for owner in (self.generation_config, self.config, self.tokenizer):
            sources.append(getattr(owner, "eos_token_id", None))
        ids = next((source for source in sources if source is not None), ())
        return frozenset([ids] if isinstance(ids, int) else ids)

    @cached_property
    def ranked_vocabulary(self) -> list[int] | None:
        """The checkpoint's token ids by falling frequency; None when it has no draft vocabulary."""
        if self._learnt is not None:
            return self._learnt.vocabulary or None
        return checkpoint.ranked_vocabulary(self.path, self.facts)

    def draft_head(self, options: Options) -> Head | None:
        """Build the reduced draft head the options ask for, once per size; None for the whole head.

        `draft_vocab` auto is the checkpoint's list, if it has one. Raises: UserError for a size it cannot have.
        """
        return self._draft_head(options, self.plan(options))

    def _draft_head(self, options: Options, plan: Plan) -> Head | None:
        size = options.draft_vocab
        lost = self.path is None and self._learnt is None
        if plan.draft_length and lost and self.facts.owns_head(plan.exit_layer):
            warnings.warn(
                f"exit {plan.exit_layer} was trained for a draft head of its own, which is in its folder and "
                "not in this model, so few drafts will be kept; layerskip.load(FOLDER) has it, and so has a "
                "model that from_pretrained loaded from a folder that is still there",
                stacklevel=1,
            )
        if size == "auto":
            size = self._default_draft_vocabulary(plan) or "off"
        own = self.facts.owns_head(plan.exit_layer)
        if size == "off":
            if not own or self.facts.exit_adapter is None:
                return None
            size = self.stack.vocab_size
        always = tuple(sorted(self.eos_ids(options)))
        key = (int(size), always, own)
        if key not in self._heads:
            rows = checkpoint.draft_rows(self.path, self.facts) if own else None
            head = self.stack.draft_head(int(size), self.ranked_vocabulary, always, rows)
            self._heads[key] = replace(head, adapter=self._adapter if own else None)
        return self._heads[key]

    @cached_property
    def _adapter(self) -> Adapter | None:
        """The checkpoint's exit adapter, laid out. Raises: UserError for one that does not fit the model."""
        learnt = self._learnt
        weights = (
            learnt.state_dict() if learnt is not None else checkpoint.adapter_weights(self.path, self.facts)
        )
        return None if weights is None else self.stack.adapter(weights, max(self.facts.exits))

    def _default_draft_vocabulary(self, plan: Plan) -> int:
        """How many tokens the draft head has by default: those the checkpoint asks for or lists, else 0."""
        ranked, size = self.ranked_vocabulary, self.facts.draft_vocab_size
        if not plan.draft_length:
            return 0
        if (
            ranked is None
        ):  # a size of the lowest ids; that of a list which is out of reach says nothing of them
            return size or 0 if self.facts.draft_vocab is None else 0
        return len(set(ranked[:size]))

    def controllers_of(self, plan: Plan, head: Head | None) -> Callable[[], Controller]:
        """Say whose controller a request gets: that of its plan, whose experience serves later calls too.

        What is not timed must not depend on other requests: there each one has its own.
        """
        exits = self.facts.exits or range(1, self.stack.num_layers)
        arms = (
            control.arms(
                plan.exit_layer, plan.draft_length, plan.confidence, exits, plan.policy == "adaptive"
            )
            if plan.draft_length
            else ()
        )

        def made() -> Controller:
            costs = self.row_costs(measured=plan.timed)
            # By what positions cost beside others: what is not timed must not depend on those.
            own = [replace(arm, costs=costs) if plan.timed and arm.exit_layer == 0 else arm for arm in arms]
            return Controller(
                control.Prices.of(self.stack, head, costs),
                own,
                copying=plan.copying and replace(plan.copying, costs=costs, padded=not self.stack.ragged),
                trained=plan.exit_layer in self.facts.exits,
                guard=plan.guard,
                timed=plan.timed,
            )

        if not plan.timed:
            return made
        key = (plan, None if head is None else head.size)
        if key not in self.controllers:
            self.controllers[key] = made()
        return lambda: self.controllers[key]

    @property
    def _learnt(self) -> Any:
        """The adapter of a model in memory that `train_adapter` has taught; None for all others."""
        return getattr(self.hf, "exit_adapter", None)

    def row_costs(self, measured: bool = True) -> RowCosts:
        """What a pass over several positions costs, in passes over one: measured here, or guessed by the device.

        The guess is the same in every process.
        """
        return self._measured_costs if measured else row_costs(self.stack.device.type)

    @cached_property
    def _measured_costs(self) -> RowCosts:
        return measured_row_costs(self.stack)

    # -- engines ---------------------------------------------------------------------------------------------

    def _rounds(
        self, call: Call, requests: Sequence[Request], rows: int
    ) -> Iterator[tuple[int, Round | Exception]]:
        """Serve requests, so many at a time; yield (place, round or error). Requests are checked at once."""
        wanted = max(len(request.prompt) + request.max_new_tokens - 1 for request in requests)
        capacity = max(1, min(wanted, self.stack.context or wanted))
        engine = self.engines.take(rows, capacity, call.head, call.options.states)
        for request in requests:  # before any work: the last of many prompts may be the wrong one
            try:
                engine.check(request)
            except UserError as error:
                self.engines.give_back(engine)
                many = len(requests) > 1
                where = f"prompt {request.index + 1} of {requests[-1].index + 1}: " if many else ""
                raise UserError(where + error.message, error.hint) from None
        return self._served(engine, requests)

    def _streamed(self, call: Call, prompt: Any) -> Iterator[Round]:
        prompts, single = _as_batch(prompt)
        if not single:
            raise UserError("stream takes one prompt", "use generate for a list, or one stream per prompt")
        events = self._rounds(call, [call.request(prompts[0])], rows=1)
        return (round for _, round in raising(events))

    def _served(self, engine: Engine, requests: Sequence[Request]) -> Iterator[tuple[int, Round | Exception]]:
        try:
            yield from Scheduler(engine).run(requests)
        finally:
            self.engines.give_back(engine)


def _ended(rounds: Sequence[Round]) -> bool:
    return bool(rounds and rounds[-1].finish_reason)


def _as_batch(prompt: Any) -> tuple[list[Any], bool]:
    """Tell one prompt from a list of prompts: one is text, a list of messages, or token ids."""
    if isinstance(prompt, torch.Tensor) or hasattr(prompt, "__array__"):
        return ([prompt], True) if prompt.ndim == 1 else (list(prompt), False)
    if isinstance(prompt, str):
        return [prompt], True
    if isinstance(prompt, Sequence):
        if prompt and isinstance(prompt[0], (Integral, Mapping)):
            return [prompt], True
        if not prompt:
            raise UserError("the prompt is empty", "give text, messages, token ids, or a list of them")
        return list(prompt), False
    raise UserError(
        f"cannot read a prompt of type {type(prompt).__name__}", "give text, messages or token ids"
    )
