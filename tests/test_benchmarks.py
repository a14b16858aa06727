"""The scripts in benchmarks/ run, at a size where only their logic can be wrong."""

import json
import sys

import pytest

from layerskip.errors import UserError
from layerskip.model.native.kernels import kernels


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


def test_the_passes_of_a_shape_are_told_over_one_position(benchmark):
    import tiny

    told = benchmark("shapes").passes(tiny.stack("llama+native"), 8, repeats=2)
    assert [*told] == [1, 4, 9]
    assert told[1] == 1.0


def test_rows_are_told_over_one_position_beside_what_their_products_take(benchmark):
    formats = benchmark("formats")
    seconds = {("int8", width): [0.002 + 0.001 * width] * 3 for width in formats.WIDTHS}
    told = formats._rows("int8", seconds, 0.0006)
    assert (told["step_s"], told["over_one"][4]) == (pytest.approx(0.003), pytest.approx(2))
    assert told["least_over_one"][9] == pytest.approx(1.8)
    tables = benchmark("tables")
    assert tables._rows(json.loads(json.dumps(told)), 9) == "3.67 (1.80)"
    assert tables._rows({"over_one": {"9": 3.6}}, 9) == "3.60"
    assert tables._rows({}, 9) == ""


@pytest.mark.skipif(kernels() is None, reason="needs a C++ compiler")
def test_the_peak_of_the_vector_unit_is_measured_where_there_is_one(benchmark):
    peak = benchmark("arithmetic").Peak()
    found = peak("int8", 1)
    assert found is None or found > 1e8
    assert (peak("int4", 1) is None) == (found is None)


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
    with pytest.raises(UserError, match="results of another run: epochs differ"):
        script("adapter_gate", *given, "--epochs", 2)
    for seconds in (1e-9, 0.5):
        place = tmp_path / f"work-{seconds}"
        script("adapter_gate", *given[:-3], "--cells", 2, "--work", place, "--seconds", seconds)
        (cell,) = [json.loads(path.read_text()) for path in place.glob("*.json") if path.name != "setup.json"]
        assert (cell["train_steps"] > 0) == (seconds > 1e-3)


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


def test_the_tables_of_topv2_are_made_from_what_it_saves(topv2, results, benchmark, tmp_path):
    topv2("--limit", 3, "--save", "--cells", "2x4@0.8")
    (saved,) = results.iterdir()
    assert str(tmp_path) not in saved.read_text()
    assert json.loads(saved.read_text())["configuration"]["data"] == "test.jsonl"
    table = benchmark("tables").topv2()
    assert f"results/{saved.name}" in table
    assert "self-speculation, E 2, K 4, stopping below 0.8 |" in table
    with pytest.raises(SystemExit, match="a cell is ExK"):
        topv2("--limit", 3, "--cells", "2by4")


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
    assert capsys.readouterr().out.count("no result file yet") == 7
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
    script, folder, results, tmp_path, monkeypatch, capsys
):
    from layerskip.measure.advice.cells import Cell
    from layerskip.measure.advice.tune import Race, Trial
    from layerskip.measure.speed import round_times

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
    (saved,) = results.iterdir()
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
