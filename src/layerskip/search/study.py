"""The search: TPE chooses settings, successive halving ends what does not pay, a budget ends it all.

    search = Search(folder, recipe, space, budget_s=7200, max_cost=0.01)
    for trial in search.run(watch):
        ...

Its storage is a file in the folder, so it goes on where it was killed, and the same command in another terminal
works on it too. What is chosen for a trial depends on its number, the seed and the trials before it, so with one
worker a search that was killed and one that was not make the same trials.

The objective is the speed-up that a run predicts on its evaluation data. Cost is what training did to the whole
model: its perplexity over that of the reference on the same rows. The reference is the recipe trained as long
without exits and dropout; there is none, and no cost, where no weight of the model is trained.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from filelock import FileLock, Timeout
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from layerskip.errors import UserError
from layerskip.search.runs import Figures, TrialRun
from layerskip.train.job.recipe import Recipe, as_yaml, read_recipe
from layerskip.watch import Watch, silent

if TYPE_CHECKING:
    from layerskip.search.space import Space

STORAGE, ASKED, REFERENCE = "study.log", "search.json", "reference"
RUNGS = 4  # evaluations of a run, at each of which it may end
COST, SECONDS, WHY = "cost", "seconds", "why"  # what a trial's attributes are called
HOPELESS = 3.0  # times the cost allowed, at which a run ends early
STARTUP = 6  # trials that are drawn at random


@dataclass
class Search:
    """A search in its folder. Raises: UserError where the folder holds another one."""

    folder: Path
    recipe: str
    space: Space
    budget_s: float
    max_cost: float
    trials: int | None = None
    seed: int = 0
    study: optuna.Study = field(init=False)

    def __post_init__(self) -> None:
        self.base = self._base()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_same()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        steps = self.base.steps or 0
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(self.folder / STORAGE))),
            study_name="search",
            direction="maximize",
            load_if_exists=True,
            sampler=self._sampler(0),
            pruner=SuccessiveHalvingPruner(min_resource=max(1, steps // RUNGS), reduction_factor=2),
        )

    # -- running -----------------------------------------------------------------------------------------------

    def run(self, watch: Watch = silent) -> Iterator[optuna.trial.FrozenTrial]:
        """Make trials until the budget or their number is used up; yield each that has ended.

        Raises: UserError where a run fails; the search can go on when its cause is gone.
        """
        reference = self.reference(watch)
        while (trial := self._next()) is not None:
            with self._lock(trial.number):
                yield self._tried(trial, reference, watch)

    def reference(self, watch: Watch = silent) -> float | None:
        """The loss of the whole model where exits cost it nothing; None where it is not trained.

        Raises: UserError where the recipe evaluates nothing.
        """
        if self.base.freeze == "model":
            return None
        run = TrialRun(self.folder / REFERENCE, self.recipe, [*self._settings(), "e_scale=0", "p_max=0"])
        with FileLock(self.folder / f"{REFERENCE}.lock"):
            loss = None
            for step, figures in run.follow():
                loss = figures.loss
                watch("reference: steps", step, self.base.steps or 0)
        if loss is None:
            raise UserError("the reference was not evaluated", "give eval_data=FILE")
        return loss

    @property
    def spent_s(self) -> float:
        """Seconds that trials have taken, those of earlier sittings too."""
        trials = self.study.get_trials(deepcopy=False)
        return float(sum(trial.user_attrs.get(SECONDS, 0.0) for trial in trials))

    def _next(self) -> Trial | None:
        """A trial that was left behind, else a new one; None when budget or number are used up."""
        trials = self.study.get_trials(deepcopy=False)
        for left in trials:
            if left.state is TrialState.RUNNING and self._is_free(left.number):
                return Trial(self.study, left._trial_id)
        if self.spent_s >= self.budget_s or (self.trials is not None and len(trials) >= self.trials):
            return None
        self.study.sampler = self._sampler(len(trials))
        return self.study.ask()

    def _tried(self, trial: Trial, reference: float | None, watch: Watch) -> optuna.trial.FrozenTrial:
        chosen = [f"{key}={told.suggested(key, trial)}" for key, told in self.space.ranges.items()]
        run = TrialRun(self._place(trial.number), self.recipe, [*self._settings(), *chosen])
        began, before = time.monotonic(), trial.user_attrs.get(SECONDS, 0.0)
        pruned, speedup = None, None
        try:
            for step, figures in run.follow():
                speedup = figures.speedup
                cost = _cost(figures, reference)
                trial.set_user_attr(COST, cost)
                trial.set_user_attr(SECONDS, before + time.monotonic() - began)
                watch(f"trial {trial.number}: steps", step, self.base.steps or 0)
                trial.report(figures.speedup or 0.0, step)
                pruned = self._hopeless(trial, cost)
                if pruned is not None and run.result is None:
                    run.stop()
                    break
                if self.spent_s >= self.budget_s and run.result is None:
                    run.stop()
                    pruned = "the budget is used up"
                    break
        except (
            UserError
        ) as error:  # settings that cannot be trained: a loss that is not finite, an exit too deep
            self.study.tell(trial, state=TrialState.FAIL)
            trial.set_user_attr(WHY, error.message)
        else:
            trial.set_user_attr(SECONDS, before + time.monotonic() - began)
            if run.result is None:
                trial.set_user_attr(WHY, pruned or "stopped")
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                self.study.tell(trial, speedup or 0.0)
        return self.study.get_trials(deepcopy=False)[trial.number]

    def _hopeless(self, trial: Trial, cost: float) -> str | None:
        """Why a run should end here; None where it should not."""
        if cost > HOPELESS * self.max_cost:
            return f"it costs {100 * cost:.1f}% of perplexity"
        return "others were faster at this step" if trial.should_prune() else None

    # -- what it found -------------------------------------------------------------------------------------------

    def finished(self) -> list[optuna.trial.FrozenTrial]:
        """Trials that ran to their end, the best first: those within the cost, then the cheapest."""
        done = [t for t in self.study.get_trials(deepcopy=False) if t.state is TrialState.COMPLETE]
        return sorted(done, key=self._rank)

    def _rank(self, trial: optuna.trial.FrozenTrial) -> tuple[bool, float]:
        cost = trial.user_attrs.get(COST, 0.0)
        within = cost <= self.max_cost
        assert trial.value is not None
        return not within, -trial.value if within else cost

    def recipe_of(self, trial: optuna.trial.FrozenTrial) -> Recipe:
        """A trial's recipe, without an output of its own."""
        chosen = [f"{key}={self._worded(key, trial)}" for key in self.space.ranges]
        return read_recipe(self.recipe, [*self._settings(), *chosen])

    def _worded(self, key: str, trial: optuna.trial.FrozenTrial) -> str:
        return self.space.ranges[key].suggested(key, optuna.trial.FixedTrial(trial.params))

    # -- the folder ----------------------------------------------------------------------------------------------

    def _base(self) -> Recipe:
        """The recipe with the settings that stay; ranges are tried by their ends. Raises: UserError."""
        base = read_recipe(self.recipe, self.space.settings)
        if base.steps is None:
            raise UserError("a search needs runs of one length", "give steps=N, a tenth of a whole run, say")
        if base.eval_data is None:
            raise UserError("a search compares runs by what they say of other text", "give eval_data=FILE")
        for key, told in self.space.ranges.items():
            for value in told.choices or (f"{told.low:g}", f"{told.high:g}"):
                read_recipe(self.recipe, [*self.space.settings, f"{key}={value}"])
        return base

    def _settings(self) -> list[str]:
        steps = self.base.steps or 0
        rung = max(1, steps // RUNGS)
        return [*self.space.settings, f"save_every={rung}", f"eval_every={rung}", "keep=1", "best_by=none"]

    def _check_same(self) -> None:
        from layerskip.checkpoint.files import write_json
        from layerskip.reading import read_json

        ranges = {
            key: vars(told) | {"choices": list(told.choices)} for key, told in self.space.ranges.items()
        }
        asked = {"recipe": as_yaml(self.base, explain=False), "ranges": ranges, "seed": self.seed}
        file = self.folder / ASKED
        if not file.is_file():
            if any(self.folder.iterdir()):
                raise UserError(f"{self.folder} is not empty", "name another --output")
            write_json(file, asked)
        elif read_json(file, dict) != json.loads(json.dumps(asked)):
            raise UserError(
                f"the search in {self.folder} has another recipe, ranges or seed",
                "go on with those, or name another --output",
            )

    def _sampler(self, number: int) -> TPESampler:
        return TPESampler(
            seed=self.seed + 1009 * number,
            n_startup_trials=STARTUP,
            multivariate=True,
            constant_liar=True,
            constraints_func=lambda trial: (trial.user_attrs.get(COST, 0.0) - self.max_cost,),
        )

    def _place(self, number: int) -> Path:
        return self.folder / f"trial-{number:03d}"

    def _lock(self, number: int) -> FileLock:
        return FileLock(self.folder / f"trial-{number:03d}.lock")

    def _is_free(self, number: int) -> bool:
        """Whether no worker has this trial: its lock goes with its process."""
        with suppress(Timeout), self._lock(number).acquire(timeout=0):
            return True
        return False


def _cost(figures: Figures, reference: float | None) -> float:
    """By how much perplexity is above the reference's, as a share; less than nothing costs nothing."""
    if reference is None or figures.loss is None:
        return 0.0
    return max(0.0, math.expm1(figures.loss - reference))


def front(trials: Sequence[optuna.trial.FrozenTrial]) -> list[optuna.trial.FrozenTrial]:
    """The trials that no other beats in both speed-up and cost, the cheapest first."""
    best, found = -math.inf, []
    for trial in sorted(trials, key=lambda t: (t.user_attrs.get(COST, 0.0), -(t.value or 0.0))):
        assert trial.value is not None
        if trial.value > best:
            best = trial.value
            found.append(trial)
    return found
