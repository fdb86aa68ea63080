"""Parts of a submitted sweep, as processes on this machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from dlopt.basics.files import read_json
from dlopt.sweeps.element import RESTARTS
from tests.support.line import dlopt
from tests.support.processes import run_dlopt
from tests.support.ranks import ROOT
from tests.support.requires import requires
from tests.support.slurm import LONG
from tests.sweeps.fake_slurm import SMALL, SUBMIT

LONG_IN_ONE_PROCESS = [word for word in LONG if not word.startswith(("parallel", "epochs"))]


def start(folder: Path, *words: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "dlopt", *words]
    return subprocess.Popen(
        line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def statuses(sweep: Path) -> Sequence[str]:
    return [str((read_json(path / "summary.json") or {}).get("status")) for path in sorted(sweep.glob("[0-9]*"))]


@requires("git")
@pytest.mark.parametrize("edition", [1, 2], ids=["in a repository", "in none"])
def test_the_submitted_code_runs(edition: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class is edited after the submission: the jobs use it as it was, and record its hash; without Git as it is."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    if edition == 1:
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
    module = tmp_path / "mine_edited.py"
    text = "import torch\nprint('edition', 1)\nclass Own(torch.optim.SGD): pass\n"
    module.write_text(text)
    own = [
        "optimizer=custom",
        "optimizer._target_=mine_edited.Own",
        "allow_packages=[mine_edited]",
        "+optimizer.lr=0.1",
    ]
    assert dlopt(tmp_path, *SUBMIT, *SMALL, "epochs=1", "seed=0,1", *own).code == 0
    module.write_text(text.replace("1", "2"))
    worker = run_dlopt(tmp_path, "sweep", "work", "sweep", environment={**os.environ, "PYTHONPATH": str(ROOT)})
    assert worker.returncode == 0 and statuses(tmp_path / "sweep") == ["finished"] * 2, worker
    for number in range(2):
        assert f"edition {edition}\n" in (tmp_path / f"sweep/{number}/output.log").read_text()
        facts = read_json(tmp_path / f"sweep/{number}/environment.json") or {}
        assert len(facts["submitted_code"]) == 64
    result = dlopt(tmp_path, "sweep", "status", "sweep")
    assert result.code == 0 and result.out.startswith("2 jobs: 2 finished\n")


@pytest.mark.slow
def test_a_killed_element_a_stopped_one_and_a_doubled_one(tmp_path: Path) -> None:
    """The second resumes the job of the first, and the third that of the second: once each, from its checkpoint."""
    line = [*SUBMIT, *LONG_IN_ONE_PROCESS, "epochs=200", "optimizer.lr=0.01,0.02"]
    assert start(tmp_path, *line).wait(100) == 0
    sweep, first = tmp_path / "sweep", tmp_path / "sweep/0/metrics.jsonl"

    def wait_for(lines: int, part: "subprocess.Popen[str]") -> None:
        deadline = time.monotonic() + 100
        while not first.exists() or len(first.read_text().splitlines()) < lines:
            assert time.monotonic() < deadline and part.poll() is None, part.communicate()
            time.sleep(0.1)

    part = start(tmp_path, "sweep", "work", "sweep", "part=1/2")
    wait_for(10, part)
    part.kill()
    part.wait()
    part = start(tmp_path, "sweep", "work", "sweep", "part=1/2")
    wait_for(40, part)
    doubled = start(tmp_path, "sweep", "work", "sweep", "part=1/2")
    said, _ = doubled.communicate(timeout=100)
    assert doubled.returncode == 0 and "job 0 interrupted: running elsewhere" in said, said
    part.send_signal(signal.SIGUSR1)
    said, _ = part.communicate(timeout=100)
    assert part.returncode == 75 and "SIGUSR1: stopping 1 job" in said
    assert statuses(sweep)[0] == "interrupted"
    assert (read_json(sweep / "0" / RESTARTS) or {})["count"] == 0  # there was progress
    part = start(tmp_path, "sweep", "work", "sweep", "n_jobs=2")
    said, _ = part.communicate(timeout=200)
    assert part.returncode == 0 and statuses(sweep) == ["finished"] * 2, said
    assert len((read_json(sweep / "0/summary.json") or {})["resumed_from"]) == 2


@pytest.mark.slow
def test_a_failed_job_stops_the_sweep(tmp_path: Path) -> None:
    """Where that was asked for: the others are interrupted with checkpoints, or never start."""
    targets = ["data.train._target_=tests.support.slurm.Deadly,tests.support.slurm.Slow", "seed=0,1"]
    line = [*LONG_IN_ONE_PROCESS, *targets, "epochs=2", "hydra.launcher.stop_on_failure=true", "hydra.sweep.dir=sweep"]
    local = start(tmp_path, "train", "-m", *line)
    said, _ = local.communicate(timeout=200)
    assert local.returncode == 1 and "job 0 failed: stopped; resume with resume=auto" in said, said
    assert statuses(tmp_path / "sweep") == ["failed"]
