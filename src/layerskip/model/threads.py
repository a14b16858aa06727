"""How many CPU threads decoding should use, and whether somebody else is using the cores.

Decoding is hundreds of small parallel regions a token: one thread per physical core is best, and a region waits
for its slowest thread, so one busy neighbour can cost a factor of ten.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from pathlib import Path

from layerskip.errors import UserError

BUSY = 0.5  # cores in use by others from which a warning is worth its line


_NO_MAPPINGS, _NEVER_TRIM = (-4, 0), (-1, (1 << 31) - 1)
"""Arguments of glibc's mallopt: M_MMAP_MAX, M_TRIM_THRESHOLD."""

MOST_PER_CORE = 2  # threads; thousands of them on a few cores spin against each other and never end


def chosen_threads(given: int | None = None) -> int:
    """Count the physical cores this process may use: affinity, container quota, no second hyperthreads.

    A number that is given wins, then OMP_NUM_THREADS where it is set.
    Raises: UserError for more than `MOST_PER_CORE` threads on each core this process may use.
    """
    allowed, name = _allowed_cores(), "--threads"
    if given is None and (told := os.environ.get("OMP_NUM_THREADS", "").split(",")[0]).isdecimal():
        given, name = int(told) or None, "OMP_NUM_THREADS"
    if given is not None:
        if given > MOST_PER_CORE * len(allowed):
            raise UserError(
                f"{name} is {given}, and this process may use {len(allowed)} cores",
                f"give at most {MOST_PER_CORE * len(allowed)}; one thread per physical core is fastest",
            )
        return given
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {_text(siblings.format(cpu)) or str(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota()))


def keep_memory() -> None:
    """Let this process keep the memory that it frees, for the next step: training on a CPU takes a fifth less time.

    glibc gives large blocks back at once, and the system clears the pages of those that follow. Other C libraries
    are left as they are. The peak of memory is higher by some fifth.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(*_NO_MAPPINGS)
        mallopt(*_NEVER_TRIM)


def _allowed_cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _quota() -> int:
    """Read the whole cores a container may use (cgroup v2); a large number where nothing limits it."""
    limit, _, period = (_text("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    return math.ceil(int(limit) / int(period or 100_000)) if limit.isdecimal() else 1 << 30


def busy_cores(seconds: float = 0.1) -> float | None:
    """Measure how many of this process's cores are at work while it sleeps; None where the system does not tell."""
    before = _busy_ticks()
    time.sleep(seconds)
    after = _busy_ticks()
    if before is None or after is None:
        return None
    return (after - before) / os.sysconf("SC_CLK_TCK") / seconds


def busy_warning(busy: float | None, threads: int) -> str | None:
    """Warn that others use the cores and say what to do; None where they are free or the system does not tell."""
    if busy is None or busy <= BUSY:
        return None
    free = max(1, math.floor(len(_allowed_cores()) - busy))
    remedy = f"try --threads {free} (now {threads}), or wait" if free < threads else "wait, or stop them"
    told = f"others keep {busy:.1f} cores busy; decoding beside them can be many times slower"
    return f"{told}: {remedy}"


def _busy_ticks() -> int | None:
    ours = {f"cpu{cpu}" for cpu in _allowed_cores()}
    lines = [line.split() for line in (_text("/proc/stat") or "").split("\n")]
    cores = [list(map(int, fields[:8])) for name, *fields in filter(None, lines) if name in ours]
    return (
        sum(sum(ticks) - ticks[3] - ticks[4] for ticks in cores) if cores else None
    )  # all but idle and waiting


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
