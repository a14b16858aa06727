"""The sandbox survives what programs do, by accident or carelessly, and its verdict is not given away.

Every attack is bounded (a fork bomb of twenty, a memory bomb of some gigabytes), so that a sandbox that fails one
fails its test and not the machine.
"""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from layerskip.errors import UserError
from layerskip.measure.tasks import sandbox
from layerskip.measure.tasks.sandbox import LAYERS, Limits, run, run_all

QUICK = Limits(seconds=0.5, memory_bytes=192 << 20)
PATIENT = Limits(seconds=10, memory_bytes=192 << 20)  # for what ends by itself, on however slow a machine
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Landlock, seccomp and /proc are Linux's")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Folders of runs are made in a place of the test's own; nothing may be left there, file or process."""
    place = tmp_path / "runs"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    descriptors = len(os.listdir("/dev/fd"))
    yield place
    assert len(os.listdir("/dev/fd")) == descriptors
    assert list(place.iterdir()) == []
    assert processes_in(place) == []


def processes_in(place):
    """Each is started with its folder as its argument."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if f"\0{place}/" in entry.read_text(errors="replace"):
                found.append(entry.parts[2])
    return found


@pytest.fixture
def victim(tmp_path):
    """A folder outside the sandbox that must stay as it is."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "kept").write_text("kept")
    os.utime(folder / "kept", (1, 1))
    yield folder
    assert [path.name for path in folder.iterdir()] == ["kept"]
    assert (folder / "kept").read_text() == "kept"
    assert (folder / "kept").stat().st_mtime == 1


def test_right_code_passes_and_wrong_code_fails_with_its_reason():
    assert run("def add(a, b):\n    return a + b", "assert add(1, 2) == 3").passed
    wrong = run("def add(a, b):\n    return a - b", "assert add(1, 2) == 3, 'sum'")
    assert (wrong.status, wrong.detail) == ("failed", "AssertionError: sum")
    assert run("def add(a, b:").detail.startswith("SyntaxError")


USUAL = {
    "typing and dataclasses": "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int'\nA(1)",
    "hashlib, random, re": "import hashlib, random, re, math; hashlib.md5(b'x').hexdigest(); random.random()",
    "threads": "import concurrent.futures as c\nassert [*c.ThreadPoolExecutor(4).map(abs, [-1])] == [1]",
    "an event loop": "import asyncio\nasync def f(): return 3\nassert asyncio.run(f()) == 3",
    "files of its own": "import tempfile, os\nopen('a', 'w').write('x'); os.rename('a', 'b'); os.remove('b')\n"
    "tempfile.NamedTemporaryFile('w').write('x')",
    "numpy": "import numpy; assert (numpy.eye(2) @ numpy.ones(2)).sum() == 2",
    "printing anything": "print('\\udcff \\u2603'.encode('utf8', 'replace')); print('\\u2603')",
    "main block": "if __name__ == '__main__':\n    input()",
}


@pytest.mark.parametrize("name", USUAL)
def test_what_honest_programs_need_is_allowed(name):
    outcome = run(USUAL[name], limits=Limits(seconds=20))
    assert outcome.passed, outcome


ATTACKS = {  # how it may end, and the program, which knows `victim`
    "endless loop": ("timed_out", "while True: pass"),
    "endless loop that catches everything": (
        "timed_out",
        """
        import signal
        for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGINT, signal.SIGXCPU):
            signal.signal(number, signal.SIG_IGN)
        while True:
            try:
                while True: pass
            except BaseException:
                pass
        """,
    ),
    "endless sleep": ("timed_out", "import time\ntime.sleep(1e6)"),
    "thread left behind": (
        "passed",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()",
    ),
    "doubling of bytes": ("out_of_memory", "a = bytearray(1)\nfor _ in range(32): a = a + a"),
    "growth of a list": ("out_of_memory", "a = []\nfor _ in range(200): a.append('x' * (1 << 24))"),
    "a list of everything": ("out_of_memory", "a = list(range(10 ** 8))"),
    "one large power": ("out_of_memory failed timed_out", "a = 'x' * (1 << 33)"),
    "too many threads": (  # Python waits for ever on a thread that finds no memory to begin with
        "failed timed_out",
        "import threading, time\nfor _ in range(200): threading.Thread(target=time.sleep, args=(9,)).start()",
    ),
    "open for writing": ("refused", "open(victim + '/new', 'w')"),
    "open for appending": ("refused", "open(victim + '/kept', 'a').write('x')"),
    "open through ..": (
        "refused",
        "import os\nopen(os.path.relpath(victim, os.getcwd()) + '/new', 'w')",
    ),
    "os.open": ("refused", "import os\nos.open(victim + '/new', os.O_CREAT | os.O_WRONLY)"),
    "truncation": ("refused", "import os\nos.truncate(victim + '/kept', 0)"),
    "pathlib": ("refused", "import pathlib\npathlib.Path(victim, 'new').write_text('x')"),
    "shutil": ("refused", "import shutil\nopen('own', 'w').close()\nshutil.copy('own', victim + '/new')"),
    "move": ("refused", "import shutil\nshutil.move(victim + '/kept', 'own')"),
    "a symbolic link": ("refused", "import os\nos.symlink(victim, 'link')\nopen('link/new', 'w')"),
    "a symbolic link there": ("refused", "import os\nos.symlink('own', victim + '/new')"),
    "a hard link": ("refused", "import os\nos.link(victim + '/kept', 'own')\nopen('own', 'w')"),
    "an open folder": (
        "refused failed",
        "import os\nos.open('new', os.O_CREAT | os.O_WRONLY, dir_fd=os.open(victim, os.O_RDONLY))",
    ),
    "another folder": ("refused", "import os\nos.chdir(victim)\nopen('new', 'w')"),
    "the home of the user": (
        "refused",
        "import os, pwd\nopen(pwd.getpwuid(os.getuid()).pw_dir + '/layerskip-leak', 'w')",
    ),
    "deletion": ("refused", "import os\nos.remove(victim + '/kept')"),
    "deletion of a tree": ("refused", "import shutil\nshutil.rmtree(victim)"),
    "times": ("refused", "import os\nos.utime(victim + '/kept', (5, 5))"),
    "modes": ("refused", "import os\nos.chmod(victim, 0)"),
    "a database": (
        "refused",
        "import sqlite3\nsqlite3.connect(victim + '/new').execute('create table t(a)')",
    ),
    "its own folder": ("refused failed", "import os, shutil\nshutil.rmtree(os.getcwd())"),
    "its own folder, locked": ("passed", "import os\nos.mkdir('a')\nopen('a/b', 'w')\nos.chmod('a', 0)"),
    "a huge file": (
        "failed",
        "file = open('a', 'wb')\nfor _ in range(99): file.write(bytes(1 << 20)); file.flush()",
    ),
    "many open files": ("failed", "a = [open('/dev/null') for _ in range(500)]"),
    "fork": ("refused", "import os\nos.fork()"),
    "fork bomb": (
        "passed",
        "import os\nfor _ in range(20):\n    try: os.fork()\n    except OSError: pass",
    ),
    "subprocess": ("refused", "import subprocess\nsubprocess.run(['touch', victim + '/new'])"),
    "shell": ("refused", "import os\nos.system('touch ' + victim + '/new')"),
    "daemon": (
        "refused",
        """
        import subprocess
        subprocess.Popen(['sleep', '60'], start_new_session=True, close_fds=True)
        """,
    ),
    "multiprocessing": ("refused", "import multiprocessing as m\nm.get_context('fork').Process().start()"),
    "another program": ("refused", "import os\nos.execv('/bin/true', ['true'])"),
    "kill of the parent": ("refused", "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)"),
    "kill of its group": (
        "refused",
        "import os, signal\nos.killpg(os.getpgid(os.getppid()), signal.SIGTERM)",
    ),
    "socket": ("refused", "import socket\nsocket.create_connection(('127.0.0.1', 9))"),
    "server": ("refused", "import socket\nsocket.create_server(('127.0.0.1', 0))"),
    "name lookup": ("refused", "import socket\nsocket.getaddrinfo('localhost', 80)"),
    "output of gigabytes": (
        "passed timed_out",
        """
        import os, sys
        for _ in range(1000):
            os.write(1, bytes(1 << 20)), os.write(2, bytes(1 << 20)), sys.stderr.write('x' * 9999)
        """,
    ),
    "standard input": ("failed", "input()"),
    "deep recursion": ("failed", "def f(): return f()\nf()"),
    "bottomless recursion": (
        "crashed out_of_memory failed timed_out",
        """
        import sys
        sys.setrecursionlimit(10 ** 9)
        class A:
            def __repr__(self): return repr(self)
        repr(A())
        """,
    ),
    "segmentation fault": ("crashed", "import faulthandler\nfaulthandler._read_null()"),
    "abortion": ("crashed", "import os\nos.abort()"),
    "ctypes": ("refused", "import ctypes\nctypes.string_at(0)"),
    "raised limits": ("refused", "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (-1, -1))"),
    "an exception that cannot be shown": (
        "failed",
        "class Bad(Exception):\n    def __str__(self): raise SystemExit\nraise Bad",
    ),
    "a very long exception": ("failed", "raise ValueError('x' * 10 ** 7)"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_the_parent_survives(name, victim):
    ends, program = ATTACKS[name]
    endless = "timed_out" in ends
    outcome = attack(program, victim, QUICK if endless else PATIENT)
    assert outcome.status in ends.split(), outcome
    assert len(outcome.detail) <= 300


def attack(program, victim, limits=PATIENT, layers=LAYERS):
    return run(f"victim = {str(victim)!r}\n{textwrap.dedent(program)}", limits=limits, layers=layers)


FORGERIES = {
    "sys.exit": "import sys\nsys.exit(0)",
    "os._exit": "import os\nos._exit(0)",
    "exit in a thread": "import os, threading as t\nt.Thread(target=os._exit, args=(0,)).start()\nwhile True: pass",
    "exit at exit": "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit",
    "printing it": "print('passed', flush=True)",
    "writing it everywhere": """
import os
for number in range(3, 300):
    try: os.write(number, b'passed \\n')
    except OSError: pass
""",
    "flooding every descriptor": """
import os
for number in range(3, 300):
    try: os.write(number, b'x' * 50000)
    except OSError: pass
""",
    "closing everything": "import os\nos.closerange(0, 1000)",
    "other functions": "import builtins, os\nbuiltins.exec = builtins.compile = print\nos.write = os._exit = print",
    "the harness's names": "import __main__\n__main__.judged = lambda *a: ('passed', '')",
    "its own check": "def check(f): pass",
    "its own errors": "import builtins as b\nclass Quiet(SystemExit): pass\nb.AssertionError = Quiet",
}


@pytest.mark.parametrize("function", ["double", ""])
@pytest.mark.parametrize("name", FORGERIES)
def test_a_wrong_program_cannot_pass_by_simple_means(name, function):
    test = "def check(f):\n    assert f(2) == 4\ncheck(globals().get('double'))"
    outcome = run(FORGERIES[name] + "\ndef double(x): return x", test, QUICK, function=function)
    assert outcome.status in ("failed", "exited"), outcome


# As seen from here, and not from `start`, a path that goes two up stays in the run's folder.
FROM_A_FOLDER = """
import os
start = os.open('.', os.O_RDONLY)
os.makedirs('a/b')
open('own', 'w').close()
os.chdir('a/b')
"""
KERNEL = {  # what each layer stops without the others
    ("hook", "write"): "open(victim + '/new', 'w')",
    ("hook", "fork"): "import os\nos.fork()",
    ("hook", "kill"): "import os\nos.kill(os.getppid(), 0)",
    ("hook", "socket"): "import socket\nsocket.socket()",
    ("hook", "read"): "open(victim + '/kept')",
    ("hook", "read a folder"): "import os\nos.scandir(victim)",
    ("hook", "list a folder"): "import os\nos.listdir(victim)",
    ("hook", "go there"): "import os\nos.chdir(victim)",
    ("hook", "delete from a folder"): f"{FROM_A_FOLDER}os.remove('../../victim/kept', dir_fd=start)",
    ("hook", "move from a folder"): f"{FROM_A_FOLDER}os.rename('../../victim/kept', 'own', src_dir_fd=start)",
    ("hook", "move to a folder"): f"{FROM_A_FOLDER}os.rename('own', '../../victim/new', dst_dir_fd=start)",
    ("hook", "make in a folder"): f"{FROM_A_FOLDER}os.mkdir('../../victim/new', dir_fd=start)",
    ("hook", "modes from a folder"): f"{FROM_A_FOLDER}os.chmod('../../victim/kept', 0, dir_fd=start)",
    ("hook", "times from a folder"): f"{FROM_A_FOLDER}os.utime('../../victim/kept', (5, 5), dir_fd=start)",
    ("hook", "link from a folder"): f"{FROM_A_FOLDER}os.link('../../victim/kept', 'new', src_dir_fd=start)",
    ("hook", "write from a folder"): f"{FROM_A_FOLDER}os.open('../../victim/new', os.O_CREAT, dir_fd=start)",
    ("hook", "write through a link"): f"{FROM_A_FOLDER}os.symlink('../../victim', 'out', dir_fd=start)",
    ("hook", "a folder of Python's"): "import os\nos.open(os.path.dirname(os.__file__), os.O_RDONLY)",
    ("hook", "write by descriptor"): "import os\nopen(f'/proc/self/fd/{os.open(os.__file__, 0)}', 'a')",
    ("hook", "the parent's files"): "import os\nopen(f'/proc/{os.getppid()}/cmdline')",
    ("hook", "signals by input"): "import fcntl, os\nfcntl.fcntl(100, fcntl.F_SETOWN, os.getppid())",
    ("hook", "signals on input"): "import fcntl\nfcntl.fcntl(100, fcntl.F_SETFL, 0x2040)",
    ("landlock", "read"): "open(victim + '/kept')",
    ("landlock", "the parent's files"): "import os\nopen(f'/proc/{os.getppid()}/cmdline')",
    ("landlock", "write"): "open(victim + '/new', 'w')",
    (
        "landlock",
        "write from C",
    ): "import ctypes\nif ctypes.CDLL(None).creat((victim + '/new').encode(), 438) < 0:"
    " raise PermissionError",
    ("landlock", "delete"): "import os\nos.remove(victim + '/kept')",
    ("landlock", "truncate"): "import os\nos.truncate(victim + '/kept', 0)",
    ("landlock", "move"): "import os\nos.rename(victim + '/kept', 'own')",
    ("landlock", "pipe"): "import os\nos.mkfifo(victim + '/new')",
    ("seccomp", "fork"): "import os\nos.fork()",
    ("seccomp", "exec"): "import subprocess\nsubprocess.run(['true'])",
    ("seccomp", "kill"): "import os\nos.kill(os.getppid(), 0)",
    ("seccomp", "socket"): "import socket\nsocket.socket()",
    ("seccomp", "fork from C"): "import ctypes\nif ctypes.CDLL(None).fork() < 0: raise PermissionError",
}


@pytest.mark.parametrize(("layer", "what"), KERNEL)
def test_each_layer_holds_alone(layer, what, victim):
    outcome = attack(KERNEL[layer, what], victim, layers=[layer])
    if layer not in outcome.layers:
        pytest.skip(f"this system has no {layer}")
    assert outcome.status == "refused", outcome


@LINUX
def test_a_run_of_root_has_none_of_roots_powers():
    status = run("print", "import re\nfound = re.search(r'CapEff:\\s*(\\w+)', open('/proc/self/status').read())\n"
                 "assert int(found[1], 16) in (0, 4), found[1]")  # fmt: skip
    assert status.passed, status


def test_own_folders_are_used_by_descriptor_and_libraries_are_read():
    program = """
        import os, shutil, tempfile, pwd, zoneinfo, asyncio, ssl
        with tempfile.TemporaryDirectory() as folder:
            start = os.open(folder, os.O_RDONLY)
            os.mkdir("a", dir_fd=start)
            os.close(os.open("a/b", os.O_CREAT | os.O_WRONLY, dir_fd=start))
            os.symlink("a", folder + "/link")
            open(folder + "/link/b").read()
            shutil.rmtree(folder + "/a")
        open(os.__file__).read(), open("/proc/self/status").read(), pwd.getpwuid(os.getuid())
    """
    assert (outcome := run(textwrap.dedent(program), limits=Limits(seconds=20))).passed, outcome


def test_folders_nested_deeper_than_recursion_goes_are_removed():
    assert run("import os\nfor _ in range(1050):\n    os.mkdir('d')\n    os.chdir('d')", layers=[]).passed


@LINUX
def test_a_fault_in_c_code_is_a_crash():
    outcome = run("import ctypes\nctypes.string_at(0)", layers=["landlock", "seccomp"])
    assert (outcome.status, outcome.detail) == ("crashed", "SIGSEGV")


@LINUX
def test_a_run_ends_with_the_process_that_started_it(tmp_path, home):
    code = "from layerskip.measure.tasks.sandbox import *; run('while True: pass', limits=Limits(seconds=60))"
    place = tmp_path / "elsewhere"
    place.mkdir()
    starter = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(place)})
    try:
        assert within(20, lambda: processes_in(place))
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.wait()
    assert within(20, lambda: not processes_in(place))


def within(seconds, condition):
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def test_runs_side_by_side_keep_their_order_and_the_time_limit_is_each_ones_own():
    jobs = [("while True: pass", ""), ("x = 1", "assert x == 1"), ("x = 2", "assert x == 1")] * 3
    outcomes = run_all(jobs, QUICK, workers=3)
    assert [one.status for one in outcomes] == ["timed_out", "passed", "failed"] * 3


def test_a_long_program_arrives_whole():
    assert run("x = 0\n" + "x += 1\n" * 60_000, "assert x == 60_000", Limits(seconds=30)).passed


def test_where_a_run_cannot_be_confined_nothing_is_run_and_no_score_is_made(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    broken = "def confine(*told):\n        raise OSError('no such lock')\n"
    source = sandbox.INSIDE.read_text().replace("__file__", repr(str(sandbox.INSIDE)))
    child.write_text(source.replace("from sandbox_confine import confine", broken))
    monkeypatch.setattr(sandbox, "INSIDE", child)
    with pytest.raises(UserError, match="cannot be run safely here: broken OSError: no such lock"):
        run("x = 1")
    child.write_text("")
    with pytest.raises(UserError, match="cannot be run safely here: silent"):
        run("x = 1")
