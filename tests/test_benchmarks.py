"""The scripts in benchmarks/ run, at a size where only their logic can be wrong."""

import gzip
import importlib
import json
import sys
from pathlib import Path

import pytest

from layerskip.errors import UserError

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


def test_attention_compares_bits_before_it_times_passes(script, folder, capsys, monkeypatch):
    given = (
        "--model",
        folder,
        "--dtype",
        "float32",
        "--contexts",
        "70,128",
        "--widths",
        "3",
        "--turns",
        2,
        "--threads",
        1,
    )
    script("attention", *given)
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert first == "the bits of single steps: 2 contexts, 2 widths"
    assert [row.split()[:2] for row in rows] == [["70", "1"], ["70", "3"], ["128", "1"], ["128", "3"]]
    monkeypatch.setattr("torch.equal", lambda *_: False)
    with pytest.raises(SystemExit, match="1 positions behind 70 differ"):
        script("attention", *given)


def test_the_adapters_gate_trains_judges_and_prices_each_cell_once(script, folder, tmp_path, capsys):
    lines = []
    for n in range(12):
        ids = [(7 * n + 3 * i * i) % 50 + 4 for i in range(30)]
        lines.append(json.dumps({"input_ids": ids, "completion_mask": [0] * 8 + [1] * 22}) + "\n")
    train, held = tmp_path / "own.jsonl", tmp_path / "maths.jsonl"
    train.write_text("".join(lines[:9]))
    held.write_text("".join(lines[9:]))
    given = (
        "--model", folder, "--train", train, "--held", held, "--work", tmp_path / "work", "--threads", 1,
        "--epochs", 1, "--tokens", 150, "--cells", 2, 7,
    )  # fmt: skip
    script("adapter_gate", *given)
    told = capsys.readouterr().out
    assert "154 tokens of answers, 7 sequences" in told
    assert told.count("drafts right") == 4  # when it is judged, and beside its price
    assert told.count("ms a draft") == 2
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    script("adapter_gate", *given)  # nothing is trained again
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}


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
    with pytest.raises(UserError, match="max_new_tokens"):
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


# -- the built-in model --------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """The tasks' files, a few short lines each."""
    questions = [
        {"category": name, "turns": [f"{name} {n}", "more"]} for name in ("writing", "qa") for n in (1, 2)
    ]
    problems = [{"prompt": f"what is {n} + 1?", "response": f"#### {n + 1}"} for n in range(4)]
    code = {
        "task_id": "0",
        "entry_point": "f",
        "test": "def check(f): f()",
        "prompt": "def f():\n    # One\n",
    }
    lines = {
        "human-eval/HumanEval.jsonl": [code] * 2,
        "gsm8k/test.jsonl.gz": problems,
        "cnn-dailymail/summarization.jsonl": [{"prompt": "Article: a\nSummary:", "response": "a"}],
        "spec-bench/dev-120.jsonl": questions,
    }
    for name, rows in lines.items():
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    return tmp_path / "data"


@pytest.fixture
def builtin(script, folder, data, tmp_path, monkeypatch):
    """Run builtin.py on the tiny checkpoint; returns the records of a task's work folder."""
    import record

    (tmp_path / "results").mkdir()
    monkeypatch.setattr(record, "HERE", tmp_path)

    def call(*more, task="chat"):
        script("builtin", "--model", folder, "--base", folder, "--data", data, "--limit", 2, "--max-new-tokens", 8,
               "--dtype", "float32", "--threads", 1, "--work", tmp_path / "work", *more)  # fmt: skip
        lines = (tmp_path / "work" / f"builtin-{task}" / "records.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return call


def test_the_builtin_model_is_held_against_its_base_on_every_task(
    builtin, script, tmp_path, monkeypatch, capsys
):
    import tables

    monkeypatch.setattr(tables, "HERE", tmp_path)
    builtin("--hf", "--hf-limit", 1, "--trials", 2, "--save")
    (saved,) = (tmp_path / "results").iterdir()
    assert saved.name.startswith("builtin_tiny_float32_cpu_")
    assert str(tmp_path) not in saved.read_text()
    result = json.loads(saved.read_text())
    assert list(result["tasks"]) == result["mean_of"] == ["humaneval", "gsm8k", "cnn-dm", "chat"]
    for task, models in result["tasks"].items():
        for who, told in models.items():
            row = told["methods"]["self-speculative"]
            assert row["equal"] == row["prompts"] == (1 if task == "cnn-dm" else 2)
            assert 0 <= told["exit"]["agreement_draft_vocab"] <= 1
            low, high = row["speedup_with_prompt"]["ci95"]
            assert low <= row["speedup_with_prompt"]["ratio"] <= high
            assert ("hf-early-exit" in told["methods"]) == (who == "model")
        assert models["model"]["methods"]["hf"]["prompts"] == 1
    assert f"results/{saved.name}" in tables.builtin()
    assert "| mean of 4 | base |" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    script("figures", "--results", tmp_path / "results", "--figures", tmp_path / "figures")
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["builtin-speedup.png"]


def test_the_builtin_benchmark_goes_on_after_a_kill_and_takes_questions_in_turn(builtin, data, monkeypatch):
    first = builtin("--tasks", "chat,gsm8k", "--limit", 3)
    assert [(one["trial"], one["index"]) for one in first] == [(0, 0), (0, 1), (0, 2)]
    assert list(first[0]["runs"]) == [
        "model ar",
        "model self-speculative",
        "base ar",
        "base self-speculative",
    ]
    assert next(iter(first[1]["runs"])) == "model self-speculative"  # led in rotation
    module = sys.modules["builtin"]
    assert module.TASKS["chat"].prompts(data, 3) == ["writing 1", "qa 1", "writing 2"]
    assert module.TASKS["gsm8k"].prompts(data, 2) == ["what is 3 + 1?", "what is 2 + 1?"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "agreed", None)  # nothing is decoded again
        assert builtin("--tasks", "chat", "--limit", 3) == first
    assert len(builtin("--tasks", "chat", "--limit", 4)) == 4
    with pytest.raises(UserError, match="max_new_tokens"):
        builtin("--tasks", "chat", "--max-new-tokens", 9)
    with pytest.raises(UserError, match="unknown task"):
        builtin("--tasks", "chats")


def test_what_training_cost_is_paired_and_goes_on_after_a_kill(
    script, folder, data, tmp_path, monkeypatch, capsys
):
    import record
    import tables

    (tmp_path / "results").mkdir()
    for module in (record, tables):
        monkeypatch.setattr(module, "HERE", tmp_path)
    (data / "wikitext-2").mkdir()
    (data / "wikitext-2" / "test.txt").write_text("some words of a text " * 200)
    given = ("--model", folder, "--base", folder, "--data", data, "--quality-limit", 2, "--max-new-tokens", 4,
             "--dtype", "float32", "--threads", 1, "--work", tmp_path / "work")  # fmt: skip
    monkeypatch.setattr("builtin_cost.WINDOW", 64)
    script("builtin_cost", *given, "--windows", 2)
    first = capsys.readouterr()
    assert first.err.count("text: window") == 4  # both models
    script("builtin_cost", *given, "--windows", 3, "--save")
    again = capsys.readouterr()
    assert again.err.count("text: window") == 2
    (saved,) = (tmp_path / "results").iterdir()
    result = json.loads(saved.read_text())
    assert result["perplexity"]["model"] == result["perplexity"]["base"]
    assert result["perplexity"]["model"]["tokens"] == 3 * 63
    assert result["perplexity"]["relative_difference"] == {"mean": 0.0, "ci95": [0.0, 0.0]}
    assert {name: task["items"] for name, task in result["tasks"].items()} == {"humaneval": 2, "gsm8k": 2}
    assert result["tasks"]["gsm8k"]["difference"]["only_base"] == 0
    assert "| GSM8K accuracy, 2 items | 0.0% | 0.0% | +0.0 points [+0.0, +0.0] |" in again.out
    assert str(tmp_path) not in saved.read_text()


def test_a_shorter_output_differs_where_it_ends(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("builtin")
    run = {"tokens": [1, 2], "decode_s": 1.0, "prompt_s": 1.0, "decode_tokens": 1, "rounds": 1}
    run |= {"plain_rounds": 0, "drafted": 0, "accepted": 0}
    found = [
        {"trial": t, "index": i, "runs": {"base ar": run, "base self-speculative": {**run, "difference": at}}}
        for t, i, at in ((0, 0, None), (0, 1, None), (1, 0, None), (1, 1, 7))
    ]
    told = module.summary(found, "base self-speculative")
    assert (told["equal"], told["prompts"], told["first_differences"]) == (1, 2, [7])  # in any trial
    difference = module.difference
    assert [difference([1, 2], other) for other in ([1, 2], [1], [1, 3], [1, 2, 3])] == [None, 1, 1, 2]


# -- figures -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lens_and_timeline_are_drawn_again_from_a_result_file(
    script, run, folder, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    options = ("--generate", 6, "--exit-layer", 2, "--draft-length", 3, "--output", "a.png", "--save")
    assert run("inspect", folder, "hello", *options)[0] == 0
    [file] = tmp_path.glob("inspect_*.json")
    script("figures", "--results", tmp_path, "--figures", "figures")
    told = capsys.readouterr().out
    for name, original in (("lens.png", "a.png"), ("timeline.png", "a-timeline.png")):
        assert (tmp_path / "figures" / name).read_bytes() == (tmp_path / original).read_bytes()
        assert f"{name}: drawn from {file.name}" in told
    assert "exits.png: no result file yet" in told
    assert run("inspect", folder, "hello", "--save")[0] == 0
    script("figures", "--inspect", file, "--figures", "figures")
    assert "timeline.png: skipped" in capsys.readouterr().out


def test_every_figure_has_its_result_file(script, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    configuration = {"model": "tiny", "trained_exits": [2]}
    cell = {"exit_layer": 2, "draft_length": 3, "draft_vocab": "off", "predicted_speedup": 1.3}
    measured = cell | {"speedup": {"ratio": 1.2, "ci95": [1.1, 1.3]}}
    row = {"exit_layer": 2, "agreement": 0.5, "kl": 1.0, "tv": 0.4, "perplexity": 20.0, "tokens": 9}
    gate = {"draft_s": 1e-3, "speedup": 1.2, "kinds": {"mean": {"tokens_per_round": [1.3, 1.4, 1.45, 1.47]}}}
    doctor = {"surface": [cell], "acceptance_by_position": {"2": [0.9, 0.5, None]}}
    files = {
        "eval_tiny_float32_cpu_2026-01-01": {"exits": [row, row | {"exit_layer": 5, "kl": 0.0}]},
        "tuning_tiny_float32_cpu_2026-01-01": {"grid": [measured], "doctor": doctor},
        "adapter-gate_tiny_2026-01-01": {"cells": {"default": gate, "steps 1": gate | {"speedup": 1.1}}},
    }
    for name, result in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result | {"configuration": configuration}))
    script("figures", "--results", tmp_path, "--figures", tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "exits.png", "speedup-surface.png", "acceptance-by-position.png", "adapter-gate.png"
    }  # fmt: skip
    assert capsys.readouterr().out.count("no result file yet") == 5
    (tmp_path / "tuning_tiny_float32_cpu_2026-01-01.json").unlink()
    own = {"exit_layer": 2, "acceptance_by_position": [0.7, 0.3]}
    bench = {"methods": {"self-speculative": own}, "configuration": configuration}
    for name in ("bench_tiny_float32_cpu_2026-01-02", "bench_tiny_float32_sim80_cpu_2026-01-03"):
        (tmp_path / f"{name}.json").write_text(json.dumps(bench))
    script("figures", "--results", tmp_path, "--figures", tmp_path)
    assert (
        "acceptance-by-position.png: drawn from bench_tiny_float32_cpu_2026-01-02.json\n"
        in capsys.readouterr().out
    )


@pytest.mark.slow
def test_doctor_and_tuner_are_held_against_a_grid_on_other_prompts(
    script, folder, tmp_path, monkeypatch, capsys
):
    import record

    from layerskip.measure.advice.cells import Cell
    from layerskip.measure.advice.tune import Race, Trial
    from layerskip.measure.speed import round_times

    (tmp_path / "results").mkdir()
    monkeypatch.setattr(record, "HERE", tmp_path)
    monkeypatch.setattr(round_times, "TURNS", 1)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "set alarm {n}", "response": "x"}}\n' for n in range(5)))
    given = ("--model", folder, "--prompts", prompts, "--choose", 2, "--measure", 2, "--exits", "1,3",
             "--draft-length", "1,4", "--max-new-tokens", 8, "--seconds", 0.1, "--trials", 1, "--threads", 1,
             "--no-chat", "--separator", r"\n", "--dtype", "float32")  # fmt: skip
    with monkeypatch.context() as patch:
        turn = Race.turn
        patch.setattr(Race, "turn", lambda own, trials: trials[0].differing.append(0) or turn(own, trials))
        with pytest.raises(SystemExit, match="outputs differ"):
            script("tuning", *given, "--save")
    script("tuning", *given, "--save")
    (saved,) = (tmp_path / "results").iterdir()
    assert saved.name.startswith("tuning_tiny_float32_cpu_")
    result = json.loads(saved.read_text())
    assert [(row["exit_layer"], row["draft_length"]) for row in result["grid"]] == [
        (1, 1),
        (1, 4),
        (3, 1),
        (3, 4),
    ]
    assert all(row["equal"] == row["of"] == 2 for row in result["grid"])
    assert {"doctor", "tune", "doctor_choice", "tuned_against_best", "configuration"} <= set(result)
    assert result["configuration"]["prompts"] == ["prompts.jsonl"]
    assert str(tmp_path) not in saved.read_text()
    _, high = result["tuned_against_best"]["ratio"]["ci95"]
    assert result["tuned_against_best"]["significantly_worse"] == (high < 1)
    assert "predicted / measured" in capsys.readouterr().out
    module = sys.modules["tuning"]
    best, choice = ({0: [(4.0, 2.0)] * 2, 1: [(4.0, 2.0)]}, {0: [(4.0, 1.0), (4.0, 3.0)], 1: [(4.0, 2.0)]})
    trials = [Trial(Cell(1, 1, 0), 1.0, seconds=seconds) for seconds in (choice, best)]
    ratio = module.against_best(trials[0], trials[1:])["ratio"]["ratio"]
    assert ratio == 1, "a prompt passed over gives its turn to another, which counts once all the same"
    pytest.importorskip("matplotlib")
    from layerskip.measure.exits.draw import speedup_surface

    assert speedup_surface(result, tmp_path / "surface.png").stat().st_size > 1000


# -- sources of drafts ---------------------------------------------------------------------------------------


@pytest.fixture
def sources(script, folder, data, tmp_path, monkeypatch):
    """Run a script on the kinds that the few lines have, on the tiny checkpoint; returns what it saved."""
    import record

    (tmp_path / "results").mkdir()
    monkeypatch.setattr(record, "HERE", tmp_path)

    def call(name, *more, saved):
        script(name, "--model", folder, "--data", data, "--tasks", "chat,qa,humaneval", "--limit", 2, "--save",
               "--max-new-tokens", 10, "--dtype", "float32", "--threads", 1, "--work", tmp_path / saved,
               *more)  # fmt: skip
        [file] = (tmp_path / "results").glob(f"{saved}_tiny_float32_cpu_*.json")
        return json.loads(file.read_text())

    return call


def test_sources_are_measured_by_kind_of_text(sources, monkeypatch, tmp_path, capsys):
    import tables

    result = sources("sources", "--methods", "default,lookup,exit", saved="sources")
    assert list(result["kinds"]) == ["chat", "qa", "humaneval"]
    for told in result["kinds"].values():
        assert list(told) == ["ar", "default", "lookup", "exit"]
        assert all(
            told[name]["equal"] == told[name]["prompts"] == 2 for name in ("default", "lookup", "exit")
        )
        assert set(told["lookup"]["by_source"]) <= {"lookup"}
        assert set(told["exit"]["by_source"]) <= {"exit"}
        assert told["ar"]["tokens_per_round"] == told["ar"]["plain_share"] == 1.0
    assert list(result["mean"]) == ["default", "lookup", "exit"]
    assert "| mean | **" in capsys.readouterr().out
    monkeypatch.setattr(tables, "HERE", tmp_path)
    assert "| humaneval | " in tables.sources()


def test_sampled_sources_and_peers_are_files_of_their_own(sources):
    sampled = sources("sources", "--methods", "default", "--temperature", 0.8, saved="sources-sampled")
    assert sampled["kinds"]["qa"]["default"]["speedup"]["ratio"] > 0
    peers = sources("sources", "--methods", "default,hf,hf-lookup-3", saved="sources-peers")
    assert list(peers["mean"]) == ["default", "hf", "hf-lookup-3"]


def test_the_worst_prompts_are_those_with_fewest_tokens_per_round(sources, monkeypatch, capsys):
    result = sources("worst", saved="worst")
    assert result["tokens_per_round"] == sorted(result["tokens_per_round"])
    assert result["tried"] >= len(result["tokens_per_round"]) == 2
    assert " x [" in capsys.readouterr().out
