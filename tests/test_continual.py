"""The comparison of a model before and after continual training, at a size where only its logic can be wrong."""

import json
import math
import random
from pathlib import Path

import pytest

from layerskip.errors import UserError
from layerskip.train.job.recipe import read_recipe


def curve(loss, points=10, end=1000):
    return [
        {"tokens": end * (i + 1) / points, "loss": {"2": loss(end * (i + 1) / points)}} for i in range(points)
    ]


def test_what_more_tokens_bring_is_the_line_behind_the_warm_up(benchmark):
    continual = benchmark("continual")
    told = curve(lambda tokens: 9.0 if tokens <= 100 else 5 - 0.2 * math.log2(tokens))
    found = continual.more_tokens(told)["2"]
    assert found["points"] == 9
    assert found["doubling"]["middle"] == pytest.approx(-0.2)
    assert found["doubling"]["ci95"] == pytest.approx([-0.2, -0.2]), "points on a line leave no doubt"
    assert found["4"]["middle"] == pytest.approx(5 - 0.2 * math.log2(4000))
    assert found["4"]["ci95"] == pytest.approx([found["4"]["middle"]] * 2)
    assert continual.more_tokens(told[:2]) == {}, "two points are no line"
    close = [*told, {"tokens": 1040, "loss": {"2": 8.0}}]
    assert continual.more_tokens(close)["2"]["doubling"]["middle"] == pytest.approx(-0.2), (
        "the end is no point"
    )


def test_the_interval_of_a_doubling_covers_the_truth_as_often_as_it_says(benchmark):
    continual, dice = benchmark("continual"), random.Random(0)
    covered = 0
    for _ in range(400):
        told = curve(lambda tokens: 5 - 0.2 * math.log2(tokens) + dice.gauss(0, 0.05))
        low, high = continual.more_tokens(told)["2"]["doubling"]["ci95"]
        covered += low < -0.2 < high
    assert 0.92 < covered / 400 < 0.98


def test_the_recipe_takes_what_every_cell_changes(benchmark):
    for settings in benchmark("continual").CELLS.values():
        recipe = read_recipe("continual-small", settings)
        assert recipe.steps * recipe.batch_size * recipe.length == pytest.approx(5e6, rel=1e-3)
        assert recipe.lr_schedule == "constant"


def test_an_unknown_cell_is_refused(script, tmp_path):
    given = ("--data", tmp_path, "--held", tmp_path, "--text", tmp_path, "--work", tmp_path / "work")
    with pytest.raises(UserError, match="--cells: more"):
        script("continual", *given, "--cells", "held,more")
    with pytest.raises(UserError, match="no file"):
        script("continual", *given)
    file = tmp_path / "text.txt"
    file.write_text("words")
    given = ("--data", tmp_path, "--held", file, "--text", file, "--work", tmp_path / "work")
    with pytest.raises(UserError, match="global_batch"):  # before the first one's night
        script("continual", *given, "--set", "global_batch=8")
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_every_exit_is_judged_before_and_after_and_nothing_is_trained_twice(
    script, benchmark, folder, data, results, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    text = tmp_path / "held.txt"
    text.write_text("\n\n".join(f"say {i} abc " * 60 for i in range(30)))
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"text": f"say {i} abc " * 20}) + "\n" for i in range(6)))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent / "src"))
    given = [
        "--data",
        data,
        "--held",
        held,
        "--text",
        text,
        "--work",
        tmp_path / "work",
        "--windows",
        4,
        "--rows",
        4,
    ]
    tiny = (f"model={json.dumps(str(folder))}", "layers=null", "exits=[2, 3]", "length=48", "steps=8", "rotation=2",
            "eval_every=2", "save_every=4", "batch_size=2", "template=off")  # fmt: skip
    given += [word for key in tiny for word in ("--set", key)]
    script("continual", *given, "--save")
    [saved] = results.glob("continual_tiny_cpu_*.json")
    assert str(tmp_path.parent) not in saved.read_text()
    found = json.loads(saved.read_text())
    assert [*found["cells"]] == ["published", "held"]
    for told in found["cells"].values():
        assert [*told["exits"]] == [*found["before"]]
        assert [point["tokens"] for point in told["curve"]] == [192, 384, 576, 768]
        assert {*told["more"]["2"]} == {"doubling", "points", "2", "4", "16"}
        assert told["perplexity_change"]["ratio"] != 0.0
        assert told["exits"]["2"] != found["before"]["2"]
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.json")}
    script("continual", *given)
    assert done == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.json")}
    script("figures", "--results", results, "--figures", tmp_path / "figures")
    assert (tmp_path / "figures" / "continual.png").stat().st_size > 1000
    lines = benchmark("training_tables").continual().splitlines()
    assert lines[0] == "| exit | before | published | held |"
    assert lines[2].startswith("| 2 | ")
    assert "| held: loss of exit | a doubling of the tokens | after twice as many | after 16 times |" in lines
