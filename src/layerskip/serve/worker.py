"""The thread that owns the model: it takes requests from a fair queue, drives the scheduler, and delivers rounds.

    worker = Worker(engine, queue=64)
    worker.start()
    job = Job(request, client="...", deliver=print)       # `deliver` is called in the worker's thread
    worker.submit(job)                                     # BusyError where the queue is full
    worker.took(job.reader)                                # a delivery has been read
    worker.cancel(job)                                     # from any thread, in any state
    worker.drain(30); worker.stop()

Everything else only submits, reads and cancels. A job's last delivery is a round with a `finish_reason`, or an
error. While `UNREAD` deliveries wait for a reader, the rows of its jobs are left out of rounds.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from layerskip.decode.scheduler import Scheduler, Status, Ticket
from layerskip.errors import UserError
from layerskip.serve.prefixes import WORTH, Held, chosen, common
from layerskip.serve.queue import FairQueue

if TYPE_CHECKING:
    from layerskip.decode.engine import Engine
    from layerskip.decode.request import Request, Round

UNREAD = 64  # deliveries that may wait for a reader: a healthy one is a few behind, and this many stay small
IDLE_S = 0.5  # how long the thread sleeps at most while nothing is to be done


class BusyError(Exception):
    """The queue is full; `retry_s` says when to come again."""

    def __init__(self, retry_s: int) -> None:
        super().__init__("too many requests wait")
        self.retry_s = retry_s


class DrainingError(Exception):
    """The server is going down and takes no more."""


class BrokenError(Exception):
    """The worker has failed: nothing is decoded any more."""


class LateError(Exception):
    """A request took longer than it may."""


class GoneError(Exception):
    """A request was cancelled: its client has left, or was stuck for too long."""


@dataclass(eq=False)
class Reader:
    """Who reads what one or several jobs deliver. Changed with the worker's lock held."""

    unread: int = 0  # deliveries
    full_since: float | None = None  # when they became too many, or one of too many was last read


@dataclass(eq=False)
class Job:
    """A request on its way through the server, and what became of it. Times are of `time.monotonic`."""

    request: Request
    client: str
    deliver: Callable[[Round | Exception], None]
    deadline: float | None = None
    reader: Reader = field(default_factory=Reader)  # shared by the choices of one answer
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None  # when it got a row
    first: float | None = None  # when its first token came
    ended: float | None = None
    cached: int = 0  # leading tokens of the prompt that were in a cache
    made: int = 0  # tokens written
    ticket: Ticket | None = None
    over: bool = False

    @property
    def is_full(self) -> bool:
        """Whether its reader must read before more is delivered."""
        return self.reader.full_since is not None and not self.over


Watcher = Callable[["Job", "Round | Exception"], None]


class Worker:
    """Serve jobs with one engine. `watch` is told every delivery, for metrics.

    Where a reader with `UNREAD` deliveries reads nothing for `stalled_s`, its jobs are cancelled.
    """

    def __init__(
        self, engine: Engine, queue: int, watch: Watcher | None = None, stalled_s: float = 60.0
    ) -> None:
        self.engine = engine
        self.scheduler = Scheduler(engine)
        self._watch, self._stalled_s = watch, stalled_s
        self._queue: FairQueue[Job] = FairQueue(queue)
        self._running: dict[Ticket, Job] = {}
        self._behind: list[
            Job
        ] = []  # next in line, once a running one has computed what their prompts begin with
        self._kept: dict[Ticket, float] = {}  # rows with an earlier output, by when they were last of use
        self._cancelled: list[tuple[Job, Exception]] = []
        self._wake = threading.Condition()
        self._draining = self._stopped = False
        self._took_s = 1.0  # how long a request has a row, lately
        self.fault: BaseException | None = None  # what ended the thread, where that was no request's error
        self._threads = torch.get_num_threads()  # of the compiled code, which every thread is told anew
        self._thread = threading.Thread(target=self._run, name="layerskip-worker", daemon=True)

    # -- from any thread -------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the thread is alive."""
        return self._thread.is_alive() and self.fault is None

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def rows(self) -> int:
        return len(self.engine.cache.lengths)

    @property
    def waiting(self) -> int:
        return len(self._queue) + len(self._behind)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def suspended(self) -> int:
        return sum(job.is_full for job in [*self._running.values()])

    def submit(self, *jobs: Job) -> None:
        """Queue jobs that belong together, all or none.

        Raises: UserError for a request that cannot be honoured; BusyError, DrainingError, BrokenError.
        """
        for job in jobs:
            self.engine.check(job.request)
        with self._wake:
            if self._draining:
                raise DrainingError
            if not self.healthy:
                raise BrokenError
            room = self._queue.most + max(0, self.rows - self.running)
            if len(self._queue) + len(jobs) > room:
                raise BusyError(max(1, round(self._took_s * (1 + len(self._queue) / self.rows))))
            for job in jobs:
                self._queue.put(job.client, job)
            self._wake.notify_all()

    def took(self, reader: Reader) -> None:
        """Note that one delivery has been read; rows that were left out for it take part in rounds again."""
        with self._wake:
            reader.unread -= 1
            if reader.full_since is not None:
                reader.full_since = time.monotonic() if reader.unread >= UNREAD else None
                self._wake.notify_all()

    def cancel(self, job: Job, why: Exception | None = None) -> None:
        """End a job within a round, in whatever state it is; one that has ended stays as it is."""
        with self._wake:
            self._cancelled.append((job, why or GoneError()))
            self._wake.notify_all()

    def drain(self, seconds: float | None = None) -> bool:
        """Take no more jobs and wait for those there are; say whether all have ended in time."""
        with self._wake:
            self._draining = True
            self._wake.notify_all()
            return self._wake.wait_for(
                lambda: not (self._queue or self._behind or self._running) or not self.healthy, seconds
            )

    def stop(self) -> None:
        """End the thread, and with it whatever is left."""
        with self._wake:
            self._draining = self._stopped = True
            self._wake.notify_all()
        self._thread.join(10)

    # -- the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while self._turn():
                pass
        except BaseException as error:  # noqa: BLE001 - told to all who wait, and by /health
            self.fault = error
        with self._wake:
            left = [*self._running.values(), *self._behind, *(job for _, job in self._queue.items())]
            self._running.clear()
            self._behind.clear()
            for client, job in self._queue.items():
                self._queue.drop(client, job)
            self._wake.notify_all()
        for job in left:
            self._tell(job, self.fault if isinstance(self.fault, Exception) else DrainingError())

    def _turn(self) -> bool:
        """Do what others wished for, give rows out, take one step; False when it is over."""
        with self._wake:
            if self._is_idle():
                self._wake.wait(IDLE_S)
            if self._stopped:
                return False
            cancelled, self._cancelled = self._cancelled, []
            waiting = [job for _, job in self._queue.items()]  # others put more in at any moment
        for job, why in cancelled:
            self._drop(job, why)
        now = time.monotonic()
        for job in [*self._running.values(), *self._behind, *waiting]:
            full_since = job.reader.full_since  # may be set to None meanwhile
            if job.deadline is not None and now > job.deadline:
                self._drop(job, LateError())
            elif full_since is not None and now - full_since > self._stalled_s:
                self._drop(job, GoneError())
        for ticket, job in self._running.items():
            if ticket.row is not None:
                self.engine.suspend(ticket.row, job.is_full)
        self._admit()
        if self._running:
            for ticket, event in self.scheduler.step():
                self._told(ticket, event)
        return True

    def _is_idle(self) -> bool:
        """Whether a turn would do nothing: nobody can get a row, and all who have one are full. Needs `_wake`."""
        waits = bool(self._queue) and len(self._running) + len(self._behind) < self.rows
        return not (
            self._cancelled
            or self._stopped
            or waits
            or not all(map(self._follows, self._behind))
            or any(not job.is_full for job in self._running.values())
        )

    def _admit(self) -> None:
        """Give rows out, but let those wait whose beginning another one is computing: it is copied then."""
        waiting, self._behind = self._behind, []
        while (job := waiting.pop(0) if waiting else self._taken()) is not None:
            if self._follows(job):
                self._behind.append(job)
            else:
                self._place(job)

    def _taken(self) -> Job | None:
        """The next job of the queue, if there is a row for it."""
        with self._wake:
            return self._queue.take() if len(self._running) + len(self._behind) < self.rows else None

    def _follows(self, job: Job) -> bool:
        """Whether a running job computes, at this moment, at least half of this one's prompt."""
        prompt = job.request.prompt
        return any(
            other.first is None
            and not other.is_full
            and common(prompt, other.request.prompt) >= max(WORTH, len(prompt) // 2)
            for other in self._running.values()
        )

    def _place(self, job: Job) -> None:
        """Give a job its row: the one that holds most of its prompt, else a free one, else the oldest kept."""
        free = len(self._kept) + len(self._running) < self.rows
        held = [
            Held(ticket, self.engine.tokens(ticket.row), ticket in self._kept, self._kept.get(ticket, 0.0))
            for ticket in [*self._kept, *self._running]
            if ticket.row is not None
        ]
        place = chosen(job.request.prompt, held, free)
        assert place is not None, "there is a free row or a kept one"
        if place.evicted is not None:
            self._kept.pop(place.evicted)
            self.scheduler.cancel(place.evicted)
        if place.after is not None:
            self._kept.pop(place.after)
        elif place.like in self._kept:
            self._kept[place.like] = time.monotonic()
        try:
            ticket = self.scheduler.submit(job.request, after=place.after, like=place.like)
        except UserError as error:
            self._end(job, error)
            return
        job.ticket, job.started = ticket, time.monotonic()
        job.cached = len(job.request.prompt)  # less what is computed of it
        self._running[ticket] = job

    def _told(self, ticket: Ticket, event: Round | Exception) -> None:
        job = self._running.get(ticket)
        if job is None:
            return
        if isinstance(event, Exception):
            del self._running[ticket]
            self._end(job, event)
            return
        job.cached -= event.prompt_tokens
        job.made += len(event.tokens)
        if event.tokens and job.first is None:
            job.first = time.monotonic()
        if event.finish_reason:
            del self._running[ticket]
            if ticket.status is Status.KEPT:
                self._kept[ticket] = time.monotonic()
            if job.started is not None:
                self._took_s += 0.2 * (time.monotonic() - job.started - self._took_s)
            self._end(job, event)
        else:
            self._tell(job, event)

    def _drop(self, job: Job, why: Exception) -> None:
        if job.over:
            return
        with self._wake:
            waited = self._queue.drop(job.client, job) or job in self._behind
            self._behind = [other for other in self._behind if other is not job]
        if not waited and job.ticket is not None and self._running.pop(job.ticket, None) is not None:
            self.scheduler.pause(job.ticket)  # what it has computed may serve the next one
            if job.ticket.status is Status.KEPT:
                self._kept[job.ticket] = time.monotonic()
        self._end(job, why)

    def _end(self, job: Job, event: Round | Exception) -> None:
        self._tell(job, event)
        with self._wake:
            self._wake.notify_all()

    def _tell(self, job: Job, event: Round | Exception) -> None:
        if job.over:
            return
        if isinstance(event, Exception) or event.finish_reason:
            job.over, job.ended = True, time.monotonic()
        if self._watch is not None:
            self._watch(job, event)
        with self._wake:
            job.reader.unread += 1
            if job.reader.unread >= UNREAD and job.reader.full_since is None:
                job.reader.full_since = time.monotonic()
        try:
            job.deliver(event)
        except RuntimeError:  # its event loop has closed: nobody is there to read it
            job.over = True
