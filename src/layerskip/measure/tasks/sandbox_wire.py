"""What crosses between the processes of a sandbox: frames over a socket, and plain data as bytes.

`encode` and `decode` know None, bool, int, float, complex, str, bytes, tuple, list, set, frozenset and dict, and
nothing else. What comes out of `decode` has exactly these types, so no method of the sender's can come with it. A
subclass crosses as its base, a NumPy scalar as Python's. Used by both sides; the standard library alone.
"""

from __future__ import annotations

import math
import select
import struct
import time
from collections.abc import Callable, Iterable
from os import read, write  # bound: a program may put others in their place
from typing import Any

LARGEST = 16 << 20  # bytes of a frame
DEEPEST = 100

# -- frames --------------------------------------------------------------------------------------------------


def send(channel: int, body: bytes, until: float = math.inf) -> None:
    """Write one frame. Raises: TimeoutError when `until` (monotonic) has passed, EOFError when nobody reads."""
    rest = memoryview(struct.pack(">I", len(body)) + body)
    while rest:
        _wait(channel, select.POLLOUT, until)
        try:
            rest = rest[write(channel, rest) :]
        except BlockingIOError:
            continue
        except ConnectionError:
            raise EOFError from None


def receive(channel: int, until: float = math.inf, largest: int = LARGEST) -> bytes:
    """Read one frame.

    Raises: TimeoutError, EOFError when the other end is closed, ValueError when it is too large.
    """
    (length,) = struct.unpack(">I", _exactly(channel, 4, until))
    if length > largest:
        raise ValueError(f"{length} bytes where {largest} are allowed")
    return _exactly(channel, length, until)


def waiting(channel: int) -> bool:
    """Whether there is something to read from somebody still there."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    return any(event & select.POLLIN and not event & select.POLLHUP for _, event in poll.poll(0))


def _exactly(channel: int, count: int, until: float) -> bytes:
    found = bytearray()
    while len(found) < count:
        _wait(channel, select.POLLIN, until)
        try:
            piece = read(channel, min(count - len(found), 1 << 16))
        except BlockingIOError:
            continue
        except ConnectionError:
            raise EOFError from None
        if not piece:
            raise EOFError
        found += piece
    return bytes(found)


def _wait(channel: int, event: int, until: float) -> None:
    poll = select.poll()
    poll.register(channel, event)
    left = until - time.monotonic()
    if left <= 0 or not poll.poll(None if left == math.inf else 1000 * left):
        raise TimeoutError


# -- plain data ----------------------------------------------------------------------------------------------


def encode(value: Any) -> bytes:
    """Write plain data. Raises: TypeError for anything else, ValueError for what is too deep or too large."""
    parts: list[bytes] = []
    _add(value, parts, 0)
    whole = b"".join(parts)
    if len(whole) > LARGEST:
        raise ValueError(f"{len(whole)} bytes cannot be handed over")
    return whole


def _sized(tag: bytes, body: bytes) -> bytes:
    return tag + struct.pack(">I", len(body)) + body


def _whole(value: int) -> bytes:
    return int.to_bytes(value, int.bit_length(value) // 8 + 1, "big", signed=True)


# The base's own methods are called, not what a subclass made of them.
LEAVES: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"N",
    bool: lambda value: b"T" if value else b"F",
    int: lambda value: _sized(b"i", _whole(value)),
    float: lambda value: b"f" + struct.pack(">d", value),
    complex: lambda value: b"c" + struct.pack(">dd", value.real, value.imag),
    str: lambda value: _sized(b"s", str.encode(value, "utf-8", "surrogatepass")),
    bytes: lambda value: _sized(b"b", b"".join([value])),
}
BRANCHES: dict[type, tuple[bytes, Callable[[Any], Iterable[Any]]]] = {
    tuple: (b"t", tuple.__iter__),
    list: (b"l", list.__iter__),
    set: (b"e", set.__iter__),
    frozenset: (b"z", frozenset.__iter__),
    dict: (b"d", lambda value: (part for pair in dict.items(value) for part in pair)),
}


def _add(value: Any, parts: list[bytes], depth: int) -> None:
    if depth > DEEPEST:
        raise ValueError(f"data deeper than {DEEPEST} cannot be handed over")
    for kind in type(value).__mro__:
        if kind in LEAVES:
            parts.append(LEAVES[kind](value))
            return
        if kind in BRANCHES:
            tag, inner = BRANCHES[kind]
            items = list(inner(value))
            parts.append(tag + struct.pack(">I", len(items)))
            for item in items:
                _add(item, parts, depth + 1)
            return
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        _add(value.item(), parts, depth + 1)
        return
    raise TypeError(f"{type(value).__name__} is no plain data and cannot be handed over")


def decode(data: bytes) -> Any:
    """Read plain data. Raises: ValueError for what `encode` does not write."""
    try:
        value, end = _read(data, 0, 0)
    except (struct.error, IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError("malformed data") from error
    if end != len(data):
        raise ValueError("malformed data")
    return value


MAKERS: dict[bytes, Callable[[bytes], Any]] = {
    b"i": lambda body: int.from_bytes(body, "big", signed=True),
    b"s": lambda body: body.decode("utf-8", "surrogatepass"),
    b"b": bytes,
}
CONSTANTS = {b"N": None, b"T": True, b"F": False}
GATHERERS: dict[bytes, Callable[[list[Any]], Any]] = {
    b"t": tuple,
    b"l": list,
    b"e": set,
    b"z": frozenset,
    b"d": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
}


def _read(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    if depth > DEEPEST:
        raise ValueError("data too deep")
    tag, at = data[at : at + 1], at + 1
    if tag in CONSTANTS:
        return CONSTANTS[tag], at
    if tag == b"f":
        return struct.unpack_from(">d", data, at)[0], at + 8
    if tag == b"c":
        return complex(*struct.unpack_from(">dd", data, at)), at + 16
    (count,), at = struct.unpack_from(">I", data, at), at + 4
    if count > len(data) - at:  # an item takes a byte or more
        raise ValueError("malformed data")
    if tag in MAKERS:
        return MAKERS[tag](data[at : at + count]), at + count
    gather, items = GATHERERS[tag], []
    for _ in range(count):
        item, at = _read(data, at, depth + 1)
        items.append(item)
    return gather(items), at
