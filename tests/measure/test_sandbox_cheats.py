"""A program that does not know its answers does not pass, whatever it does to the process that runs it.

The answer is a word that nobody guesses: who passes has read it or forged the verdict. Every attack is harmless
where it succeeds: a signal 0, a limit read, a priority that stays.
"""

import os
import sys
import textwrap

import pytest

from cheats import CHEATS, SAMPLE
from layerskip.measure.tasks.sandbox import LAYERS, Limits, run

BRIEF = Limits(seconds=0.4, memory_bytes=256 << 20)
PATIENT = Limits(seconds=10, memory_bytes=256 << 20)
TEST = """
def check(candidate):
    assert (first := candidate(1)) == "sesame-one", first
    assert candidate(2) == "sesame-one"
check(guess)
"""
START = f"""
import builtins, os, struct, sys
PARENT, TEST_FILE, SOCKET = {os.getpid()}, None, 100
def framed(body): return struct.pack(">I", len(body)) + body
def everywhere(data, numbers=range(1024)):
    for number in numbers:
        try: os.write(number, data)
        except OSError: pass
def found(text): return text[text.index("".join(["sesa", "me-"])):][:10]
from sandbox_wire import encode
"""
SOLUTION = "def guess(n): return 'sesame-one'"


def attempt(program, limits=PATIENT, layers=LAYERS, **known):
    names = "".join(f"{name} = {value!r}\n" for name, value in known.items())
    program = START + names + textwrap.dedent(program)
    return run(program, TEST, limits, layers, function="guess", given="guess = None")


def test_who_knows_the_answers_passes():
    assert attempt(SOLUTION).passed


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.full) for name in CHEATS]
)
def test_a_cheat_does_not_pass(name, tmp_path):
    ends, program = CHEATS[name]
    (tmp_path / "test.py").write_text(TEST)
    outcome = attempt(program, BRIEF if "timed_out" in ends else PATIENT, TEST_FILE=str(tmp_path / "test.py"))
    assert outcome.status in ends.split(), outcome


KERNEL = ("landlock", "seccomp")  # hostile code can disable the hook
BENEATH = {  # what it can then call, as C sees it
    "the test's file": "libc.open(TEST_FILE.encode(), 0)",
    "the test's file by its folder": "libc.openat(libc.open(TEST_FILE[:-8].encode(), 0), b'test.py', 0)",
    "the test's file, written": "libc.open(TEST_FILE.encode(), 1)",
    "the parent's arguments": "libc.open(b'/proc/%d/cmdline' % PARENT, 0)",
    "the parent's memory": "libc.open(b'/proc/%d/mem' % PARENT, 0)",
    "the parent's descriptors": "libc.open(b'/proc/%d/fd/0' % PARENT, 0)",
    "the judge's memory": "max(libc.open(b'/proc/%d/mem' % n, 0) for n in others)",
    "the judge's descriptors": "max(libc.open(b'/proc/%d/fd/100' % n, 2) for n in others)",
    "its own socket": "libc.open(b'/proc/self/fd/100', 2)",
    "a trace": "max(libc.ptrace(0x4206, n, 0, 0) for n in (PARENT, *others))",
    "memory read": "libc.process_vm_readv(PARENT, None, 0, None, 0, 0)",
    "a descriptor of the parent": "libc.syscall(434, PARENT, 0)",
    "a signal": "libc.kill(PARENT, 0)",
    "a signal on input": "libc.fcntl(100, fcntl.F_SETOWN, PARENT)",
    "which signal": "libc.fcntl(100, fcntl.F_SETSIG, 9)",
    "whose signal": "libc.fcntl(100, 15, struct.pack('ii', 1, PARENT))",
    "input that signals": "libc.fcntl(100, fcntl.F_SETFL, os.O_ASYNC if hasattr(os, 'O_ASYNC') else 0x2000)",
    "a folder that signals": "libc.fcntl(libc.open(b'.', 0), fcntl.F_NOTIFY, 1)",
    "input that signals by ioctl": "libc.ioctl(100, 0x5452, struct.pack('i', 1))",
    "an owner by ioctl": "libc.ioctl(100, 0x8901, struct.pack('i', PARENT))",
    "typing on a terminal": "libc.ioctl(0, 0x5412, b'x')",
    "the parent's limits": "libc.prlimit(PARENT, 7, None, (ctypes.c_long * 2)())",
    "the parent's priority": "libc.setpriority(0, PARENT, 0)",
    "the parent's processors": "libc.sched_setaffinity(PARENT, 8, b'\\xff' * 8)",
    "datagrams to anybody": "libc.socketpair(1, 2, 0, (ctypes.c_int * 2)())",
    "shared memory": "libc.shmget(0, 4096, 0o1600)",
    "another namespace": "libc.unshare(0x10000000)",
    "a child": "libc.fork()",
}


@pytest.mark.skipif(sys.platform != "linux", reason="Landlock and seccomp are Linux's")
def test_the_kernel_refuses_what_reaches_beyond_without_the_hook(tmp_path):
    (tmp_path / "test.py").write_text(TEST)
    program = f"""
import ctypes, fcntl
libc = ctypes.CDLL(None, use_errno=True)
near = {{*range(os.getpid() - 20, os.getpid() + 20)}} - {{os.getpid()}}
others = [n for n in near if os.path.exists(f"/proc/{{n}}")]
def guess(n): return [name for name, code in {BENEATH}.items() if eval(code) >= 0]
"""
    outcome = attempt(program, PATIENT, KERNEL, TEST_FILE=str(tmp_path / "test.py"))
    if outcome.layers != KERNEL:
        pytest.skip("this system lacks a layer")
    assert (outcome.status, outcome.detail) == ("failed", "AssertionError: []")


def test_what_a_program_says_of_its_end_cannot_steer_a_terminal():
    outcome = attempt("def guess(n): raise ValueError('\\x1b[2J\\u202e\\0')")
    assert outcome.detail == "ValueError: ?[2J??"
