"""The search: what it reads, what it chooses, what a kill leaves, what it says in the end."""

import json
import sys

import pytest

optuna = pytest.importorskip("optuna")

from layerskip.cli.search import seconds, share  # noqa: E402
from layerskip.errors import UserError  # noqa: E402
from layerskip.search import runs, study  # noqa: E402
from layerskip.search.report import _untried, report  # noqa: E402
from layerskip.search.runs import Figures  # noqa: E402
from layerskip.search.space import DEFAULTS, Range, read_space  # noqa: E402
from layerskip.search.study import Search, front  # noqa: E402
from layerskip.train.job.recipe import read_recipe, recipe_names  # noqa: E402

BASE = ["model=m", "data=d.jsonl", "eval_data=e.jsonl", "steps=40"]
RANGES = ["learning_rate=1e-4..1e-2", "e_scale=0.1..1", "exit_loss=ce|kl"]


def test_ranges_are_told_from_settings():
    space = read_space([*RANGES, "adapter_steps=1..4", "exits=[2]|[2, 4]", "length=512"])
    assert space.settings == ["length=512"]
    assert space.ranges["learning_rate"] == Range(1e-4, 1e-2)
    assert space.ranges["learning_rate"].logarithmic
    assert not space.ranges["e_scale"].whole
    assert space.ranges["adapter_steps"] == Range(1, 4, whole=True)
    assert space.ranges["exits"].choices == ("[2]", "[2, 4]")
    for wrong in ("nothing", "e_scale=1..0.1", "exit_loss=ce|ce", "exit_loss=ce|"):
        with pytest.raises(UserError):
            read_space([wrong])


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_ranges_that_fit_it(name):
    space = read_space(["length=16"], name)
    assert 3 <= len(space.ranges) <= 8
    fixed = read_space(["learning_rate=1e-3"], name)
    assert "learning_rate" not in fixed.ranges
    if name in DEFAULTS:
        for key, told in space.ranges.items():
            for value in told.choices or (f"{told.low:g}", f"{told.high:g}"):
                read_recipe(name, [f"{key}={value}"])


def test_times_and_shares_are_read():
    assert (seconds("2h"), seconds("90m"), seconds("45 s")) == (7200, 5400, 45)
    assert (share("1%"), share("0.02")) == (0.01, 0.02)
    for wrong in ("2", "h", "-1h"):
        with pytest.raises(UserError, match="--budget"):
            seconds(wrong)
    with pytest.raises(UserError, match="--max-cost"):
        share("much")


class World:
    """Runs that take no time: the speed-up peaks at a learning rate, and exits cost more the louder they are."""

    def __init__(self):
        self.made, self.stopped, self.kill_at, self.broken = [], [], None, set()
        self.step_s = 0.0  # what ten steps take

    def figures(self, recipe, step):
        reached = step / 40
        peak = 1.8 - abs(float(recipe.learning_rate) - 1e-3) * 100
        speedup = 1.0 + (peak - 1.0) * reached * (1.0 if recipe.exit_loss == "kl" else 0.8)
        return Figures(speedup, 3.0 - reached + 0.03 * recipe.e_scale**2 * reached)


@pytest.fixture
def world(monkeypatch):
    made = World()

    class Run:
        def __init__(self, folder, recipe, settings, held=None):
            self.folder, self.result, self.ended, self.seconds = folder, None, False, 0.0
            assert held is not None, "the process keeps the lock"
            self.recipe = read_recipe(recipe, settings)
            folder.mkdir(parents=True, exist_ok=True)
            made.made.append((folder.name, self.recipe))

        def follow(self):
            for step in (10, 20, 30, 40):
                if self.ended:
                    return
                if self.folder.name in made.broken:
                    raise UserError("a run of the search failed: loss is not finite")
                if made.kill_at == (self.folder.name, step):
                    made.kill_at = None
                    raise KeyboardInterrupt
                self.seconds += made.step_s
                yield step, made.figures(self.recipe, step)  # the last checkpoint is there before the end is
            if not self.ended:
                self.result = {"steps": 40}

        def stop(self):
            self.ended = True
            made.stopped.append(self.folder.name)

    monkeypatch.setattr(study, "TrialRun", Run)
    return made


def searching(folder, trials=12, given=(*BASE, *RANGES), **how):
    return Search(
        folder, "finetune", read_space(given, "finetune"), how.pop("budget_s", 1e9), 0.01, trials, **how
    )


def settings(search):
    return [(trial.state.name, trial.params, trial.values) for trial in search.study.trials]


def test_it_finds_the_peak_within_the_cost(world, tmp_path):
    search = searching(tmp_path / "s", 40)
    list(search.run())
    best = search.finished()[0]
    assert best.user_attrs["cost"] <= 0.01
    assert best.params["exit_loss"] == "kl"
    assert best.user_attrs["speedup"] > 1.6
    assert world.stopped, "what others beat ends early"
    pruned = [trial for trial in search.study.trials if trial.state.name == "PRUNED"]
    assert pruned
    assert all(trial.last_step < 40 for trial in pruned), "a run that has made its last step is done"
    assert world.made[0][0] == "reference"
    assert (world.made[0][1].e_scale, world.made[0][1].p_max) == (0, 0)


def test_a_dearer_trial_is_never_the_best_while_one_stayed_within_the_cost(tmp_path):
    """1.60 x at 0.3% too much was worth more than 1.25 x within."""
    search = searching(tmp_path / "s")
    for value, cost in ((1.30, 0.013), (1.25, 0.005), (1.20, 0.009)):
        trial = search.study.ask()
        trial.set_user_attr("cost", cost)
        search.study.tell(trial, value)
    assert [trial.value for trial in search.finished()] == [1.25, 1.20, 1.30]


def test_the_cost_is_over_the_best_whole_model_and_not_over_a_poor_reference(tmp_path):
    """The reference learns at the recipe's rate: where that is too high, every trial was free."""
    search = searching(tmp_path / "s")
    search.study.set_user_attr("loss", {40: 3.0})
    for value, loss in ((1.25, 2.90), (1.30, 2.95), (1.20, 2.905)):
        trial = search.study.ask()
        trial.set_user_attr("loss", {20: 3.5, 40: loss})
        search.study.tell(trial, value)
    done = search.finished()
    assert [trial.value for trial in done] == [1.25, 1.20, 1.30]
    assert [search.cost_of(trial) for trial in done] == pytest.approx([0, 0.005, 0.051], abs=1e-3)
    assert search._lowest({20: 3.4, 40: 3.0}, 1) == {20: 3.4, 40: 2.90}
    assert search._lowest({}) == {}, "a model that is not trained costs nothing"


def test_a_search_that_was_killed_makes_the_same_trials(world, tmp_path):
    whole = searching(tmp_path / "whole")
    list(whole.run())
    for at in (("trial-000", 20), ("trial-004", 10), ("trial-007", 10)):
        world.kill_at = at
        search = searching(tmp_path / "killed")
        with pytest.raises(KeyboardInterrupt):
            list(search.run())
    search = searching(tmp_path / "killed")
    list(search.run())
    assert settings(search) == settings(whole)


def test_another_seed_tries_other_settings_and_other_ranges_are_refused(world, tmp_path):
    one, other = searching(tmp_path / "a", 3), searching(tmp_path / "b", 3, seed=1)
    for search in (one, other):
        list(search.run())
    assert settings(one) != settings(other)
    with pytest.raises(UserError, match="another recipe, ranges or seed"):
        searching(tmp_path / "a", 3, [*BASE, "e_scale=0.1..0.9"])
    with pytest.raises(UserError, match="another recipe, ranges or seed"):
        searching(tmp_path / "a", 3, seed=2)


def test_a_budget_ends_it_and_a_larger_one_goes_on(world, tmp_path):
    world.step_s = 5.0
    search = searching(tmp_path / "s", None, budget_s=100)
    list(search.run())
    done = len(search.study.trials)
    assert 1 <= done < 12
    assert search.spent_s == 5.0 * sum(4 if t.state.name == "COMPLETE" else t.last_step // 10
                                       for t in search.study.trials) + 20  # fmt: skip
    again = searching(tmp_path / "s", None, budget_s=300)
    list(again.run())
    assert len(again.study.trials) > done


def test_a_trial_another_worker_has_is_left_alone(world, tmp_path):
    search = searching(tmp_path / "s", 3)
    trial, lock = search._next()
    ended = [one.number for one in search.run()]
    lock.release()
    assert trial.number not in ended
    assert [one.number for one in searching(tmp_path / "s", 3).run()] == [trial.number]


def test_a_run_that_fails_is_told_and_three_in_a_row_end_the_search(world, tmp_path):
    world.broken = {"trial-001"}
    search = searching(tmp_path / "s", 4)
    states = [trial.state.name for trial in search.run()]
    assert states[1] == "FAIL"
    assert states.count("FAIL") == 1
    assert "not finite" in search.study.trials[1].user_attrs["why"]
    world.broken = {f"trial-{i:03d}" for i in range(4, 20)}
    with pytest.raises(UserError, match="3 trials in a row failed"):
        list(searching(tmp_path / "s", 20).run())


def test_the_best_recipe_is_the_users_own_but_for_what_was_searched(world, tmp_path):
    search = searching(tmp_path / "s", 3)
    list(search.run())
    best = search.recipe_of(search.finished()[0])
    plain = read_recipe("finetune", BASE)
    assert (best.save_every, best.keep, best.best_by) == (plain.save_every, plain.keep, plain.best_by)


PRETEND = """
import json, pathlib, sys, time
out = pathlib.Path(json.loads(next(a for a in sys.argv if a.startswith("output="))[7:]))
begun = (out / "recipe.yaml").is_file()
assert begun == ("--resume" in sys.argv)
out.mkdir(parents=True, exist_ok=True)
(out / "recipe.yaml").write_text("x")
for step in (2, 4):
    place = out / f"checkpoint-{step}"
    place.mkdir(exist_ok=True)
    line = {"step": step, "eval_predicted_speedup": 1 + step / 10, "eval_exit_30_loss": 2.0}
    (place / "trainer_state.json").write_text(json.dumps({"log_history": [line]}))
    if not begun and step == 2:
        time.sleep(30)
print(json.dumps({"steps": 5, "predicted_speedup": 1.5, "exits": {"30": {"loss": 1.9}}}))
"""


def test_a_run_is_followed_stopped_and_taken_up_again(tmp_path):
    """In a folder whose name YAML and a shell would read otherwise; steps that no rung divides are told too."""
    (tmp_path / "pretend.py").write_text(PRETEND)
    place = tmp_path / "runs #2: 'a b'"

    def made():
        one = runs.TrialRun(place, "tiny", ["steps=5"])
        one._command[:3] = [sys.executable, str(tmp_path / "pretend.py")]
        return one

    first = made()
    for step, figures in first.follow():
        assert (step, figures) == (2, Figures(1.2, 2.0))
        first.stop()
    assert first.result is None
    assert first._process.poll() is not None
    assert list(made().follow()) == [(2, Figures(1.2, 2.0)), (4, Figures(1.4, 2.0)), (5, Figures(1.5, 1.9))]
    assert [step for step, _ in made().follow()] == [2, 4, 5]


def test_a_run_that_is_ended_from_outside_is_not_taken_for_a_finished_one(tmp_path):
    (tmp_path / "pretend.py").write_text(PRETEND)
    one = runs.TrialRun(tmp_path / "s", "tiny", [])
    one._command[:3] = [sys.executable, str(tmp_path / "pretend.py")]
    steps = one.follow()
    next(steps)
    one._process.terminate()
    with pytest.raises(runs.StoppedError):
        list(steps)
    (tmp_path / "pretend.py").write_text("raise SystemExit('no memory')")
    other = runs.TrialRun(tmp_path / "t", "tiny", [])
    other._command[:3] = one._command[:2]
    with pytest.raises(UserError, match="no memory"):
        list(other.follow())


def test_what_cannot_be_trained_is_said_before_any_run(tmp_path):
    cases = {
        "give steps=N": [*BASE[:3], *RANGES],
        "give eval_data": [*BASE[:2], "steps=40", *RANGES],
        "unknown key": [*BASE, "learningrate=1e-4..1e-2"],
        "e_scale": [*BASE, "e_scale=0.5..2"],
        "compared with a run that has e_scale=0": [*BASE, "freeze=above", "learning_rate=1e-4..1e-2"],
    }
    for says, given in cases.items():
        with pytest.raises(UserError, match=says):
            searching(tmp_path / "s", 3, given)


def test_the_report_says_what_is_best_what_mattered_and_what_was_not_tried(world, tmp_path):
    pytest.importorskip("matplotlib")
    search = searching(tmp_path / "s", 24)
    list(search.run())
    told = report(search)
    assert read_recipe(told["best"]["recipe"]).learning_rate == pytest.approx(
        told["best"]["settings"]["learning_rate"], rel=1e-4
    )
    assert set(told["importance"]) <= {"learning_rate", "e_scale", "exit_loss"}
    costs = [row["cost"] for row in told["front"]]
    assert costs == sorted(costs)
    page = (tmp_path / "s" / "report.md").read_text()
    assert page.count("\n| ") >= 24
    assert "Best: trial" in page
    assert (tmp_path / "s" / "front.png").stat().st_size > 1000
    assert str(tmp_path) not in json.dumps(told["all"])


def test_the_front_holds_what_no_other_beats():
    def one(number, value, cost):
        made = optuna.trial.create_trial(value=value, user_attrs={"cost": cost, "speedup": value})
        made.number = number
        return made

    trials = [one(0, 1.2, 0.01), one(1, 1.1, 0.02), one(2, 1.4, 0.05), one(3, 1.0, 0.0)]
    assert [trial.number for trial in front(trials, lambda trial: trial.user_attrs["cost"])] == [3, 0, 2]


def test_figures_are_read_from_a_trainers_log():
    line = {"eval_predicted_speedup": 1.4, "eval_exit_2_loss": 3.0, "eval_exit_30_loss": 2.0, "step": 5}
    assert runs.figures_of(line) == Figures(1.4, 2.0)
    assert runs.figures_of({"eval_loss": 1.0}) == Figures(None, None)


def test_a_run_without_exits_has_losses_and_no_speedup(tmp_path):
    """The reference of a search: what trials are compared with on their way."""
    state = tmp_path / "run" / "checkpoint-2" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "eval_exit_30_loss": 2.0}]
    state.write_text(json.dumps({"log_history": lines}))
    assert runs.TrialRun(tmp_path, "tiny", [])._evaluated() == [(2, Figures(None, 2.0))]


def test_ends_of_a_range_by_the_logarithm_that_no_trial_came_near_are_told(tmp_path):
    search = searching(tmp_path / "s")
    rows = [{"settings": {"learning_rate": rate, "e_scale": 0.5, "exit_loss": "ce"}} for rate in (1e-3, 2e-3)]
    assert _untried(search, {"all": rows}) == (
        "learning_rate below 0.001, learning_rate above 0.002, e_scale below 0.5, e_scale above 0.5, exit_loss=kl"
    )


@pytest.mark.slow
def test_a_search_of_real_runs(run, folder, tmp_path):
    """Two trials of the tiny recipe on the tiny checkpoint, as the command makes them."""
    lines = "".join(
        json.dumps({"prompt": f"say {i}", "completion": "abc" * (i % 4 + 1)}) + "\n" for i in range(40)
    )
    (tmp_path / "data.jsonl").write_text(lines)
    (tmp_path / "held.jsonl").write_text(lines[:600].rsplit("\n", 1)[0] + "\n")
    given = ("search", "tiny", f"model={folder}", f"data={tmp_path / 'data.jsonl'}", "exits=[2]", "length=64",
             f"eval_data={tmp_path / 'held.jsonl'}", "steps=8", "batch_size=2", "learning_rate=1e-4..1e-2",
             "--trials", "2", "--output", tmp_path / "s", "--max-cost", "50%", "--json")  # fmt: skip
    code, out, err = run(*given)
    assert code == 0, err
    told = json.loads(out.strip().split("\n")[-1])
    assert told["trials"] == 2
    assert told["best"]["cost"] >= 0
    assert read_recipe(told["best"]["recipe"]).steps == 8
