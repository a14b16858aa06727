"""The built-in model's card says what files say, and that a number is missing where it is."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from layerskip.checkpoint.catalogue import BUILTINS

SCRIPTS = Path(__file__).parent.parent / "scripts"
BUILTIN = next(one for one in BUILTINS if one.name == "smollm2-135m")
SOURCES = [
    {"kind": "maths", "source": "questions", "licence": "MIT", "count": 1200},
    {"kind": "documents", "source": "books", "licence": "CC0-1.0", "count": 34},
]
LOG = [
    {"step": 5, "tokens": 1_000_000, "exit_4_loss": 3.0, "exit_4_agreement": 0.4, "exit_30_loss": 1.0},
    {"step": 10, "tokens": 2_340_000, "exit_4_loss": 2.0, "exit_4_agreement": 0.6, "exit_30_loss": 1.0},
]
MACHINE = {
    "device": "cpu",
    "device_name": "some CPU",
    "threads": 2,
    "dtype": "bfloat16",
    "date": "2026-01-02",
}
RATIO = {"ratio": 1.234, "ci95": [1.1, 1.3]}


def speed():
    sources = {"exit": {"drafted": 1000, "accepted": 456}, "lookup": {"drafted": 4, "accepted": 1}}
    row = {"equal": 3, "prompts": 3, "tokens_per_round": 2.5, "by_source": sources, "speedup": RATIO}
    four = {"agreement": [0.5, 0.4, None, None]}
    return {
        "kinds": {"gsm8k": {"exit": row, "lookup": row, "default": row, "exit-4": four}},
        "mean": {"exit": RATIO, "lookup": RATIO, "default": RATIO, "exit-4": RATIO},
        "configuration": {**MACHINE, "commit": "abc123", "max_new_tokens": 256, "trials": 1},
    }


@pytest.fixture
def module(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    return importlib.import_module("model_card")


def test_the_card_tells_everything_the_files_tell(module):
    recipe = {
        "model": "smollm2-135m-base",
        "exits": [4],
        "data": ["/some/where/gsm.jsonl"],
        "lora": None,
        "output": "x",
    }
    about = {
        "commit": "def456",
        "trained_on": "2 cores of some CPU",
        "layerskip": {"exit_layer": 4, "draft_length": 6, "draft_vocab_size": 8192, "policy": "adaptive"},
    }
    text = module.card(
        BUILTIN,
        [module.Training(recipe, LOG)],
        SOURCES,
        {"about": about, "bytes": 23_500_000, "changed": 2},
        speed(),
    )
    header = yaml.safe_load(text.split("---")[1])
    assert (header["license"], header["language"]) == ("apache-2.0", ["en"])
    assert header["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    for told in (
        BUILTIN.requirement, BUILTIN.file_sha256, "**not the original weights**", "of 23.5 MB",
        "with a trained early exit", "exit layer E 4, draft length K 6, draft vocabulary 8192, policy adaptive",
        "| maths | questions | MIT | 1,200 |", "1,234 in all. Documents are read", "10 steps, 2,340,000 tokens",
        "data: [gsm.jsonl]", "| 4 | 2.500 | 50.0% |", "| 30 | 1.000 | not measured |", "the last training batches",
        "| maths questions (GSM8K) | 1.23 x [1.10, 1.30] |", "| 2.50 | 50 40 - - | 45.6% | 25.0% | 9 of 9 |",
        "Measured 2026-01-02 on some CPU, 2 threads, bfloat16, 256 new tokens at most.", "--quantize int4",
        "2.3 million tokens on 2 cores of some CPU", "Made from commit def456, measured at abc123.",
        "scripts/make_builtin.sh", "benchmarks/sources.py", "benchmarks/untouched.py",
    ):  # fmt: skip
        assert told in text, told
    assert "/some/where" not in text
    assert "lora" not in text


@pytest.mark.parametrize(
    ("exit_layer", "read"), [(0, "a token's embedding"), (2, "a token's state after layer 2")]
)
def test_an_adapter_is_called_one_and_costs_nothing(module, exit_layer, read):
    entry = {"exit_layer": exit_layer, "exits": [exit_layer], "exit_adapter": "exit_adapter.safetensors"}
    delta = {"about": {"layerskip": entry}, "bytes": 11_000_000, "changed": 0}
    text = module.card(BUILTIN, [], SOURCES[:1], delta, speed())
    assert f"an exit adapter: a small network drafts from {read} and the last layer's state" in text
    assert "## What it cost\n\nTraining changed no weight of the base" in text
    assert "1,200 in all. Prompts were answered by the base itself" in text
    assert "early exit:" not in text


def test_what_no_file_tells_is_said_to_be_missing(module):
    text = module.card(BUILTIN)
    for title, told in (
        ("Data", "Sources: not recorded."),
        ("Training", "Trained on: not recorded."),
        ("Speed", "Not measured."),
        ("What it cost", "Not measured."),
    ):
        assert text.split(f"## {title}\n\n")[1].startswith(told)
    assert "Exits at the end: not measured." in text
    assert "commit not recorded, measured at not recorded" in text
    assert "None" not in text


def test_runs_that_follow_each_other_are_added_up_and_an_evaluation_counts_more_than_the_log(module):
    evaluated = [*LOG, {"step": 10, "eval_exit_4_loss": 2.25, "eval_exit_4_agreement": 0.55}]
    text = module.card(BUILTIN, [module.Training(None, LOG), module.Training(None, evaluated)])
    assert "Run 1: 10 steps" in text
    assert "| 4 | 2.250 | 55.0% |\n\nPer token, on held-out data" in text
    assert "Trained with 4.7 million tokens" in text


def test_the_card_is_written_from_a_folder_of_files(module, tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "recipe.yaml").write_text("steps: 10  # as many\n")
    for step in (5, 10):
        state = {"log_history": [line for line in LOG if line["step"] <= step]}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    about = {"layerskip_delta": json.dumps({"about": {"trained_on": "a GPU"}})}
    save_file({"x": torch.zeros(2)}, tmp_path / "d.safetensors", about)
    (tmp_path / "sources.json").write_text(json.dumps(SOURCES))
    (tmp_path / "speed.json").write_text(json.dumps(speed()))
    monkeypatch.setattr(module, "newest", lambda pattern: None)
    arguments = ["--run", tmp_path, "--sources", tmp_path / "sources.json", "--delta", tmp_path / "d.safetensors",
                 "--speed", tmp_path / "speed.json", "--output"]  # fmt: skip
    for output in ("-", tmp_path / "card.md"):
        monkeypatch.setattr(sys, "argv", ["model_card", *map(str, arguments), str(output)])
        module.main()
    printed = capsys.readouterr().out
    text = (tmp_path / "card.md").read_text()
    assert printed == text + "written: card.md\n"
    for told in ("Trained on: a GPU.", "10 steps, 2,340,000 tokens", "steps: 10", "(GSM8K) |", "books"):
        assert told in text
    assert module.delta_header(tmp_path / "d.safetensors")["changed"] == 1
    own = {name: torch.zeros(2) for name in ("draft_vocab", "draft_head:whole", "exit_adapter:join.weight")}
    save_file(own, tmp_path / "d.safetensors", about)
    monkeypatch.setattr(module, "newest", lambda pattern: tmp_path / "speed.json")  # cost, too
    module.main()
    assert "Training changed no weight" in (tmp_path / "card.md").read_text()
    assert module.result("none", "sources") is None
    assert module.delta_header(tmp_path / "none.safetensors") is None
    assert module.training(tmp_path / "none") == module.Training()
