"""doctor and tune, in process on a tiny checkpoint: what they print, write, refuse."""

import json
import shlex
import shutil

import pytest

import layerskip
import tiny
from layerskip.measure.advice import doctor, prediction
from layerskip.measure.advice.tune import Race
from layerskip.measure.speed import round_times

QUICK = ("--max-new-tokens", 8)
RACE = (*QUICK, "--seconds", 1)


@pytest.fixture(autouse=True)
def few_turns(monkeypatch):
    monkeypatch.setattr(round_times, "TURNS", 1)


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "my prompts.jsonl"
    file.write_text('{"prompt": "hello"}\n{"prompt": "a b c"}\n{"prompt": "never used"}\n')
    return ("--prompts", file, "--limit", 2)


@pytest.fixture
def checkpoint(folder, tmp_path):
    """A copy to write into, with trained exits and keys that are not ours to change."""
    copy = shutil.copytree(folder, tmp_path / "own")
    config = json.loads((copy / "config.json").read_text())
    config |= {"layerskip": {"exits": [2, 3], "recipe": "mine"}, "somebody_elses": [1, 2]}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_doctor_prints_one_object_with_all_that_was_asked(run, folder, prompts):
    code, printed, message = run("doctor", folder, *prompts, *QUICK, "--json")
    assert code == 0, message
    [line] = printed.splitlines()
    result = json.loads(line)
    assert {
        "trained_exits", "agreement", "step_s", "best", "recommended_mode", "verdict", "surface",
        "acceptance_by_position", "checks", "memory", "configuration",
    } <= set(result)  # fmt: skip
    assert result["agreement"][str(tiny.NUM_LAYERS)] == 1
    assert result["best"]["draft_length"] >= 1
    assert 1 <= result["best"]["exit_layer"] < tiny.NUM_LAYERS
    low, high = result["best"]["interval"]
    assert low <= high
    told = result["configuration"]
    assert (told["model"], told["prompts"], told["num_prompts"]) == ("tiny", "my prompts.jsonl", 2)
    assert "save" not in told
    assert str(folder.parent) not in json.dumps({k: v for k, v in result.items() if k != "verdict"})


def test_doctor_gives_the_verdict_first_then_equality_then_the_curve(run, checkpoint, prompts):
    code, printed, _ = run("doctor", checkpoint, *prompts, *QUICK, "--no-chat", "--threads", 1)
    assert code == 0
    place = 0  # the verdict's own words depend on what was measured
    for text in ("x [", "equality:", "plain rounds", "agrees with", "accepted", "memory: weights"):
        place = printed.index(text, place)
    assert printed.count("trained") >= 2
    assert "as plain text" in printed
    assert (
        " --no-chat --threads 1 --save" in printed.splitlines()[0] or "by default" in printed.splitlines()[0]
    )


def test_the_doctor_hands_what_it_was_told_to_tune(run, checkpoint, prompts, monkeypatch):
    """A verdict of its own, so that the command stands in it whatever the times are."""
    monkeypatch.setattr(doctor, "verdict", lambda analysis, name, trained, default, also: name + also)
    told = (*QUICK, "--exits", "2,3", "--dtype", "float32", "--no-chat", "--separator", r" \n")
    result = json.loads(run("doctor", checkpoint, *prompts, *told, "--json")[1])
    assert shlex.split(result["verdict"]) == [str(checkpoint)] + [
        str(word) for word in (*prompts, *QUICK, "--no-chat", "--separator", r" \n", *told[2:6])
    ]


@pytest.mark.parametrize("verb", ["doctor", "tune"])
def test_a_separator_follows_prompts_that_are_not_wrapped(run, folder, tmp_path, monkeypatch, verb):
    file, seen = tmp_path / "p.jsonl", []
    file.write_text('{"prompt": "hello"}\n')
    monkeypatch.setattr(prediction, "continuations", lambda lm, items, *more: seen.extend(items) or [])
    run(verb, folder, "--prompts", file, *QUICK, "--no-chat", "--separator", r"é\n")
    run(verb, folder, "--prompts", file, *QUICK, "--chat", "--separator", r"é\n")
    lm = layerskip.load(folder, device="cpu")
    assert seen == [lm.encode("helloé\n", chat=False), lm.encode("hello", chat=True)]


def test_doctor_looks_only_at_what_it_is_told_to(run, checkpoint, prompts):
    only = ("--exits", "3", "--draft-vocab", 40, "--dtype", "float64", "--stack", "hf")
    result = json.loads(run("doctor", checkpoint, *prompts, *QUICK, *only, "--json")[1])
    assert {(row["exit_layer"], row["draft_vocab"]) for row in result["surface"]} == {(3, 40)}
    assert (result["checks"]["dtype"], result["checks"]["stack"]) == ("float64", "hf")
    assert result["memory"]["draft_head_bytes"] > 0


def test_tune_measures_and_leaves_the_checkpoint_alone_unless_told(run, checkpoint, prompts):
    before = (checkpoint / "config.json").read_bytes()
    code, printed, message = run("tune", checkpoint, *prompts, *RACE, "--json")
    assert code == 0, message
    [line] = printed.splitlines()
    result = json.loads(line)
    assert {"agreement", "step_s", "best", "surface", "measured", "saved", "configuration"} <= set(result)
    best, first = result["best"], result["measured"][0]
    assert first["speedup"] == {"ratio": best["measured_speedup"], "ci95": best["measured_interval"]}
    by_drafter = {
        name: [row for row in result["measured"] if row["drafter"] == name] for name in result["sources"]
    }
    assert {row["exit_layer"] for row in by_drafter["exit"]} == {2, 3}
    assert {row["exit_layer"] for row in by_drafter["lookup"]} == {None}
    assert len(by_drafter["lookup"]) >= 2
    assert len(by_drafter["auto"]) >= 3
    assert all(row["equal"] == row["of"] >= 2 for row in result["measured"]), "float32"
    assert result["saved"] is None
    assert (checkpoint / "config.json").read_bytes() == before


def test_tune_writes_the_choice_and_every_verb_uses_it(run, checkpoint, prompts):
    code, printed, message = run("tune", checkpoint, *prompts, *RACE, "--save")
    assert code == 0, message
    assert "over plain decoding, measured" in printed.splitlines()[0]
    assert "equality:" in printed.splitlines()[1]
    assert "every verb uses it now" in printed
    config = json.loads((checkpoint / "config.json").read_text())
    entry = config["layerskip"]
    assert (entry["exits"], entry["recipe"], config["somebody_elses"]) == ([2, 3], "mine", [1, 2])
    assert entry.get("exit_layer", 2) in (2, 3)
    assert {"exit_layer", "copy_length"} & set(entry)
    lm = layerskip.load(checkpoint, device="cpu")
    stats = lm.generate("hello", max_new_tokens=4).stats
    assert (stats["mode"], stats["drafter"]) == (entry["mode"], entry["drafter"])


def test_a_loss_in_float32_ends_tuning_without_a_speed_or_a_choice(run, checkpoint, prompts, monkeypatch):
    before = (checkpoint / "config.json").read_bytes()
    turn = Race.turn

    def lossy(self, trials):
        turn(self, trials)
        trials[0].differing.append(0)

    monkeypatch.setattr(Race, "turn", lossy)
    code, printed, message = run("tune", checkpoint, *prompts, *RACE, "--save", "--json")
    assert (code, printed) == (1, "")
    assert "not lossless: with " in message
    assert "prompt 1 and" in message
    assert "layerskip doctor" in message
    assert (checkpoint / "config.json").read_bytes() == before


def test_tune_for_a_batch_says_how_to_keep_the_choice(run, folder, prompts):
    code, printed, message = run("tune", folder, *prompts, *RACE, "--batch-size", 2, "--exits", "2")
    assert code == 0, message
    assert "--save makes it the default" in printed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--limit", 0), "--limit must be a whole number, at least 1"),
        (("--threads", 0), "--threads must be a whole number, at least 1"),
        (("--max-new-tokens", 1), "at least 2"),
        (("--exits", "2,x"), "comma-separated list of layers"),
        (("--exits", "0"), "comma-separated list of layers"),
        (("--draft-vocab", "most"), "a whole number, auto or off"),
        (("--prompts", "none.jsonl"), "cannot read"),
        (("--dtype", "floaty32"), "did you mean 'float32'"),
        (("--exits", tiny.NUM_LAYERS), "out of range"),
        (("--draft-vocab", 10_000), "draft vocabulary of 10000 tokens"),
        (("--max-new-tokens", tiny.CONTEXT), "passes the context"),
    ],
    ids=str,
)
@pytest.mark.parametrize("verb", ["doctor", "tune"])
def test_slips_are_refused(fails, folder, verb, arguments, expected):
    assert expected in fails(verb, folder, *arguments, "--json")


def test_a_race_takes_some_time_and_some_rows(fails):
    assert "--seconds must be a whole number, at least 1" in fails("tune", "no-such-model", "--seconds", 0)
    assert "--batch-size must be a whole number, at least 1" in fails(
        "tune", "no-such-model", "--batch-size", 0
    )
