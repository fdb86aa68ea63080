"""Waiting of OpenMP's threads beside other processes."""

import ctypes
import os
import sys
import time
from pathlib import Path

import pytest

from dlopt.machine import openmp
from dlopt.machine.openmp import Contention, Team, Usage, measure

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux: schedstat of /proc")


def test_usage_is_per_second_and_ignores_threads_of_one_measurement():
    before = Usage(wall=10.0, busy=100.0, own=40.0, waits={"1": 5.0, "2": 7.0, "ended": 9.0})
    after = Usage(wall=10.5, busy=101.0, own=40.25, waits={"1": 5.25, "2": 7.125, "new": 3.0})
    assert after.since(before) == (1.5, 0.75)


@pytest.mark.parametrize(
    ("others", "waited", "shared"),
    [(1.0, 0.5, True), (1.0, 0.05, False), (0.1, 0.5, False), (0.0, 0.0, False)],
    ids=["contention", "free core for each thread", "threads wait for each other only", "alone"],
)
def test_cores_are_shared_if_threads_wait_for_other_processes(others, waited, shared):
    assert Contention().update(others, waited) is shared


def test_cores_count_as_free_after_a_second_without_waiting():
    contention = Contention()
    contention.update(1.0, 0.5)
    assert [contention.update(1.0, 0.01) for _ in range(4)] == [True, True, True, False]


def test_a_single_quiet_period_changes_nothing():
    contention = Contention()
    contention.update(1.0, 0.5)
    assert all(contention.update(1.0, waited) for waited in (0.01, 0.01, 0.5, 0.01, 0.06, 0.01, 0.01, 0.01))


@linux
def test_measures_this_process():
    before = measure()
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    after = measure()
    assert before is not None and after is not None
    assert after.own - before.own >= 0.05 and after.busy >= before.busy
    assert str(os.getpid()) in after.waits


def sleeps() -> int:
    """Returns how often threads of this process have gone to sleep."""
    count = 0
    for task in Path("/proc/self/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        count += sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
    return count


@linux
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores: with one, threads always sleep")
def test_threads_sleep_at_the_end_of_regions_while_the_team_is_open():
    nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
    libraries = openmp.libgomp()
    if not libraries:
        pytest.skip("needs libgomp: this PyTorch uses another OpenMP")

    def sleeps_in_regions() -> int:
        before = sleeps()
        for _ in range(300):
            libraries[0].GOMP_parallel(nothing, None, 2, 0)
            end = time.perf_counter() + 2e-4  # shorter than the threads spin, longer than 100 spins
            while time.perf_counter() < end:
                pass
        return sleeps() - before

    openmp.adapt_waiting(1)  # another test may have started the watch of this process
    team = Team(libraries, (os.cpu_count() or 1) + 1)
    deadline = time.monotonic() + 60
    while (sleeping := sleeps_in_regions()) < 200 and time.monotonic() < deadline:
        pass  # the team is not open yet
    team.close()
    assert sleeping >= 200  # of 300 regions; without the team 0, unless other processes interrupt the spinning


def test_watch_opens_a_team_while_cores_are_shared_and_reports_it_once(monkeypatch, caplog):
    periods = [0.0] * 2 + [0.5] * 30 + [0.0] * 8 + [0.5] * 3  # seconds waited per second
    clocks = [Usage(i, 2.0 * i, 1.0 * i, {"1": sum(periods[:i])}) for i in range(len(periods) + 1)]
    readings, events = iter(clocks), []

    class Opened:
        def __init__(self, libraries: object, size: int) -> None:
            events.append("opened")

        def close(self) -> None:
            events.append("closed")

    monkeypatch.setattr(openmp, "measure", lambda: next(readings, None))
    monkeypatch.setattr(openmp, "Team", Opened)
    monkeypatch.setattr(openmp, "_PERIOD", 0.001)
    watch = openmp.Watch([], threads=2)
    watch._thread.join(60)
    assert events == ["opened", "closed", "opened", "closed"]
    assert [record.getMessage() for record in caplog.records] == [openmp._REPORT % 1.0]


@linux
def test_one_thread_needs_no_watch_and_several_share_one(monkeypatch):
    monkeypatch.setattr(openmp, "_watch", None)
    openmp.adapt_waiting(1)
    assert openmp._watch is None
    openmp.adapt_waiting(2)
    watch = openmp._watch
    openmp.adapt_waiting(2)
    assert openmp._watch is watch
    openmp.adapt_waiting(1)
    assert openmp._watch is None
