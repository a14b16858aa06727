"""A conversation: its cache is kept between turns and reused as far as the tokens agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from layerskip.decode.pool import rounded_capacity
from layerskip.decode.scheduler import Scheduler, Status, Ticket

if TYPE_CHECKING:
    from layerskip.decode.call import Call
    from layerskip.decode.generation import Generation
    from layerskip.decode.pool import EnginePool
    from layerskip.decode.request import Round

FIRST = 1024  # tokens that the cache of a conversation holds before it grows


class Chat:
    """A conversation: one row whose cache is reused up to the longest common token prefix of each turn.

    `LanguageModel.chat` opens one. The cache starts small and grows with the conversation, to `limit` tokens.
    """

    def __init__(self, call: Call, engines: EnginePool, limit: int, system: str | None = None) -> None:
        self.call, self.limit = call, limit
        self._engines = engines
        self._engine = engines.take(1, min(limit, FIRST), call.head)
        self.scheduler = Scheduler(self._engine)
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._system)
        self._ticket: Ticket | None = None  # of the turn before, whose row is kept
        self._turn = 0
        self.last: Generation | None = None

    def send(self, content: str) -> Iterator[Round]:
        """Answer a message, yielding rounds; abandoning the iterator keeps what was said so far.

        Raises: UserError, with the conversation unchanged, when it no longer fits the context.
        """
        messages = [*self.messages, {"role": "user", "content": content}]
        request = self.call.request(messages, self._turn, keep=True)
        self._make_room(len(request.prompt) + request.max_new_tokens - 1)
        before = self._ticket
        if before is not None and before.status in (Status.FAILED, Status.CANCELLED):
            before = None
        ticket = self._ticket = self.scheduler.submit(request, before)
        self._turn += 1
        rounds: list[Round] = []
        try:
            while ticket.status in (Status.WAITING, Status.RUNNING):
                for _, event in self.scheduler.step():
                    if isinstance(event, Exception):
                        raise event
                    rounds.append(event)
                    yield event
        finally:
            self.scheduler.pause(ticket)
            self.last = self.call.generation(rounds, len(request.prompt))
            if self.last.tokens:  # an answer abandoned before its first token leaves no turn
                self.messages = [*messages, {"role": "assistant", "content": self.last.text}]

    def reset(self) -> None:
        """Forget the conversation but not the system message."""
        self.messages = list(self._system)
        self.last = None
        if self._ticket is not None:
            self.scheduler.cancel(self._ticket)
            self._ticket = None

    def close(self) -> None:
        """End the conversation; its engine serves other calls."""
        self.reset()
        self._engines.give_back(self._engine)

    def _make_room(self, wanted: int) -> None:
        """Let the cache hold so many tokens, or as many as the limit allows."""
        capacity = min(self.limit, rounded_capacity(wanted, self.limit))
        if capacity > self._engine.cache.capacity:
            self._engine.grow(capacity)
