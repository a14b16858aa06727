"""Settings that must not change an output: what a case is, which are tried, how one is decoded.

case = Case(exit_layer=6, draft_length=4)
decoded(lm, prompts, 32, case) == decoded(lm, prompts, 32)      # what losslessness means
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from layerskip.decode.engine import Engine
from layerskip.decode.options import Options
from layerskip.decode.scheduler import Scheduler
from layerskip.errors import UserError, nearest

if TYPE_CHECKING:
    from layerskip.decode.call import Call
    from layerskip.decode.language_model import LanguageModel

LENGTHS = (1, 2, 4, 8)  # K that are tried
ROWS = (1, 3)  # prompts decoded together; three stand in a batch of four on the device
SOURCES = ("exit", "lookup", "auto")  # auto: both
POLICIES = (("fixed", False), ("confidence", False), ("adaptive", False), ("fixed", True), ("adaptive", True))
MOST_EXITS = 6


@dataclass(frozen=True)
class Case:
    """A way to decode. `guard` takes plain steps while they are faster; `on_device` is who leads the rounds."""

    exit_layer: int
    draft_length: int
    draft_vocab: int | str = "off"
    policy: str = "fixed"
    guard: bool = False
    drafter: str = "exit"
    on_device: bool = False
    rows: int = 1

    @property
    def options(self) -> dict[str, Any]:
        names = ["draft_vocab", "policy", "guard", "drafter"]
        names += [] if self.drafter == "lookup" else ["exit_layer", "draft_length"]
        return {"mode": "self-speculative", **{name: getattr(self, name) for name in names}}

    @property
    def work(self) -> int:
        """Order cases from cheap to dear."""
        return self.exit_layer * self.draft_length * self.rows

    def told(self) -> str:
        vocab = "no draft vocabulary" if self.draft_vocab == "off" else f"draft vocabulary {self.draft_vocab}"
        return (
            f"E {self.exit_layer}, K {self.draft_length}, {vocab}, policy {self.policy}"
            f"{' with guard' if self.guard else ''}, {'device' if self.on_device else 'host'} rounds, "
            f"{self.rows} row{'s' if self.rows > 1 else ''}"
        )


@dataclass(frozen=True)
class Counterexample:
    """The smallest prompts and budget found that still differ, and both outputs."""

    case: Case
    prompts: list[list[int]]
    max_new_tokens: int
    plain: list[list[int]]
    own: list[list[int]]

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def spelled(self) -> str:
        """Spell it for `layerskip verify --case`: without the outputs and what is at its default."""
        given = {
            one.name: getattr(self.case, one.name)
            for one in fields(Case)
            if getattr(self.case, one.name) != one.default
        }
        return json.dumps({**given, "prompts": self.prompts, "max_new_tokens": self.max_new_tokens})


def read_case(text: str) -> tuple[Case, list[list[int]], int]:
    """Read what `Counterexample.spelled` wrote. Raises: UserError."""
    allowed = 'such as {"exit_layer": 2, "draft_length": 4, "prompts": [[1, 2]], "max_new_tokens": 8}'
    try:
        given = json.loads(text)
        prompts, budget = given.pop("prompts"), given.pop("max_new_tokens")
        known = [one.name for one in fields(Case)]
        for name in given:
            if name not in known:
                raise UserError(f"--case: unknown key {name!r}", nearest(name, known))
        case = Case(**given)
        sound = all(isinstance(token, int) for prompt in prompts for token in prompt)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--case cannot be read: {error}", f"it is a JSON object {allowed}") from None
    if not (prompts and sound and type(budget) is int and budget > 0):
        raise UserError("--case needs prompts of token ids and a budget of at least 1", allowed)
    return case, prompts, budget


class Clock:
    """The time a verification may take; each part says when it is due."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds, self.now, self.began, self.due = seconds, now, now(), seconds

    @property
    def spent(self) -> float:
        return self.now() - self.began

    @property
    def over(self) -> bool:
        return self.spent >= self.due

    def until(self, share: float) -> Clock:
        """Let the next part run until this share of all the time is over."""
        self.due = share * self.seconds
        return self


def exit_layers(lm: LanguageModel) -> list[int]:
    """The checkpoint's own; one layer, a quarter, a half, all but one (most drafts are kept there); other exits."""
    layers, facts = lm.stack.num_layers, lm.facts
    spread = (1, layers // 4, layers // 2, layers - 1)
    own = () if facts.exit_layer is None else (facts.exit_layer,)
    wanted = (*own, *spread, *facts.exits)
    return list(dict.fromkeys(e for e in wanted if facts.first_exit <= e < layers))[:MOST_EXITS]


def draft_vocabulary(lm: LanguageModel) -> int:
    """The checkpoint's own size, else a quarter of the vocabulary."""
    head = lm.draft_head(Options.parse({"mode": "self-speculative", "drafter": "exit"}))
    return max(1, lm.stack.vocab_size // 4) if head is None else head.size


def cases(lm: LanguageModel, strength: int = 2) -> list[Case]:
    """Choose settings such that every value, or every pair of values (strength 2), occurs; cheap ones first."""
    names = ("exit_layer", "draft_length", "draft_vocab", "policy", "drafter", "on_device", "rows")
    values: list[Sequence[Any]] = [
        exit_layers(lm), LENGTHS, (draft_vocabulary(lm), "off"), POLICIES, SOURCES, (False, True), ROWS,
    ]  # fmt: skip
    made = []
    for chosen in covering(values, strength):
        given = dict(zip(names, chosen, strict=True))
        policy, guard = given.pop("policy")
        made.append(Case(**given, policy=policy, guard=guard))
    return sorted(made, key=lambda case: case.work)


def covering(values: Sequence[Sequence[Any]], strength: int) -> list[tuple[Any, ...]]:
    """Choose combinations greedily until every value (1) or pair of values of two kinds (2) occurs in one."""

    def parts(cell: tuple[Any, ...]) -> set[tuple[Any, ...]]:
        return set(itertools.combinations(enumerate(cell), strength))

    everything = {cell: parts(cell) for cell in itertools.product(*values)}
    missing, chosen = set().union(*everything.values()), []
    while missing:
        best = max(everything, key=lambda cell: len(everything[cell] & missing))
        chosen.append(best)
        missing -= everything[best]
    return chosen


def decoded(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    case: Case | None = None,
    *,
    rows: int = 1,
    indices: Sequence[int] | None = None,
    drafts: Counter[str] | None = None,
    **sampling: Any,
) -> list[list[int]]:
    """Decode prompts, plainly (`rows` at a time) or as the case says; returns the new tokens of each.

    `drafts` counts those that were judged, and kept. Nothing a controller has learnt stays: a case gives the same
    when it is run alone.
    Raises: whatever ended an output.
    """
    call = prepared(lm, max_new_tokens, case, **sampling)
    requests = [
        call.request(list(prompt), index)
        for index, prompt in zip(indices or range(len(prompts)), prompts, strict=True)
    ]
    if case is not None:
        rows = case.rows
    capacity = max(len(prompt) for prompt in prompts) + max_new_tokens - 1
    engine = Engine(
        lm.stack,
        rows=min(rows, len(prompts)),
        capacity=min(capacity, lm.stack.context or capacity),
        draft_head=call.head,
        device_rounds=case is not None and case.on_device,
    )
    tokens: list[list[int]] = [[] for _ in prompts]
    for place, event in Scheduler(engine).run(requests):
        if isinstance(event, Exception):
            raise event
        tokens[place] += event.tokens
        if drafts is not None:
            drafts.update(judged=event.drafted, kept=event.accepted)
    return tokens


def prepared(lm: LanguageModel, max_new_tokens: int, case: Case | None, **sampling: Any) -> Call:
    """Resolve a case's options, with fresh controllers."""
    how: Mapping[str, Any] = {"mode": "ar"} if case is None else case.options
    lm.controllers.clear()
    return lm.call(Options.parse({"max_new_tokens": max_new_tokens, "seed": 0, **how, **sampling}))
