"""What several positions cost is measured once, kept, and never believed where it cannot be."""

import json

import pytest

import tiny
from layerskip.model import row_costs as module
from layerskip.model.cost import RowCosts, row_costs
from layerskip.model.row_costs import WIDTHS, measured_row_costs


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "busy_cores", lambda seconds: 0.0)
    return tmp_path / "row-costs"


def clocked(monkeypatch, seconds):
    """Passes take as long as `seconds(width)` says."""
    taken = []
    monkeypatch.setattr(module, "_pass", lambda stack, cache, width: taken.append(width) or seconds(width))
    return taken


def test_costs_are_linear_between_points_and_behind_the_last():
    costs = RowCosts(((1, 1.0), (4, 1.3), (8, 2.1)))
    assert [costs(n) for n in (1, 2, 4, 6, 8, 12)] == pytest.approx([1.0, 1.1, 1.3, 1.7, 2.1, 2.9])


def test_costs_are_measured_once_and_kept(cache, monkeypatch):
    stack = tiny.stack("llama+native")
    taken = clocked(monkeypatch, lambda width: 0.01 * (1 + 0.1 * width))
    first = measured_row_costs(stack)
    assert first(1) == 1.0
    assert first(16) == pytest.approx(2.6 / 1.1, abs=1e-3)
    assert set(taken) == set(WIDTHS)
    taken.clear()
    assert measured_row_costs(stack) == first
    assert not taken
    assert not stack.counters.runs, "measuring is not work that counts"


def test_costs_never_fall_with_more_positions(cache, monkeypatch):
    clocked(monkeypatch, lambda width: 0.008 if width == 6 else 0.01)
    assert [cost for _, cost in measured_row_costs(tiny.stack("llama+native")).points] == [1.0] * len(WIDTHS)


@pytest.mark.parametrize("reason", ["busy", "disturbed", "slow"])
def test_the_guess_stays_where_measuring_is_not_to_be_trusted(cache, monkeypatch, reason):
    clocked(
        monkeypatch, lambda width: {"disturbed": 0.01 if width < 12 else 0.5, "slow": 3.0}.get(reason, 0.01)
    )
    if reason == "busy":
        monkeypatch.setattr(module, "busy_cores", lambda seconds: 1.0)
    assert measured_row_costs(tiny.stack("llama+native")) == row_costs("cpu")
    assert not [*cache.glob("*")], "nothing is kept"


@pytest.mark.parametrize(
    "content", ["", "{}", "[[1, 1.0]]", "[1, 2]", json.dumps([[w, -1.0] for w in WIDTHS]), "nul"]
)
def test_a_file_that_is_no_measurement_is_measured_again(cache, monkeypatch, content):
    clocked(monkeypatch, lambda width: 0.01)
    stack = tiny.stack("llama+native")
    wanted = measured_row_costs(stack)
    [file] = cache.glob("*.json")
    file.write_text(content)
    assert measured_row_costs(stack) == wanted
    assert json.loads(file.read_text()) == [list(point) for point in wanted.points]


def test_a_real_stack_is_timed(cache):
    found = measured_row_costs(tiny.stack("llama"))
    assert found == row_costs("cpu") or [width for width, _ in found.points] == list(WIDTHS)
