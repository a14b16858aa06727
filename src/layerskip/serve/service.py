"""From a request of the protocol to jobs of the worker, and from their rounds to an answer; knows no HTTP."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from layerskip.decode.engine import Engine
from layerskip.decode.options import Options
from layerskip.errors import UserError
from layerskip.serve.processors import Bias, Grammars, Penalties
from layerskip.serve.protocol import Asked, ChatRequest
from layerskip.serve.replies import Reply, usage
from layerskip.serve.worker import Job, Reader, Worker

if TYPE_CHECKING:
    from layerskip.decode.language_model import LanguageModel
    from layerskip.decode.request import Request, Round
    from layerskip.serve.metrics import Metrics
    from layerskip.serve.settings import ServeOptions

Event = tuple[int, "Round | Exception"]


@dataclass
class Exchange:
    """One request being answered: a job and a reply for each choice, and where their rounds arrive."""

    id: str
    prompts: list[list[int]]
    jobs: list[Job]
    replies: list[Reply]
    events: asyncio.Queue[Event]
    took: Callable[[], None]  # called for every event that is taken from them
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self) -> dict[str, Any]:
        """Tokens of all choices; a prompt counts once however many answers it has."""
        each = len(self.jobs) // len(self.prompts)
        firsts = self.jobs[::each]
        return usage(sum(map(len, self.prompts)), sum(max(0, job.cached) for job in firsts), self.replies)

    async def rounds(self) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """Yield (choice, what a round adds to it) until all have ended. Raises: what ended a job by an error."""
        left = len(self.jobs)
        while left:
            place, event = await self.events.get()
            self.took()
            if isinstance(event, Exception):
                raise event
            added = self.replies[place].push(event)
            left -= event.finish_reason is not None
            yield place, added


class Service:
    """A loaded model behind the worker. One event loop submits; the worker's thread decodes."""

    def __init__(
        self, lm: LanguageModel, settings: ServeOptions, name: str, metrics: Metrics | None = None
    ) -> None:
        self.head = lm.draft_head(Options())
        remembers = self.head is not None and self.head.adapter is not None
        settings = settings.fitted(lm.stack, remembers)
        assert settings.rows is not None
        assert settings.context is not None
        self.lm, self.settings, self.name = lm, settings, name
        engine = Engine(
            lm.stack, rows=settings.rows, capacity=settings.context, draft_head=self.head,
            prefill_chunk=settings.prefill_chunk,
        )  # fmt: skip
        self.worker = Worker(engine, settings.queue, metrics, settings.stalled)
        self.grammars = Grammars(lm.tokenizer, lm.stack.vocab_size, lm.eos_ids(Options()))
        self.ready = False
        if metrics is not None:
            metrics.observe(self.worker)

    def start(self) -> None:
        """Start the worker and warm up: what is measured, packed and compiled once is done before the first client.

        Raises: UserError where the model cannot decode.
        """
        self.lm.generate([self.lm.encode("a")[0]] * 8, max_new_tokens=8, eos_token_id=())
        self.worker.start()
        self.ready = True

    def exchange(self, asked: Asked, client: str, loop: asyncio.AbstractEventLoop) -> Exchange:
        """Turn a request into jobs that deliver to a loop; nothing is submitted yet.

        Raises: UserError for one that cannot be honoured; LookupError for a model that is not here.
        """
        asked.refuse()
        if asked.model not in (None, "", self.name):
            raise LookupError(asked.model)
        choices = asked.n or 1
        prompts = [self.encode(prompt) for prompt in asked.prompts()]
        if choices * len(prompts) > self.settings.choices:
            raise UserError(
                f"{choices * len(prompts)} answers were asked for, at most {self.settings.choices} are given",
                "lower n, or send fewer prompts",
            )
        events = asyncio.Queue[Event]()
        deadline = time.monotonic() + self.settings.timeout
        reader, jobs = Reader(), list[Job]()
        replies: list[Reply] = []
        for prompt in prompts:
            for choice in range(choices):
                place = len(jobs)

                def deliver(event: Round | Exception, place: int = place) -> None:
                    loop.call_soon_threadsafe(events.put_nowait, (place, event))

                request, stops = self._request(asked, prompt, choice)
                jobs.append(Job(request, client, deliver, deadline, reader))
                replies.append(Reply(self.lm.tokenizer, stops, asked.top(), asked.layerskip.rounds))
        kind = "chatcmpl" if isinstance(asked, ChatRequest) else "cmpl"
        took = partial(self.worker.took, reader)
        return Exchange(f"{kind}-{secrets.token_hex(12)}", prompts, jobs, replies, events, took)

    def encode(self, prompt: Any) -> list[int]:
        """Turn messages, text or ids into ids. Raises: UserError, for a prompt that leaves no room too."""
        ids = self.lm.encode(prompt, chat=False if isinstance(prompt, str) else None)
        most = self.settings.context or 0
        if len(ids) > most:
            raise UserError(f"the prompt has {len(ids)} tokens, the context is {most}", "shorten it")
        return ids

    def _request(self, asked: Asked, prompt: list[int], choice: int) -> tuple[Request, tuple[str, ...]]:
        keywords = asked.keywords()
        most = max(1, (self.settings.context or 0) + 1 - len(prompt))
        top = asked.top()
        options = Options.parse(
            keywords
            | {
                "max_new_tokens": min(asked.limit() or most, most),
                "logprobs": top is not None,
                "top_logprobs": top or 0,
                "logits_processor": self._processors(asked, len(prompt)),
            }
        )
        call = self.lm.call(options)
        request = call.request(prompt, index=choice, keep=not call.plan.unverified)
        return replace(request, prompt=tuple(request.prompt)), call.stops

    def _processors(self, asked: Asked, prompt: int) -> tuple[Any, ...]:
        found: list[Any] = []
        if asked.logit_bias:
            found.append(Bias(asked.logit_bias, self.lm.stack.vocab_size))
        if asked.presence_penalty or asked.frequency_penalty:
            found.append(Penalties(prompt, asked.presence_penalty or 0.0, asked.frequency_penalty or 0.0))
        if (grammar := self.grammars.following(asked.response_format, prompt)) is not None:
            found.append(grammar)
        return tuple(found)

    def about(self) -> dict[str, Any]:
        """What clients may know of the model, as `GET /v1/models` tells it."""
        plan = self.lm.plan(Options())
        return {
            "id": self.name, "object": "model", "created": 0, "owned_by": "layerskip",
            "max_model_len": self.settings.context,
            "layerskip": {
                "layers": self.lm.stack.num_layers, "exits": sorted(self.lm.facts.exits), "mode": plan.mode,
                "drafter": plan.drafter, "exit_layer": plan.exit_layer, "draft_length": plan.draft_length,
                "policy": plan.policy, "dtype": str(self.lm.stack.dtype).removeprefix("torch."),
                "rows": self.settings.rows,
            },
        }  # fmt: skip
