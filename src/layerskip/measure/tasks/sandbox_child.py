"""The inside of the sandbox: confine this process, run a program and its test, say how it ended.

Started by `sandbox.py` as a script of its own, with the standard library alone: a job comes in by standard input,
two lines go out by standard output, "ready" with the layers in force and the verdict. Untrusted code sees neither.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import platform
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

FOLDER = os.path.realpath(os.getcwd())
HIGH = 100  # descriptors of ours start here, above RLIMIT_NOFILE

# -- layer one: an audit hook, which Python offers everywhere and cannot remove ------------------------------

FORBIDDEN = ("ctypes.", "syslog.", "subprocess.", "pty.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn",
             "os.system", "os.startfile", "os.kill", "signal.pthread_kill", "resource.setrlimit",
             "resource.prlimit")  # fmt: skip
CHANGES = {  # events that change the file system: how many of their first arguments are paths
    "os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.mkdir": 1, "os.link": 2, "os.truncate": 1, "os.chmod": 1,
    "os.chown": 1, "os.chflags": 1, "os.utime": 1, "os.setxattr": 1, "os.removexattr": 1, "sqlite3.connect": 1,
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def hook() -> Callable[[str, tuple[Any, ...]], None]:
    """Make the hook; what it uses is bound here, out of reach of a reassigned `os.path.realpath`."""
    realpath, fsdecode, folder = os.path.realpath, os.fsdecode, FOLDER
    refused, unix = PermissionError, 1

    def inside(path: Any) -> bool:
        if isinstance(path, int):
            return False
        full = realpath(fsdecode(path))
        return full == folder or full.startswith(folder + os.sep) or full == os.devnull

    def check(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            wrong = bool(flags & WRITES) and not isinstance(path, int) and not inside(path)
        elif event == "os.symlink":
            wrong = not inside(args[1])
        elif event.startswith("socket."):
            wrong = not (event == "socket.__new__" and args[1] == unix)  # the pair inside asyncio's loop
        else:
            wrong = event.startswith(FORBIDDEN) or not all(map(inside, args[: CHANGES.get(event, 0)]))
        if wrong:
            raise refused(f"{event} is refused here")

    return check


# -- layer two, Linux: Landlock allows writing beneath the folder only ----------------------------------------

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EVERY_WRITE = (  # access bits that each version of Landlock adds, of those that change something
    (1, sum(1 << bit for bit in (1, *range(4, 13)))),  # write a file, remove, make
    (2, 1 << 13),  # move between folders
    (3, 1 << 14),  # truncate
)
WRITE_FILE = 1 << 1


def landlock(libc: ctypes.CDLL) -> bool:
    """Forbid this process all changes outside the folder; false where the kernel has no Landlock (5.13)."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    access = sum(bits for since, bits in EVERY_WRITE if version >= since)
    rules = libc.syscall(CREATE_RULESET, struct.pack("Q", access), 8, 0)
    for path, allowed in ((FOLDER, access), (os.devnull, WRITE_FILE)):
        place = os.open(path, os.O_PATH)
        done(libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", allowed, place), 0))
        os.close(place)
    done(libc.syscall(RESTRICT_SELF, rules, 0))
    os.close(rules)
    return True


# -- layer three, Linux: seccomp allows no further process, no signal to others, no socket --------------------

MACHINES = {  # audit number, clone, and what is refused
    "x86_64": (0xC000003E, 56, {
        "socket": 41, "fork": 57, "vfork": 58, "execve": 59, "kill": 62, "ptrace": 101, "rt_sigqueueinfo": 129,
        "tkill": 200, "tgkill": 234, "rt_tgsigqueueinfo": 297, "process_vm_writev": 311, "execveat": 322,
        "pidfd_send_signal": 424, "io_uring_setup": 425,
    }),
    "aarch64": (0xC00000B7, 220, {
        "ptrace": 117, "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "socket": 198,
        "execve": 221, "rt_tgsigqueueinfo": 240, "process_vm_writev": 271, "execveat": 281,
        "pidfd_send_signal": 424, "io_uring_setup": 425,
    }),
}  # fmt: skip
CLONE3, CLONE_THREAD = 435, 0x10000
X32 = 0x40000000  # calls of x86-64's other convention have numbers from here
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER_AT, MACHINE_AT, FIRST_ARGUMENT_AT = 0, 4, 16
ALLOW, REFUSE, UNKNOWN = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
NO_NEW_PRIVS, SET_SECCOMP, SET_DEATH_SIGNAL = 38, 22, 1


def seccomp(libc: ctypes.CDLL) -> bool:
    """Refuse the calls of the table; false on other machines or kernels."""
    if platform.machine() not in MACHINES or sys.maxsize < 2**32:
        return False
    audit, clone, refused = MACHINES[platform.machine()]
    steps = [(LOAD, 0, 0, MACHINE_AT), (EQUAL, 1, 0, audit), (RETURN, 0, 0, REFUSE), (LOAD, 0, 0, NUMBER_AT),
             (AT_LEAST, 0, 1, X32), (RETURN, 0, 0, REFUSE)]  # fmt: skip
    for number in sorted(refused.values()):
        steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE)]
    # clone3 hides its flags behind a pointer: said to be unknown, the C library takes clone, where threads show.
    steps += [(EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, UNKNOWN), (EQUAL, 0, 3, clone),
              (LOAD, 0, 0, FIRST_ARGUMENT_AT), (ANY_BIT, 1, 0, CLONE_THREAD), (RETURN, 0, 0, REFUSE),
              (RETURN, 0, 0, ALLOW)]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    return bool(libc.prctl(SET_SECCOMP, 2, program, 0, 0) == 0)


# -- all of it -----------------------------------------------------------------------------------------------


def done(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), "a system call failed")


def limit(limits: dict[str, int]) -> None:
    """Set resource limits. A limit this system does not have, or that is lower already, is left."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            highest = resource.getrlimit(kind)[1]
            value = value if highest == resource.RLIM_INFINITY else min(value, highest)
            # The hard limit on seconds is later: at the soft one a signal tells it from lack of memory.
            hard = value + 1 if name == "CPU" and highest in (resource.RLIM_INFINITY, value + 1) else value
            try:
                resource.setrlimit(kind, (value, hard))
            except (ValueError, OSError):  # macOS refuses a bound on addresses
                continue


def confine(limits: dict[str, int], layers: list[str], parent: int) -> list[str]:
    """Confine this process for good; returns the layers in force."""
    held = []
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        # Root is root no more, but may read what it could read. Others hold no capability and give up none.
        header = struct.pack("=Ii", 0x20080522, 0)
        if libc.capset(header, struct.pack("=6I", 1 << 2, 1 << 2, 0, 0, 0, 0)) != 0:
            done(libc.capset(header, bytes(24)))
        done(libc.prctl(SET_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0))
        if os.getppid() != parent:  # it died before
            os._exit(1)
        done(libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0))
        held += [make.__name__ for make in (landlock, seccomp) if make.__name__ in layers and make(libc)]
    limit({**limits, "CORE": 0, **({} if "seccomp" in held else {"NPROC": 0})})
    if "hook" in layers:
        sys.addaudithook(hook())
        held.append("hook")
    return held


def judged(program: str, test: str) -> tuple[str, str]:
    """Run both in one namespace; returns how that ended and what was raised."""
    execute, compiled = exec, compile  # the program may put others in their place
    module = types.ModuleType("program")
    sys.modules["program"] = sys.modules["__main__"] = module  # dataclasses look for their module there
    try:
        execute(compiled(program, "<program>", "exec"), module.__dict__)
        execute(compiled(test, "<test>", "exec"), module.__dict__)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the verdict
        error.__traceback__ = error.__context__ = None  # frees what the frames hold, memory bombs too
        kinds = {MemoryError: "out_of_memory", PermissionError: "refused", SystemExit: "exited"}
        status = next((told for kind, told in kinds.items() if isinstance(error, kind)), "failed")
        try:
            detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        except BaseException:  # noqa: BLE001 - an exception that cannot be shown
            detail = ""
        return status, detail
    return "passed", ""


def main() -> None:
    job, verdict = (fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, HIGH) for descriptor in (0, 1))
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    read, write, leave = os.read, os.write, os._exit
    given = json.loads(read(job, int(read(job, 10))))
    try:
        held = confine(given["limits"], given["layers"], given["parent"])
    except Exception as error:  # noqa: BLE001 - the other side reports it
        write(verdict, f"broken {type(error).__name__}: {error}\n".encode())
        leave(1)
    write(verdict, f"ready {' '.join(held)}\n".encode())
    status, detail = judged(given["program"], given["test"])
    # The word that means "passed" is read only now: while untrusted code runs it is not in this process.
    word = read(job, 32).decode() if status == "passed" else status
    write(verdict, f"{word} {detail}\n".encode("utf-8", "replace"))
    leave(0)


if __name__ == "__main__":
    main()
