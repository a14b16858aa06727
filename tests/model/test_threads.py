"""How many threads, and who else is at work; from the files a Linux system shows, or without them."""

import pytest

from layerskip.errors import UserError
from layerskip.model import threads


@pytest.fixture
def machine(monkeypatch):
    """A machine described by the files it shows."""
    files = {}
    monkeypatch.setattr(threads, "_text", files.get)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return files


def test_hyperthreads_of_one_core_count_once(machine):
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        machine[f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = siblings
    assert threads.chosen_threads() == 2


def test_a_container_s_quota_limits_the_threads_and_max_does_not(machine):
    assert threads.chosen_threads() == 4
    machine["/sys/fs/cgroup/cpu.max"] = "max 100000"
    assert threads.chosen_threads() == 4
    machine["/sys/fs/cgroup/cpu.max"] = "250000 100000"
    assert threads.chosen_threads() == 3
    machine["/sys/fs/cgroup/cpu.max"] = "10000 100000"
    assert threads.chosen_threads() == 1


def test_the_user_s_own_number_wins(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7,2")
    assert threads.chosen_threads() == 7


def test_busy_cores_are_ticks_over_time_and_unknown_where_the_system_is_silent(monkeypatch):
    monkeypatch.undo()  # the suite's own stand-in for it
    readings = iter(
        [
            "cpu 900 0 0 0 0 0 0 0\ncpu0 100 0 50 900 5 1 2 3\ncpu9 7 0 0 0 0 0 0 0",
            "cpu 999 0 0 0 0 0 0 0\ncpu0 110 0 55 905 5 1 2 3\ncpu9 99 0 0 0 0 0 0 0",  # 9 is not ours
        ]
    )
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr(threads, "_text", lambda path: next(readings))
    monkeypatch.setattr(threads.os, "sysconf", lambda name: 100)
    assert threads.busy_cores(0.1) == pytest.approx(1.5)
    monkeypatch.setattr(threads, "_text", lambda path: None)
    assert threads.busy_cores(0.0) is None


def test_the_warning_names_the_number_of_threads_that_leaves_others_their_cores(machine):
    """It named no remedy, while on two cores one thread was three times as fast as two beside a busy neighbour."""
    assert threads.busy_warning(None, 4) is threads.busy_warning(0.4, 4) is None
    assert "try --threads 2 (now 4)" in threads.busy_warning(1.3, 4)
    assert "try --threads 1 (now 4)" in threads.busy_warning(4.0, 4)
    assert threads.busy_warning(1.3, 1).endswith("wait, or stop them")


def test_more_threads_than_cores_can_run_are_refused(machine, monkeypatch, folder, fails):
    """--threads 4096 hung: every parallel region waited for thousands of threads on a few cores."""
    assert threads.chosen_threads(8) == 8
    with pytest.raises(UserError, match="--threads is 9, and this process may use 4 cores") as refusal:
        threads.chosen_threads(9)
    assert "at most 8" in refusal.value.hint
    assert "--threads is 4096" in fails("generate", folder, "hi", "--threads", 4096)
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    with pytest.raises(UserError, match="OMP_NUM_THREADS is 4096"):
        threads.chosen_threads()


def test_a_busy_machine_is_a_warning_on_stderr_and_nothing_more(monkeypatch, folder, run):
    monkeypatch.setattr(threads, "busy_cores", lambda: 1.3)
    code, printed, message = run("generate", folder, "hi", "--max-new-tokens", 2, "--json")
    assert code == 0
    assert printed.startswith("{")
    assert "others keep 1.3 cores busy" in message
