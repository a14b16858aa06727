"""What `layerskip plan` says before a run: numbers that add up, a curve with its limits, a fleet that fits."""

import json
import math
from pathlib import Path

import pytest
import torch

from layerskip.errors import UserError
from layerskip.train.job import curve, forecast, work
from layerskip.train.job import run as runs
from layerskip.train.job.recipe import read_recipe

CURVE = curve.curve_of(read_recipe("exit-adapter"))
KEYS = {
    "recipe", "device", "tokens", "answer_tokens", "steps", "parameters", "trainable", "operations", "hours",
    "hours_from", "step_s", "memory_bytes", "memory_free_bytes", "disk_bytes", "disk_free_bytes", "prediction",
    "no_prediction", "fits", "reasons", "gpus", "command", "notes",
}  # fmt: skip


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.fixture
def plan(run, folder, data, tmp_path, monkeypatch):
    """Run `layerskip plan` on the tiny checkpoint in an empty folder; returns the JSON."""
    monkeypatch.chdir(tmp_path)

    def call(recipe, *settings, **given):
        given = {"model": folder, "data": data, "length": 48, "template": "off", **given}
        words = [f"{key}={value}" for key, value in given.items() if value is not None]
        code, printed, message = run("plan", recipe, *words, *settings, "--json")
        assert code == 0, message
        assert not [*tmp_path.iterdir()], "a plan writes nothing"
        return json.loads(printed)

    return call


# -- the line ------------------------------------------------------------------------------------------------


def test_a_line_is_that_of_least_squares_and_the_interval_widens_away_from_the_points():
    line = curve.fitted([(0, 1.0), (1, 3.1), (2, 4.9), (3, 7.0)])
    assert line.slope == pytest.approx(1.98)
    assert line.at(0).middle == pytest.approx(1.03)
    widths = [line.at(x).high - line.at(x).low for x in (1.5, 0, -4)]
    assert widths == sorted(widths)
    exact = curve.fitted([(0, 1.0), (1, 2.0), (2, 3.0)]).at(5)
    assert (exact.low, exact.middle, exact.high) == (6.0, 6.0, 6.0)
    assert curve.t95(0) == math.inf
    assert curve.t95(3) == 3.18
    assert curve.t95(30) == pytest.approx(2.04, abs=0.005)


def test_the_interval_covers_each_measured_point_that_was_left_out_of_the_fit():
    for place, (tokens, agreement, per_round) in enumerate(CURVE.points):
        others = CURVE.points[:place] + CURVE.points[place + 1 :]
        told = curve.Curve("", 4, others, CURVE.chance).predicted(tokens)
        for name, value in (("agreement", agreement), ("tokens_per_round", per_round)):
            low, high = told[name]["ci95"]
            assert low <= value <= high, (tokens, name)
            assert high - low < 0.9, "an interval that covers everything says nothing"


def test_an_extrapolation_says_so_and_reaches_to_the_nearest_measured_end():
    inside, below, above = (CURVE.predicted(tokens) for tokens in (2e6, 1e4, 1e9))
    assert [told["extrapolated"] for told in (inside, below, above)] == [False, True, True]
    assert below["tokens_per_round"]["middle"] == 1.0, "no round gives less than a token"
    assert below["tokens_per_round"]["ci95"][1] > 1.6
    assert above["tokens_per_round"]["ci95"][0] < 2.3 < above["tokens_per_round"]["middle"] <= 5.0
    assert above["agreement"]["ci95"][1] <= 1.0


def test_only_an_adapter_on_the_embedding_has_a_curve():
    assert curve.curve_of(read_recipe("exit-adapter", ["exits=[2]"])) is None
    assert curve.curve_of(read_recipe("finetune")) is None


# -- work and time -------------------------------------------------------------------------------------------


def shaped(recipe, *settings, **changes):
    """Work of a recipe on 4 layers with 100 parameters each, a head of 40, one token a step."""
    made = read_recipe(recipe, ["exits=null", *settings])
    given = {"steps": 100, "per_epoch": 100, "tokens": 1, "layer": 100, "head": 40, "adapter": 0} | changes
    rest = {"draft_head": 10, "attention": 0, "kept": 0.0} | changes
    return work.Work(made, runs.schedule_for(made, 4), **{**rest, **given})


def test_operations_of_a_step_are_those_of_its_layers_and_heads():
    plain = ("p_max=0", "e_scale=0", "curriculum=all", "exit_loss=ce")
    assert shaped("finetune", *plain).step(0) == 6 * (4 * 100 + 40)
    assert shaped("finetune", *plain, "checkpointing=true").step(0) == 8 * 400 + 6 * 40
    exits = shaped("finetune", "p_max=0", "curriculum=all")
    assert exits.step(0) == 6 * (400 + 4 * 40)
    assert exits.total == 100 * exits.step(7)
    gradual = shaped("finetune", "p_max=0", "curriculum=gradual")
    assert gradual.step(0) == 6 * (400 + 40)
    assert gradual.step(99) == exits.step(0)
    assert gradual.step(0) < gradual.total / 100 < gradual.step(99)
    dropped = shaped("finetune", *plain[1:], "p_max=0.5", "drop_depth=uniform")
    assert dropped.step(0) == 6 * (200 + 40)


def test_an_adapter_runs_the_model_forward_once_and_not_again_where_its_states_are_kept():
    made = read_recipe("exit-adapter", ["adapter_steps=2"])
    given = {
        "steps": 20,
        "per_epoch": 10,
        "tokens": 1,
        "layer": 100,
        "head": 40,
        "adapter": 30,
        "attention": 0,
    }
    own = work.Work(made, runs.schedule_for(made, 4), **given, draft_head=10, kept=1.0)
    assert own.step(0) - own.step(10) == 2 * 4 * 100
    assert own.step(10) == 2 * 10 + 6 * 2 * 40


def test_hours_follow_from_timed_steps_and_the_interval_holds_the_unscaled_time():
    flat = shaped("finetune", "p_max=0", "e_scale=0")
    told = work.hours_measured([36.0, 36.0], flat, 1)
    assert told.middle == pytest.approx(1.0)
    assert (told.low, told.high) == (pytest.approx(0.9), pytest.approx(1.1))
    growing = shaped("finetune", "p_max=0", "curriculum=gradual")
    told = work.hours_measured([36.0, 36.0], growing, 1)
    assert told.low == pytest.approx(0.9)
    assert told.middle == pytest.approx(growing.total / 100 / growing.step(1))
    assert work.hours_measured([30.0, 42.0], flat, 1).high > 2, "two steps that differ tell little"


def test_a_fleet_holds_the_run_ends_it_in_time_and_divides_the_rows():
    run = shaped("finetune", "batch_size=4", "global_batch=32", tokens=4e14 * 36)
    total_hours = run.total / work.GPU_FLOPS / 3600
    assert work.fleet(run, 1e9, 1e9, total_hours / 2) == 2
    assert work.fleet(run, 1e9, 1e9, total_hours / 7) == 8
    assert work.fleet(run, 500e9, 1e9, total_hours) == 8
    assert work.fleet(run, 1e9, 1e9, total_hours / 9) is None, "16 x 4 rows are more than a step has"
    command = forecast.launch("mine.yaml", ["separator= => "], 32)
    assert command.startswith("accelerate launch --config_file ")
    assert "--num_processes 32 --num_machines 4" in command
    assert command.endswith("-m layerskip train mine.yaml 'separator= => '")


# -- the verb ------------------------------------------------------------------------------------------------


def test_a_plan_with_model_and_data_times_steps_and_agrees_with_that_of_training(plan, run, folder, data):
    told = plan("finetune", "hold_out=8", "epochs=20")
    assert {*told} == KEYS
    asked = (f"model={folder}", f"data={data}", "length=48", "template=off", "hold_out=8", "epochs=20")
    own = json.loads(run("train", "finetune", *asked, "--plan", "--json")[1])
    for key in ("tokens", "steps", "memory_bytes", "disk_bytes", "trainable"):
        assert told[key] == own[key], key
    assert (told["hours_from"], len(told["step_s"])) == ("steps", 4)
    low, high = told["hours"]["ci95"]
    assert 0 < low < told["hours"]["middle"] < high
    assert told["fits"]
    assert told["command"] is told["prediction"] is None
    assert "no curve" in told["no_prediction"]


def test_an_adapters_gain_goes_by_tokens_of_answers_read_once(plan):
    once, twice = (plan("exit-adapter", f"epochs={n}", "hold_out=0", "--timed-steps", 2) for n in (1, 2))
    assert once["answer_tokens"] == twice["answer_tokens"] < once["tokens"] < twice["tokens"]
    assert once["prediction"] == twice["prediction"]
    assert once["prediction"]["extrapolated"]
    assert once["trainable"] < once["parameters"]


def test_a_model_of_which_only_the_shape_is_known_is_planned_from_it(plan, folder, run, monkeypatch):
    shape = {"model": "org/far-away", "from_config": folder / "config.json", "data": None}
    told = plan("continual-llama3.2-1b", "layers=null", "exits=[2,3]", "--budget", "1s", **shape)
    assert told["tokens"] == 50_000 * 256 * 48
    assert (told["hours_from"], told["step_s"]) == ("shapes", [])
    low, high = told["hours"]["ci95"]
    assert high / low == pytest.approx(6)
    assert not told["fits"]
    assert "are allowed" in told["reasons"][0]
    assert f"--num_processes {told['gpus']}" in told["command"]
    assert told["operations"] > 6 * told["tokens"] * told["parameters"] / 3


def test_a_run_that_memory_does_not_hold_is_not_begun(plan, monkeypatch):
    monkeypatch.setattr(forecast, "available_bytes", lambda device: 1000)
    told = plan("finetune")
    assert told["hours_from"] == "shapes"
    assert "of memory" in told["reasons"][0]
    assert "does not fit" in told["notes"][0]


def test_a_plan_is_printed_in_lines(run, folder, data):
    asked = (f"model={folder}", f"data={data}", "length=48", "template=off", "--timed-steps", 1)
    code, printed, message = run("plan", "exit-adapter", *asked)
    assert code == 0, message
    first = [line.split()[0] for line in printed.splitlines()]
    assert first[:4] == ["tokens", "time", "memory", "disk"]
    assert "an extrapolation" in " ".join(printed.split())
    assert "it fits" in printed


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("modl=x",), "unknown key 'modl' in the recipe\n  did you mean 'model'"),
        (("--budget", "soon"), "--budget is 'soon'"),
        (("model=org/far-away",), "org/far-away is not on this machine, so its shape is not known"),
        (("--device", "tpu9"), "device 'tpu9' is not usable here"),
    ],
)
def test_a_plan_refuses_what_training_would(run, given, says):
    code, printed, message = run("plan", "exit-adapter", *given)
    assert (code, printed) == (2, "")
    assert says in message


def test_rows_without_data_need_a_number_of_steps(folder):
    recipe = read_recipe("finetune", [f"model={folder}", "length=48", "exits=[2]"])
    with pytest.raises(UserError, match="neither data nor steps"):
        forecast.forecast(recipe, torch.device("cpu"), 1.0)


def test_every_key_of_the_plan_is_documented():
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    assert [key for key in KEYS if f"`{key}`" not in text] == []
