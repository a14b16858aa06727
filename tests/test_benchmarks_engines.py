"""Scripts beside other engines and the search: their logic, and the tables made of what they save."""

import json

import numpy as np
import pytest

from layerskip.train.job.recipe import read_recipe


def test_every_cell_of_the_grid_is_a_recipe_and_the_search_has_its_keys(benchmark):
    made = benchmark("search_grid")
    cells = made.grid()
    assert len({tuple(cell) for cell in cells}) == 24
    for cell in cells:
        read_recipe(made.RECIPE, cell)
    assert [told.split("=")[0] for told in made.RANGES] == list(made.GRID)


def window(rng, tokens, share):
    agreed = {e: int(rng.binomial(tokens, share)) for e in ("2", "4")} | {"6": tokens}
    return {"tokens": tokens, "exits": {e: {"agreed": n, "nll": 2.0 * tokens} for e, n in agreed.items()}}


def test_two_runs_are_compared_window_by_window(benchmark, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(
        num_hidden_layers=6, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=128,
        vocab_size=512,
    ).save_pretrained(tmp_path)  # fmt: skip
    rng, made = np.random.default_rng(0), benchmark("search_grid")
    good, bad = ([window(rng, 100, share) for _ in range(30)] for share in (0.9, 0.5))
    told = made.compared(good, bad, tmp_path)
    assert told["search"] > told["grid"]
    assert told["difference"]["mean"] == pytest.approx(told["search"] - told["grid"])
    low, high = told["difference"]["ci95"]
    assert 0 < low < told["difference"]["mean"] < high
    assert told["perplexity_change"] == 0
    same = made.compared(good, good, tmp_path)
    assert same["difference"] == {"mean": 0, "ci95": [0, 0]}


def test_the_published_rows_are_within_a_fifth_of_the_cost_model(benchmark):
    for row in benchmark("reference_table").ROWS:
        assert row.predicted == pytest.approx(row.speedup, rel=0.2), row.what


def test_an_engine_that_does_not_open_an_export_is_a_row_too(benchmark, monkeypatch, tmp_path):
    tables = benchmark("engine_tables")
    told = {"model": "m", "draft_length": 4, "max_new_tokens": 8}
    rows = [
        {
            "artefact": "draft",
            "engine": "x 1",
            "equal": {"same": 2, "of": 2},
            "acceptance": 0.5,
            "command": "run",
        },
        {"artefact": "vllm", "engine": "vLLM", "failed": "no such thing"},
    ]
    file = tmp_path / "engines_m_2026-01-01.json"
    file.write_text(json.dumps({"rows": rows, "configuration": told, "exit_layer": 3, "prompts": 2}))
    monkeypatch.setattr(tables.record, "newest_of_each", lambda _: [file])
    lines = tables.engines().splitlines()
    assert "| draft | x 1 | yes | 2 of 2 | 50.0% | `run` |" in lines
    assert any("no: no such thing" in line for line in lines)


def test_lm_evals_tasks_are_written_from_the_data(benchmark, tmp_path):
    import gzip

    import yaml

    data, place = tmp_path / "data", tmp_path / "tasks"
    for folder in (data / "gsm8k", data / "wikitext-2", place):
        folder.mkdir(parents=True)
    with gzip.open(data / "gsm8k" / "test.jsonl.gz", "wt") as file:
        file.write(json.dumps({"prompt": "1 + 2?", "response": "It is 3.\n#### 3"}) + "\n")
    (data / "wikitext-2" / "test.txt").write_text("words " * 3000)
    benchmark("harness").written(data, 1, place)
    assert json.loads((place / "gsm8k.jsonl").read_text()) == {"prompt": "1 + 2?", "target": "3"}
    for name in ("gsm8k", "wikitext"):
        told = yaml.safe_load((place / f"{name}.yaml").read_text())
        assert told["task"] == name
        assert told["dataset_kwargs"]["data_files"]["test"] == str(place / f"{name}.jsonl")


def test_an_output_that_ends_early_is_not_the_same(benchmark):
    equal = benchmark("engines")._equal
    plain = [[1, 2, 3], [4, 5], [6]]
    assert equal(plain, [[1, 2, 3, 9], [4], []]) == {"same": 1, "of": 3, "parted_at": [None, 1, 0]}
