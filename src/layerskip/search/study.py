"""The search: TPE chooses settings, successive halving ends what does not pay, a budget ends it all.

    search = Search(folder, recipe, space, budget_s=7200, max_cost=0.01)
    for trial in search.run(watch):
        ...

Its storage is a file in the folder, so it goes on where it was killed, and the same command in another terminal
works on it too. What is chosen for a trial depends on its number, the seed and the trials before it, so with one
worker a search that was killed and one that was not make the same trials.

The objective is the speed-up that a run predicts on its evaluation data, less a penalty for what it costs beyond
what it may. Cost is what training did to the whole model: its perplexity over that of the reference, on the same
rows after as many steps. The reference is the recipe trained without exits and dropout; there is none, and no cost,
where no weight of the model is trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from collections.abc import Callable

    from layerskip.search.space import Space

STORAGE, ASKED, REFERENCE = "study.log", "search.json", "reference"
RUNGS = 4  # evaluations of a run, at each of which it may end
COST, SPEEDUP, SECONDS, WHY = "cost", "speedup", "seconds", "why"  # what a trial's attributes are called
LOSS = "loss"  # of the whole model by step
HOPELESS = 3.0  # times the cost allowed, at which a run ends early
PENALTY = 100.0  # of speed-up for each 1 of perplexity beyond what it may cost: 1.00 x for 1%
MOST_FAILURES = 3  # in a row
QUIET = ("e_scale=0", "p_max=0")  # the reference: exits cost the whole model nothing
STARTUP = 6  # trials that are drawn at random


@dataclass
class Search:
    """A search in its folder.

    Raises: UserError where the folder holds another one, or the recipe lacks steps or evaluation data.
    """

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

        Raises: UserError where the reference, or several trials in a row, cannot be trained; StoppedError where a
        run was ended from outside. The same search goes on then.
        """
        reference = self.reference(watch)
        failed = 0
        while (mine := self._next()) is not None:
            trial, lock = mine
            try:
                ended = self._tried(trial, lock, reference, watch)
            finally:
                lock.release()
            failed = failed + 1 if ended.state is TrialState.FAIL else 0
            if failed >= MOST_FAILURES:
                raise UserError(
                    f"{failed} trials in a row failed, the last: {ended.user_attrs.get(WHY)}",
                    "mend the cause, or the ranges; the same command goes on",
                )
            yield ended

    def reference(self, watch: Watch = silent) -> dict[int, float]:
        """The loss of the whole model by step where exits cost it nothing; none where it is not trained.

        Raises: UserError where the recipe evaluates nothing; StoppedError.
        """
        if self.base.freeze == "model":
            return {}
        with FileLock(self.folder / f"{REFERENCE}.lock") as lock:
            quiet = [*self._settings(), *QUIET]
            run = TrialRun(self.folder / REFERENCE, self.recipe, quiet, _descriptor(lock))
            losses = {}
            for step, figures in run.follow():
                if figures.loss is not None:
                    losses[step] = figures.loss
                watch("reference: steps", step, self.base.steps or 0)
            self.study.set_user_attr(SECONDS, run.seconds)
            self.study.set_user_attr(LOSS, losses)
        if not losses:
            raise UserError("the reference was not evaluated", "give eval_data=FILE")
        return losses

    @property
    def spent_s(self) -> float:
        """Seconds that the reference and all trials have taken, those of earlier sittings too."""
        trials = self.study.get_trials(deepcopy=False)
        own = sum(trial.user_attrs.get(SECONDS, 0.0) for trial in trials)
        return float(own + self.study.user_attrs.get(SECONDS, 0.0))

    def _next(self) -> tuple[Trial, FileLock] | None:
        """A trial that was left behind, else a new one, and the lock that says it is ours; None at the end."""
        with FileLock(self.folder / "next.lock"):
            trials = self.study.get_trials(deepcopy=False)
            for left in trials:
                if left.state is TrialState.RUNNING and (lock := self._locked(left.number)) is not None:
                    self.study.sampler = self._sampler(left.number)
                    return Trial(self.study, left._trial_id), lock
            if self.spent_s >= self.budget_s or (self.trials is not None and len(trials) >= self.trials):
                return None
            self.study.sampler = self._sampler(len(trials))
            trial = self.study.ask()
            lock = self._locked(trial.number)
            assert lock is not None, "a new trial is nobody's"
            return trial, lock

    def _tried(
        self, trial: Trial, lock: FileLock, reference: dict[int, float], watch: Watch
    ) -> optuna.trial.FrozenTrial:
        """Run a trial to its end, or to where it is ended early, and tell what it gave."""
        chosen = [f"{key}={told.suggested(key, trial)}" for key, told in self.space.ranges.items()]
        held = _descriptor(lock)
        run = TrialRun(self._place(trial.number), self.recipe, [*self._settings(), *chosen], held)
        value, why = 0.0, None
        lowest, losses = self._lowest(reference, trial.number), dict[int, float]()
        try:
            for step, figures in run.follow():
                # On the way a high learning rate's loss has not sunk yet: there the reference says enough.
                against = lowest if step == self.base.steps else reference
                value, cost = worth(figures, against.get(step), self.max_cost)
                if figures.loss is not None:
                    losses[step] = figures.loss
                    trial.set_user_attr(LOSS, losses)
                trial.set_user_attr(COST, cost)
                trial.set_user_attr(SPEEDUP, figures.speedup)
                trial.set_user_attr(SECONDS, run.seconds)
                watch(f"trial {trial.number}: steps", step, self.base.steps or 0)
                trial.report(value, step)
                ends = step >= (self.base.steps or 0)  # done, though its result may not be there yet
                if run.result is None and not ends:
                    why = self._hopeless(trial, cost)
                if why is not None:
                    run.stop()
                    break
        except UserError as error:  # settings that cannot be trained: a loss that is not finite, say
            why, state = error.message, TrialState.FAIL
        else:
            state = TrialState.COMPLETE if run.result is not None else TrialState.PRUNED
        trial.set_user_attr(SECONDS, run.seconds)
        trial.set_user_attr(WHY, why)
        self.study.tell(trial, value if state is TrialState.COMPLETE else None, state)
        return self.study.get_trials(deepcopy=False)[trial.number]

    def _lowest(self, reference: dict[int, float], number: int | None = None) -> dict[int, float]:
        """The lowest loss of the whole model by step: the reference's, or a trial's, before `number` if given.

        A reference at the recipe's own learning rate is easily beaten where the rate is searched, too.
        """
        lowest = dict(reference)
        for trial in self.study.get_trials(deepcopy=False):
            if reference and (number is None or trial.number < number):
                for step, loss in _losses(trial.user_attrs).items():
                    lowest[step] = min(loss, lowest.get(step, math.inf))
        return lowest

    def _hopeless(self, trial: Trial, cost: float) -> str | None:
        """Why a run should end here; None where it should not."""
        if cost > HOPELESS * self.max_cost:
            return f"it costs {100 * cost:.1f}% of perplexity"
        if trial.should_prune():
            return "others were better at this step"
        return "the budget is used up" if self.spent_s >= self.budget_s else None

    # -- what it found -------------------------------------------------------------------------------------------

    def finished(self) -> list[optuna.trial.FrozenTrial]:
        """Trials that ran to their end, the best first: those that cost what they may before all others."""
        done = [t for t in self.study.get_trials(deepcopy=False) if t.state is TrialState.COMPLETE]
        return sorted(done, key=lambda trial: (self.cost_of(trial) > self.max_cost, -(trial.value or 0.0)))

    def cost_of(self, trial: optuna.trial.FrozenTrial) -> float:
        """Perplexity of a trial's whole model over the lowest that any run had after as many steps, as a share."""
        losses, reference = _losses(trial.user_attrs), _losses(self.study.user_attrs)
        if not losses or not reference:
            return float(trial.user_attrs.get(COST, 0.0))
        last = max(losses)
        return math.expm1(losses[last] - self._lowest(reference)[last])

    def recipe_of(self, trial: optuna.trial.FrozenTrial) -> Recipe:
        """A trial's recipe, without an output of its own. Raises: UserError as `read_recipe`."""
        fixed = optuna.trial.FixedTrial(trial.params)
        chosen = [f"{key}={told.suggested(key, fixed)}" for key, told in self.space.ranges.items()]
        return read_recipe(self.recipe, [*self.space.settings, *chosen])

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
        if base.freeze != "model":
            try:
                read_recipe(self.recipe, [*self.space.settings, *QUIET])
            except UserError as error:
                raise UserError(
                    f"trials are compared with a run that has {' '.join(QUIET)}, and here {error.message}",
                    error.hint,
                ) from error
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
        )

    def _place(self, number: int) -> Path:
        return self.folder / f"trial-{number:03d}"

    def _locked(self, number: int) -> FileLock | None:
        """Take a trial's lock; None where a worker, or a run that it left, has it."""
        lock = FileLock(self.folder / f"trial-{number:03d}.lock")
        with suppress(Timeout):
            lock.acquire(timeout=0)
            return lock
        return None


def _losses(kept: dict[str, Any]) -> dict[int, float]:
    """By step, which JSON has as text."""
    return {int(step): loss for step, loss in kept.get(LOSS, {}).items()}


def _descriptor(lock: FileLock) -> int | None:
    return lock._context.lock_file_fd


def worth(figures: Figures, reference: float | None, max_cost: float) -> tuple[float, float]:
    """The objective, and the cost in it: perplexity over the lowest so far, as a share; less than none is none.

    `reference` is that loss at the same step, None where the model is not trained.
    """
    cost = 0.0
    if reference is not None and figures.loss is not None:
        cost = max(0.0, math.expm1(figures.loss - reference))
    return (figures.speedup or 0.0) - PENALTY * max(0.0, cost - max_cost), cost


def speedup_of(trial: optuna.trial.FrozenTrial) -> float:
    """The speed-up that a trial's last evaluation predicts."""
    return float(trial.user_attrs.get(SPEEDUP) or 0.0)


def front(
    trials: Sequence[optuna.trial.FrozenTrial], cost_of: Callable[[optuna.trial.FrozenTrial], float]
) -> list[optuna.trial.FrozenTrial]:
    """The trials that no other beats in both speed-up and cost, the cheapest first."""
    best, found = -math.inf, []
    for trial in sorted(trials, key=lambda t: (cost_of(t), -speedup_of(t))):
        if speedup_of(trial) > best:
            best = speedup_of(trial)
            found.append(trial)
    return found
