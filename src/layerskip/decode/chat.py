"""A conversation: its cache is kept between turns and reused as far as the tokens agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from layerskip.decode.engine import Engine
from layerskip.decode.generation import Generation, finished
from layerskip.decode.options import Options, seeded
from layerskip.errors import UserError

if TYPE_CHECKING:
    from layerskip.decode.request import Round


class Chat:
    """A conversation: one row whose cache is reused up to the longest common token prefix of each turn."""

    def __init__(
        self, lm: Any, options: Options, system: str | None = None, context: int | None = None
    ) -> None:
        self.lm = lm
        self.options = seeded(options)
        self.plan = lm.plan(options)
        self._system = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._system)
        if context is not None and context < 1:
            raise UserError(f"context is {context}", "give a number of tokens, at least 1")
        capacity = min(filter(None, (context, lm.stack.context)), default=4096)
        self.engine = Engine(lm.stack, rows=1, capacity=capacity, draft_head=lm.draft_head(options))
        self._row: int | None = None
        self._turn = 0
        self.last: Generation | None = None

    def send(self, content: str) -> Iterator[Round]:
        """Answer a message, yielding rounds; abandoning the iterator keeps what was said so far.

        Raises: UserError, with the conversation unchanged, when it no longer fits the context.
        """
        messages = [*self.messages, {"role": "user", "content": content}]
        request = self.lm.request(messages, self.options, self._turn, keep=True)
        row = self._row = self.engine.add(request, self._row)
        self._turn += 1
        rounds: list[Round] = []
        try:
            while not (rounds and rounds[-1].finish_reason):
                for round in self.engine.step():
                    rounds.append(round)
                    yield round
        except UserError:
            self._row = None  # the engine has cancelled it
            raise
        finally:
            if self._row is not None:
                self.engine.pause(row)
            self.last = finished(
                self.lm.tokenizer, rounds, self.plan, len(request.prompt), self.options.stops
            )
            if self.last.tokens:  # an answer abandoned before its first token leaves no turn
                self.messages = [*messages, {"role": "assistant", "content": self.last.text}]

    def reset(self) -> None:
        """Forget the conversation but not the system message."""
        self.messages = list(self._system)
        self.last = None
        if self._row is not None:
            self.engine.cancel(self._row)
            self._row = None
