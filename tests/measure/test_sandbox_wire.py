"""Plain data crosses whole; nothing but plain data does, and no bytes make the reader do more than refuse."""

import math
import os
import random
import socket
import time

import pytest

from layerskip.measure.tasks import sandbox_wire as wire
from layerskip.measure.tasks.sandbox_wire import DEEPEST, decode, encode, receive, send

VALUES = [
    None, True, False, 0, -1, 255, 256, -(2**63), 10**4000, 0.0, -0.0, 1e-320, math.inf, -math.inf, 1 + 2j, "",
    "häuser \U0001f600 \ud800 \0", b"", b"\xff", (), [], {}, set(), frozenset(), (1, (2, [3, {"a": {4, 5}}])),
    {1: 2, "b": None, (1, 2): [3], None: {}}, [frozenset({("x", 1.5)})], [True, 1, 1.0],
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(VALUES)))
def test_plain_data_comes_back_with_its_exact_types(place):
    assert repr(decode(encode(VALUES[place]))) == repr(VALUES[place])  # repr tells True from 1 and 1 from 1.0


def test_not_a_number_stays_one_and_dictionaries_keep_their_order():
    assert math.isnan(decode(encode(math.nan)))
    assert [*decode(encode({"b": 1, "a": 2}))] == ["b", "a"]


@pytest.mark.parametrize("value", [object(), len, iter([]), range(3), type, bytearray(), [{1: [object()]}]])
def test_anything_else_is_refused(value):
    with pytest.raises(TypeError, match="is no plain data"):
        encode(value)


def test_depth_and_size_are_bounded(monkeypatch):
    deep = []
    for _ in range(DEEPEST + 1):
        deep = [deep]
    with pytest.raises(ValueError, match="deeper than"):
        encode(deep)
    assert decode(encode(deep[0])) == deep[0]
    with pytest.raises(ValueError, match="too deep"):
        decode(b"l\0\0\0\1" * 10**5)
    monkeypatch.setattr(wire, "LARGEST", 100)
    with pytest.raises(ValueError, match="bytes cannot be handed over"):
        encode("x" * 100)


def test_no_bytes_make_the_reader_do_more_than_refuse():
    chance = random.Random(0)
    for _ in range(3000):
        data = bytearray(encode(chance.choice(VALUES[:10] + VALUES[14:])))
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.choice([*b"NTFifcsbtlezd", *range(256)])
        try:
            found = decode(bytes(data[: chance.randint(0, len(data) + 2)]))
        except ValueError:
            continue
        encode(found)  # what was read is plain


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


def test_frames_arrive_whole_and_time_is_kept(ends):
    ours, theirs = (end.fileno() for end in ends)
    send(theirs, b"one")
    send(theirs, b"")
    assert wire.waiting(ours)
    assert receive(ours) == b"one"
    assert receive(ours) == b""
    assert not wire.waiting(ours)
    soon = time.monotonic() + 0.05
    with pytest.raises(TimeoutError):
        receive(ours, soon)
    with pytest.raises(TimeoutError):
        send(ours, bytes(1 << 24), time.monotonic() + 0.05)


def test_a_frame_that_is_too_large_or_cut_off_is_refused(ends):
    ours, theirs = (end.fileno() for end in ends)
    send(theirs, b"12345")
    with pytest.raises(ValueError, match="5 bytes where 4"):
        receive(ours, largest=4)
    receive_all = os.read(ours, 5)
    assert receive_all == b"12345"
    os.write(theirs, b"\0\0\0\x05abc")
    ends[1].close()
    with pytest.raises(EOFError):
        receive(ours)
    with pytest.raises(EOFError):
        send(ours, b"x")
    assert not wire.waiting(ours)
