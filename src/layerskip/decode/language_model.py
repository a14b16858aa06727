"""The Python face: load a model, generate, stream, chat. Thin loops over the engine.

lm = layerskip.load("smollm2-135m")
lm.generate("def fibonacci(n):", mode="self-speculative", exit_layer=6, draft_length=4).text
for round in lm.stream([{"role": "user", "content": "Hello"}]): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from layerskip.checkpoint import facts as checkpoint
from layerskip.decode import control
from layerskip.decode import text as texts
from layerskip.decode.control import Controller
from layerskip.decode.engine import Engine
from layerskip.decode.generation import Generation, finished
from layerskip.decode.options import Options, Plan, seeded
from layerskip.decode.request import Request, Round
from layerskip.errors import UserError
from layerskip.model import cost

if TYPE_CHECKING:
    from pathlib import Path

    from layerskip.checkpoint.facts import Facts
    from layerskip.decode.chat import Chat
    from layerskip.model.head import Head
    from layerskip.model.stack import Stack


@dataclass
class _Item:
    """A prompt on its way through the engine."""

    request: Request
    rounds: list[Round] = field(default_factory=list)


class LanguageModel:
    """A loaded model with its tokenizer and defaults."""

    def __init__(self, stack: Stack, tokenizer: Any = None, path: Path | None = None, hf: Any = None) -> None:
        self.stack = stack
        self.tokenizer = tokenizer
        self.path = path
        self.hf = None if stack.name == "native" else hf  # the native stack has emptied it
        self.config = getattr(hf, "config", None)
        self.generation_config = getattr(hf, "generation_config", None)
        self.facts: Facts = (
            checkpoint.facts_of(hf.config, str(path or "")) if hf is not None else checkpoint.Facts()
        )
        self._heads: dict[tuple[int, tuple[int, ...], bool], Head] = {}
        self.controllers: dict[tuple[Plan, int | None], Controller] = {}
        self.keep_engine = stack.device.type == "cuda"
        self._last_engine: Engine | None = None

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer can wrap messages."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    # -- the three ways to decode ----------------------------------------------------------------------------

    def generate(self, prompt: Any, **keywords: Any) -> Any:
        """Continue a prompt (text, messages or token ids), or a list of them.

        Returns a `Generation`, or a list of them in input order. Keywords: see `Options`.
        Exact: self-speculative output equals plain decoding (tests/test_lossless.py says in which sense).
        Raises: UserError for a request that cannot be honoured.
        """
        prompts, single = _as_batch(prompt)
        done = list(self.each(prompts, **keywords))
        return done[0] if single else done

    def each(
        self, prompts: Sequence[Any], *, indices: Sequence[int] | None = None, **keywords: Any
    ) -> Iterator[Generation]:
        """Continue many prompts together, yielding each result, in input order, as soon as it is there.

        A prompt's index, by default its place, decides with the seed what is sampled for it: a job that was
        interrupted gives the indices of the prompts left.
        """
        options = Options.parse(keywords)
        items = self._items(prompts, options, indices)
        if not items:
            return
        engine = self._engine(items, options, rows=min(options.batch_size, len(items)))
        waiting = list(items)
        for item, round in _drive(engine, items, self._give_back):
            item.rounds.append(round)
            while waiting and waiting[0].rounds and waiting[0].rounds[-1].finish_reason:
                yield self._generation(waiting.pop(0), options)

    def stream(self, prompt: Any, **keywords: Any) -> Iterator[Round]:
        """Yield the rounds of one prompt as they happen; abandoning the iterator frees everything."""
        options = Options.parse(keywords)
        prompts, single = _as_batch(prompt)
        if not single:
            raise UserError("stream takes one prompt", "use generate for a list, or one stream per prompt")
        items = self._items(prompts, options)
        engine = self._engine(items, options, rows=1)
        return (round for _, round in _drive(engine, items, self._give_back))

    def chat(self, system: str | None = None, context: int | None = None, **keywords: Any) -> Chat:
        """Open a conversation that keeps its cache between turns."""
        from layerskip.decode.chat import Chat

        return Chat(self, Options.parse(keywords), system, context)

    # -- from options to requests ----------------------------------------------------------------------------

    def plan(self, options: Options) -> Plan:
        return options.plan(self.facts, self.stack.num_layers)

    def encode(self, prompt: Any, chat: bool | None = None) -> list[int]:
        """Turn text, messages or token ids into token ids."""
        if isinstance(prompt, torch.Tensor):
            prompt = prompt.tolist()
        if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
            return list(prompt)
        return texts.encode_prompt(self.tokenizer, prompt, chat)

    def eos_ids(self, options: Options) -> frozenset[int]:
        """All end-of-sequence ids: of the options, else the generation config, else config and tokenizer."""
        sources = [options.eos_token_id]
        for owner in (self.generation_config, self.config, self.tokenizer):
            sources.append(getattr(owner, "eos_token_id", None))
        ids = next((source for source in sources if source is not None), ())
        return frozenset([ids] if isinstance(ids, int) else ids)

    def request(self, prompt: Any, options: Options, index: int = 0, keep: bool = False) -> Request:
        """Build the engine's request for one prompt. Raises: UserError when its options cannot be honoured."""
        plan = self.plan(options)
        assert options.seed is not None, "the seed is drawn once per call"
        strings, ends = texts.split_stops(self.tokenizer, options.stops)
        simulated = options.simulate_acceptance
        return Request(
            prompt=self.encode(prompt, options.chat),
            max_new_tokens=options.max_new_tokens,
            exit_layer=plan.exit_layer,
            draft_length=plan.draft_length,
            confidence=plan.confidence,
            controller=self._controller(options) if plan.controlled else None,
            believe=plan.believe,
            eos=self.eos_ids(options) | ends,
            processing=options.processing,
            seed=options.seed,
            index=index,
            stop=texts.StopStrings(self.tokenizer, strings).push if strings else None,
            logprobs=options.logprobs,
            simulated=None if simulated is None else cost.per_token_from(simulated, plan.draft_length),
            keep=keep,
        )

    def _items(
        self, prompts: Sequence[Any], options: Options, indices: Sequence[int] | None = None
    ) -> list[_Item]:
        options = seeded(options)
        numbered = zip(range(len(prompts)) if indices is None else indices, prompts, strict=True)
        return [_Item(self.request(prompt, options, index)) for index, prompt in numbered]

    @cached_property
    def ranked_vocabulary(self) -> list[int] | None:
        """The checkpoint's token ids by falling frequency; None when it has no draft vocabulary."""
        return checkpoint.ranked_vocabulary(self.path, self.facts)

    def draft_head(self, options: Options) -> Head | None:
        """Build the reduced draft head the options ask for, once per size; auto is the checkpoint's list if any."""
        size = options.draft_vocab
        if size == "auto":
            size = self._default_draft_vocabulary(options) or "off"
        if size == "off":
            return None
        always = tuple(sorted(self.eos_ids(options)))
        own = self.facts.owns_head(self.plan(options).exit_layer)
        key = (int(size), always, own)
        if key not in self._heads:
            rows = checkpoint.draft_rows(self.path, self.facts) if own else None
            self._heads[key] = self.stack.draft_head(int(size), self.ranked_vocabulary, always, rows)
        return self._heads[key]

    def _controller(self, options: Options) -> Controller:
        """Find the controller of a plan: what it has learnt serves later calls too."""
        plan, head, stack = self.plan(options), self.draft_head(options), self.stack
        key = (plan, None if head is None else head.size)
        if key not in self.controllers:
            exits = self.facts.exits or range(1, stack.num_layers)
            self.controllers[key] = Controller(
                control.Prices.of(stack, head),
                control.arms(
                    plan.exit_layer, plan.draft_length, plan.confidence, exits, plan.policy == "adaptive"
                ),
                trained=plan.exit_layer in self.facts.exits,
                guard=plan.guard,
            )
        return self.controllers[key]

    def _default_draft_vocabulary(self, options: Options) -> int:
        """How many tokens the draft head has by default: those the checkpoint asks for or lists, else 0."""
        ranked, size = self.ranked_vocabulary, self.facts.draft_vocab_size
        if not self.plan(options).draft_length:
            return 0
        if (
            ranked is None
        ):  # a size of the lowest ids; that of a list which is out of reach says nothing of them
            return size or 0 if self.facts.draft_vocab is None else 0
        return len(set(ranked[:size]))

    def _engine(self, items: Sequence[_Item], options: Options, rows: int) -> Engine:
        wanted = max(len(item.request.prompt) + item.request.max_new_tokens - 1 for item in items)
        context = self.stack.context or wanted
        engine = self._idle_engine(rows, max(1, min(wanted, context)), self.draft_head(options))
        for item in items:  # before any work: the last of many prompts may be the wrong one
            try:
                engine.check(item.request)
            except UserError as error:
                where = (
                    f"prompt {item.request.index + 1} of {items[-1].request.index + 1}: "
                    if len(items) > 1
                    else ""
                )
                raise UserError(where + error.message, error.hint) from None
        return engine

    def _idle_engine(self, rows: int, capacity: int, head: Head | None) -> Engine:
        """Make an engine, or take the last one again where graphs were captured on its cache."""
        if not self.keep_engine:
            return Engine(self.stack, rows=rows, capacity=capacity, draft_head=head)
        rounded = min(max(256, 1 << (capacity - 1).bit_length()), self.stack.context or 1 << 62)
        last, self._last_engine = self._last_engine, None  # lent: two streams must not share it
        if last is not None and last.serves(rows, rounded, head):
            return last
        del last  # its cache must not stand beside the new one
        try:
            return Engine(self.stack, rows=rows, capacity=rounded, draft_head=head)
        except UserError:
            return Engine(self.stack, rows=rows, capacity=capacity, draft_head=head)

    def _give_back(self, engine: Engine) -> None:
        if self.keep_engine:
            self._last_engine = engine

    def _generation(self, item: _Item, options: Options) -> Generation:
        return finished(
            self.tokenizer, item.rounds, self.plan(options), len(item.request.prompt), options.stops
        )


def _drive(
    engine: Engine, items: Sequence[_Item], give_back: Callable[[Engine], None]
) -> Iterator[tuple[_Item, Round]]:
    """Keep the engine's rows filled with items, in order, until all are done; then give it back, empty."""
    waiting = list(items)[::-1]
    running: dict[int, _Item] = {}
    try:
        while waiting or running:
            while waiting and len(running) < len(engine.cache.lengths):
                row = engine.add(waiting[-1].request)
                running[row] = waiting.pop()
            for round in engine.step():
                item = running[round.row]
                if round.finish_reason:
                    del running[round.row]
                yield item, round
    finally:
        for row in running:
            engine.cancel(row)
        give_back(engine)


def _as_batch(prompt: Any) -> tuple[list[Any], bool]:
    """Tell one prompt from a list of prompts: one is text, a list of messages, or token ids."""
    if isinstance(prompt, torch.Tensor):
        return ([prompt], True) if prompt.dim() == 1 else (list(prompt), False)
    if isinstance(prompt, str):
        return [prompt], True
    if isinstance(prompt, Sequence):
        if prompt and isinstance(prompt[0], (int, Mapping)):
            return [prompt], True
        if not prompt:
            raise UserError("the prompt is empty", "give text, messages, token ids, or a list of them")
        return list(prompt), False
    raise UserError(
        f"cannot read a prompt of type {type(prompt).__name__}", "give text, messages or token ids"
    )
