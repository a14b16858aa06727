"""What policies commit follows the target law exactly: confidence and adaptive, on the host and on the device.

By chi-square through the real engine, as in test_accept.py; controls with known biases must fail the same test.
"""

from collections import Counter

import pytest

from laws import FAILS, PASSES, exact_first_tokens, first_tokens, p_value, small_model
from layerskip.decode.control import Choice, Controller, Prices
from layerskip.decode.drafters.exit import ExitDrafter
from layerskip.decode.sampling import DRAFT, Uniforms

SURE = 0.45  # in the middle of what the small model's exits reach


@pytest.fixture(scope="module")
def model():
    return small_model()


class Superstitious:
    """Draft again only after a long draft, kept or not: the choice depends on discarded drafts."""

    copying, timed, plain = None, True, None

    def __init__(self):
        self.long = True

    def rest(self, num_rows):
        return None

    def choose(self, chances):
        return [Choice(2, 3, SURE) if self.long else Choice(3, 0)] * len(chances)

    def learn(self, choice, seconds, rows):
        self.long = rows[0].drafted == 3


class Clocked(Controller):
    """The real controller on a clock that runs by what was drafted, so that it changes its mind all the time."""

    def __init__(self):
        menu = [Choice(1, 1), Choice(1, 3), Choice(2, 1), Choice(2, 3, SURE)]
        super().__init__(Prices(3, 1.0, 0.1), menu, trained=True)
        self.used = set()

    def learn(self, choice, seconds, rows):
        self.used.add((choice.exit_layer, choice.draft_length))
        late = 0.1 if choice.draft_length else 1.0
        super().learn(choice, late * (1 + sum(row.drafted + row.kept for row in rows) % 7), rows)


@pytest.mark.parametrize("device", [False, pytest.param(True, marks=pytest.mark.full)])
def test_stopping_before_a_draw_leaves_the_law_alone(model, device):
    found = first_tokens(model, 3, 200, device, exit_layer=2, draft_length=3, confidence=SURE)
    assert p_value(found, exact_first_tokens(model, 3)) > PASSES


@pytest.mark.parametrize("device", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_choice_by_what_became_of_discarded_drafts_leaves_the_law_alone(model, device):
    found = first_tokens(model, 3, 200, device, exit_layer=2, draft_length=3, controller=Superstitious)
    assert p_value(found, exact_first_tokens(model, 3)) > PASSES


@pytest.mark.parametrize("device", [False, True])
def test_no_two_rounds_draft_with_the_same_number(model, monkeypatch, device):
    """Met again, a discarded draft's number would make a draft depend on what the controller chose by it."""
    asked, original = Counter(), Uniforms.at

    def noted(self, row, position, purpose, began=0):
        asked[row, position, purpose, began] += purpose == DRAFT
        return original(self, row, position, purpose, began)

    monkeypatch.setattr(Uniforms, "at", noted)
    first_tokens(model, 3, 60, device, exit_layer=2, draft_length=3, controller=Superstitious)
    assert max(asked.values()) == 1
    positions = Counter(address[:2] for address, count in asked.items() if count)
    assert max(positions.values()) > 1, "some position was drafted again"


@pytest.mark.parametrize("device", [pytest.param(False, marks=pytest.mark.full), True])
def test_the_adaptive_controller_leaves_the_law_alone(model, device):
    controller = Clocked()
    found = first_tokens(model, 3, 200, device, exit_layer=2, draft_length=3, controller=lambda: controller)
    assert len(controller.used) >= 3, "it changed its mind"
    assert p_value(found, exact_first_tokens(model, 3)) > PASSES
    each = first_tokens(model, 3, 200, device, exit_layer=2, draft_length=3, controller=Clocked)
    assert p_value(each, exact_first_tokens(model, 3)) > PASSES


def test_dropping_drawn_tokens_that_look_unlikely_would_be_seen(model, monkeypatch):
    """Control: stopping by the drawn token's own probability instead, after the draw, is biased (trap 8)."""
    original = ExitDrafter._propose

    def picky(self, rows, drafts, drawing, processors, logits):
        going_on = original(self, rows, drafts, drawing, processors, logits)
        laws = logits.softmax(-1)
        unlikely = [b for b, law in zip(going_on, laws, strict=True) if law[drafts[b].tokens[-1]] < 0.3]
        for b in unlikely:
            drafts[b].tokens.pop()
            drafts[b].laws.pop()
        return [b for b in going_on if b not in unlikely]

    monkeypatch.setattr(ExitDrafter, "_propose", picky)
    found = first_tokens(model, 3, 400, exit_layer=2, draft_length=3)
    assert p_value(found, exact_first_tokens(model, 3)) < FAILS
