"""The index of a row's own tokens against looking them all up, and its counts against hindsight."""

import random

import pytest

from layerskip.decode.history import COUNTED, GUESS, LONGEST, PLACES, WEIGHT, History, Match


def wanted_match(tokens):
    """The longest match among the latest places of the last two tokens, else the latest of the last one."""
    n = len(tokens)
    places = [p for p in range(2, n) if tokens[p - 2 : p] == tokens[n - 2 :]][::-1][:PLACES] if n > 1 else []
    found = Match(0, 0)
    single = [p for p in range(1, n) if tokens[p - 1] == tokens[-1]]
    if single:
        found = Match(single[-1], 1)
    for place in places:
        length = 2
        while length < min(LONGEST, place) and tokens[place - 1 - length] == tokens[n - 1 - length]:
            length += 1
        if length > found.length:
            found = Match(place, length)
    return found


def texts():
    dice = random.Random(1)
    for alphabet in (2, 3, 8, 40):
        for _ in range(6):
            tokens = [dice.randrange(alphabet) for _ in range(90)]
            tokens[60:75] = tokens[20:35]
            yield tokens


@pytest.mark.parametrize("tokens", [*texts()])
def test_a_match_is_the_longest_of_the_latest_places(tokens):
    history = History()
    for size in range(1, len(tokens) + 1):
        assert history.match(tokens[:size]) == wanted_match(tokens[:size])


@pytest.mark.parametrize("tokens", [*texts()])
def test_indexing_at_once_or_token_by_token_is_the_same(tokens):
    one, many = History(30), History(30)
    for size in range(1, len(tokens) + 1):
        many.match(tokens[:size])
    assert one.match(tokens) == many.match(tokens)
    assert [one.agreement(n) for n in range(1, 20)] == [many.agreement(n) for n in range(1, 20)]


@pytest.mark.parametrize("tokens", [*texts()])
def test_what_copies_were_worth_is_counted_in_hindsight_behind_the_prompt(tokens):
    prompt, right, seen = 25, [0] * (COUNTED + 1), [0] * (COUNTED + 1)
    for size in range(prompt, len(tokens)):
        place, length = wanted_match(tokens[:size])
        if length:
            seen[min(length, COUNTED)] += 1
            right[min(length, COUNTED)] += tokens[place] == tokens[size]
    history = History(prompt)
    history.match(tokens)
    for length in range(1, LONGEST + 1):
        counted = min(length, COUNTED)
        share = (right[counted] + WEIGHT * GUESS[counted]) / (seen[counted] + WEIGHT)
        assert history.agreement(length) == pytest.approx(share)
    length = wanted_match(tokens).length
    chances = history.chances(tokens, 5)
    assert chances == ([history.agreement(length + i) for i in range(5)] if length else [])
    assert history.chances(tokens, 5, shortest=length + 1) == []


def test_a_copy_goes_on_into_itself():
    history = History()
    tokens = [7, 1, 2, 3, 1, 2, 3]
    assert history.match(tokens) == Match(4, 3)
    copied = history.continuation(tokens)
    assert [next(copied) for _ in range(8)] == [1, 2, 3, 1, 2, 3, 1, 2]
    assert [*History().continuation([5])] == []
    assert [*History().continuation([5, 6])] == []


def test_an_interrupted_step_of_indexing_is_done_again():
    """The same token noted twice is noted once: an index that points at itself would never end."""
    tokens, history = [1, 2, 1, 2, 1, 2], History()
    history.match(tokens[:4])
    history._index(tokens, 4)  # and an interrupt before the new size
    assert history.match(tokens) == wanted_match(tokens)


def test_a_long_text_is_indexed_in_time():
    """Every place of a text of one token matches; what is compared is bounded."""
    tokens = [3] * 20_000
    history = History(100)
    assert history.match(tokens) == Match(len(tokens) - 1, LONGEST)
