"""Programs that try to pass a test whose answers they do not know, for tests/measure/test_sandbox_cheats.py."""

CHEATS = {  # how it ends, and the program
    # -- leaving
    "exit before the test": ("exited", "def guess(n): pass\nsys.exit(0)"),
    "exit in the call": ("exited", "def guess(n): sys.exit(0)"),
    "hard exit in the call": ("exited", "def guess(n): os._exit(0)"),
    "an exit that says so": ("exited", "def guess(n): raise SystemExit('passed ')"),
    "exit at exit": (
        "exited",
        "import atexit\natexit.register(os._exit, 0)\ndef guess(n): raise SystemExit",
    ),
    "exit from a timer's signal": (
        "exited",
        """
        import signal
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        def guess(n):
            while True: pass
        """,
    ),
    "exit from a hook of exceptions": (
        "failed",
        """
        import threading, warnings
        sys.excepthook = sys.unraisablehook = threading.excepthook = lambda *_: os._exit(0)
        warnings.showwarning = lambda *_: os._exit(0)
        def guess(n): raise AssertionError
        """,
    ),
    "abortion": ("crashed", "def guess(n): os.abort()"),
    # -- Python turned against the test
    "a trace that jumps over asserts": (
        "failed exited",
        """
        def jump(frame, event, arg):
            try: frame.f_lineno += 1
            except ValueError: pass
            return jump
        sys.settrace(jump)
        def guess(n):
            frame = sys._getframe()
            while frame: frame.f_trace, frame = jump, frame.f_back
            return "none"
        """,
    ),
    "a profile function": (
        "failed",
        "def look(frame, event, arg): frame.f_globals.pop('check', None)\n"
        "sys.setprofile(look)\ndef guess(n): pass",
    ),
    "monitoring": (
        "failed",
        """
        if hasattr(sys, "monitoring"):
            sys.monitoring.use_tool_id(1, "cheat")
            sys.monitoring.set_events(1, sys.monitoring.events.RAISE)
            sys.monitoring.register_callback(1, sys.monitoring.events.RAISE, lambda *_: os._exit(0))
        def guess(n): return "none"
        """,
    ),
    "another AssertionError": (
        "failed",
        "class Quiet(SystemExit): pass\nbuiltins.AssertionError = Quiet\ndef guess(n): pass",
    ),
    "other builtins": (
        "failed exited",
        "for name in ('all', 'any', 'abs', 'len', 'isinstance', 'type', 'bool'):\n"
        "    setattr(builtins, name, lambda *_: True)\ndef guess(n): pass",
    ),
    "other builtins altogether": (
        "failed",
        "class All(dict):\n    def __missing__(self, name): return lambda *_: True\n"
        "__builtins__ = All()\ndef guess(n): return everything()",
    ),
    "another import": (
        "failed",
        "builtins.__import__ = lambda *_, **__: sys.modules['program']\ndef guess(n): pass",
    ),
    "a finder of modules": (
        "failed",
        "class Finder:\n    @staticmethod\n    def find_spec(*_): os._exit(0)\n"
        "sys.meta_path.insert(0, Finder)\ndef guess(n): pass",
    ),
    "poisoned modules": (
        "failed exited",
        "for name in ('copy', 'math', 'json', 'pickle', 'random', 'operator', 'struct'):\n"
        "    sys.modules[name] = sys.modules['program']\ndef deepcopy(x): return 'none'\n"
        "def guess(n): pass",
    ),
    "the harness's functions": (
        "failed exited",
        """
        for module in ("sandbox_wire", "sandbox_confine", "__main__"):
            for name, thing in list(vars(sys.modules[module]).items()):
                if callable(thing): setattr(sys.modules[module], name, lambda *_: b"passed ")
        def guess(n): pass
        """,
    ),
    "the harness's frames": (
        "failed",
        """
        def guess(n):
            frame, all = sys._getframe(), []
            while frame:
                all.append(str(frame.f_locals) + str(frame.f_globals))
                frame.f_locals.update(status="passed", error=None)
                frame = frame.f_back
            return found("".join(all))
        """,
    ),
    "the frames of all threads": (
        "failed",
        "def guess(n):\n    return [str(f.f_locals)[:99] for f in sys._current_frames().values()]",
    ),
    "all objects": (
        "refused",
        "import gc\ndef guess(n): return [o for o in gc.get_objects() if 'one' in str(o)][0]",
    ),
    "the function is gone": ("failed", "def guess(n): pass\ndel guess"),
    "the function is a class": (
        "failed",
        "class guess:\n    def __init__(self, n): pass\n    def __eq__(self, other): return True",
    ),
    "another interpreter": (
        "failed refused",
        """
        try: import _interpreters as other
        except ImportError: import _xxsubinterpreters as other
        def guess(n): return other.create()
        """,
    ),
    # -- objects that lie
    "a word that equals everything": (
        "failed",
        "class Yes(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\n"
        "def guess(n): return Yes()",
    ),
    "a list that equals everything": (
        "failed",
        "class Yes(list):\n    def __eq__(self, other): return True\ndef guess(n): return Yes()",
    ),
    "a number that equals everything": (
        "failed",
        "class Yes(int):\n    def __eq__(self, other): return True\ndef guess(n): return Yes()",
    ),
    "a float that equals everything": (
        "failed",
        "class Yes(float):\n    def __eq__(self, other): return True\ndef guess(n): return Yes()",
    ),
    "a dict that equals everything": (
        "failed",
        "class Yes(dict):\n    def __eq__(self, other): return True\ndef guess(n): return Yes()",
    ),
    "a tuple that converts itself": (
        "failed",
        "class Yes(tuple):\n    def __eq__(self, other): return True\n    def __iter__(self): os._exit(0)\n"
        "def guess(n): return Yes()",
    ),
    "an object with another class": (
        "failed",
        "class Yes:\n    __class__ = str\n    def __eq__(self, other): return True\n"
        "def guess(n): return Yes()",
    ),
    "a mock": ("failed", "from unittest import mock\ndef guess(n): return mock.ANY"),
    "a lying array": (
        "failed",
        "class A:\n    shape, item = (), str\nA.__module__ = 'numpy'\ndef guess(n): return A()",
    ),
    "a generator": ("failed", "def guess(n): yield 'none'"),
    "a coroutine": ("failed", "async def guess(n): return 'none'"),
    "a function": ("failed", "def guess(n): return lambda: 'none'"),
    "itself": ("failed", "def guess(n): return guess"),
    "not a number": ("failed", "def guess(n): return float('nan')"),
    "a pickle": (
        "failed",
        "import pickle\nclass P:\n    def __reduce__(self): return os._exit, (0,)\n"
        "def guess(n): return pickle.dumps(P())",
    ),
    "words of the verdict": ("failed", "def guess(n): return '!passed '"),
    # -- exceptions that lie
    "an error of the test's": ("failed", "def guess(n): raise AssertionError"),
    "an error that is no Exception": ("failed", "def guess(n): raise KeyboardInterrupt"),
    "an error that ends generators": ("failed", "def guess(n): raise GeneratorExit"),
    "an error named passed": (
        "failed",
        "passed = type('passed', (BaseException,), {})\ndef guess(n): raise passed",
    ),
    "an error with odd arguments": ("failed", "def guess(n): raise UnicodeDecodeError('a', b'', 0, 0, 'b')"),
    "an error that cannot be shown": (
        "failed",
        "class Bad(Exception):\n    def __str__(self): raise SystemExit\ndef guess(n): raise Bad(object())",
    ),
    # -- too much
    "a huge answer": ("failed", "def guess(n): return 'x' * (20 << 20)"),
    "a huge answer in the frame": (
        "failed",
        "def guess(n): everywhere(b'\\xff' * 4)\n",
    ),
    "a deep answer": (
        "failed",
        "def guess(n):\n    all = []\n    for _ in range(10 ** 5): all = [all]\n    return all",
    ),
    "an endless answer": ("failed", "def guess(n):\n    all = []\n    all.append(all)\n    return all"),
    "a memory bomb in the call": ("out_of_memory", "def guess(n): return bytearray(1 << 40)"),
    "recursion in the call": ("failed", "def guess(n): return guess(n)"),
    "no answer": ("timed_out", "def guess(n):\n    while True: pass"),
    "half an answer": (
        "timed_out",
        "import time\ndef guess(n):\n    os.write(SOCKET, b'\\0\\0\\0\\x09half')\n    time.sleep(99)",
    ),
    # -- the socket
    "verdicts on every descriptor": (
        "failed",
        "def guess(n): pass\nfor word in (b'passed', b'passed ', b'!passed ', b'ready'):\n"
        "    everywhere(framed(word) * 9)",
    ),
    "the bare word on every descriptor": ("failed", "def guess(n): pass\neverywhere(b'passed \\n')"),
    "answers before the questions": (
        "failed",
        "def guess(n): pass\neverywhere(framed(b'passed ') + framed(encode(('returned', 'none'))) * 9)",
    ),
    "a verdict as an answer": ("failed", "def guess(n): everywhere(framed(b'!passed '))"),
    "two answers": ("failed", "def guess(n): everywhere(framed(encode(('returned', 'none'))) * 2)"),
    "answers from a thread": (
        "failed",
        """
        import threading
        def write():
            while True: everywhere(framed(encode(("returned", "none"))), [SOCKET])
        def guess(n): threading.Thread(target=write).start()
        """,
    ),
    "answers from a thread long before": (
        "failed",
        """
        import threading
        def write():
            while True: everywhere(framed(encode(("returned", "none"))), [SOCKET])
        threading.Thread(target=write, daemon=True).start()
        def guess(n): pass
        """,
    ),
    "malformed answers": ("failed", "def guess(n): everywhere(framed(b'l' + b'\\xff' * 40))"),
    "a bottomless answer": ("failed", "def guess(n): everywhere(framed(b'l\\0\\0\\0\\1' * 10 ** 5))"),
    "an answer that cannot be": ("failed", "def guess(n): everywhere(framed(b'e\\0\\0\\0\\1l\\0\\0\\0\\0'))"),
    "an empty answer": ("failed", "def guess(n): everywhere(framed(b''))"),
    "a class of its own choice": (
        "failed",
        "def guess(n): everywhere(framed(encode(('raised', 'open', ['open', 'print'], ()))))",
    ),
    "all descriptors closed": ("exited failed", "def guess(n): os.closerange(0, 1024)"),
    "all descriptors closed before": ("exited failed", "def guess(n): pass\nos.closerange(0, 1024)"),
    "descriptors exchanged": (
        "failed exited",
        "import fcntl\ndef guess(n):\n    for number in (0, 1, 2): os.dup2(SOCKET, number)\n"
        "    everywhere(framed(b'passed '), (0, 1, 2))",
    ),
    "questions read away": (
        "timed_out failed",
        """
        import socket, threading
        line = socket.socket(socket.AF_UNIX, fileno=SOCKET)
        threading.Thread(target=lambda: [line.recv(1 << 16) for _ in range(99)]).start()
        def guess(n): pass
        """,
    ),
    "the socket shut down": (
        "exited failed",
        "import socket\ndef guess(n): socket.socket(socket.AF_UNIX, fileno=SOCKET).shutdown(socket.SHUT_RDWR)",
    ),
    "descriptors handed over": (
        "refused failed",
        """
        import socket
        def guess(n):
            line = socket.socket(socket.AF_UNIX, fileno=os.dup(SOCKET))
            socket.send_fds(line, [framed(encode(("returned", "none")))], [0, 1, 2])
        """,
    ),
    "the socket opened again": (
        "refused failed",
        "def guess(n): open(f'/proc/self/fd/{SOCKET}', 'wb').write(framed(b'!passed '))",
    ),
    "the socket mapped": ("failed refused", "import mmap\ndef guess(n): return mmap.mmap(SOCKET, 4096)[:9]"),
    # -- other processes and files
    "the test's file": ("refused", "def guess(n): return found(open(TEST_FILE).read())"),
    "the test's file by its folder": (
        "refused",
        "def guess(n):\n    folder = os.open(os.path.dirname(TEST_FILE), 0)\n"
        "    return found(os.read(os.open('test.py', 0, dir_fd=folder), 999).decode())",
    ),
    "the test's file through a link": (
        "refused",
        "os.symlink(TEST_FILE, 'link')\ndef guess(n): return found(open('link').read())",
    ),
    "the test's file from a mapped one": (
        "refused",
        "import mmap\ndef guess(n): return found(mmap.mmap(os.open(TEST_FILE, 0), 0, prot=1)[:].decode())",
    ),
    "its environment and arguments": (
        "failed",
        "def guess(n): return found(str(os.environ) + str(sys.argv) + str(sys.orig_argv))",
    ),
    "the parent's arguments": (
        "refused failed",
        "def guess(n): return found(open(f'/proc/{PARENT}/cmdline').read())",
    ),
    "the parent's environment": (
        "refused failed",
        "def guess(n): return found(open(f'/proc/{PARENT}/environ').read())",
    ),
    "the parent's memory": ("refused failed", "def guess(n): open(f'/proc/{PARENT}/mem', 'rb').read(1)"),
    "the parent's descriptors": ("refused failed", "def guess(n): return os.listdir(f'/proc/{PARENT}/fd')"),
    "its own memory": ("refused failed", "def guess(n): open('/proc/self/mem', 'r+b').write(b'x')"),
    "all processes": (
        "failed",
        """
        def guess(n):
            text = ""
            for number in [*range(os.getpid() - 9, os.getpid() + 9), PARENT]:
                for name in ("cmdline", "environ", "maps", "mem", "fd/0", "fd/3", "cwd/test.py"):
                    try:
                        if number != os.getpid(): text += open(f"/proc/{number}/{name}").read()
                    except OSError: pass
            return found(text)
        """,
    ),
    "a trace of the parent": (
        "refused",
        "def guess(n):\n    import ctypes\n    ctypes.CDLL(None).ptrace(0x4206, PARENT, 0, 0)",
    ),
    "a signal to the parent": ("refused", "def guess(n): os.kill(PARENT, 0)"),
    "signals by way of the socket": (
        "refused",
        "import fcntl\ndef guess(n): fcntl.fcntl(SOCKET, fcntl.F_SETOWN, PARENT)",
    ),
    "a child that answers": ("refused", "def guess(n): return os.fork()"),
    "higher limits": (
        "refused",
        "import resource\ndef guess(n): resource.setrlimit(resource.RLIMIT_CPU, (9, 9))",
    ),
    # -- from call to call
    "answers that alternate": ("failed", "def guess(n, seen=[]):\n    seen.append(n)\n    return str(seen)"),
    "a second call that never ends": (
        "failed timed_out",
        "def guess(n, seen=[]):\n    seen.append(n)\n    while len(seen) > 1: pass",
    ),
}  # fmt: skip


SAMPLE = {  # the rest runs with the whole matrix
    "hard exit in the call", "exit at exit", "a trace that jumps over asserts", "another AssertionError",
    "other builtins", "poisoned modules", "the harness's functions", "the harness's frames", "all objects",
    "a word that equals everything", "a list that equals everything", "an object with another class", "a mock",
    "a generator", "an error of the test's", "a deep answer", "no answer", "verdicts on every descriptor",
    "answers before the questions", "a verdict as an answer", "answers from a thread", "all descriptors closed",
    "the test's file by its folder", "the parent's memory", "signals by way of the socket",
}  # fmt: skip
