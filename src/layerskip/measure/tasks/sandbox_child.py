"""The inside of the sandbox: a process that runs a program and answers calls, or one that runs a test and asks.

Started by `sandbox.py` as a script of its own with one socket, its standard input. It is told its limits, confines
itself, says "ready" and gets its job whole before anything runs. The *candidate* has the program and nothing else;
it answers (function, arguments) with a value or an exception, as plain data. The *judge* has the test and no
untrusted code; where the test calls the function, it asks, and it alone gives the verdict.
"""

from __future__ import annotations

import builtins
import fcntl
import json
import os
import sys
import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerskip.measure.tasks.sandbox_confine import confine
    from layerskip.measure.tasks.sandbox_wire import decode, encode, receive, send
else:  # the package takes longer to import than most programs to run
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))
    from sandbox_confine import confine
    from sandbox_wire import decode, encode, receive, send

    del sys.path[0]

HIGH = 100  # the socket stands here, above RLIMIT_NOFILE
ASKED, JUDGED = b"?", b"!"
LONGEST_DETAIL = 300


def shown(error: BaseException) -> str:
    """Text of an error on one line, cut; empty where it cannot be had."""
    try:
        return " ".join(str(error).split())[:LONGEST_DETAIL]
    except BaseException:  # noqa: BLE001 - an exception that cannot be shown
        return ""


def ending(error: BaseException | None) -> bytes:
    """Status and detail of a text that ended in this error."""
    if error is None:
        return b"passed "
    error.__traceback__ = error.__context__ = None  # frees what the frames hold, memory bombs too
    kinds = {MemoryError: "out_of_memory", PermissionError: "refused", SystemExit: "exited"}
    status = next((told for kind, told in kinds.items() if isinstance(error, kind)), "failed")
    return f"{status} {type(error).__name__}: {shown(error)}".encode("utf-8", "replace")


def run(texts: Iterable[tuple[str, str]], namespace: dict[str, Any]) -> BaseException | None:
    """Execute (name, text) one after the other; returns what was raised."""
    execute, compiled = exec, compile  # a program may put others in their place
    try:
        for name, text in texts:
            execute(compiled(text, f"<{name}>", "exec"), namespace)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the outcome
        return error
    return None


def named(name: str) -> dict[str, Any]:
    """Make the module that the texts run in; dataclasses look for their module in sys.modules."""
    module = types.ModuleType(name)
    sys.modules[name] = sys.modules["__main__"] = module
    return module.__dict__


# -- the candidate -------------------------------------------------------------------------------------------


def candidate(channel: int, program: str, test: str, function: str) -> None:
    """Run the program, say how it ended, then answer calls of the function for as long as anybody asks."""
    namespace, value = named("program"), eval
    error = run([("program", program), ("test", test)], namespace)
    send(channel, ending(error))
    while error is None and function:
        args, keywords = decode(receive(channel))
        send(channel, answer(lambda: value(function, namespace), args, keywords))


def answer(
    function: Callable[[], Callable[..., Any]], args: tuple[Any, ...], keywords: dict[str, Any]
) -> bytes:
    """Call the function; its result as a frame: what it returned, what it raised, or that no frame can hold it."""
    try:
        value = function()(*args, **keywords)
    except BaseException as error:  # noqa: BLE001 - it is the answer
        return raised(error)
    try:
        return encode(("returned", value))
    except (TypeError, ValueError) as error:
        return encode(("unfit", shown(error)))
    except BaseException as error:  # noqa: BLE001 - out of memory
        return raised(error)


def raised(error: BaseException) -> bytes:
    """Describe an exception: its name, its built-in kinds, nearest first, and arguments that are plain data."""
    error.__traceback__ = error.__context__ = None
    kinds = [kind.__name__ for kind in type(error).__mro__ if vars(builtins).get(kind.__name__) is kind]
    try:
        return encode(("raised", type(error).__name__, kinds, error.args))
    except (TypeError, ValueError):
        return encode(("raised", type(error).__name__, kinds, (shown(error),)))


# -- the judge -----------------------------------------------------------------------------------------------


def judge(channel: int, given: str, test: str, function: str) -> None:
    """Run the test, behind the text that it is given, with the function's calls asked; say how it ended."""
    namespace = named("test")

    def asked(*args: Any, **keywords: Any) -> Any:
        send(channel, ASKED + encode((args, keywords)))
        found = taken(receive(channel))
        if isinstance(found, UnfitError):  # decided here and now: a test that catches everything would go on
            send(channel, JUDGED + b"failed " + str(found).encode("utf-8", "replace"))
            os._exit(0)
        if isinstance(found, BaseException):
            raise found
        return found

    error = run([("given", given)], namespace)
    if error is None:
        namespace[function] = asked
        error = run([("test", test)], namespace)
    send(channel, JUDGED + ending(error))


class UnfitError(ValueError):
    """What came back is no answer."""


def taken(frame: bytes) -> Any:
    """Read an answer: what was returned, or an exception of Python's own kinds, to be raised."""
    try:
        match decode(frame):
            case ("returned", value):
                return value
            case ("unfit", str(reason)):
                return UnfitError(reason)
            case ("raised", str(name), list(kinds), tuple(args)):
                pass
            case _:
                return UnfitError("no answer")
    except ValueError as error:
        return UnfitError(str(error))
    known = [vars(builtins).get(kind) for kind in kinds if isinstance(kind, str)]
    kind = next((one for one in known if isinstance(one, type) and issubclass(one, BaseException)), Exception)
    try:
        return (kind if kind.__name__ == name else type(name, (kind,), {}))(*args)
    except Exception:  # noqa: BLE001 - a few kinds want arguments of their own
        return Exception(name, *args)


def main() -> None:
    """Take the socket off standard input, confine this process, read one job and do it."""
    channel = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, HIGH)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.closerange(3, channel)
    os.closerange(channel + 1, 4096)
    leave = os._exit
    try:
        told = json.loads(receive(channel))
        held = confine(told["limits"], told["layers"], told["parent"])
    except Exception as error:  # noqa: BLE001 - the other side reports it
        send(channel, f"broken {type(error).__name__}: {error}".encode())
        leave(1)
    send(channel, f"ready {' '.join(held)}".encode())
    try:
        role, *job = decode(receive(channel))
        {"candidate": candidate, "judge": judge}[role](channel, *job)
    finally:
        leave(0)


if __name__ == "__main__":
    main()
