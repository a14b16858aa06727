"""Training from scratch, its preparation and its comparison, at a size where only their logic can be wrong."""

import json
import os
import random
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import psutil
import pytest
from transformers import AutoConfig, AutoTokenizer

from layerskip.errors import UserError
from layerskip.train.job.recipe import read_recipe

ROOT = Path(__file__).parent.parent
MADE = ("config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Thirty documents of made-up words, one of them twice, and three lines of JSON."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = ["".join(draw.choices("abcdefghij é", k=draw.randint(2, 6))) for _ in range(120)]
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"document {i}. " + " ".join(draw.choices(words, k=150)))
    (folder / "again.txt").write_text((folder / "7.txt").read_text() + "\n")
    lines = folder.parent / f"{folder.name}.jsonl"
    lines.write_text("".join(json.dumps({"text": f"line {i} " + words[i] * 20}) + "\n" for i in range(3)))
    return folder, lines


@pytest.fixture
def make(texts, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = import_module("make_scratch")

    def call(name, *more):
        given = (*texts, "--output", tmp_path / name, "--vocabulary", 300, "--width", 32, "--length", 64)
        monkeypatch.setattr(sys, "argv", ["make_scratch", *map(str, (*given, *more))])
        module.main()
        return tmp_path / name

    call.module = module
    return call


def rows_of(file):
    return [json.loads(line)["input_ids"] for line in file.read_text().splitlines()]


def test_the_same_texts_and_seed_make_the_same_bytes_and_another_seed_other_ones(make):
    one, again, other = make("one"), make("again"), make("other", "--seed", 1)
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert {path.name for path in files} == {
        *MADE, "train.jsonl", "held.jsonl", "held.txt", "prompts.jsonl", "made.json"
    }  # fmt: skip
    assert [name for name in files if (one / name).read_bytes() != (again / name).read_bytes()] == []
    assert (one / "held.txt").read_text() != (other / "held.txt").read_text()
    assert {len(row) for row in rows_of(one / "train.jsonl")} <= {*range(2, 65)}
    few = json.loads((make("few", "--tokens", 200) / "made.json").read_text())
    assert 200 <= few["train"]["tokens"] < 264


def test_documents_are_held_out_whole_and_read_back_from_their_rows(make, texts):
    folder = make("one", "--held", 0.2, "--length", 1000)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    end = tokenizer.eos_token_id
    parts = {}
    for name in ("train", "held"):
        rows = rows_of(folder / f"{name}.jsonl")
        joined = [token for row in rows for token in row]
        parts[name] = {text for text in tokenizer.decode(joined).split("<|end|>") if text}
    assert not parts["train"] & parts["held"]
    originals = {file.read_text().strip() for file in texts[0].iterdir()}
    originals |= {json.loads(line)["text"] for line in texts[1].read_text().splitlines()}
    assert parts["train"] | parts["held"] == {text.strip() for text in originals}, "each once, none cut"
    assert {*(folder / "held.txt").read_text().strip().split("\n\n")} == parts["held"]
    assert len(parts["held"]) >= 5
    made = json.loads((folder / "made.json").read_text())
    assert made["train"]["documents"] + made["held"]["documents"] == 33
    assert made["train"]["tokens"] == sum(map(len, rows_of(folder / "train.jsonl")))
    assert (
        end < made["vocabulary"] == len(tokenizer) == AutoConfig.from_pretrained(folder / "model").vocab_size
    )
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) > 5
    assert all(any(prompt in held for held in parts["held"]) for prompt in prompts)


def test_parameters_are_counted_as_the_model_has_them_and_the_recipe_says_them(make):
    import torch
    from transformers import AutoModelForCausalLM

    config = make.module.configuration(4096, 0, 192, 8, 256)
    told = make.module.parameters(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(told.values()) == sum(p.numel() for p in model.parameters())
    text = (ROOT / "src" / "layerskip" / "recipes" / "scratch-small.yaml").read_text()
    for count in (*told.values(), sum(told.values())):
        assert f"{count / 1e6:.2f} M" in text
    recipe = read_recipe("scratch-small")
    assert recipe.steps * recipe.batch_size * recipe.length == pytest.approx(20e6, rel=1e-3)
    assert (recipe.p_max, recipe.drop_depth, recipe.drop_time, recipe.e_scale) == (0.1, "exp", "exp", 0.2)


def test_a_cell_of_twenty_million_tokens_takes_less_than_75_minutes_at_180_gflops(make, benchmark):
    from layerskip.train.job.run import schedule_for
    from layerskip.train.job.work import Work

    config = make.module.configuration(4096, 0, 192, 8, 256)
    layer = make.module.parameters(config)["layers"] // 8
    for name, settings in benchmark("scratch").CELLS.items():
        recipe = read_recipe("scratch-small", settings)
        work = Work(
            recipe, schedule_for(recipe, 8), recipe.steps, recipe.steps, 32 * 256, layer, 4096 * 192, 0, 0,
            4 * 192 * 256, 0.0,
        )  # fmt: skip
        assert work.total / 180e9 < 75 * 60, name


def test_what_cannot_be_made_is_refused(make, tmp_path):
    with pytest.raises(UserError, match="--width is 40"):
        make("one", "--width", 40)
    with pytest.raises(UserError, match="1 documents are too few"):
        make.module.split(["one"], 0.5, 0)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    with pytest.raises(UserError, match="is not plain text"):
        make.module.documents([str(chats)])


def test_a_file_of_several_documents_is_cut_where_it_says(make, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("one<|book|>two<|book|> \n<|book|>one")
    assert make.module.documents([str(book)], "<|book|>") == ["one", "two"]


# -- the comparison ------------------------------------------------------------------------------------------


def test_cells_are_compared_by_seed_and_averaged_over_seeds(benchmark):
    scratch = benchmark("scratch")
    exits = {"2": {"agreement": 0.5, "speedup": 1.1}, "8": {"agreement": 1.0}}
    base = {seed: {"exits": exits, "nll": [10.0, 20.0], "tokens": [5, 10], "seconds": 1.0} for seed in (0, 1)}
    worse = {seed: told | {"nll": [10.5 + seed, 21.0 + 2 * seed]} for seed, told in base.items()}
    told = scratch.summed(worse, base)
    by_seed = told["perplexity_change_by_seed"]
    assert by_seed["0"]["ratio"] == pytest.approx(2.718281828**0.1 - 1)
    assert by_seed["0"]["ci95"] == [pytest.approx(by_seed["0"]["ratio"])] * 2, "all windows are alike"
    low, high = told["perplexity_change"]["ci95"]
    assert low < by_seed["0"]["ratio"] < by_seed["1"]["ratio"] < high
    assert told["exits"]["2"]["agreement"] == {"ratio": 0.5, "ci95": [0.5, 0.5]}
    assert "ci95" not in scratch.summed({0: worse[0]}, base)["perplexity_change"], "one seed has no interval"
    assert scratch.summed(base, base)["perplexity_change"]["ratio"] == 0.0


def test_a_cell_that_is_unknown_or_has_no_baseline_is_refused(script, tmp_path):
    given = ("scratch", "--data", tmp_path, "--work", tmp_path / "work")
    wrong = {
        "--cells: drop": ("--cells", "baseline,drop"),
        "--cells dropout lacks baseline": ("--cells", "dropout"),
        "--once: all": ("--once", "all"),
        "--once both,baseline": ("--once", "both,baseline"),
    }
    for says, more in wrong.items():
        with pytest.raises(UserError, match=says):
            script(*given, *more)


@pytest.mark.slow
def test_a_comparison_that_is_killed_goes_on_from_its_checkpoint_and_trains_nothing_twice(
    make, script, results, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    work = tmp_path / "work"
    given = [
        "--data", make("made"), "--work", work, "--cells", "baseline,gradual", "--seeds", 0, "--exits", 2,
        "--windows", 4, "--prompts", 2, "--max-new-tokens", 6, "--trials", 1, "--dtype", "float32",
    ]  # fmt: skip
    micro = ("steps=300", "length=64", "batch_size=2", "save_every=20", "dtype=float32", "log_every=100")
    given += [word for key in micro for word in ("--set", key)]
    command = [sys.executable, str(ROOT / "benchmarks" / "scratch.py"), *map(str, given)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    begun = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not [*work.glob("baseline-0/run/checkpoint-*")]:
            assert begun.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        training = psutil.Process(begun.pid).children(recursive=True)
        begun.kill()
        begun.wait()
        for process in training:
            process.kill()
    recipe = work / "baseline-0" / "run" / "recipe.yaml"
    first = recipe.stat().st_mtime_ns
    assert not (work / "baseline-0" / "result.json").exists()

    monkeypatch.setenv("PYTHONPATH", environment["PYTHONPATH"])
    script("scratch", *given, "--save")
    assert recipe.stat().st_mtime_ns == first, "it went on, and did not begin anew"
    [saved] = results.glob("scratch_small_float32_cpu_*.json")
    assert str(tmp_path) not in saved.read_text()
    cells = json.loads(saved.read_text())["cells"]
    assert [*cells] == ["baseline", "gradual"]
    for told in cells.values():
        assert [*told["exits"]] == [str(k) for k in range(1, 9)]
        assert told["exits"]["8"]["agreement"]["ratio"] == 1.0
        assert told["exits"]["2"]["equal"]["ratio"] == 1.0
        assert {"acceptance", "speedup", "tokens_per_round"} <= {*told["exits"]["2"]}
    assert cells["baseline"]["perplexity_change"]["ratio"] == 0.0
    assert cells["gradual"]["perplexity_change"]["ratio"] != 0.0

    done = {path: path.stat().st_mtime_ns for path in work.rglob("*.json")}
    script("scratch", *given)
    assert done == {path: path.stat().st_mtime_ns for path in work.rglob("*.json")}
    with pytest.raises(UserError, match="results of another run: recipe, set differ"):
        script("scratch", *given, "--set", "learning_rate=1e-3")

    script("figures", "--results", results, "--figures", tmp_path / "figures")
    assert (tmp_path / "figures" / "scratch.png").stat().st_size > 1000


def test_the_table_tells_spread_over_seeds_and_none_of_one(benchmark, monkeypatch, tmp_path):
    tables, scratch = benchmark("training_tables"), benchmark("scratch")
    figures = {"agreement": 0.5, "perplexity": 30.0, "acceptance": 0.4, "speedup": 1.1, "equal": 1.0}
    exits = {"2": figures, "8": {"agreement": 1.0, "perplexity": 20.0}}
    one = {"exits": exits, "nll": [10.0], "tokens": [5], "seconds": 1.0}
    two = {0: one, 1: one | {"nll": [10.5], "exits": exits | {"2": figures | {"speedup": 1.3}}}}
    file = tmp_path / "scratch_small_bfloat16_cpu_2026-01-01.json"
    told = {"windows": 4, "draft_length": 4, "prompts": 2, "max_new_tokens": 6, "trials": 1}
    told |= {"dtype": "bfloat16", "threads": 2, "device_name": "machine"}
    cells = {"baseline": scratch.summed({0: one}, {0: one}), "both": scratch.summed(two, {0: one, 1: one})}
    made = {"parameters": {"layers": 3_000_000, "embeddings": 1_000_000}, "layers": 8}
    recipe = "steps: 10\nbatch_size: 4\nlength: 100000\n"
    file.write_text(json.dumps({"cells": cells, "configuration": told, "made": made, "recipe": recipe}))
    monkeypatch.setattr(tables.record, "newest", lambda _: file)
    lines = tables.scratch().splitlines()
    assert lines[2] == "| baseline | 1 | 20.00 |  | 50%, 40%, 1.10 x |"
    assert lines[3].startswith("| both | 2 | 20.00 [20.00, 20.00] | +5.3 [")
    assert "50%, 40%, 1.20 [" in lines[3]
    assert "| 2 | 50%, 30.00 | 50%, 30.00 |" in lines
    assert "4.0 M parameters and 8 layers, 4 M tokens a run" in lines[-1]
