"""Training prompts that share a passage with what a model is judged by are found, and only those."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "check_prompts.py"
QUESTION = (
    "A farmer has nineteen sheep and buys four more every week; how many does he have after three weeks?"
)
CLEAN = ["Tell me about sheep.", QUESTION.replace("sheep", "goats and cows and geese")[:60]]


def run(*arguments):
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def written(path, prompts):
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def test_a_passage_is_found_whatever_case_marks_and_company(tmp_path):
    judged = written(tmp_path / "judged.jsonl", [QUESTION, "Hello."])
    found = written(
        tmp_path / "train.jsonl", [*CLEAN, f"Solve!\n\n{QUESTION.upper().replace(';', ',')}", "Hello."]
    )
    done = run("--train", found, "--judged", judged)
    assert done.returncode == 1
    assert "train.jsonl:3 shares" in done.stdout
    assert "judged.jsonl:1" in done.stdout
    assert "1 lines share one" in done.stdout


def test_lines_are_dropped_on_demand(tmp_path):
    judged = written(tmp_path / "judged.jsonl", [QUESTION])
    found = written(tmp_path / "train.jsonl", [*CLEAN, QUESTION])
    assert run("--train", found, "--judged", judged, "--drop").returncode == 0
    assert [json.loads(line)["prompt"] for line in found.read_text().splitlines()] == CLEAN
    assert run("--train", found, "--judged", judged).returncode == 0


def test_nothing_to_compare_with_is_an_error(tmp_path):
    judged = written(tmp_path / "judged.jsonl", ["Hello."])
    assert "hold no text" in run("--train", judged, "--judged", judged).stderr
