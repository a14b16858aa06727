"""Confine this process for good: an audit hook, Landlock, seccomp and resource limits.

Loaded by `sandbox_child.py` in the process to confine; the standard library alone.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

FOLDER = os.path.realpath(os.getcwd())
# What may be read beside the folder: Python, its libraries and what they look up. Not the home, not the folder
# the harness was started in: the tests lie there.
READABLE = sorted(
    {
        os.path.realpath(path)
        for path in (
            *sys.path, sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", "/nix/store", "/System", "/Library",
            "/var/db/timezone", "/etc/ld.so.cache", "/etc/localtime", "/etc/passwd", "/etc/nsswitch.conf",
            "/etc/mime.types", "/dev/null", "/dev/zero", "/dev/random", "/dev/urandom",
            "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/sys/devices/system/cpu",
        )
        if path and os.path.exists(path)
    }
)  # fmt: skip

# -- layer one: an audit hook, which Python offers everywhere and cannot remove ------------------------------

FORBIDDEN = ("ctypes.", "syslog.", "subprocess.", "pty.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn",
             "os.system", "os.startfile", "os.kill", "signal.pthread_kill", "resource.setrlimit",
             "resource.prlimit", "gc.", "cpython.PyInterpreterState_New", "sys.remote_exec")  # fmt: skip
CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {  # where a path and the folder it starts from stand
    "os.remove": ((0, 1),), "os.rename": ((0, 2), (1, 3)), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),),
    "os.link": ((0, 2), (1, 3)), "os.truncate": ((0, None),), "os.chmod": ((0, 2),), "os.chown": ((0, 3),),
    "os.chflags": ((0, None),), "os.utime": ((0, 3),), "os.setxattr": ((0, None),), "os.removexattr": ((0, None),),
    "sqlite3.connect": ((0, None),),
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Commands that make input and output send signals to a process of one's choice.
OWNERS = {getattr(fcntl, name) for name in ("F_SETOWN", "F_SETSIG", "F_NOTIFY") if hasattr(fcntl, name)} | (
    {15} if sys.platform == "linux" else set()
)
O_ASYNC = getattr(os, "O_ASYNC", 0x2000 if sys.platform == "linux" else 0x40)
FIOASYNC, FIOSETOWN, SIOCSPGRP, TIOCSTI = 0x5452, 0x8901, 0x8902, 0x5412
REQUESTS = (FIOASYNC, FIOSETOWN, SIOCSPGRP, TIOCSTI) if sys.platform == "linux" else (0x8004667D, 0x8004667C)


def hook() -> Callable[[str, tuple[Any, ...]], None]:
    """Make the hook; what it uses is bound here, out of reach of a reassigned `os.path.realpath`."""
    realpath, fsdecode, isabs, join, isdir = (
        os.path.realpath, os.fsdecode, os.path.isabs, os.path.join, os.path.isdir,
    )  # fmt: skip
    refused, unix, folder, readable, separator = PermissionError, 1, FOLDER, tuple(READABLE), os.sep

    def within(full: str, roots: tuple[str, ...]) -> bool:
        return any(full == root or full.startswith(root + separator) for root in roots)

    def inside(path: Any, start: Any = None) -> bool:
        if isinstance(path, int):
            return False
        path = fsdecode(path)
        if isinstance(start, int) and start >= 0 and not isabs(path):
            path = join(f"/dev/fd/{start}" if sys.platform == "darwin" else f"/proc/self/fd/{start}", path)
        full = realpath(path)
        return full == "/dev/null" or within(full, (folder,))

    def may_open(path: Any, flags: int) -> bool:
        """Whether to open it. The event does not tell the folder a relative path starts from.

        So no folder outside can be opened, and no relative path goes up: from a folder inside it stays inside.
        """
        if isinstance(path, int):
            return True
        if ".." in (path := fsdecode(path)).split(separator) and not isabs(path):
            return False
        full = realpath(path)
        if full == "/dev/null" or within(full, (folder,)):
            return True
        return not flags & WRITES and within(full, readable) and not isdir(full)

    def check(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            wrong = not may_open(args[0], args[2])
        elif event == "os.symlink":  # a link inside leads inside, wherever it is moved
            to = fsdecode(args[0])
            wrong = (
                not inside(args[1], args[2]) or ".." in to.split(separator) or (isabs(to) and not inside(to))
            )
        elif event.startswith("socket."):
            wrong = not (event == "socket.__new__" and args[1] == unix)  # the pair inside asyncio's loop
        elif event == "fcntl.fcntl":
            wrong = args[1] in OWNERS or (args[1] == fcntl.F_SETFL and bool(args[2] & O_ASYNC))
        elif event == "fcntl.ioctl":
            wrong = args[1] & 0xFFFFFFFF in REQUESTS
        elif event in ("os.chdir", "os.scandir", "os.listdir"):  # a folder open already is one inside
            path = "." if args[0] is None else args[0]
            wrong = not (isinstance(path, int) or inside(path))
            if event == "os.listdir" and wrong:  # how modules are found; it leaves no folder open
                wrong = not within(realpath(fsdecode(path)), readable)
        elif event in CHANGES:
            wrong = not all(
                inside(args[at], None if from_ is None else args[from_]) for at, from_ in CHANGES[event]
            )
        else:
            wrong = event.startswith(FORBIDDEN)
        if wrong:
            raise refused(f"{event} is refused here")

    return check


# -- layer two, Linux: Landlock allows writing beneath the folder only, and reading what `READABLE` names -------

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EVERY_ACCESS = (  # access bits that each version of Landlock adds, but for execution
    (1, sum(1 << bit for bit in range(1, 13))),  # write a file, read, remove, make
    (2, 1 << 13),  # move between folders
    (3, 1 << 14),  # truncate
)
WRITE_FILE, READ_FILE, READ_FOLDER = 1 << 1, 1 << 2, 1 << 3
SCOPED = 6  # the version from which signals to processes outside can be refused, sockets by name too


def landlock(libc: ctypes.CDLL) -> bool:
    """Forbid this process all else; false where the kernel has no Landlock (5.13)."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    access = sum(bits for since, bits in EVERY_ACCESS if version >= since)
    asked = struct.pack("QQQ", access, 0, 3) if version >= SCOPED else struct.pack("Q", access)
    rules = libc.syscall(CREATE_RULESET, asked, len(asked), 0)
    reading = [(path, READ_FILE | (READ_FOLDER if os.path.isdir(path) else 0)) for path in READABLE]
    for path, allowed in ((FOLDER, access), (os.devnull, WRITE_FILE), *reading):
        place = os.open(path, os.O_PATH)
        done(libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", allowed, place), 0))
        os.close(place)
    done(libc.syscall(RESTRICT_SELF, rules, 0))
    os.close(rules)
    return True


# -- layer three, Linux: seccomp allows no further process, no signal to others, no socket --------------------

CALLS = {  # what is refused, and its numbers on x86-64 and aarch64 (0: it has none)
    "socket": (41, 198), "fork": (57, 0), "vfork": (58, 0), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "kcmp": (312, 272), "io_uring_setup": (425, 425), "unshare": (272, 97),
    "setns": (308, 268), "bpf": (321, 280), "userfaultfd": (323, 282), "perf_event_open": (298, 241),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "connect": (42, 203), "bind": (49, 200), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
}  # fmt: skip
CLONE, FCNTL, IOCTL, PRLIMIT, SOCKETPAIR = (56, 220), (72, 25), (16, 29), (302, 261), (53, 199)
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # audit number, column of the table
CLONE3, CLONE_THREAD = 435, 0x10000
X32 = 0x40000000  # calls of x86-64's other convention have numbers from here
LOAD, EQUAL, AT_LEAST, ANY_BIT, AND, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
NUMBER_AT, MACHINE_AT, FIRST_AT, SECOND_AT, THIRD_AT = 0, 4, 16, 24, 32  # low words of the arguments
ALLOW, REFUSE, UNKNOWN = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
DEATH_SIGNAL, DUMPABLE, SET_SECCOMP, NO_NEW_PRIVS = 1, 4, 22, 38

Step = tuple[int, int, int, int]


def seccomp(libc: ctypes.CDLL) -> bool:
    """Refuse the calls of the table; false on other machines or kernels."""
    if platform.machine() not in MACHINES or sys.maxsize < 2**32:
        return False
    audit, column = MACHINES[platform.machine()]
    refuse, allow = (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)

    def when(value: int, *then: Step) -> list[Step]:
        return [(EQUAL, 0, len(then), value), *then]

    def none_of(values: list[int]) -> list[Step]:
        return [step for value in sorted(values) for step in when(value, refuse)]

    steps: list[Step] = [(LOAD, 0, 0, MACHINE_AT), (EQUAL, 1, 0, audit), refuse, (LOAD, 0, 0, NUMBER_AT),
                         (AT_LEAST, 0, 1, X32), refuse]  # fmt: skip
    steps += none_of([numbers[column] for numbers in CALLS.values() if numbers[column]])
    # clone3 hides its flags behind a pointer: said to be unknown, the C library takes clone, where threads show.
    steps += when(CLONE3, (RETURN, 0, 0, UNKNOWN))
    steps += when(CLONE[column], (LOAD, 0, 0, FIRST_AT), (ANY_BIT, 1, 0, CLONE_THREAD), refuse, allow)
    steps += when(PRLIMIT[column], (LOAD, 0, 0, FIRST_AT), (EQUAL, 1, 0, 0), refuse, allow)  # its own only
    # A pair of streams talks to itself alone; datagrams could be sent to any socket by name.
    steps += when(
        SOCKETPAIR[column], (LOAD, 0, 0, SECOND_AT), (AND, 0, 0, 0xF), (EQUAL, 1, 0, 1), refuse, allow
    )
    steps += when(IOCTL[column], (LOAD, 0, 0, SECOND_AT), *none_of([*REQUESTS]), allow)
    flags = when(fcntl.F_SETFL, (LOAD, 0, 0, THIRD_AT), (ANY_BIT, 0, 1, O_ASYNC), refuse)
    steps += when(FCNTL[column], (LOAD, 0, 0, SECOND_AT), *none_of([*OWNERS]), *flags, allow)
    steps += [allow]
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
        done(libc.prctl(DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0))
        if os.getppid() != parent:  # it died before
            os._exit(1)
        done(libc.prctl(DUMPABLE, 0, 0, 0, 0))  # what lies in this process is nobody else's to read
        done(libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0))
        held += [make.__name__ for make in (landlock, seccomp) if make.__name__ in layers and make(libc)]
    limit({**limits, "CORE": 0, **({} if "seccomp" in held else {"NPROC": 0})})
    if "hook" in layers:
        sys.addaudithook(hook())
        held.append("hook")
    return held
