"""Estimates of the time that jobs take."""

import json
from pathlib import Path
from typing import Any

import pytest

from dlopt.basics.errors import UserError
from dlopt.basics.folders import RunFolder
from dlopt.sweeps.estimate import Estimate, _load, estimate_job, estimate_line, first_updates, is_enough, per_update
from dlopt.training.checkpoint.content import Checkpoint


def lines(*ends: tuple[int, float]) -> list[dict[str, Any]]:
    return [{"epoch": i, "step": step, "seconds": seconds} for i, (step, seconds) in enumerate(ends, 1)]


def test_fastest_epoch_counts_beside_other_processes():
    metrics = lines((10, 5.0), (20, 6.0), (30, 11.0))
    assert per_update(metrics, 12.5, 25 + 10) == (0.1, 12.5 / 35)


def test_an_incomplete_epoch_gives_the_average_only():
    assert per_update([], 3.0, 6) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("metrics", "epochs", "steps", "enough"),
    [
        (lines((10, 1.0)), 10, None, False),
        (lines((10, 1.0), (20, 2.0)), 10, None, True),
        (lines((10, 1.0), (20, 2.0)), 30, None, False),
        (lines((10, 1.0), (20, 2.0)), 30, 100, True),
        (lines((10, 4.0), (20, 4.5)), 100, None, False),
        (lines((10, 4.0), (20, 4.5)), 80, None, True),
    ],
    ids=["one epoch", "a fifth", "a fifteenth", "steps win", "fastest epoch, too short", "fastest epoch"],
)
def test_a_probe_ends_after_a_tenth_of_the_job(metrics, epochs, steps, enough):
    assert is_enough(metrics, epochs, steps) is enough


class Clock:
    """A clock that each reading advances by a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now

    def sleep(self, seconds: float) -> None:
        pass


@pytest.mark.parametrize("share, horizon", [(0.25, 8), (None, 2)])
def test_extrapolates_to_all_updates(
    share: float | None, horizon: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of eight updates in 0.6 s give an estimate from 2.4 s, with a margin; a finished run needs neither."""
    summary = {"status": "finished" if share is None else "interrupted", "seconds": 0.6, "steps": 2}
    checkpoint = Checkpoint({"progress": {"horizon": horizon, "epoch": 1, "position": 0, "steps_per_epoch": 2}})

    class Stopped:
        def __init__(self, folder: Path, *_: object) -> None:
            config = RunFolder(folder).config()
            assert config is not None and config["schedule_epochs"] is None  # the horizon is the length of the run
            (folder / "summary.json").write_text(json.dumps(summary))
            (folder / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "step": 1, "seconds": 0.5}))

        def poll(self) -> int:
            return 0 if share is None else 75

    monkeypatch.setattr("dlopt.sweeps.pool.spawn", Stopped)
    monkeypatch.setattr("dlopt.sweeps.estimate.time", Clock())
    monkeypatch.setattr("dlopt.training.checkpoint.checkpoints.Checkpoints.load_newest", lambda self: checkpoint)
    estimate = estimate_job([{"seed": 0, "schedule_epochs": 5.0, "epochs": 1, "steps": None}], {})
    assert estimate is not None and (estimate.start_up, estimate.once) == pytest.approx((0.4, 1.0))
    assert (estimate.low, estimate.high) == pytest.approx((0.6, 0.6) if share is None else (2.4, 1.5 * 2.4))


class Probe:
    """A probe of width 0 trains for 4 s; that of width 1 ends with exit code 2, that of width 2 with 1."""

    count = 0

    def __init__(self, folder: Path, *_: object) -> None:
        Probe.count += 1
        config = RunFolder(folder).config()
        assert config is not None
        self.code = (0, 2, 1)[config["width"]]
        summary = {"status": "failed", "reason": f"reason {self.code}"} if self.code else {"status": "finished"}
        (folder / "summary.json").write_text(json.dumps(summary | {"seconds": 4.0, "steps": 8}))

    def poll(self) -> int:
        return self.code


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> type[Probe]:
    monkeypatch.setattr("dlopt.sweeps.pool.spawn", Probe)
    monkeypatch.setattr(Probe, "count", 0)
    return Probe


def test_warns_of_jobs_that_would_fail(probes: type[Probe], capsys: pytest.CaptureFixture[str]) -> None:
    estimate = estimate_job([{"width": i % 3, "seed": i} for i in range(9)], {})
    assert estimate is not None and (estimate.low, estimate.high) == (4.0, 4.0)
    assert capsys.readouterr().out.splitlines() == [f"warning: a job would fail: reason {code}" for code in (2, 1)]
    assert estimate_job([{"width": 2}], {}) is None
    assert "reason 1" in capsys.readouterr().out


def test_refuses_a_config_that_cannot_work(probes: type[Probe]) -> None:
    with pytest.raises(UserError, match="reason 2"):
        estimate_job([{"width": 1}], {})


@pytest.mark.parametrize(("jobs", "widths", "count"), [(1, 1, 1), (3, 3, 1), (12, 1, 1), (8, 2, 2), (60, 60, 3)])
def test_probes_different_configs_and_fewer_than_there_are_jobs(
    jobs: int, widths: int, count: int, probes: type[Probe]
) -> None:
    seeds = [{"seed": i, "data": {"split_seed": i}, "note": str(i), "run_id": str(i)} for i in range(jobs)]
    estimate_job([{**each, "width": 0, "optimizer": i % widths} for i, each in enumerate(seeds)], {})
    assert probes.count == count


@pytest.mark.parametrize(
    ("estimate", "jobs", "at_once", "line"),
    [
        (Estimate(1.16, 1.16, 1.0), 6, 1, "6 jobs of about 2.2 s each: about 13.2 s in total"),
        (Estimate(5, 6, 1), 3, 2, "3 jobs of about 6.0 s to 7.0 s each, 2 at once: about 12.0 s to 14.0 s in total"),
        (Estimate(72.4, 72.4), 32, 1, "32 jobs of about 1:13 each: about 38:56 in total"),
        (Estimate(0.01, 0.02), 1, 1, "1 job of about 0.1 s"),
        (Estimate(50.0, 70.0), 1, 1, "1 job of about 50.0 s to 1:10"),
        (None, 3, 2, "3 jobs, 2 at once; the duration could not be estimated"),
        (Estimate(5, 5), 2, 16, "2 jobs of about 5.0 s each, 2 at once: about 5.0 s in total"),
    ],
)
def test_estimate_adds_up(estimate: Estimate | None, jobs: int, at_once: int, line: str) -> None:
    assert estimate_line(estimate, jobs, at_once) == line


def test_what_precedes_all_jobs_is_counted_once() -> None:
    line = estimate_line(Estimate(2.0, 3.0, once=5.0), 4, 1)
    assert line == "4 jobs of about 2.0 s to 3.0 s each and 5.0 s to start: about 13.0 s to 17.0 s in total"


def test_the_imports_of_the_server_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    class AfterImports(Probe):
        def __init__(self, folder: Path, *_: object) -> None:
            super().__init__(folder)
            clock.now += 30.0 if Probe.count == 1 else 0.0

    monkeypatch.setattr("dlopt.sweeps.pool.spawn", AfterImports)
    monkeypatch.setattr(Probe, "count", 0)
    monkeypatch.setattr("dlopt.sweeps.estimate.time", clock)
    jobs = [{"width": 0, "optimizer": i // 3, "seed": i} for i in range(6)]
    estimate = estimate_job(jobs, {})
    assert Probe.count == 2 and estimate is not None and estimate.once == pytest.approx(31.0)
    assert estimate.start_up == 0.0 and estimate.total == (4.0, 4.0)
    line = "6 jobs of about 4.0 s each and 31.0 s to start: about 55.0 s in total"
    assert estimate_line(estimate, 6, 1) == line
    assert estimate_line(estimate, 1, 1) == "1 job of about 35.0 s", "one job waits for them, too"


def test_the_first_update_counts_once() -> None:
    """It loads and compiles: 2 s of a probe of 3 s, whose other 9 updates take 0.1 s each, and 0.1 s to end."""
    times = [(1, 100.0), (2, 100.1), (10, 100.9)]
    first = first_updates(times, seconds=3.0, steps=10)
    assert first == pytest.approx((1, 2.1))
    assert per_update([], 3.0, 10, first) == pytest.approx((0.1, 0.1))
    assert per_update(lines((5, 2.5), (10, 2.9)), 3.0, 10, first) == pytest.approx((0.08, 0.1))
    assert first_updates([], 3.0, 10) == first_updates([(10, 1.0)], 3.0, 10) == (0, 0.0)


def test_names_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr("os.getloadavg", lambda: (6.25, 0.0, 0.0))
    assert _load() == " (on this busy machine: a load of 6.2 for 2 cores; faster once it is free)"
    monkeypatch.setattr("os.getloadavg", lambda: (1.4, 6.0, 6.0))
    assert _load() == ""
