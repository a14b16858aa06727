"""Run a program somebody's model wrote away from this process, and judge it where it cannot reach.

    outcome = run("def add(a, b): return a + b", "assert add(1, 2) == 3", function="add")
    outcome.status                     # passed, failed, timed_out, out_of_memory, refused, exited or crashed

Two confined processes, started afresh for each run. The *candidate* has the program and nothing else: it answers
calls of the one function. The *judge* has the test and no untrusted code: where the test calls the function it
asks, and it alone says how the test ended. This process stands between them: it forwards one question, then takes
one answer, and what was said before it was asked is a forgery. Both are plain data (`sandbox_wire`), so neither an
object that equals everything, nor a trace function, nor the exit code decides: whatever a program does to its own
process, it can only answer wrongly or not at all. The judge's arguments are copies: a program cannot change them.
Without a function, test and program share a namespace and passing is the program's own word: for accidents only.

Each process has a fresh folder, a time limit kept from outside and resource limits. It writes in its folder only
and reads Python, its libraries and little else; it starts no process, sends no signal, opens no socket. An audit
hook refuses what reaches beyond; on Linux, Landlock (5.13) and seccomp (x86-64, aarch64) refuse it in the kernel
too, and a run of root loses root's capabilities. `Outcome.layers` says which of these were in force.

What it does not hold. Faults of the kernel. Where `layers` lacks landlock or seccomp (macOS, old kernels), hostile
code: the hook lives in the process it watches, which can disable it, and sees what Python does, not what C code
does; on macOS memory is not bounded either. Modes and times of files elsewhere are guarded by the hook alone. Disk
is bounded per file and by time, not in total. That a file elsewhere exists, and its size, can be seen; a test that
lies in a folder of `sys.path` can be read. A test is as strict as it is: a program that knows its answers passes.
For code you know to be hostile use a virtual machine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from layerskip.errors import UserError
from layerskip.measure.tasks import sandbox_wire as wire

LAYERS = ("hook", "landlock", "seccomp")
PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY, REFUSED, EXITED, CRASHED = STATUSES = (
    "passed", "failed", "timed_out", "out_of_memory", "refused", "exited", "crashed",
)  # fmt: skip
INSIDE = Path(__file__).with_name("sandbox_child.py")
START_S = 60.0  # a machine this slow to start Python is not judged by it
LONGEST_WORD = 4096
FORGED = FAILED, "a forged answer"


@dataclass(frozen=True)
class Limits:
    """What each process of a run may use."""

    seconds: float = 5.0  # from when the program starts, both together
    memory_bytes: int = 1 << 30  # of addresses
    file_bytes: int = 16 << 20  # each
    open_files: int = 64

    def by_resource(self) -> dict[str, int]:
        """The limits by resource, as `resource.RLIMIT_...` calls them."""
        return {
            "AS": self.memory_bytes,
            "CPU": int(self.seconds) + 2,  # for when nobody is left to watch the clock
            "FSIZE": self.file_bytes,
            "NOFILE": self.open_files,
        }


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: str
    detail: str  # the exception or signal
    seconds: float
    layers: tuple[str, ...]  # that were in force

    @property
    def passed(self) -> bool:
        return self.status == PASSED


class Job(NamedTuple):
    """A program and what judges it."""

    program: str
    test: str = ""
    function: str = ""  # the one thing of the program that the test may call
    given: str = ""  # trusted text that the test builds on; run before it


class Child(NamedTuple):
    """A confined process and our end of its socket."""

    process: subprocess.Popen[bytes]
    channel: int


def run(
    program: str,
    test: str = "",
    limits: Limits = Limits(),
    layers: Sequence[str] = LAYERS,
    *,
    function: str = "",
    given: str = "",
) -> Outcome:
    """Execute a program, and a test that calls its function, in processes of their own; see `Job`.

    Passed means that both came to their end; leaving early, by whatever exit code, does not count.

    Raises: UserError where processes cannot be started or confined.
    """
    if os.name != "posix":
        raise UserError("programs can be run on Linux and macOS only", "use a Linux virtual machine")
    try:
        asked = wire.encode(("candidate", program, "" if function else test, function))
        judging = wire.encode(("judge", given, test, function))
    except ValueError as error:
        raise UserError(f"a program or its test is too long: {error}", "leave the item out") from error
    with ExitStack() as stack:
        try:
            candidate, *others = [  # both start at once
                stack.enter_context(_child(limits, layers)) for _ in range(2 if function else 1)
            ]
        except OSError as error:
            raise UserError(f"programs cannot be run here: {error}", "is there a Python to start?") from error
        # The judge is closed to others before any untrusted code runs.
        held = [_confined(child) for child in (candidate, *others)]
        began = time.monotonic()
        until = began + limits.seconds
        try:
            status, detail = _program(candidate, asked, until)
            if status == PASSED and others:
                status, detail = _test(others[0], judging, candidate, until)
        except _Over as over:
            status, detail = over.args
        return Outcome(status, detail, time.monotonic() - began, held[0])


def run_all(
    jobs: Iterable[tuple[str, ...]], limits: Limits = Limits(), workers: int | None = None
) -> list[Outcome]:
    """Run many jobs, a few side by side; outcomes in the order of the jobs. Raises: UserError as `run` does."""
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda job: run(**Job(*job)._asdict(), limits=limits), jobs))


@contextmanager
def _child(limits: Limits, layers: Sequence[str]) -> Iterator[Child]:
    """Start a process that confines itself and waits for its job; nothing of it is left afterwards.

    It has one descriptor of ours, a socket: unlike a pipe it cannot be opened again through /proc.
    """
    folder = tempfile.mkdtemp(prefix="layerskip-")
    environment = {
        "HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    told = {"limits": limits.by_resource(), "layers": list(layers), "parent": os.getpid()}
    try:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-s", "-P", "-B", "-X", "utf8", str(INSIDE), folder],
                    stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    cwd=folder, env=environment, start_new_session=True,
                )  # fmt: skip
            ours.setblocking(False)
            try:
                with suppress(EOFError):  # `_confined` says so
                    wire.send(ours.fileno(), json.dumps(told).encode(), time.monotonic() + START_S)
                yield Child(process, ours.fileno())
            finally:
                if process.returncode is None:  # else its number may be another's by now
                    with suppress(ProcessLookupError, PermissionError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.kill()
                    process.wait()
    finally:
        _remove(folder)


def _confined(child: Child) -> tuple[str, ...]:
    """Wait until a process is confined; returns the layers in force."""
    try:
        said = wire.receive(child.channel, time.monotonic() + START_S, LONGEST_WORD).decode(errors="replace")
    except (EOFError, TimeoutError, ValueError):
        said = "silent"
    ready, *layers = said.split() or [""]
    if ready != "ready":
        raise UserError(
            f"programs cannot be run safely here: {said}",
            "nothing was run; try a virtual machine, or a container whose seccomp profile permits Landlock",
        )
    return tuple(layers)


class _Over(Exception):  # noqa: N818 - not a mistake of ours
    """A process that was asked gave no answer; carries status and detail of the outcome."""


def _answer(child: Child, asked: bytes, until: float, largest: int = wire.LARGEST) -> bytes:
    """Send a process a frame and read what it says to it. Raises: _Over."""
    try:
        wire.send(child.channel, asked, until)
        return wire.receive(child.channel, until, largest)
    except TimeoutError:
        raise _Over(TIMED_OUT, "") from None
    except EOFError:
        raise _Over(*_ended(child.process, until)) from None
    except ValueError:
        raise _Over(*FORGED) from None


def _program(child: Child, job: bytes, until: float) -> tuple[str, str]:
    """Have the program run; what it says of its end is its own word."""
    return _verdict(_answer(child, job, until, LONGEST_WORD))


def _test(judge: Child, job: bytes, candidate: Child, until: float) -> tuple[str, str]:
    """Have the test run, and carry its questions to the candidate and the answers back."""
    said = _answer(judge, job, until)
    while said[:1] == b"?":
        if wire.waiting(candidate.channel):
            return FORGED  # said before it was asked
        said = _answer(judge, _answer(candidate, said[1:], until), until)
    return _verdict(said[1:])


def _verdict(said: bytes) -> tuple[str, str]:
    status, _, detail = said.decode(errors="replace").partition(" ")
    shown = "".join(letter if letter.isprintable() else "?" for letter in detail.strip()[:300])
    return (status, shown) if status in STATUSES else FORGED


def _ended(process: subprocess.Popen[bytes], until: float) -> tuple[str, str]:
    """Tell how a process ended that says nothing any more: it is gone, or closed all it had open."""
    try:
        code = process.wait(max(0.05, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return TIMED_OUT, ""
    if code >= 0:
        return EXITED, f"with code {code}"
    if -code == signal.SIGXCPU:
        return TIMED_OUT, ""
    # Nobody but the kernel kills it before its time.
    return OUT_OF_MEMORY if -code == signal.SIGKILL else CRASHED, signal.Signals(-code).name


def _remove(folder: str) -> None:
    """Remove what a run left, folders nested deeper than Python's recursion included."""
    with suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.exists(folder):
        for command in (["chmod", "-R", "u+rwx", folder], ["rm", "-rf", folder]):
            subprocess.run(command, stderr=subprocess.DEVNULL, check=False)
