"""The state of a submitted grid, from its run folders and from Slurm's queue."""

import json
from pathlib import Path

import pytest

from dlopt.basics.locks import hold
from dlopt.sweeps import status
from dlopt.sweeps.array import SUBMISSION, WORKERS, JobArray, JobEntry
from dlopt.sweeps.slurm_queue import note_array
from tests.support.line import dlopt
from tests.sweeps.fake_slurm import WriteTool


def submit(sweep: Path, count: int, elements: int) -> None:
    (sweep / WORKERS).mkdir(parents=True, exist_ok=True)
    JobArray(tuple(JobEntry(str(number), f"seed={number}", "epochs=1") for number in range(count)), elements).write(
        sweep
    )
    (sweep / WORKERS / SUBMISSION).write_text("{}")


def test_a_submitted_sweep(tmp_path: Path, write_tool: WriteTool) -> None:
    """Jobs as their folders and Slurm's queue say; there is no other record."""
    sweep = tmp_path / "s"
    for number, ended in enumerate(("finished", None, "interrupted", "interrupted", "failed", None, None)):
        (sweep / str(number)).mkdir(parents=True)
        if ended is not None:
            summary = {"status": ended, "reason": "disk full" if ended == "failed" else ""}
            (sweep / str(number) / "summary.json").write_text(json.dumps(summary))
    submit(sweep, 8, 4)
    note_array(sweep, "21")
    states = {0: "RUNNING", 1: "PENDING", 2: "CONFIGURING"}
    reasons = {0: "None", 1: "QOSMaxJobsPerUserLimit", 2: "None"}
    rows = [
        f"{21:<24}{index:<12}{state:<24}{reasons[index]:<96}{sweep}/workers/%A_%a.log"
        for index, state in states.items()
    ]
    write_tool("squeue", "\n".join(f"echo '{row}'" for row in rows))
    with hold(sweep / "1/.lock"), hold(sweep / "6/.lock"):
        result = dlopt(tmp_path, "sweep", "status", "s")
        document = json.loads(dlopt(tmp_path, "sweep", "status", "s", "--json").out)
    assert result.code == 75 and result.out.splitlines() == [
        "8 jobs: 1 finished, 2 running, 4 queued, 1 failed",
        "elements of Slurm job 21: 3 running, 1 pending",
        "  1 pending: QOSMaxJobsPerUserLimit",
        "  job 1: seed=1  (21_0)",
        "  job 6: seed=6  (another process)",
        "  s/4 failed: disk full",
    ]
    assert document["workers"] == ["21_0", "21_2", "another process"] and document["waiting_workers"] == 1
    assert document["pending_reasons"] == {"QOSMaxJobsPerUserLimit": 1}
    assert (document["slurm_jobs"], document["slurm_answers"], document["ended_early"]) == (["21"], True, {})
    assert [job["reason"] for job in document["jobs"]] == [*[None] * 4, "disk full", *[None] * 3]
    assert [job["worker"] for job in document["jobs"]] == [None, "21_0", *[None] * 4, "another process", None]
    write_tool("squeue", "true")
    write_tool("sacct", "echo '21_0|TIMEOUT\n21_1|COMPLETED\n21_2|NODE_FAIL'")
    assert dlopt(tmp_path, "sweep", "status", "s").out.splitlines() == [
        "8 jobs: 1 finished, 4 queued, 2 interrupted, 1 failed",
        "  s/4 failed: disk full",
        "ended early: 21_0 TIMEOUT, 21_2 NODE_FAIL",
        "nothing runs the jobs that are left; to continue: dlopt sweep resume s",
    ]
    document = json.loads(dlopt(tmp_path, "sweep", "status", "s", "--json").out)
    assert document["ended_early"] == {"21_0": "TIMEOUT", "21_2": "NODE_FAIL"}
    write_tool("squeue", "exit 1")
    assert json.loads(dlopt(tmp_path, "sweep", "status", "s", "--json").out)["slurm_answers"] is False
    assert "warning: squeue does not answer\n" in dlopt(tmp_path, "sweep", "status", "s").out


def test_a_look_asks_slurm_once(tmp_path: Path, write_tool: WriteTool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again after 2, 4, 8, 16, 32, 32, ... seconds, however often the folders are read."""
    submit(tmp_path / "s", 2, 1)
    note_array(tmp_path / "s", "21")
    write_tool("squeue", f"echo asked >>{tmp_path}/calls")
    now, calls = 1000.0, []
    monkeypatch.setattr(status.time, "monotonic", lambda: now)
    reader = status.StatusReader(tmp_path / "s")
    for second in range(100):
        now = 1000.0 + second
        reader.read()
        if (tmp_path / "calls").read_text().count("asked") > len(calls):
            calls.append(second)
    assert calls == [0, 2, 6, 14, 30, 62, 94]
