"""How the pairs of a judgement run: how many at once, until when, again after a failure, and under which conditions."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from dlopt.lab.judge import command, running
from dlopt.sweeps.jobs import JobResult
from dlopt.sweeps.pool import JobSource, Pool
from tests.support.folders import make_run
from tests.support.line import dlopt

BASE = "model=mlp epochs=2 device=cpu"
WORDS = ("judge", BASE, "optimizer.lr=0.2", "output=out", "error_rate=0.5")  # three equal pairs decide


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], list[int]]:
    """Returns a function after which a pool of so many slots makes runs; it returns how many ran at once."""

    def install(slots: int) -> list[int]:
        counts: list[int] = []

        def run(source: JobSource, pool: Pool, overview: Any) -> None:
            while jobs := [job for _ in range(slots) if (job := source.next()) is not None]:
                counts.append(len(jobs))
                for job in jobs:
                    template = tmp_path / "made" / job.folder.path.parent.name
                    shutil.rmtree(template, ignore_errors=True)
                    gain = 0.1 * (template.name == "change")
                    shutil.copytree(
                        make_run(template, accuracies=(0.1, 0.5 + gain)), job.folder.path, dirs_exist_ok=True
                    )
                    (job.folder.path / "config.yaml").write_text(yaml.safe_dump({**job.plan.saved}))
                    source.ended(job, JobResult("finished", {}))

        monkeypatch.setattr(running.pools, "run", run)
        monkeypatch.setattr(running.pools, "warm_up", lambda: None)
        started = command.run
        monkeypatch.setattr(command, "run", lambda judged, pool, plan_job: started(judged, _pool(slots), plan_job))
        return counts

    return install


def _pool(slots: int) -> Pool:
    return Pool(slots, lambda *_: pytest.fail("no process starts"), lambda _: None)


@pytest.mark.parametrize(("slots", "counts"), [(1, [1] * 6), (5, [4, 4])])
def test_pairs_fill_the_slots_and_are_printed_in_the_unit_of_the_metric(
    slots: int, counts: list[int], at_once: Callable[[int], list[int]], tmp_path: Path
) -> None:
    counted = at_once(slots)
    result = dlopt(tmp_path, *WORDS)
    assert result.code == 0, result.err
    assert counted == counts
    assert result.out.splitlines()[:3] == [
        "proposal 1 against this base, in out/1",
        "gain in validation accuracy (above 0, the change is better):",
        "  pair 1: +10.00 points; no interval yet",
    ]
    assert result.out.count("gain in validation accuracy (above") == 1 and result.out.count("  pair ") == 3
    assert "  pair 3: +10.00 points; so far +10.00 to +10.00\n" in result.out


def test_a_run_that_failed_runs_again_and_one_that_diverged_does_not(
    at_once: Callable[[int], list[int]], tmp_path: Path
) -> None:
    counted = at_once(2)
    assert dlopt(tmp_path, *WORDS).code == 0
    failed, diverged = (tmp_path / f"out/1/change/{seed}" for seed in (1000, 1001))
    for path, is_diverged in ((failed, False), (diverged, True)):
        (path / "summary.json").write_text(json.dumps({"status": "failed", "diverged": is_diverged, "reason": "x"}))
        (path / "mark").touch()
    ledger = tmp_path / "out/ledger.jsonl"
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:2]))  # undecided
    counted.clear()
    again = dlopt(tmp_path, *WORDS)
    assert "  pair 1: +10.00 points; no interval yet\n  pair 2: the change diverged; " in again.out, again.err
    assert counted[0] == 1 and not (failed / "mark").exists() and (diverged / "mark").exists()


def test_pairs_start_until_the_minutes_are_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ends: list[float] = []
    monkeypatch.setattr(command, "run", lambda judgement, *_: ends.append(judgement.end))
    monkeypatch.setattr(command.time, "monotonic", lambda: 1000.0)
    for words in (["minutes=2"], []):
        assert dlopt(tmp_path, *WORDS, *words).code == 4
    assert ends == [1120.0, float("inf")]


def test_runs_of_other_conditions_are_named(at_once: Callable[[int], list[int]], tmp_path: Path) -> None:
    at_once(2)
    words = ("judge", f"{BASE} threads=1", *WORDS[2:])
    first = dlopt(tmp_path, *words)
    assert first.code == 0 and "other conditions" not in first.err
    config = tmp_path / "out/1/base/1002/config.yaml"  # the last pair
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"threads": 3}))
    environment = config.parent / "environment.json"
    environment.write_text(json.dumps(json.loads(environment.read_text()) | {"dlopt": "0.0.1"}))
    message = dlopt(tmp_path, *words).err
    assert "warning: earlier runs of this proposal had other conditions: " in message
    assert "threads=1 (was 3)" in message and "0.0.1" in message and message.count("warning") == 1
    ledger = tmp_path / "out/ledger.jsonl"  # without a pair so far, those of the first pair
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:2]))
    config = tmp_path / "out/1/base/1000/config.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"threads": 5}))
    assert "threads=1 (was 5)" in dlopt(tmp_path, *words, "minutes=1e-9").err


def test_pairs_are_shown_without_a_display_of_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second overview would leave its bar on the terminal until the end."""
    from dlopt.tracking import overview

    made = []
    monkeypatch.setattr(overview.Overview, "__init__", lambda self, *_, silent=False, **__: made.append(silent))
    judgement = SimpleNamespace(waiting=list, looks=[], seeds=3, folder=tmp_path)
    running._Pairs(judgement, None, print)  # type: ignore[arg-type]
    assert made == [True]
