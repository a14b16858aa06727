"""Figures from small made-up results: each is a picture of the right size, and what cannot be drawn is said."""

import struct
import sys
import warnings

import pytest

from layerskip.errors import UserError
from layerskip.measure.exits.lens import Lens
from layerskip.measure.exits.timeline import Strip, Timeline

pytest.importorskip("matplotlib")
from PIL import Image, ImageChops

from layerskip.measure.exits import canvas, draw

EDGES = 20  # pixels of white that are cut off at the sides of the canvas


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def size(file):
    """Width and height of a PNG in pixels; small files only."""
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert 2_000 < len(data) < 250_000
    return struct.unpack(">II", data[16:24])


def evaluated(trained=()):
    layers = range(1, 7)
    rows = [
        {
            "exit_layer": k,
            "agreement": k / 6,
            "tv": 1 - k / 6,
            "kl": 6.0 - k,
            "perplexity": 10.0 * (7 - k),
            "tokens": 9,
        }
        for k in layers
    ]
    return {"exits": rows, "configuration": {"model": "tiny", "trained_exits": list(trained)}}


def cell(exit_layer, draft_length, predicted, measured=None, vocabulary=64):
    made = {"exit_layer": exit_layer, "draft_length": draft_length, "draft_vocab": vocabulary}
    made["predicted_speedup"] = predicted
    if measured is None:
        return made
    return made | {"speedup": {"ratio": measured, "ci95": [measured - 0.1, measured + 0.1]}}


def tuned(layers=(1, 2, 4), slow=False):
    surface = [cell(e, k, 0.5 + 0.1 * k if slow else 0.8 + 0.2 * k) for e in layers for k in (1, 2, 4)]
    grid = [cell(e, k, 1.0 + 0.2 * k, 0.7 if slow else 1.1 + 0.2 * k) for e in (1, 2) for k in (2, 4)]
    return {"doctor": {"surface": surface}, "grid": grid}


def seen(columns=3):
    return Lens(
        layers=4,
        first=0,
        read=["$a", "_", " the"][:columns] * max(1, columns // 3),
        exits=[1, 2, 4],
        top=[[" x^2$ and $y"] * columns, ["\n"] * columns, ["中\u202e"] * columns],
        probability=[[0.0, 0.5, 1.0][:columns] * max(1, columns // 3)] * 3,
        agrees=[[False] * columns, [True] * columns, [True] * columns],
        settles=[1, 2, 3][:columns] * max(1, columns // 3),
    )


def shown(rounds=3):
    cells = [
        ("kept", " a"),
        ("rejected", "$"),
        ("dropped", "_"),
        ("correction", "longer than its cell is wide, by far"),
    ]
    first = Strip(2, 3, "prefill", [("plain", "\n")])
    return Timeline([first, *(Strip(2, 3, "self-speculative", cells) for _ in range(rounds))])


def test_exits_of_one_and_of_two_models(tmp_path):
    file = draw.exits({"alone": evaluated()}, tmp_path / "one.png")
    assert size(file) == pytest.approx((1650, 660), abs=EDGES)
    both = {"untrained": evaluated(), "trained": evaluated([2, 4])}
    assert size(draw.exits(both, tmp_path / "two.png")) == pytest.approx((1650, 660), abs=EDGES)


@pytest.mark.parametrize(
    "result", [tuned(), tuned(range(1, 30)), tuned(slow=True)], ids=["fast", "tall", "slow"]
)
def test_the_speedup_surface(result, tmp_path):
    assert size(draw.speedup_surface(result, tmp_path / "a.png")) == pytest.approx((1650, 660), abs=EDGES)


def test_a_surface_shows_the_best_of_its_draft_vocabularies():
    cells = [cell(2, 3, 1.1, vocabulary=64), cell(2, 3, 1.4, vocabulary=128), cell(2, 4, 0.9)]
    assert draw._by_cell((c, c["predicted_speedup"]) for c in cells) == {(2, 3): 1.4, (2, 4): 0.9}


def test_acceptance_leaves_out_places_that_were_never_reached(tmp_path):
    series = {"tiny": {12: [0.9, 0.5, None], 4: [0.8, 0.2, 0.1]}, "other": {2: [None, None]}}
    assert size(draw.acceptance(series, tmp_path / "a.png")) == pytest.approx((1650, 570), abs=EDGES)


def test_a_lens_is_as_high_as_its_rows_and_blocks(tmp_path):
    low = size(draw.lens(seen(), tmp_path / "one.png", "tiny $ _"))
    high = size(draw.lens(seen(3 * draw.COLUMNS), tmp_path / "three.png", "tiny"))
    assert high[0] == pytest.approx(1650, abs=EDGES)
    assert low[1] < high[1]


def test_pictures_of_little_have_no_blank_margins(tmp_path):
    """A lens of three tokens was blank over its right third, and a timeline of short rounds too."""
    widths = []
    for file in (
        draw.lens(seen(), tmp_path / "l.png", "tiny"),
        draw.timeline(shown(), tmp_path / "t.png", "t"),
    ):
        with Image.open(file) as opened:
            pixels = opened.convert("RGB")
        content = ImageChops.invert(pixels).getbbox()
        assert content == (*2 * [canvas.MARGIN], *(side - canvas.MARGIN for side in pixels.size))
        widths.append(pixels.width)
    assert widths[0] < 1200


def test_a_timeline_has_a_row_per_round(tmp_path):
    few, many = (size(draw.timeline(shown(n), tmp_path / f"{n}.png", "tiny")) for n in (1, 11))
    assert many[1] - few[1] == pytest.approx(10 * 0.235 * canvas.DPI, abs=1)


def test_a_headline_names_the_model_and_cuts_a_long_text():
    assert draw.headline("tiny", "Set an alarm\n") == "tiny reads “Set an alarm↵”"
    assert draw.headline("tiny", "x" * 200).endswith("x…”")


@pytest.mark.parametrize("ending", [".svg", ".pdf"])
def test_other_kinds_of_pictures(ending, tmp_path):
    file = tmp_path / f"a{ending}"
    draw.check(file)
    assert draw.acceptance({"tiny": {2: [0.5, 0.2]}}, file).stat().st_size > 1000


def test_a_picture_that_cannot_be_written_is_found_out_before_the_work(tmp_path, monkeypatch):
    draw.check(tmp_path / "a.png")
    for file, told in ((tmp_path / "a.txt", "no picture"), (tmp_path / "none" / "a.png", "no folder")):
        with pytest.raises(UserError, match=told):
            draw.check(file)
    (tmp_path / "b.png").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        draw.acceptance({"tiny": {2: [0.5]}}, tmp_path / "b.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pictures need matplotlib") as caught:
        draw.check(tmp_path / "a.png")
    assert "layerskip[measure]" in caught.value.hint


def test_speed_ups_have_a_bar_for_each_that_was_measured(tmp_path):
    told = {"ratio": 1.3, "ci95": [1.2, 1.5]}
    groups = {
        "code": {"base": {"ratio": 0.99, "ci95": [0.98, 1.0]}, "trained": told},
        "chat": {"trained": None},
    }
    assert size(draw.bars(groups, tmp_path / "bars.png", "title", "axis", "note")) == pytest.approx(
        (1650, 570), abs=EDGES
    )
