"""The best setting by measurement: the best predicted race plain decoding, the worse half drops out each rung.

    trials = finalists(analysis, default_cell(lm))
    order = halving(lm, trials, prompts, max_new_tokens=64, seconds=180)
    order[0].measured()         # plain seconds over its own, with the 95% interval

On each prompt plain decoding and all settings still in the race take turns; a ratio compares two runs on the same
prompt in the same turn, ends of sequence respected, timed from outside the engine. What is told of the winner comes
from a last rung of its own: the runs that chose it flatter it.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from layerskip.checkpoint import facts as checkpoint
from layerskip.decode.pool import EnginePool
from layerskip.errors import UserError
from layerskip.measure.intervals import Ratio, ratio_of_sums
from layerskip.watch import Watch, silent

if TYPE_CHECKING:
    from pathlib import Path

    from layerskip.decode.language_model import LanguageModel
    from layerskip.measure.advice.cells import Analysis, Cell, Predicted

FINALISTS = 6  # of exits alone
LEADING_EXITS = 3  # each sends its best cell
COPIES = 2  # settings that copy, alone and beside an exit
LEAST_TURNS = 2  # of a rung
LAST_TURNS = 8  # at least, of the last one; fewer where there are fewer prompts
WARM_UP = 8  # new tokens of a first call


@dataclass
class Trial:
    """A setting in the race, and how it did: seconds of plain decoding and its own, by group of prompts."""

    cell: Cell
    predicted: float
    confidence: float | None = None  # the policy's threshold
    policy: str = "fixed"
    interval: tuple[float, float] | None = None  # of the prediction
    seconds: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    of: int = 0
    differing: list[int] = field(default_factory=list)  # prompts whose output was not plain decoding's
    drafted: int = 0
    accepted: int = 0

    @classmethod
    def predicted_by(cls, one: Predicted, policy: str = "fixed") -> Trial:
        """Put a prediction to the test. The adaptive policy starts from it and was not predicted itself."""
        interval = None if policy == "adaptive" else one.interval
        return cls(one.cell, one.speedup, one.confidence, policy, interval)

    @property
    def options(self) -> dict[str, Any]:
        sure = {} if self.confidence is None else {"confidence": self.confidence}
        return {**self.cell.options, "policy": self.policy, **sure}

    def measured(self) -> Ratio:
        """Plain seconds over its own, both for all prompts; one that was played several times counts once."""
        played = list(self.seconds.values())
        if len(played) > 1:
            played = [
                [(statistics.mean(a), statistics.mean(b))]
                for a, b in (zip(*own, strict=True) for own in played)
            ]
        return ratio_of_sums(*zip(*(pair for pairs in played for pair in pairs), strict=True))

    @property
    def pays(self) -> bool:
        """Whether it was measured to be faster than plain decoding."""
        return self.measured().low > 1

    @property
    def mode(self) -> str:
        """What to decode by: plainly where it does not pay."""
        return "self-speculative" if self.pays else "ar"

    def record(self) -> dict[str, Any]:
        found = self.measured()
        return {
            **self.cell.record(),
            "policy": self.policy,
            "confidence": self.confidence,
            "predicted_speedup": self.predicted,
            "speedup": found.record(),
            "acceptance": self.accepted / self.drafted if self.drafted else None,
            "equal": self.of - len(self.differing),
            "of": self.of,
        }


def finalists(analysis: Analysis, default: Cell | None = None, count: int = FINALISTS) -> list[Trial]:
    """Choose what is worth measuring: the best cell of each leading exit, then the best of the others, then copies.

    The checkpoint's present default comes on top, and the other policies: the best cell of the confidence policy
    where it was predicted, and the adaptive one, which starts from the best cell and finds its own.
    """
    leading = analysis.best_of(lambda cell: cell.exit_layer)[:LEADING_EXITS]
    rows = analysis.best_of(lambda cell: (cell.exit_layer, cell.draft_length))  # sizes hardly differ
    chosen: dict[Cell, Predicted] = {one.cell: one for one in leading}
    for one in rows:
        if len(chosen) < count:
            chosen.setdefault(one.cell, one)
    adaptive = [analysis.best]
    for drafter in ("lookup", "auto"):
        copies = [one for one in analysis.copies if one.cell.drafter == drafter]
        best = sorted(copies, key=lambda one: -one.speedup)[:COPIES]
        chosen |= {one.cell: one for one in best}
        adaptive += best[:1] if drafter == "auto" else []
    chosen |= {one.cell: one for one in [analysis.of(default)] if one}
    trials = [Trial.predicted_by(one) for one in chosen.values()]
    if analysis.confident is not None:
        trials.append(Trial.predicted_by(analysis.confident, "confidence"))
    trials += [Trial.predicted_by(one, "adaptive") for one in adaptive]
    return sorted(trials, key=lambda trial: -trial.predicted)


def halving(
    lm: LanguageModel,
    trials: Sequence[Trial],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    seconds: float,
    batch_size: int = 1,
    watch: Watch = silent,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Trial]:
    """Measure in rungs of equal time until one is left, then that one anew; return them by rank.

    Prompts go round, so each rung is played on others than the one before as long as they last. The winner's
    ratios are those of its last rung alone.
    """
    groups = [list(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    race = Race(lm, groups, max_new_tokens, clock)
    alive, dropped = list(trials), list[Trial]()
    rungs = math.ceil(math.log2(len(alive))) + 1 if alive else 0
    watch("warming up", 0, 0)
    race.warm_up(alive)
    for rung in range(rungs):
        began, turns, least = clock(), 0, LEAST_TURNS
        if rung == rungs - 1:
            alive[0].seconds, least = {}, max(LEAST_TURNS, min(LAST_TURNS, len(groups)))
        while turns < least or clock() - began < seconds / rungs:
            what = f"measuring, rung {rung + 1} of {rungs}, {len(alive)} settings"
            watch(what, int(clock() - began), int(seconds / rungs))
            race.turn(alive)
            turns += 1
        alive.sort(key=lambda trial: -trial.measured().ratio)
        kept = math.ceil(len(alive) / 2)
        dropped = [*alive[kept:], *dropped]
        alive = alive[:kept]
    return [*alive, *dropped]


class Race:
    """Paired runs of settings and plain decoding, one group of prompts after the other."""

    def __init__(
        self,
        lm: LanguageModel,
        groups: Sequence[list[list[int]]],
        max_new_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.lm, self.groups, self.max_new_tokens, self.clock = lm, groups, max_new_tokens, clock
        self.turns = 0
        self.faces = defaultdict[int, "LanguageModel"](self._face)

    def _face(self) -> LanguageModel:
        """The model with engines of its own: graphs of one setting do not push out those of another."""
        face = copy.copy(self.lm)
        face.engines = EnginePool(face.stack, self.lm.engines.keep)
        return face

    def warm_up(self, trials: Sequence[Trial]) -> None:
        """Decode a little with every trial and plainly; nothing of it is counted."""
        for trial in trials:
            self._decoded(trial, self.groups[0], WARM_UP)
        self._decoded(None, self.groups[0], WARM_UP)

    def turn(self, trials: Sequence[Trial]) -> None:
        """Decode the next group plainly and with every trial, led in rotation; skip one that has nothing to decode.

        Raises: UserError when no group has anything to decode.
        """
        for _ in self.groups:
            index = self.turns % len(self.groups)
            self.turns += 1
            methods = [None, *trials]
            turned = [methods[(i + self.turns) % len(methods)] for i in range(len(methods))]
            runs = {id(one): self._decoded(one, self.groups[index], self.max_new_tokens) for one in turned}
            plain = runs[id(None)]
            if not plain.rate:
                continue
            decoded = sum(len(tokens) - 1 for tokens in plain.tokens)
            for trial in trials:
                run = runs[id(trial)]
                pair = (decoded / plain.rate, decoded / run.rate)
                trial.seconds.setdefault(index, []).append(pair)
                trial.of += len(plain.tokens)
                first = index * len(self.groups[0])
                pairs = zip(run.tokens, plain.tokens, strict=True)
                trial.differing += [first + row for row, (own, other) in enumerate(pairs) if own != other]
                trial.drafted += run.drafted
                trial.accepted += run.accepted
            return
        raise UserError(
            "every output ends at its first token, so there is nothing to time",
            "give other prompts, or --no-chat",
        )

    def _decoded(self, trial: Trial | None, prompts: list[list[int]], budget: int) -> _Run:
        """Decode a group. On CUDA it is done twice: graphs are captured in a first call that nobody times."""
        face = self.faces[id(trial)]
        options = {"mode": "ar"} if trial is None else trial.options
        for _ in range(2 if face.engines.keep else 1):
            began = self.clock()
            done = face.generate(prompts, max_new_tokens=budget, batch_size=len(prompts), **options)
            seconds = self.clock() - began
        rounds = [round for one in done for round in one.rounds]
        prefill = {round.step_id: round.step_s for round in rounds if round.source == "prefill"}
        decoded = [round for round in rounds if round.source != "prefill"]
        return _Run(
            [one.tokens for one in done],
            sum(len(round.tokens) for round in decoded) / max(1e-9, seconds - sum(prefill.values())),
            sum(round.drafted for round in decoded),
            sum(round.accepted for round in decoded),
        )


@dataclass(frozen=True)
class _Run:
    tokens: list[list[int]]
    rate: float  # tokens per second behind the prompts
    drafted: int
    accepted: int


def tuned(analysis: Analysis, ranked: Sequence[Trial]) -> dict[str, Any]:
    """Join prediction and measurement: `best` is the race's winner."""
    record, rows, winner = analysis.record(), [trial.record() for trial in ranked], ranked[0].measured()
    best = {
        **{name: rows[0][name] for name in (*ranked[0].cell.record(), "policy", "confidence")},
        "predicted_speedup": rows[0]["predicted_speedup"],
        "interval": ranked[0].interval and list(ranked[0].interval),
        "measured_speedup": winner.ratio,
        "measured_interval": winner.ci95,
        "mode": ranked[0].mode,
    }
    return {**record, "best": best, "predicted_best": record["best"], "measured": rows}


def save_choice(lm: LanguageModel, trial: Trial) -> Path:
    """Make a measured setting the checkpoint's default; where it was not faster, plain decoding.

    What it says of an exit is kept where copies alone won: `--drafter exit` goes by it.
    Raises: UserError when the model has no folder, or one that cannot be written.
    """
    if lm.path is None:
        raise UserError("this model has no folder to write into", "save it, load it from there, tune again")
    cell = trial.cell
    exit = {
        "exit_layer": cell.exit_layer,
        "draft_length": cell.draft_length,
        "draft_vocab_size": cell.draft_vocab,
        "policy": trial.policy,
        "confidence": trial.confidence,
    }
    checkpoint.write_entry(
        lm.path,
        lm.facts,
        mode=trial.mode,
        drafter=cell.drafter if trial.pays else "off",
        match_min=cell.match_min or None,
        copy_length=cell.copy_length or None,
        **(exit if cell.draft_length else {}),
    )
    return lm.path / "config.json"
