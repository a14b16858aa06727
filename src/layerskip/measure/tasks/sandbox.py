"""Run a program somebody's model wrote, and its test, in a process of its own that may do little.

    outcome = run("def add(a, b): return a + b", "assert add(1, 2) == 3")
    outcome.status                     # passed, failed, timed_out, out_of_memory, refused, exited or crashed

What it protects against is accidents and careless code: endless loops, memory and output without end, files
written or deleted elsewhere, processes, signals and sockets, a process that ends itself before its test. Each
run has a fresh folder, a time limit kept from outside and resource limits. An audit hook refuses what reaches
beyond; on Linux, Landlock (5.13) and seccomp (x86-64, aarch64) refuse it in the kernel too, and a run of root
loses root's capabilities. `Outcome.layers` says which of these were in force.

What it is not: a prison for code written to break out. Files can be read; modes and times of files elsewhere
are guarded by the hook alone (on macOS everything but time and file sizes is, and memory is not bounded
there); disk use is bounded per file and by time, not in total; a program that searches this harness's memory
can forge its verdict. For hostile code use a virtual machine.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from layerskip.errors import UserError

LAYERS = ("hook", "landlock", "seccomp")
PASSED, FAILED, TIMED_OUT, OUT_OF_MEMORY, REFUSED, EXITED, CRASHED = STATUSES = (
    "passed", "failed", "timed_out", "out_of_memory", "refused", "exited", "crashed",
)  # fmt: skip
INSIDE = Path(__file__).with_name("sandbox_child.py")
START_S = 60.0  # a machine this slow to start Python is not judged by it
LONGEST_LINE = 4096


@dataclass(frozen=True)
class Limits:
    """What a run may use."""

    seconds: float = 5.0  # from when the program starts
    memory_bytes: int = 1 << 30  # of addresses
    file_bytes: int = 16 << 20  # each
    open_files: int = 64

    def by_resource(self) -> dict[str, int]:
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


def run(program: str, test: str = "", limits: Limits = Limits(), layers: Sequence[str] = LAYERS) -> Outcome:
    """Execute a program and then its test in one namespace, away from this process.

    Passed means that both came to their end; leaving early, by whatever exit code, does not count.

    Raises: UserError where processes cannot be started or confined.
    """
    if os.name != "posix":
        raise UserError("programs can be run on Linux and macOS only", "use a Linux virtual machine")
    word = secrets.token_hex(16)
    asked = {
        "program": program,
        "test": test,
        "limits": limits.by_resource(),
        "layers": list(layers),
        "parent": os.getpid(),
    }
    job = json.dumps(asked).encode()
    folder = tempfile.mkdtemp(prefix="layerskip-")
    environment = {
        "HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    try:
        with tempfile.TemporaryFile() as given:  # a pipe would block on a long program
            given.write(b"%010d" % len(job) + job + word.encode())
            given.seek(0)
            with subprocess.Popen(
                [sys.executable, "-s", "-P", "-B", "-X", "utf8", str(INSIDE)],
                stdin=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
                cwd=folder, env=environment, start_new_session=True,
            ) as process:  # fmt: skip
                try:
                    return _outcome(process, word, limits.seconds)
                finally:
                    if process.returncode is None:  # else its number may be another's by now
                        with suppress(ProcessLookupError, PermissionError):
                            os.killpg(process.pid, signal.SIGKILL)
                        process.kill()
    except OSError as error:
        raise UserError(f"programs cannot be run here: {error}", "is there a Python to start?") from error
    finally:
        _remove(folder)


def run_all(
    jobs: Iterable[tuple[str, str]], limits: Limits = Limits(), workers: int | None = None
) -> list[Outcome]:
    """Run many (program, test), a few side by side; outcomes in the order of the jobs."""
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda job: run(job[0], job[1], limits), jobs))


def _outcome(process: subprocess.Popen[bytes], word: str, seconds: float) -> Outcome:
    """Wait for what the process says, or for its end, or for the time to be up."""
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    ready, *layers = (_line(pipe, START_S) or b"silent").decode(errors="replace").split() or [""]
    if ready != "ready":
        raise UserError(
            f"programs cannot be run safely here: {' '.join([ready, *layers])}",
            "nothing was run; try a virtual machine, or a container whose seccomp profile permits Landlock",
        )
    began = time.monotonic()
    line = _line(pipe, seconds)
    if line == b"":  # nobody can say anything any more: it has ended, or closed all it had open
        try:
            process.wait(max(0.05, began + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            line = None
    status, detail = _verdict(line, process.returncode, word)
    return Outcome(status, detail, time.monotonic() - began, tuple(layers))


def _verdict(line: bytes | None, code: int | None, word: str) -> tuple[str, str]:
    if line is None:
        return TIMED_OUT, ""
    if line:
        said, _, detail = line.decode(errors="replace").strip().partition(" ")
        if said == word:
            return PASSED, ""
        return (said, detail) if said in STATUSES and said != PASSED else (FAILED, "a forged verdict")
    assert code is not None
    if code >= 0:
        return EXITED, f"with code {code}"
    if -code == signal.SIGXCPU:
        return TIMED_OUT, ""
    # Nobody but the kernel kills it before its time.
    return OUT_OF_MEMORY if -code == signal.SIGKILL else CRASHED, signal.Signals(-code).name


def _line(pipe: int, seconds: float) -> bytes | None:
    """Read a line, byte by byte lest one takes in the next; b"" when the pipe is closed, None when time is up."""
    end, line = time.monotonic() + seconds, b""
    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    while not line.endswith(b"\n") and len(line) < LONGEST_LINE:
        left = end - time.monotonic()
        if left <= 0 or not waiting.poll(1000 * left):
            return None
        byte = os.read(pipe, 1)
        if not byte:
            return b""
        line += byte
    return line


def _remove(folder: str) -> None:
    """Remove what a run left, folders nested deeper than Python's recursion included."""
    with suppress(RecursionError):
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.exists(folder):
        for command in (["chmod", "-R", "u+rwx", folder], ["rm", "-rf", folder]):
            subprocess.run(command, stderr=subprocess.DEVNULL, check=False)
