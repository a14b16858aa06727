"""A conversation: its cache is kept between turns and reused as far as the tokens agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from layerskip.decode.pool import rounded_capacity
from layerskip.decode.scheduler import Scheduler, Status, Ticket, raising
from layerskip.decode.text import pieces
from layerskip.errors import UserError

if TYPE_CHECKING:
    from layerskip.decode.call import Call
    from layerskip.decode.engine import Engine
    from layerskip.decode.generation import Generation
    from layerskip.decode.pool import EnginePool
    from layerskip.decode.request import Request, Round

FIRST = 1024  # tokens that the cache of a conversation holds before it grows


class Chat:
    """A conversation: one row whose cache is reused up to the longest common token prefix of each turn.

    `LanguageModel.chat` opens one; options, such as `max_new_tokens`, are given there and serve every turn. The
    cache starts small and grows with the conversation, to `limit` tokens.
    """

    def __init__(self, call: Call, engines: EnginePool, limit: int, system: str | None = None) -> None:
        self.call, self.limit = call, limit
        self._engines = engines
        self._engine: Engine | None = engines.take(1, min(limit, FIRST), call.head, call.options.states)
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
        request = self._fitted(request)
        before = self._ticket
        if before is not None and before.status in (Status.FAILED, Status.CANCELLED):
            before = None
        ticket = self._ticket = self.scheduler.submit(request, before)
        self._turn += 1
        rounds: list[Round] = []
        try:
            while ticket.status in (Status.WAITING, Status.RUNNING):
                for _, round in raising(self.scheduler.step()):
                    rounds.append(round)
                    yield round
        finally:
            self.scheduler.pause(ticket)
            if self._ticket is ticket:  # else the conversation was reset meanwhile
                self.last = self.call.generation(rounds, len(request.prompt))
                if self.last.tokens:  # an answer abandoned before its first token leaves no turn
                    self.messages = [*messages, {"role": "assistant", "content": self.last.text}]

    def send_text(self, content: str) -> Iterator[str]:
        """Answer a message, yielding text in pieces, as it comes; see `send`.

        Exact: joined they are the text of `last` (test_the_pieces_of_a_turn_are_its_text).
        """
        return pieces(
            self.call.tokenizer, (round.tokens for round in self.send(content)), self.call.options.stops
        )

    def reset(self) -> None:
        """Forget the conversation but not the system message."""
        self.messages = list(self._system)
        self.last = None
        if self._ticket is not None:
            self.scheduler.cancel(self._ticket)
            self._ticket = None

    def close(self) -> None:
        """End the conversation; its engine serves other calls. Again does nothing."""
        self.reset()
        if self._engine is not None:
            self._engines.give_back(self._engine)
            self._engine = None

    def _fitted(self, request: Request) -> Request:
        """Keep a turn within the limit of the conversation, and let the cache hold it. Raises: UserError."""
        if self._engine is None:
            raise UserError("the conversation is closed", "lm.chat() opens another")
        length = len(request.prompt)
        if length > self.limit:
            raise UserError(
                f"the prompt has {length} tokens, the context is {self.limit}", "shorten the prompt"
            )
        request = replace(request, max_new_tokens=min(request.max_new_tokens, self.limit + 1 - length))
        wanted = length + request.max_new_tokens - 1
        if wanted > self._engine.cache.capacity:
            try:
                self._engine.grow(rounded_capacity(wanted, self.limit))
            except UserError:  # a power of two may be more than there is memory for
                self._engine.grow(wanted)
        return request
