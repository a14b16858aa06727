"""The scripts that judge the built-in model run on a tiny one: kinds of text, the worst prompts, its base."""

import gzip
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from layerskip.decode.request import Round
from layerskip.errors import UserError


@pytest.fixture
def data(tmp_path):
    """The files of the kinds, a few short lines each."""
    questions = [
        {"category": name, "turns": [f"{name} {n}", "more"]}
        for name in ("writing", "stem", "qa")
        for n in (1, 2)
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
        "spec-bench/dev-120.jsonl": questions,
    }
    for name, rows in lines.items():
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    return tmp_path / "data"


@pytest.fixture
def sources(script, folder, data, results, tmp_path):
    """Run a script on the kinds that the few lines have, on the tiny checkpoint; returns what it saved."""

    def call(name, *more, saved="sources"):
        script(name, "--model", folder, "--data", data, "--tasks", "chat,qa,humaneval", "--limit", 2, "--save",
               "--max-new-tokens", 10, "--dtype", "float32", "--threads", 1, "--work", tmp_path / saved,
               *more)  # fmt: skip
        [file] = results.glob(f"{saved}_tiny_float32_cpu_*.json")
        return json.loads(file.read_text())

    return call


def test_prompts_are_taken_in_turn_and_from_the_end(benchmark, data):
    kinds = benchmark("kinds")
    assert kinds.KINDS["chat"].prompts(data, 3) == ["writing 1", "stem 1", "writing 2"]
    assert kinds.KINDS["gsm8k"].prompts(data, 2) == ["what is 3 + 1?", "what is 2 + 1?"]
    assert list(kinds.chosen("qa, chat,")) == ["chat", "qa"]
    with pytest.raises(UserError, match="unknown kind of text 'chats'"):
        kinds.chosen("qa,chats")
    with pytest.raises(UserError, match="no prompts of the wanted kind"):
        kinds.KINDS["maths"].prompts(data, 2)
    (data / "gsm8k" / "test.jsonl.gz").write_bytes(gzip.compress(b'{"question": "?"}\n'))
    with pytest.raises(UserError, match="a line without 'prompt'"):
        kinds.KINDS["gsm8k"].prompts(data, 2)


def test_sources_are_measured_by_kind_of_text(sources, benchmark, tmp_path, capsys):
    result = sources("sources", "--methods", "default,lookup,exit,exit-4", "--trials", 2)
    ours = ["default", "lookup", "exit", "exit-4"]
    assert list(result["kinds"]) == ["chat", "qa", "humaneval"]
    for told in result["kinds"].values():
        assert list(told) == ["ar", *ours]
        assert all(told[name]["equal"] == told[name]["prompts"] == 2 for name in ours)
        assert set(told["lookup"]["by_source"]) <= {"lookup"}
        assert set(told["exit"]["by_source"]) <= {"exit"}
        assert told["ar"]["tokens_per_round"] == told["ar"]["plain_share"] == 1.0
        four = told["exit-4"]["by_source"]["exit"]
        assert four["accepted"] == sum(four["kept"])
        assert four["reached"][1] <= four["kept"][0] <= four["reached"][0] <= four["rounds"]
        assert told["exit-4"]["acceptance"] == {"exit": four["accepted"] / four["drafted"]}
        assert told["exit-4"]["agreement"][0] == four["kept"][0] / four["reached"][0]
        assert len(told["exit-4"]["agreement"]) == 4
    assert list(result["mean"]) == ours
    printed = capsys.readouterr().out
    assert "| mean | " in printed
    assert "drafts 1 to 4 right" in printed
    assert "| humaneval | " in benchmark("builtin_tables").sources()
    assert str(tmp_path) not in json.dumps(result)


def test_a_stopped_comparison_goes_on_and_takes_no_records_of_other_settings(sources, capsys):
    sources("sources", "--limit", 1)
    first = capsys.readouterr().err
    assert first.count("prompt 1 of 1") == 3
    assert sources("sources")["kinds"]["chat"]["ar"]["prompts"] == 2
    again = capsys.readouterr().err
    assert (again.count("prompt 1 of 2"), again.count("prompt 2 of 2")) == (0, 3)
    with pytest.raises(UserError, match="max_new_tokens"):
        sources("sources", "--max-new-tokens", 9)


def test_a_draft_is_reached_when_those_before_it_were_kept_and_it_was_judged(benchmark):
    def one(draft, accepted, tokens, finish_reason=None):
        return Round(0, [0] * tokens, [0] * draft, accepted, 2, 4, "exit", 0, 0.0, 0, 0, finish_reason)

    module = benchmark("sources")
    # The last one ended with its two kept drafts: the other two were cut off, not judged.
    rounds = [one(4, 0, 1), one(4, 1, 2), one(4, 4, 5), one(2, 1, 2), one(0, 0, 1), one(4, 2, 2, "length")]
    told = module.counted(rounds)["exit"]
    assert (told["reached"][:5], told["kept"][:5]) == ([5, 4, 1, 1, 0], [4, 2, 1, 1, 0])
    assert (told["rounds"], told["drafted"], told["accepted"]) == (5, 16, sum(told["kept"]))
    found = module.drafts([{"by_source": {"exit": told}}, {"by_source": {"exit": told, "lookup": told}}])
    assert found["by_source"]["exit"]["reached"][:3] == [10, 8, 2]
    assert found["agreement"] == [4 / 5, 2 / 4, 1, 1]
    assert found["acceptance"] == {"exit": 0.5, "lookup": 0.5}
    assert "agreement" not in module.drafts([{"by_source": {}}])


def test_an_output_counts_as_equal_where_it_is_so_in_every_trial(benchmark):
    run = {"tokens": 2, "decode_s": 1.0, "call_s": 1.0, "decode_tokens": 1, "rounds": 1, "plain_rounds": 0}
    run |= {"by_source": {}, "difference": None}
    found = [
        {"trial": t, "index": i, "runs": {"ar": run, "default": {**run, "difference": at}}}
        for t, i, at in ((0, 0, None), (0, 1, None), (1, 0, None), (1, 1, 7))
    ]
    told = benchmark("sources").report({"chat": found}, ["ar", "default"], 0.0)["kinds"]["chat"]["default"]
    assert (told["equal"], told["prompts"]) == (1, 2)


def test_a_peers_drafter_is_compared_with_its_own_plain_decoding(benchmark):
    run = {"decode_tokens": 1, "rounds": 1, "plain_rounds": 0, "by_source": {}, "difference": None}
    times = {"ar": (1.0, 10), "economize-plain": (4.0, 10), "economize-jump": (3.0, 15), "exit": (0.5, 10)}
    runs = {n: run | {"call_s": s, "decode_s": s, "tokens": tokens} for n, (s, tokens) in times.items()}
    found = {"chat": [{"trial": 0, "index": i, "runs": runs} for i in range(2)]}
    told = benchmark("sources").report(found, [*times], 0.0)
    assert list(told["over_own_plain"]) == ["economize-jump"]
    assert told["over_own_plain"]["economize-jump"]["ratio"] == pytest.approx(2.0), "seconds a token"
    assert told["mean"]["economize-jump"]["ratio"] == pytest.approx(0.5)
    assert "over_own_plain" not in benchmark("sources").report(found, ["ar", "economize-jump"], 0.0)


def saved(results, model, day, **methods):
    """Write a result of sources.py: two kinds, every method alike on both but for its speed."""
    kinds = {}
    for faster, kind in enumerate(("chat", "cnn-dm")):
        kinds[kind] = {
            name: {"speedup": {"ratio": ratio + faster, "ci95": [1.0, 2.0]}, "equal": 3, "prompts": 3, **more}
            for name, (ratio, more) in methods.items()
        }
    mean = {name: {"ratio": ratio + 0.5, "ci95": [1.0, 2.0]} for name, (ratio, _) in methods.items()}
    told = {"model": model, "max_new_tokens": 8, "trials": 2, "dtype": "float32", "threads": 1}
    result = {"kinds": kinds, "mean": mean, "configuration": told | {"device_name": "some CPU"}}
    (results / f"sources_{model}_float32_cpu_{day}.json").write_text(json.dumps(result))


def test_table_and_figure_tell_the_built_in_model_by_kind_of_text(
    results, benchmark, script, tmp_path, capsys
):
    counts = {"exit": {"drafted": 4, "accepted": 1}, "lookup": {"drafted": 10, "accepted": 5}}
    default = {"tokens_per_round": 2.25, "by_source": counts}
    old = {"exit": (1.25, {}), "lookup": (1.5, {}), "default": (1.75, default)}
    same = {"same_files": True, "prompts": 10, "same_tokens": 10, "same_bits": 10}
    told = {"max_new_tokens": 128}
    (results / "untouched_smollm2-135m_float32_cpu_2026-01-01.json").write_text(
        json.dumps(same | {"configuration": told})
    )
    saved(results, "smollm2-135m", "2026-01-01", **old)
    tables = benchmark("builtin_tables")
    lines = tables.builtin().splitlines()
    speeds = "1.25 x [1.00, 2.00] | 1.50 x [1.00, 2.00] | 1.75 x [1.00, 2.00]"
    assert lines[2] == f"| chat | {speeds} | 2.25 |  | 25.0% | 50.0% | 9 of 9 |"
    assert lines[3].startswith("| news summaries (CNN/DM) | 2.25 x")
    assert lines[4].endswith("| 2.25 x [1.00, 2.00] | 2.25 |  | 25.0% | 50.0% | 18 of 18 |")
    assert "each 2 times" in lines[-3]
    assert "10 the same bits in every state" in lines[-1]
    saved(
        results,
        "smollm2-135m",
        "2026-01-02",
        **old,
        **{"exit-4": (1.0, {"agreement": [0.5, 0.25, 0.1, None]})},
    )
    lines = tables.builtin().splitlines()
    assert [line.split(" | ")[5] for line in lines[2:5]] == ["50 25 10 -"] * 3
    assert "sources_smollm2-135m_float32_cpu_2026-01-02.json" in lines[-3]
    assert "12 of 12 outputs" in tables.gain()
    pytest.importorskip("matplotlib")
    script("figures", "--results", results, "--figures", tmp_path / "figures")
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["builtin-speedup.png"]
    assert "drawn from sources_smollm2-135m_float32_cpu_2026-01-02.json" in capsys.readouterr().out


def test_sampled_sources_and_peers_are_files_of_their_own(sources):
    sampled = sources("sources", "--methods", "default", "--temperature", 0.8, saved="sources-sampled")
    assert sampled["kinds"]["qa"]["default"]["speedup"]["ratio"] > 0
    peers = sources("sources", "--methods", "default,hf,hf-lookup-3", saved="sources-peers")
    assert list(peers["mean"]) == ["default", "hf", "hf-lookup-3"]


def test_the_worst_prompts_are_those_with_fewest_tokens_per_round(sources, capsys):
    result = sources("worst", saved="worst")
    assert result["tokens_per_round"] == sorted(result["tokens_per_round"])
    assert result["tried"] >= len(result["tokens_per_round"]) == 2
    assert " x [" in capsys.readouterr().out


def test_a_model_is_held_against_its_base_bit_by_bit(script, folder, results, tmp_path, capsys):
    twin = tmp_path / "twin"
    shutil.copytree(folder, twin)
    given = ("--model", folder, "--base", twin, "--dtype", "float32", "--threads", 1, "--max-new-tokens", 6)
    script("untouched", *given, "--limit", 2, "--save")
    assert (
        "the same, byte for byte; of 2 plain outputs of 6 tokens 2 have the same tokens, 2 the same bits"
        in (capsys.readouterr().out)
    )
    (file,) = results.iterdir()
    assert json.loads(file.read_text())["same_bits"] == 2
    weights = load_file(twin / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, twin / "model.safetensors", {"format": "pt"})
    script("untouched", *given, "--limit", 2)
    told = capsys.readouterr().out
    assert "DIFFERENT" in told
    assert " 0 the same bits" in told
