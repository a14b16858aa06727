"""A queue in front of the engine's rows: any thread may submit and cancel, one drives.

    scheduler = Scheduler(engine)
    ticket = scheduler.submit(request)
    while scheduler.busy:
        for ticket, event in scheduler.step():      # a `Round`, or the error that ended the ticket
            ...

`run` is that loop for a list of requests. The next turn of a conversation goes on in its last ticket's row:
`submit(request, after=ticket)`, where the earlier request said `keep`.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

from layerskip.decode.request import Failure
from layerskip.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from layerskip.decode.engine import Engine
    from layerskip.decode.request import Request, Round

Who = TypeVar("Who")


class Status(Enum):
    """What has become of a request."""

    WAITING = "waiting"  # for a row
    RUNNING = "running"
    KEPT = "kept"  # its output has ended, or was paused; its row is left for a next turn
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(eq=False)
class Ticket:
    """A request on its way. `row` is the engine's while the status is running or kept; `error` where it failed."""

    request: Request
    status: Status = Status.WAITING
    row: int | None = None
    error: Exception | None = None
    like: Ticket | None = None  # whose row holds the beginning of its prompt, until it has one of its own


def raising(events: Iterable[tuple[Who, Round | Exception]]) -> Iterator[tuple[Who, Round]]:
    """Yield rounds with whose they are; raise the first error."""
    for who, event in events:
        if isinstance(event, Exception):
            raise event
        yield who, event


class Scheduler:
    """Fill the engine's rows in the order of requests, and tell each request's rounds apart.

    `submit`, `cancel` and `pause` may be called from any thread, from a stop function, a signal handler and a
    finaliser: they take effect at once where nobody is in a step, else when that step ends. An error ends its own
    ticket; the others go on. A ticket's error tells where it was raised, but no longer holds what was at hand.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._waiting: deque[Ticket] = deque()  # for a free row
        self._turns: deque[tuple[Ticket, int]] = deque()  # and the kept row each goes on in
        self._by_row: dict[int, Ticket] = {}
        self._refused: list[tuple[Ticket, Round | Exception]] = []  # at admission, to be told by a step
        self._wishes: deque[tuple[Ticket, Status]] = deque()  # of others, while somebody drives
        # Of all above, held for moments. A signal handler or finaliser may come in while its own thread holds it: a
        # row changes hands in one store, or under `_rows`, which is not waited for.
        self._lock = threading.RLock()
        self._driver = threading.Lock()  # held by whoever is in `step`
        self._rows = threading.Lock()  # of the engine: held for a step, or while wishes are fulfilled

    @property
    def busy(self) -> bool:
        """Whether any ticket waits or runs, or an event has not been told yet."""
        with self._lock:
            return bool(self._waiting or self._turns or self._wishes or self._refused) or self.engine.busy

    def submit(self, request: Request, after: Ticket | None = None, like: Ticket | None = None) -> Ticket:
        """Queue a request; it gets a row in turn. With `after` it takes that ticket's kept row and cache over.

        `like` names a ticket, running or kept, whose cache begins as this one's will: that is copied if it is still
        there.
        Raises: UserError for a request that the engine cannot honour, or a ticket that has no row to go on in.
        """
        self.engine.check(request)
        ticket = Ticket(request, like=like)
        with self._lock:
            if after is None:
                self._waiting.append(ticket)
                return ticket
            if after.status in (Status.WAITING, Status.RUNNING):
                raise UserError(
                    "the turn before is still generating", "pause or cancel it first, or wait for its end"
                )
            row, after.row = after.row, None  # from here on nobody else has it
            if row is None:
                raise UserError(
                    f"the turn before is {after.status.value}, it has left no row", "submit without it"
                )
            after.status = Status.DONE
            del self._by_row[row]
            self._turns.append((ticket, row))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a ticket in any state; its row is free again, others are untouched."""
        self._wish(ticket, Status.CANCELLED)

    def pause(self, ticket: Ticket) -> None:
        """Stop generating, but keep the row for a next turn; a ticket that has no row yet is cancelled."""
        self._wish(ticket, Status.KEPT)

    def step(self) -> list[tuple[Ticket, Round | Exception]]:
        """Do one work item of the engine; tell what it committed, and which tickets failed.

        Raises: UserError where another thread is in a step.
        """
        if not self._driver.acquire(blocking=False):
            raise UserError("two threads drive one scheduler", "one steps; others submit and cancel")
        try:
            with self._rows:
                with self._lock:
                    self._fulfil_all()
                self._admit()
                events = [told for event in self.engine.step() if (told := self._told(event))]
                refused, self._refused = self._refused, []
                return refused + events
        finally:
            self._driver.release()
            self._settle()

    def _told(self, event: Round | Failure) -> tuple[Ticket, Round | Exception] | None:
        """Find the ticket of an event and bring its status up to date; None where nobody waits for it any more."""
        with self._lock:
            ticket = self._by_row.get(event.row)
            if ticket is None:
                return None
            if isinstance(event, Failure):
                self._end(ticket, Status.FAILED, _emptied(event.error))
                return ticket, event.error
            if event.finish_reason:
                self._end(ticket, Status.KEPT if ticket.request.keep else Status.DONE)
            return ticket, event

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Round | Exception]]:
        """Serve requests to their ends; yield (place, round or error). Abandoning the iterator frees their rows.

        Events of other tickets are not told meanwhile: one loop drives a scheduler.
        Raises: UserError for a request that the engine cannot honour.
        """
        tickets: dict[Ticket, int] = {}
        try:
            for place, request in enumerate(requests):
                tickets[self.submit(request)] = place
            while self.busy:
                for ticket, event in self.step():
                    if ticket in tickets:
                        yield tickets[ticket], event
        finally:
            for ticket in tickets:
                self.cancel(ticket)

    # -- rows, while driving ---------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give rows to those who wait, in order; who goes on in a kept row needs no other.

        Raises: UserError where nobody can ever get one.
        """
        if self.engine.untold:  # by a step that was interrupted: its rows are not given away before
            return
        with self._lock:
            while self._turns:
                self._take(*self._turns[0])
                self._turns.popleft()  # behind it: an interrupt must not lose a ticket
            while self._waiting and self.engine.has_room:
                self._take(self._waiting[0])
                self._waiting.popleft()
            stuck = bool(self._waiting) and not self._refused and not self.engine.busy  # before others submit
        if stuck:
            raise UserError(
                "every row is kept for a next turn", "cancel one of those tickets, or make more rows"
            )

    def _take(self, ticket: Ticket, row: int | None = None) -> None:
        """Give a ticket a free row, or the one it goes on in; note an error, which ends it and no other."""
        if ticket.status is not Status.WAITING:  # an interrupt came between this and its leaving the queue
            return
        like, ticket.like = None if ticket.like is None else ticket.like.row, None
        try:
            ticket.row = self.engine.add(ticket.request, row, like)
        except Exception as error:  # noqa: BLE001 - whatever it is
            ticket.status, ticket.error = Status.FAILED, _emptied(error)
            self._refused.append((ticket, error))
            if row is not None:
                self.engine.cancel(row)
        else:
            ticket.status = Status.RUNNING
            self._by_row[ticket.row] = ticket

    def _end(self, ticket: Ticket, status: Status, error: Exception | None = None) -> None:
        if status is not Status.KEPT:
            row, ticket.row = ticket.row, None
            if row is not None:  # else the next turn has it
                del self._by_row[row]
        ticket.status, ticket.error = status, error

    # -- wishes of others ------------------------------------------------------------------------------------

    def _wish(self, ticket: Ticket, status: Status) -> None:
        self._wishes.append((ticket, status))
        self._settle()

    def _settle(self) -> None:
        """Fulfil what was wished for, unless somebody is in a step, who will do it at its end."""
        while self._wishes and self._rows.acquire(blocking=False):
            try:
                with self._lock:
                    self._fulfil_all()
            finally:
                self._rows.release()

    def _fulfil_all(self) -> None:
        while self._wishes:
            self._fulfil(*self._wishes.popleft())

    def _fulfil(self, ticket: Ticket, status: Status) -> None:
        if ticket.status is Status.WAITING:
            ticket.status = Status.CANCELLED
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                return
            [row] = [row for other, row in [*self._turns] if other is ticket]
            self._turns.remove((ticket, row))
            self.engine.cancel(row)
        elif (slot := ticket.row) is None:
            return
        elif status is Status.CANCELLED:
            self.engine.cancel(slot)
            self._end(ticket, Status.CANCELLED)
        elif ticket.status is Status.RUNNING and self.engine.holds(
            slot
        ):  # else its end has not been told yet
            self.engine.pause(slot)
            ticket.status = Status.KEPT


def _emptied(error: Exception) -> Exception:
    """Free what an error's frames hold, tensors above all; its traceback still names their lines."""
    chain: list[BaseException] = [error]
    for one in chain:
        traceback.clear_frames(one.__traceback__)
        causes = (one.__cause__, one.__context__)
        chain += [each for each in causes if each is not None and not any(each is known for known in chain)]
    return error
