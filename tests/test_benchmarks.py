"""The scripts in benchmarks/ run, at a size where only their logic can be wrong."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Call a script of benchmarks/ in this process with arguments; returns its module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def call(name, *arguments):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        module.main()
        return module

    return call


@pytest.fixture
def topv2(script, folder, tmp_path):
    """Run topv2.py on the tiny checkpoint and twelve items; `work` is its folder of finished items."""
    data = tmp_path / "test.jsonl"
    items = [{"prompt": f"set alarm {n}", "response": f"[IN:SET {n} ]"} for n in range(12)]
    data.write_text("".join(json.dumps(item) + "\n" for item in items))

    def call(*more):
        return script(
            "topv2", "--model", folder, "--baseline", folder, "--data", data, "--tune", 2, "--exits", "2,3",
            "--draft-length", "2,3", "--dtype", "float32", "--stack", "hf", "--threads", 1, "--max-new-tokens", 8,
            "--work", tmp_path / "work", *more,
        )  # fmt: skip

    call.work = tmp_path / "work"
    return call


def test_topv2_reports_equality_and_leaves_the_tuning_items_out(topv2, capsys):
    topv2("--limit", 3)
    printed = capsys.readouterr().out
    assert printed.count("3 of 3") == 2  # both exits
    assert "baseline: +0.0 points" in printed
    indices = {
        name: [json.loads(line)["index"] for line in (topv2.work / name).read_text().splitlines()]
        for name in ("items.jsonl", "tuning.jsonl")
    }
    assert indices == {"items.jsonl": [0, 1, 2], "tuning.jsonl": [10, 11]}


def test_topv2_goes_on_after_a_kill_and_refuses_records_of_other_settings(topv2):
    topv2("--limit", 3)
    file = topv2.work / "items.jsonl"
    first, second, third = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first + second + third[: len(third) // 2])
    topv2("--limit", 4)
    lines = file.read_bytes().splitlines(keepends=True)
    assert lines[:2] == [first, second]
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2, 3]
    with pytest.raises(SystemExit, match="max_new_tokens"):
        topv2("--limit", 3, "--max-new-tokens", 9)


def test_topv2_refuses_a_draft_vocabulary_that_nobody_ranked(topv2):
    with pytest.raises(SystemExit, match="layerskip draft-vocab"):
        topv2("--limit", 3, "--draft-vocab", 100)


def test_the_tables_of_topv2_are_made_from_what_it_saves(topv2, monkeypatch, tmp_path):
    import record
    import tables

    (tmp_path / "results").mkdir()
    monkeypatch.setattr(record, "HERE", tmp_path)
    monkeypatch.setattr(tables, "HERE", tmp_path)
    topv2("--limit", 3, "--save")
    (saved,) = (tmp_path / "results").iterdir()
    assert str(tmp_path) not in saved.read_text()
    assert json.loads(saved.read_text())["configuration"]["data"] == "test.jsonl"
    assert f"results/{saved.name}" in tables.topv2()


def test_curves_are_drawn_from_a_log_in_which_exits_rotate(script, tmp_path):
    pytest.importorskip("matplotlib")
    log = [
        {
            "step": step,
            f"exit_{2 + step % 2}_loss": 2.0,
            f"exit_{2 + step % 2}_agreement": 0.5,
            "exit_5_loss": 1.0,
        }
        for step in range(1, 9)
    ]
    evaluated = {"step": 8, "eval_exit_2_loss": 2.0, "eval_exit_2_agreement": 0.6, "eval_exit_5_loss": 1.1}
    state = tmp_path / "run" / "checkpoint-8" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"log_history": [*log, evaluated]}))
    curves = script("curves", "--model", tmp_path / "run", "--figure", tmp_path / "figures" / "a.png")
    assert (tmp_path / "figures" / "a.png").stat().st_size > 1000
    run = curves.curves(curves.history(state), limit=6)
    assert run["exit_2_loss"]["steps"] == [2, 4, 6]
    assert "eval_exit_2_loss" not in run


def test_the_time_of_training_is_measured_for_every_case(script, folder, capsys):
    script("training_speed", "--model", folder, "--rows", 2, "--length", 8, "--limit", 2, "--early-exits", "1,3",
           "--dtype", "float32", "--threads", 1)  # fmt: skip
    printed = capsys.readouterr().out
    assert "wanted 28%" in printed
    assert printed.count(" x [") == 2  # a ratio for each number of exits
