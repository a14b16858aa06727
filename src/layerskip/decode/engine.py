"""Rounds over rows: everything that yields tokens yields `Round`.

    engine = Engine(stack, rows=2, capacity=512)
    row = engine.add(Request(prompt=ids, max_new_tokens=64, exit_layer=6, draft_length=4))
    while engine.busy:
        for round in engine.step():
            ...

One round function serves all modes. A row drafts K tokens with its first `exit_layer` layers and verifies them
with the layers up to `depth`: plain decoding is K = 0 with E = depth = L, early-exit decoding K = 0 with
E = depth < L (it believes its exit), self-speculation K > 0 with E < depth = L.

Invariant, per row, between steps: the cache holds all tokens but the last, which is never cached.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from layerskip.decode.control import Choice, Drafted
from layerskip.decode.request import Request, Round
from layerskip.decode.rounds.device import DeviceRounds, device_law
from layerskip.decode.rounds.host import HostRounds
from layerskip.decode.row import Row
from layerskip.decode.sampling import Uniforms
from layerskip.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from layerskip.model.head import Head
    from layerskip.model.stack import Stack

PREFILL_CHUNK = 512  # positions of a prompt per work item


class Engine:
    """Own one cache and serve its rows, one work item (a prefill chunk or a round) per `step`.

    `device_rounds` keeps rounds on the device as far as requests allow; None: where the whole model is on CUDA.
    """

    def __init__(
        self,
        stack: Stack,
        *,
        rows: int,
        capacity: int,
        draft_head: Head | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        device_rounds: bool | None = None,
    ) -> None:
        self.stack = stack
        self.draft_head = draft_head
        self.prefill_chunk = prefill_chunk
        with torch.inference_mode():
            self.cache = stack.new_cache(rows, capacity)
        if device_rounds is None:
            device_rounds = stack.device.type == "cuda" and self.cache.devices == {stack.device}
        self.host_rounds = HostRounds(stack, self.cache, draft_head)
        self.device_rounds = DeviceRounds(stack, self.cache, draft_head) if device_rounds else None
        self._rows: dict[int, Row] = {}
        self._step_id = 0
        self._prefilled_last = False

    def serves(self, rows: int, capacity: int, draft_head: Head | None) -> bool:
        """Whether this engine has no rows and is what one would be made as now."""
        same = (len(self.cache.lengths), self.cache.capacity) == (rows, capacity)
        return not self._rows and same and self.draft_head is draft_head

    @property
    def busy(self) -> bool:
        """Whether any row still has tokens to come."""
        return any(not row.finished for row in self._rows.values())

    def tokens(self, row: int) -> list[int]:
        """Committed tokens of a row, prompt included."""
        return list(self._rows[row].tokens)

    # -- rows come and go ------------------------------------------------------------------------------------

    @torch.inference_mode()
    def add(self, request: Request, row: int | None = None) -> int:
        """Take a request into a free row, or into a kept `row`, whose cache is reused as far as tokens agree.

        Raises: UserError for a request that cannot be honoured; the engine is unchanged then.
        """
        self.check(request)
        exit_layer = request.exit_layer or self.stack.num_layers
        depth = exit_layer if request.believe else self.stack.num_layers
        reused = 0
        if row is not None:
            before = self._rows[row]
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
        self.cache.set_length(row, reused, depth)
        choice = Choice(exit_layer, request.draft_length, request.confidence)
        tokens, uniforms = list(request.prompt), Uniforms(request.seed)
        self._rows[row] = Row(row, request, depth, choice, tokens, uniforms, request.processing.processors)
        return row

    def check(self, request: Request) -> None:
        """Raise UserError for a request this engine cannot honour."""
        layers, length = self.stack.num_layers, len(request.prompt)
        exit_layer = layers if request.exit_layer is None else request.exit_layer
        early = request.draft_length > 0 or request.believe
        if not 1 <= exit_layer <= (layers - 1 if early else layers):
            allowed = f"choose an exit layer from 1 to {layers - 1} (the model has {layers} layers)"
            raise UserError(f"exit layer {exit_layer} is out of range", allowed)
        if request.draft_length < 0:
            raise UserError(f"draft length {request.draft_length} is negative", "it must be 0 or more")
        if request.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {request.max_new_tokens}", "ask for at least one new token")
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
        """Stop generating but keep the row's cache for a next turn."""
        self._rows[row].finished = True

    # -- work ------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Round]:
        """Do one work item: a prompt chunk of one row, or a round of the rows that share an exit layer.

        Prompts and rounds alternate when both wait, so that a long prompt does not stall running rows.

        Raises: UserError when the model gives NaN or processors forbid everything; the rows of this work
        item are cancelled then and the others can go on.
        """
        waiting = [row for row in self._rows.values() if not row.finished]
        prompts = [row for row in waiting if self._prefilling(row)]
        rounds = [row for row in waiting if not self._prefilling(row)]
        if not waiting:
            return []
        _choose(rounds)
        self._step_id += 1
        self._prefilled_last = bool(prompts) and not (rounds and self._prefilled_last)
        if self._prefilled_last:
            group = prompts[:1]
        else:
            oldest = self._kind(min(rounds, key=lambda row: row.waited))
            group = [row for row in rounds if self._kind(row) == oldest]
        try:
            return self._prefill(group[0]) if self._prefilled_last else self._round(group)
        except UserError:
            for row in group:
                self.cancel(row.slot)
            raise

    def _kind(self, row: Row) -> tuple[Any, ...]:
        """What rows must have in common to be served by one step."""
        choice, law = row.choice, device_law(row.request) if self.device_rounds else None
        controller = id(row.request.controller)  # its rows are counted and timed together
        return choice.exit_layer, choice.confidence, choice.probes, row.depth, controller, law

    def _prefilling(self, row: Row) -> bool:
        return self.cache.lengths[row.slot] < len(row.request.prompt)

    def _prefill(self, row: Row) -> list[Round]:
        began = time.perf_counter()
        start = self.cache.lengths[row.slot]
        chunk = row.tokens[start : start + self.prefill_chunk]
        tokens = torch.tensor([chunk], device=self.stack.device)  # [1, T]
        step = self.host_rounds.span([row], [start], [len(chunk)])
        h, _ = self.stack.run(self.stack.embed(tokens, step), 0, row.depth, step, self.cache)  # [1, T, D]
        end = start + len(chunk)
        if end < len(row.tokens):
            self.cache.set_length(row.slot, end)
            seconds, passes = time.perf_counter() - began, row.depth * len(chunk)
            return [self._report(row, ([], None), h, seconds, [], 0, passes, len(chunk))]
        logits = self.stack.logits(h[:, -1])  # [1, V]
        kept, following = self.host_rounds.judge([row], logits)[0]
        seconds = time.perf_counter() - began
        self.cache.set_length(row.slot, end)
        committed = self._commit(row, [], kept, following)
        return [self._report(row, committed, logits, seconds, [], 0, row.depth * len(chunk), len(chunk))]

    def _round(self, rows: list[Row]) -> list[Round]:
        """Draft, verify, accept, commit: one round of every row in the group, see `_kind`."""
        began, choice, controller = time.perf_counter(), rows[0].choice, rows[0].request.controller
        if self.device_rounds and device_law(rows[0].request) is not None and not choice.probes:
            outcomes = self.device_rounds.round(rows)
        else:
            outcomes = self.host_rounds.round(rows)
        seconds = time.perf_counter() - began
        rounds, seen = [], []
        for row, (draft, kept, following, num_computed, logits, agreements) in zip(
            rows, outcomes, strict=True
        ):
            committed = self._commit(row, draft, kept, following)
            self.cache.set_length(row.slot, len(row.tokens) - 1, row.depth)
            passes = num_computed * row.depth
            rounds.append(self._report(row, committed, logits, seconds, draft, kept, passes))
            seen.append(Drafted(len(draft), kept, len(committed[0]), agreements))
        if controller is not None:
            controller.learn(choice, seconds, seen)
        return rounds

    def _commit(self, row: Row, draft: list[int], kept: int, following: int) -> tuple[list[int], str | None]:
        """Append what was accepted, cut at the first end of sequence, stop or budget; return it and the reason."""
        committed: list[int] = []
        reason = None
        for token in (*draft[:kept], following):
            row.tokens.append(token)
            committed.append(token)
            if token in row.request.eos:
                reason = "eos"
            elif row.request.stop is not None and row.request.stop(token):
                reason = "stop"
            elif row.budget == 0 or len(row.tokens) > self.cache.capacity:
                reason = "length"
            if reason:
                break
        return committed, reason

    def _report(
        self,
        row: Row,
        committed: tuple[list[int], str | None],
        logits: Tensor | None,
        step_s: float,
        draft: list[int],
        kept: int,
        layer_passes: int,
        prompt_tokens: int = 0,
    ) -> Round:
        """Describe what a work item did for a row, and let go of the row when it is finished."""
        (tokens, reason), request = committed, row.request
        row.waited, row.finished = self._step_id, reason is not None
        if row.finished and not request.keep:
            self.cancel(row.slot)
        plain = "early-exit" if request.believe else "plain"
        source = "self-speculative" if row.exit_layer < row.depth else plain
        return Round(
            row=row.slot,
            tokens=tokens,
            draft=draft,
            accepted=min(kept, len(tokens)),
            exit_layer=row.exit_layer,
            draft_length=row.choice.draft_length,
            source="prefill" if prompt_tokens else source,
            step_id=self._step_id,
            step_s=step_s,
            layer_passes=layer_passes,
            prompt_tokens=prompt_tokens,
            finish_reason=reason,
            logprobs=_logprobs(logits, tokens) if request.logprobs and tokens else None,
        )


def _choose(rows: list[Row]) -> None:
    """Let every controller choose for the rows it serves."""
    controllers = {id(row.request.controller): row.request.controller for row in rows}
    for controller in filter(None, controllers.values()):
        own = [row for row in rows if row.request.controller is controller]
        choice = controller.choice(len(own))
        for row in own:
            row.choice = choice


def _logprobs(logits: Tensor | None, tokens: list[int]) -> list[float]:
    """Log-probabilities of committed tokens under the model itself, before any processing: [N, V] -> N'."""
    assert logits is not None, "rows that ask for log-probabilities are served by the host"
    index = torch.tensor(tokens, device=logits.device)[:, None]
    picked = logits[: len(tokens)].log_softmax(-1).gather(-1, index)[:, 0]
    return [float(x) for x in picked]
