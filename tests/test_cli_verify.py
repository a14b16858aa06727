"""The verb verify on a tiny checkpoint: a page, files, and exit code 1 with a case that can be run again."""

import json
import re
import shlex
from dataclasses import replace

import pytest

from layerskip.model.huggingface import HuggingFaceStack

QUICK = ("--limit", 2, "--max-new-tokens", 5, "--dtype", "float32")


def test_a_sound_checkpoint_gets_a_certificate_in_words_json_and_markdown(run, folder, tmp_path):
    """In a second: a case or two of each check, and the page says that the rest was cut."""
    output = tmp_path / "certificate"
    code, printed, message = run("verify", folder, *QUICK, "--seconds", 1, "--output", output)
    assert code == 0, printed + message
    assert printed.startswith("nothing differs in what the time allowed: ")
    checks = (
        "bits of a position",
        "the same twice",
        "rows beside",
        "greedy, float32",
        "transformers, float32",
    )
    for check in checks:
        assert re.search(rf"^ ?{check}.* holds", printed, re.M), check
    assert re.search(r"^ ?sampling, chi-square .* 32 draws .* shows nothing, cut short", printed, re.M)
    result = json.loads(output.with_suffix(".json").read_text())
    assert result["holds"]
    assert len(result["fingerprint"]) == 16
    assert result["configuration"]["threads"] == 1
    assert {"torch", "transformers"} <= set(result["configuration"]["versions"])
    page = output.with_suffix(".md").read_text()
    assert all(f"| {check['check']} | {check['cases']} |" in page for check in result["checks"])


@pytest.fixture
def broken(monkeypatch):
    """Positions off by one in the late layers of a verification; behind those that the check at load looks at."""
    whole = HuggingFaceStack.run

    def shifted(stack, h, start, stop, step, cache, taps=()):
        late = start > 0 and step.width > 1 and step.starts[:1] > (7,)
        step = replace(step, positions=step.positions + 1, shared={}) if late else step
        return whole(stack, h, start, stop, step, cache, taps)

    def repair():
        monkeypatch.setattr(HuggingFaceStack, "run", whole)

    monkeypatch.setattr(HuggingFaceStack, "run", shifted)
    return repair


def test_one_wrong_line_leaves_with_1_and_a_case_that_shows_it_again(run, folder, broken):
    how = (*QUICK, "--stack", "hf", "--max-new-tokens", 16, "--only", "greedy")
    code, printed, _ = run("verify", folder, *how)
    assert code == 1
    assert printed.startswith("not lossless: ")
    [command] = re.findall(r"^ +(layerskip verify .*)$", printed, re.M)
    words = shlex.split(command)[1:]
    assert words[words.index("--stack") + 1] == "hf"
    code, printed, _ = run(*words)
    assert code == 1
    assert "they differ" in printed
    broken()
    code, printed, _ = run(*words, "--json")
    assert code == 0
    told = json.loads(printed)
    assert told["plain"] == told["own"]


def test_slips_are_told_before_the_model_is_loaded(fails, folder, tmp_path):
    assert "unknown check 'gredy'" in fails("verify", folder, "--only", "gredy")
    assert "there is no folder" in fails("verify", folder, "--output", tmp_path / "no" / "x")
    assert "--case cannot be read" in fails("verify", folder, "--case", "{")


def test_prompts_are_cut_to_leave_room_for_the_budget():
    from layerskip.cli.verify import fitting
    from layerskip.errors import UserError

    assert fitting([[1, 2, 3, 4]], 6, 4) == [[3, 4]]
    assert fitting([[1, 2, 3, 4]], None, 4) == [[1, 2, 3, 4]]
    with pytest.raises(UserError, match="fill the context"):
        fitting([[1]], 4, 4)
