"""Habits of command lines: the version, completion, quiet and verbose, progress without a terminal, a plan."""

import json
import os
import subprocess
import sys
import warnings
from importlib.metadata import version

import pytest
import torch

from layerskip.cli import results
from layerskip.cli.show import terminal


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    yield
    terminal.loudness.set(verbose=False, quiet=False)


def test_the_version_is_one_line(run):
    assert run("--version")[:2] == (0, f"layerskip {version('layerskip')}\n")


def test_the_shell_completes_verbs_and_options():
    """Completion was switched off."""
    for words, wanted in (
        ("layerskip tu", "tune"),
        ("layerskip generate --draft-l", "--draft-length"),
        ("layerskip chat smol", "smollm2-135m-base"),
        ("layerskip train fine", "finetune"),
        ("layerskip generate m --mode self", "self-speculative"),
        ("layerskip train lora learning", "learning_rate="),
        ("layerskip train lora lora.ra", "lora.rank="),
    ):
        asked = {
            "_LAYERSKIP_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        environment = {**os.environ, **asked, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "layerskip"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert wanted in done.stdout.split(), done.stderr


# -- how loud ------------------------------------------------------------------------------------------------


def test_quiet_leaves_nothing_but_errors_on_stderr(run, folder):
    loud = run("generate", folder, "hi", "--max-new-tokens", 2)
    quiet = run("--quiet", "generate", folder, "hi", "--max-new-tokens", 2)
    assert loud[2].startswith(f"loading {folder}"), "ten silent seconds in a log"
    assert "tokens/s" in loud[2]
    assert quiet == (0, loud[1], "")
    code, _, message = run("--quiet", "generate", folder, "hi", "--exit-layer", 99)
    assert code == 2
    assert "exit layer 99" in message
    assert "tokens/s" in run("generate", folder, "hi", "--max-new-tokens", 2)[2], "once is not for ever"


def test_verbose_shows_what_caused_an_error(run, tmp_path):
    asked = ("generate", tmp_path / "none", "--prompt-file", tmp_path / "none")
    code, _, message = run(*asked)
    assert (code, "Traceback" in message) == (2, False)
    code, _, message = run("--verbose", *asked)
    assert code == 2
    assert "FileNotFoundError" in message
    assert "direct cause" in message
    assert "exclude each other" in run("--verbose", "--quiet", "env")[2]


def test_warnings_of_libraries_are_shown_when_verbose_and_our_own_unless_quiet(run, monkeypatch):
    from layerskip.decode import language_model

    def warns():
        warnings.warn_explicit("ours", UserWarning, language_model.__file__, 1)
        warnings.warn_explicit("theirs", UserWarning, torch.__file__, 1)
        return {}

    monkeypatch.setattr("layerskip.measure.environment.environment", warns)
    for loudness, shown in (((), ("ours",)), (("--verbose",), ("ours", "theirs")), (("--quiet",), ())):
        message = run(*loudness, "env")[2]
        assert [word for word in ("ours", "theirs") if word in message] == [*shown]


# -- progress without a terminal -----------------------------------------------------------------------------


def test_a_line_begins_each_kind_of_work_and_one_follows_every_ten_seconds(capsys):
    """tune and the first steps of training were silent for minutes where no terminal looked on."""
    now = [0.0]
    watch = terminal.Lines(clock=lambda: now[0])
    for now[0], what, done in [
        (1, "reading", 0), (2, "reading", 1), (3, "timing", 0), (4, "reading", 2), (12.9, "timing", 5),
        (13, "timing", 6), (14, "timing", 7),
    ]:  # fmt: skip
        watch(what, done, 9)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 0 of 9", "timing: 0 of 9", "timing: 6 of 9"
    ]  # fmt: skip


def test_progress_is_lines_where_no_terminal_looks_on_and_nothing_when_quiet(capsys):
    with results.progress("loading") as watch:
        watch("counting documents", 0, 0)
    assert capsys.readouterr().err.splitlines() == ["loading", "counting documents"]
    terminal.loudness.set(verbose=False, quiet=True)
    with results.progress("loading") as watch:
        watch("counting documents", 0, 0)
    assert capsys.readouterr().err == ""


def test_training_says_what_goes_on_before_its_first_report(run, folder, data, tmp_path):
    settings = ("exits=[2, 3]", "length=48", "steps=2", "template=off", "dtype=float32", "hold_out=8")
    asked = ("train", "tiny", f"model={folder}", f"data={data}", f"output={tmp_path / 'out'}", *settings)
    code, _, message = run(*asked, "--json")
    assert code == 0, message
    told = message.splitlines()
    order = [next(i for i, line in enumerate(told) if line.startswith(begins)) for begins in (
        "loading", "encoding examples", "preparing to train", "training, steps: 0 of 2", "step 1/2",
        "evaluating, batches: 1 of",
    )]  # fmt: skip
    assert order == sorted(order)


# -- a plan --------------------------------------------------------------------------------------------------


def test_a_plan_is_printed_and_nothing_is_written(run, folder, data, tmp_path):
    asked = (f"model={folder}", f"data={data}", f"output={tmp_path / 'out'}", "exits=[2, 3]", "length=48")
    code, printed, message = run("train", "tiny", *asked, "template=off", "--plan")
    assert code == 0, message
    assert "plan  20 steps" in printed
    assert json.loads(printed.splitlines()[-1])["exits"] == [2, 3]
    assert not (tmp_path / "out").exists()
    code, printed, message = run("train", "tiny", *asked, "template=off", "--plan", "--json")
    assert json.loads(printed)["steps"] == 20
    code, _, message = run("train", "tiny", *asked, "length=1000000", "--plan")
    assert code == 2, "what would be refused is refused"
