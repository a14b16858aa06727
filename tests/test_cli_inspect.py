"""`layerskip inspect`, in process on a tiny checkpoint: what it prints, draws, writes, refuses."""

import json
import sys

import pytest
from rich.text import Text

import tiny
from layerskip.cli.show.inspection import fitted, lens_lines, settle_line, timeline_lines
from layerskip.measure.exits.lens import Lens
from layerskip.measure.exits.timeline import Strip, Timeline

L = tiny.NUM_LAYERS
SPECULATIVE = ("--exit-layer", 2, "--draft-length", 3)
SEEN = Lens(
    layers=4,
    first=0,
    read=["The", " cat", "\n"],
    exits=[1, 2, 4],
    top=[[" a", " sat", " x"], [" dog", " is", " x"], [" cat", " sat", " x"]],
    probability=[[0.25, 0.9, 1.0], [0.5, 0.04, 1.0], [0.75, 0.3, 1.0]],
    agrees=[[False, True, True], [False, False, True], [True, True, True]],
    settles=[3, 4, 1],
)
SHOWN = Timeline(
    [
        Strip(2, 3, "prefill", [("plain", " sat")]),
        Strip(2, 3, "self-speculative",
              [("kept", " on"), ("kept", " the"), ("rejected", " dog"), ("correction", " mat")]),
        Strip(4, 0, "plain", [("plain", ".")]),
    ]
)  # fmt: skip


def plain(lines):
    return [line.plain for line in lines]


# -- what stands in the terminal -----------------------------------------------------------------------------


def test_a_lens_in_characters():
    assert plain(lens_lines(SEEN, 60, coloured=False)) == [
        "      4 ┃·cat 7 ┃·sat 3 ┃·x   9",
        "      2  ·dog 5  ·is  0 ┃·x   9",
        "      1  ·a   2 :·sat 9 ┃·x   9",
        "  reads  The     ·cat    ↵",
        "settles  3       4       1",
        "",
        "┃ the full model's token from here up, : the full model's token but not above; "
        "digit: probability in tenths",
    ]


def test_a_narrow_terminal_wraps_positions_into_blocks():
    lines = plain(lens_lines(SEEN, 24, coloured=False))
    assert lines[0] == "      4 ┃·cat 7 ┃·sat 3"
    assert lines[6:11] == [
        "      4 ┃·x   9",
        "      2 ┃·x   9",
        "      1 ┃·x   9",
        "  reads  ↵",
        "settles  1",
    ]
    assert all(len(line) <= 24 for line in lines[:-1])


def test_colours_say_the_probability_and_marks_the_agreement():
    first, second, third, *_ = lens_lines(SEEN, 60, coloured=True)
    assert first.plain == "      4 ┃·cat ┃·sat ┃·x   "
    assert not first.style, "a line's own style would dim its cells"
    styles = [
        [str(span.style) for span in line.spans if " on " in str(span.style)] for line in (second, third)
    ]
    assert styles[0] == ["#000000 on #e6550d", "#000000 on #feedde", "#ffffff on #08519c"]
    assert styles[1] == ["#000000 on #fdae6b", "#ffffff on #08519c", "#ffffff on #08519c"]


def test_a_line_sums_the_lens_up():
    assert settle_line(SEEN) == (
        "half of 3 tokens are settled by layer 3 of 4 · agreement by exit 1: 67%, 2: 33%, 4: 100%"
    )


def test_tokens_fit_their_cells_wide_characters_too():
    assert fitted(" understanding", 8) == "·unders…"
    assert fitted("中文字", 5) == "中文…"
    assert fitted("a", 4) == "a   "


def test_a_timeline_in_characters():
    assert plain(timeline_lines(SHOWN, 60)) == [
        "round   E   K  kept  tokens",
        "      prompt      -  +·sat",
        "    1   2   3   2/3  ·on ·the ×·dog +·mat",
        "    2   4   0     -  +.",
        "× drafted in vain, + the full model's own token, no mark: drafted and kept",
        "4 tokens in 2 rounds, 2.00 tokens/round, 2 of 3 drafts kept (67%)",
    ]
    narrow = plain(timeline_lines(SHOWN, 34))
    assert narrow[2:4] == ["    1   2   3   2/3  ·on ·the", " " * 21 + "×·dog +·mat"]


# -- the verb ------------------------------------------------------------------------------------------------


def test_inspect_prints_one_object_with_lens_and_rounds(run, folder):
    code, printed, message = run(
        "inspect", folder, "hello", "--generate", 12, "--no-chat", *SPECULATIVE, "--json"
    )
    assert code == 0, message
    [line] = printed.splitlines()
    result = json.loads(line)
    assert list(result) == ["lens", "timeline", "configuration"]
    seen, told = result["lens"], result["configuration"]
    assert seen["exits"] == list(range(1, L + 1))
    assert len(seen["read"]) == len(seen["settles"]) == 12
    assert seen["first"] == len("hello") - 1
    said = [text for strip in result["timeline"]["strips"] for kind, text in strip["cells"]
            if kind not in ("rejected", "dropped")]  # fmt: skip
    assert seen["top"][-1] == said, "greedy and lossless: the full model's best tokens are what was generated"
    assert seen["read"][1:] == said[:-1]
    assert (told["model"], told["text"], told["chat"]) == ("tiny", "hello", False)
    assert str(folder.parent) not in line, "no path of a machine is kept"


def test_without_generating_the_text_itself_is_looked_at_unwrapped(run, folder):
    code, printed, _ = run("inspect", folder, "hello you", "--exits", "1,3", "--json")
    result = json.loads(printed)
    assert code == 0
    assert result["timeline"] is None
    assert result["lens"]["exits"] == [1, 3, L]
    assert "".join(result["lens"]["read"]) == "hello you"
    _, printed, _ = run("inspect", folder, "hello", "--generate", 2, "--json")
    assert json.loads(printed)["configuration"]["chat"] is True


def test_inspect_shows_lens_and_rounds_to_people(run, folder):
    code, printed, _ = run("inspect", folder, "hello", "--generate", 8, *SPECULATIVE, "--max-new-tokens", 8)
    assert code == 0
    places = [
        printed.index(text) for text in ("reads", "settles", "half of 8 tokens", "round ", "tokens/round")
    ]
    assert places == sorted(places)
    assert "\x1b" not in printed


def test_pictures_and_a_result_file_are_written(run, folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    code, _, message = run(
        "inspect", folder, "hello", "--generate", 6, *SPECULATIVE, "--output", "a.png", "--save"
    )
    assert code == 0, message
    assert "written: a.png, a-timeline.png" in message
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "a-timeline.png"))
    [file] = tmp_path.glob("inspect_tiny_float32_cpu_*.json")
    assert '"exits": [1, 2, 3, 4, 5],' in file.read_text(), "a row is a line"
    assert json.loads(file.read_text())["configuration"]["trained_exits"] == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("", ), "the text is empty"),
        (("hi", "--generate", -1), "--generate is -1"),
        (("hi", "--exits", "first"), "--exits is all, or layers"),
        (("hi", "--policy", "dynamic"), "unknown policy"),
        (("hi", "--draft-vocab", "most"), "a whole number, auto or off"),
        (("hi", "--output", "lens.txt"), "lens.txt is no picture"),
        (("hi", "--output", "none/lens.png"), "no folder none"),
        (("hi", "--threads", 0), "--threads must be a whole number, at least 1"),
    ],
    ids=str,
)  # fmt: skip
def test_a_slip_is_told_before_a_model_is_loaded(fails, arguments, expected):
    assert expected in fails("inspect", "no-such-model", *arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("hi", "--exits", f"1,{L + 1}"), f"exit layer {L + 1} is out of range"),
        (("hi", "--exits", "0"), "exits '0'"),
        (("hi", "--generate", 4, "--exit-layer", L), "out of range"),
        (("x" * 400,), "positions are too many"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_the_model_does_not_have_is_refused(fails, folder, arguments, expected):
    assert expected in fails("inspect", folder, *arguments)


def test_without_matplotlib_a_picture_is_refused_before_the_model_is_loaded(fails, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "layerskip[measure]" in fails("inspect", "no-such-model", "hi", "--output", tmp_path / "a.png")


def test_lines_are_rich_texts_so_markup_in_tokens_stays_text():
    odd = Strip(2, 3, "self-speculative", [("kept", "[red]"), ("bonus", "[/]")])
    assert all(isinstance(line, Text) for line in timeline_lines(Timeline([odd]), 60))
    assert "[red] +[/]" in plain(timeline_lines(Timeline([odd]), 60))[1]
