"""How many CPU threads decoding should use, and whether somebody else is using the cores.

Decoding is hundreds of small parallel regions a token: one thread per physical core is best, and a region waits
for its slowest thread, so one busy neighbour can cost a factor of ten.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

BUSY = 0.5  # cores in use by others from which a warning is worth its line


def chosen_threads() -> int:
    """Count the physical cores this process may use: affinity, container quota, no second hyperthreads.

    OMP_NUM_THREADS, where set, is the user's choice and wins.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if given.isdecimal() and int(given) > 0:
        return int(given)
    allowed = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {_text(siblings.format(cpu)) or str(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota()))


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


def _busy_ticks() -> int | None:
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    ours = {f"cpu{cpu}" for cpu in allowed}
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
