"""Rounds over rows: everything that yields tokens yields `Round`.

    engine = Engine(stack, rows=2, capacity=512)
    row = engine.add(Request(prompt=ids, max_new_tokens=64, exit_layer=6, draft_length=4))
    while engine.busy:
        for event in engine.step():     # a `Round`, or the `Failure` of one row
            ...

`scheduler.py` puts a queue in front of it.

One round function serves all modes. A row drafts K tokens, with its first `exit_layer` layers or by another
drafter, and verifies them with the layers up to `depth`: plain decoding is K = 0 with E = depth = L, early-exit
decoding K = 0 with E = depth < L (layer E's token is used without verification).

Invariant, per row, between steps: the cache holds all tokens but the last, which is never cached.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from layerskip.decode.control import EXIT, LOOKUP, Choice, Controller, Drafted
from layerskip.decode.drafters import DRAFTERS
from layerskip.decode.history import History
from layerskip.decode.request import Failure, Request, Round
from layerskip.decode.rounds.device import DeviceRounds, device_law
from layerskip.decode.rounds.host import HostRounds
from layerskip.decode.row import Draft, Outcome, Row, span
from layerskip.decode.sampling import Uniforms, logprobs_of
from layerskip.errors import UserError, nearest
from layerskip.model.head import adapter_of

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.model.head import Head
    from layerskip.model.stack import Stack


class Engine:
    """Own one cache and serve its rows, one work item (a prefill chunk or a round) per `step`.

    `prefill_chunk` is how many positions of a prompt a work item takes; None: as the stack likes it.
    `device_rounds` keeps rounds on the device as far as requests allow; None: where the whole model is on CUDA.
    `finals` keeps the last layer's states, for requests that ask for them; an adapter needs them anyway.

    Raises: UserError for a capacity beyond the context, or where the memory is not there.
    """

    def __init__(
        self,
        stack: Stack,
        *,
        rows: int,
        capacity: int,
        draft_head: Head | None = None,
        prefill_chunk: int | None = None,
        device_rounds: bool | None = None,
        finals: bool = False,
    ) -> None:
        self.stack = stack
        self.finals = finals or (draft_head is not None and draft_head.adapter is not None)
        self.draft_head = draft_head
        self.prefill_chunk = prefill_chunk or stack.prefill_chunk
        if stack.context is not None and capacity > stack.context:
            raise UserError(
                f"a cache of {capacity} positions passes the model's context of {stack.context}",
                "make it smaller",
            )
        with torch.inference_mode():
            self.cache = stack.new_cache(rows, capacity)
            if self.finals:
                self.cache.keep_finals(stack.width, stack.dtype, stack.device)
        if device_rounds is None:
            device_rounds = stack.device.type == "cuda" and self.cache.devices == {stack.device}
        self.host_rounds = HostRounds(stack, self.cache, draft_head)
        self.device_rounds = DeviceRounds(stack, self.cache, draft_head) if device_rounds else None
        self._rows: dict[int, Row] = {}
        self._step_id = self._arrivals = 0
        self._prefilled_last = False
        self._events: list[Round | Failure] = []  # of a step that is going on, or was interrupted
        self._driving = threading.Lock()

    def serves(self, rows: int, capacity: int, draft_head: Head | None, finals: bool = False) -> bool:
        """Whether this engine has no rows and is what one would be made as now."""
        same = (len(self.cache.lengths), self.cache.capacity) == (rows, capacity) and self.finals >= finals
        return not self._rows and same and self.draft_head is draft_head

    def grow(self, capacity: int) -> None:
        """Make room for more tokens in every row. Raises: UserError when the memory is not there."""
        try:
            with torch.inference_mode():
                self.cache.grow(capacity)
        finally:
            if self.device_rounds:
                self.device_rounds.graphs.clear()  # they read and write the tensors that were there before

    @property
    def busy(self) -> bool:
        """Whether any row still has tokens to come."""
        return self.untold or any(not row.finished for row in [*self._rows.values()])

    @property
    def untold(self) -> bool:
        """Whether a step that was interrupted has left events for the next one to tell."""
        return bool(self._events)

    def holds(self, row: int) -> bool:
        """Whether a request has this row."""
        return row in self._rows

    @property
    def has_room(self) -> bool:
        """Whether a request can be added without a row to go on in."""
        return len(self._rows) < len(self.cache.lengths)

    def tokens(self, row: int) -> list[int]:
        """Committed tokens of a row, prompt included. Raises: UserError for a row that has ended."""
        return list(self._known(row).tokens)

    def _known(self, row: int) -> Row:
        if row not in self._rows:
            raise UserError(f"the engine has no row {row}", "it has ended, or was cancelled")
        return self._rows[row]

    # -- rows come and go ------------------------------------------------------------------------------------

    @torch.inference_mode()
    def add(self, request: Request, row: int | None = None, like: int | None = None) -> int:
        """Take a request into a free row, or into a kept `row`, whose cache is reused as far as tokens agree.

        What a free row has in common with the row `like`, which may be running, is copied from there.
        Raises: UserError for a request that cannot be honoured; the engine is unchanged then.
        """
        self.check(request)
        exit_layer = self.stack.num_layers if request.exit_layer is None else request.exit_layer
        depth = exit_layer if request.unverified else self.stack.num_layers
        choice = Choice(exit_layer, request.draft_length, request.confidence, drafter=request.drafter)
        tokens, uniforms = list(request.prompt), Uniforms(request.seed)
        reused = 0
        if row is not None:
            before = self._known(row)
            if not before.finished:
                raise UserError(f"row {row} is still generating", "cancel it first, or wait for its end")
            if self.cache.depths[row] == depth:
                reused = before.reusable(request.prompt, self.cache.lengths[row])
        else:
            row = self.cache.allocate()
            if row is None:
                raise UserError(
                    "all rows of the engine are taken", "wait for one to finish, or make more rows"
                )
            if like is not None and self.holds(like) and self.cache.depths[like] == depth:
                reused = self._known(like).reusable(request.prompt, self.cache.lengths[like])
                self.cache.copy(like, row, reused)
        self.cache.set_length(row, reused, depth)
        self._arrivals += 1
        state, history = request.processing.processors, History(counted_from=len(tokens))
        self._rows[row] = Row(row, request, depth, choice, tokens, uniforms, state, history, self._arrivals)
        return row

    def check(self, request: Request) -> None:
        """Raise UserError for a request this engine cannot honour."""
        layers, length = self.stack.num_layers, len(request.prompt)
        exit_layer = layers if request.exit_layer is None else request.exit_layer
        early = request.unverified or (request.draft_length > 0 and request.drafter == EXIT)
        if request.drafter not in DRAFTERS:
            raise UserError(f"unknown drafter {request.drafter!r}", nearest(request.drafter, DRAFTERS))
        least = 1 if request.unverified or adapter_of(self.draft_head, 0) is None else 0
        if not least <= exit_layer <= (layers - 1 if early else layers):
            allowed = f"choose an exit layer from {least} to {layers - 1} (the model has {layers} layers)"
            raise UserError(f"exit layer {exit_layer} is out of range", allowed)
        if request.draft_length < 0:
            raise UserError(f"draft length {request.draft_length} is negative", "it must be 0 or more")
        if request.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {request.max_new_tokens}", "ask for at least one new token")
        if request.states and not self.finals:
            raise UserError("this engine keeps no states of the last layer", "make it with finals=True")
        if length == 0:
            raise UserError("the prompt is empty", "give at least one token to continue")
        if length > self.cache.capacity:
            raise UserError(
                f"the prompt has {length} tokens, the context is {self.cache.capacity}", "shorten the prompt"
            )
        strange = next((t for t in request.prompt if not 0 <= t < self.stack.vocab_size), None)
        if strange is not None:
            raise UserError(
                f"the prompt has token {strange}, the vocabulary ends at {self.stack.vocab_size - 1}",
                "was it encoded by another model's tokenizer?",
            )

    @torch.inference_mode()
    def cancel(self, row: int) -> None:
        """Drop a row, finished or not, at any time; other rows are untouched."""
        if self._rows.pop(row, None) is not None:
            self.cache.free(row)

    def pause(self, row: int) -> None:
        """Stop generating but keep the row's cache for a next turn. Raises: UserError for a row that has ended."""
        self._known(row).finished = True

    def suspend(self, row: int, suspended: bool) -> None:
        """Leave a row out of steps, its cache kept, or take it in again. Raises: UserError where it has ended."""
        self._known(row).suspended = suspended

    # -- work ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Round | Failure]:
        """Do one work item: a prompt chunk of one row, or a round of the rows that share an exit layer.

        Prompts and rounds alternate when both wait, so that a long prompt does not stall running rows. An error of
        a row (the model gives NaN, a processor or a stop function raises) ends that row alone. After an interrupt
        the next step tells what was committed, and what was not is done again.

        Raises: UserError where another thread is in a step.
        """
        if not self._driving.acquire(blocking=False):
            raise UserError("two threads step one engine", "one drives; others submit to its `Scheduler`")
        try:
            if not self.untold:
                self._work()
            events, self._events = self._events, []
            return events
        finally:
            self._driving.release()

    def _work(self) -> None:
        waiting = [row for row in self._rows.values() if not (row.finished or row.suspended)]
        prompts = [row for row in waiting if self._prefilling(row)]
        rounds = [row for row in waiting if not self._prefilling(row)]
        if not waiting:
            return
        self._choose(rounds)
        self._step_id += 1
        self._prefilled_last = bool(prompts) and not (rounds and self._prefilled_last)
        if self._prefilled_last:
            self._prefill(min(prompts, key=lambda row: row.arrived))
        else:
            oldest = self._kind(min(rounds, key=lambda row: row.waited))
            self._round([row for row in rounds if self._kind(row) == oldest])

    def _choose(self, rows: list[Row]) -> None:
        """Let every controller choose for the rows it serves together: those of one law, on the device."""
        groups: dict[Any, list[Row]] = {}
        for row in rows:
            if row.request.controller is not None:
                law = device_law(row.request) if self.device_rounds else None
                groups.setdefault((id(row.request.controller), law), []).append(row)
        for group in groups.values():
            controller = group[0].request.controller
            assert controller is not None
            rest = controller.rest(len(group))
            chances = [] if rest else [self._chances(row, controller) for row in group]
            choices = [rest] * len(group) if rest else controller.choose(chances)
            for row, choice in zip(group, choices, strict=True):
                row.choice = choice

    def _chances(self, row: Row, controller: Controller) -> list[float]:
        """Say how likely each token is that the row could copy now."""
        if controller.copying is None:
            return []
        most = min(controller.copying.longest, row.room(self.cache.capacity))
        return row.history.chances(row.tokens, most, controller.copying.shortest)

    def _kind(self, row: Row) -> tuple[Any, ...]:
        """What rows must have in common to be served by one step."""
        choice, law = row.choice, device_law(row.request) if self.device_rounds else None
        controller = row.request.controller
        timed = id(controller) if controller is not None and controller.timed else None  # counted together
        shared = (choice.exit_layer, choice.confidence) if choice.source == EXIT else ()
        return choice.source, *shared, choice.probes, row.depth, timed, law

    def _prefilling(self, row: Row) -> bool:
        return self.cache.lengths[row.slot] < len(row.request.prompt)

    def _prefill(self, row: Row) -> None:
        began = time.perf_counter()
        start = self.cache.lengths[row.slot]
        chunk = row.tokens[start : start + self.prefill_chunk]
        end, passes = start + len(chunk), row.depth * len(chunk)
        try:
            tokens = torch.tensor([chunk], device=self.stack.device)  # [1, T]
            step = span([row], [start], [len(chunk)], self.stack, self.cache)
            h, _ = self.stack.run(self.stack.embed(tokens, step), 0, row.depth, step, self.cache)  # [1, T, D]
            if end == len(row.tokens):
                logits = self.stack.logits(h[:, -1])  # [1, V]
                [verdict] = self.host_rounds.judge([row], [Draft()], logits)
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends this row and no other
            self._fail(row, error)
            return
        seconds = time.perf_counter() - began
        if end < len(row.tokens):
            self.cache.set_length(row.slot, end)
            self._report(row, Outcome([], None, passes, None), [], None, seconds, len(chunk))
        else:
            self._commit(row, Outcome([], verdict, passes, logits), seconds, len(chunk))

    def _round(self, rows: list[Row]) -> None:
        """Draft, verify, accept, commit: one round of every row in the group, see `_kind`.

        A round that fails has committed nothing. It is done again row by row, which gives the same numbers, and
        only the row that fails alone has failed.
        """
        began, choice = time.perf_counter(), rows[0].choice
        device = self.device_rounds if choice.source in (EXIT, LOOKUP) and not choice.probes else None
        try:
            if device is not None and device_law(rows[0].request) is not None:
                outcomes = device.round(rows)
            else:
                outcomes = self.host_rounds.round(rows)
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends the row it belongs to and no other
            if len(rows) == 1:
                self._fail(rows[0], error)
                return
            for row in rows:
                self._round([row])
            return
        seconds = time.perf_counter() - began
        learnt: dict[int, tuple[Controller, Choice, list[Drafted]]] = {}
        for row, outcome in zip(rows, outcomes, strict=True):
            choice, controller = row.choice, row.request.controller
            committed = self._commit(row, outcome, seconds)
            if controller is None or not committed:  # its stop function raised, or it was cancelled meanwhile
                continue
            _, longest, seen = learnt.setdefault(id(controller), (controller, choice, []))
            seen.append(Drafted(len(outcome.draft), outcome.kept, committed, outcome.agreements))
            if choice.draft_length > longest.draft_length:
                learnt[id(controller)] = controller, choice, seen
        for controller, choice, seen in learnt.values():
            controller.learn(choice, seconds, seen)

    def _commit(self, row: Row, outcome: Outcome, seconds: float, prompt_tokens: int = 0) -> int:
        """Append what was accepted, cut at the first end of sequence, stop or budget; report it; count its tokens.

        All questions are asked before anything changes: a stop function that raises ends its row alone, and one
        that cancels rows of this engine may do so.
        """
        if self._rows.get(row.slot) is not row:
            return 0  # cancelled by the stop function of a row beside it
        tokens: list[int] = []
        request = row.request
        reason, limit = None, min(len(row.tokens) + row.budget, self.cache.capacity + 1)
        try:
            for token in outcome.committed:
                tokens.append(token)
                if token in row.request.eos:
                    reason = "eos"
                elif row.stops_at(len(tokens) - 1, token):
                    reason = "stop"
                elif len(row.tokens) + len(tokens) >= limit:
                    reason = "length"
                if reason:
                    break
            told = None
            if request.logprobs or request.top_logprobs:
                told = logprobs_of(outcome.logits, tokens, request.top_logprobs)
        except Exception as error:  # noqa: BLE001 - the caller's own function may raise anything
            self._fail(row, error)
            return 0
        if self._rows.get(row.slot) is row:
            row.tokens += tokens
            assert outcome.verdict is not None
            row.state, row.answers = outcome.verdict.state, []
            self.cache.set_length(row.slot, len(row.tokens) - 1, row.depth)
            self._report(row, outcome, tokens, reason, seconds, prompt_tokens, told)
            return len(tokens)
        return 0

    def _fail(self, row: Row, error: Exception) -> None:
        if self._rows.get(row.slot) is row:
            self.cancel(row.slot)
            self._events.append(Failure(row.slot, error))

    def _report(
        self,
        row: Row,
        outcome: Outcome,
        tokens: list[int],
        reason: str | None,
        step_s: float,
        prompt_tokens: int,
        told: tuple[list[float], list[list[tuple[int, float]]]] | None = None,
    ) -> None:
        """Describe what a work item did for a row, and let go of the row when it is finished."""
        request = row.request
        row.waited, row.finished = self._step_id, reason is not None
        plain = "early-exit" if request.unverified else "plain"
        source = row.choice.drafter if row.choice.draft_length else plain
        self._events.append(
            Round(
                row=row.slot,
                tokens=tokens,
                draft=outcome.draft,
                accepted=min(outcome.kept, len(tokens)),
                exit_layer=row.exit_layer,
                draft_length=row.choice.draft_length,
                source="prefill" if prompt_tokens else source,
                step_id=self._step_id,
                step_s=step_s,
                layer_passes=outcome.layer_passes,
                prompt_tokens=prompt_tokens,
                finish_reason=reason,
                logprobs=None if told is None else told[0],
                top_logprobs=told[1] if told is not None and request.top_logprobs else None,
                states=self._states(row) if reason and request.states else None,
            )
        )
        if row.finished and not request.keep:
            self.cancel(row.slot)

    def _states(self, row: Row) -> Tensor:
        known = len(row.tokens) - 1
        states = self.stack.finished(self.cache.finals_at([row.slot] * known, range(known))).cpu()
        with torch.inference_mode(mode=False):  # the caller may train on them
            return states.clone()
