"""Jobs forked from a process that has imported torch: the same bits, each for itself, none outlives its sweep."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import yaml

from dlopt.basics.folders import RunFolder
from dlopt.config.compose import Composer
from dlopt.config.resolve import choices_of, to_plain
from dlopt.run.record import describe
from dlopt.sweeps.jobs import OUTPUT
from dlopt.sweeps.pool import Forked, spawn
from dlopt.training.checkpoint import checkpoints

ROOT = Path(__file__).resolve().parents[2]


def described(folder: Path, *overrides: str) -> Path:
    config = Composer().compose(["data.subset=100", "threads=1", "tracking=[]", *overrides])
    describe(folder, to_plain(config, overrides)[1], [], choices_of(config))
    return folder


def ended(process: Forked, seconds: float = 300) -> int | str:
    deadline = time.monotonic() + seconds
    while (code := process.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return code


@pytest.mark.slow
def test_forked_and_fresh_processes_compute_the_same_bits(tmp_path: Path) -> None:
    line = ["epochs=2", "augmentation=crop_flip", "model=resnet20", "data.subset=40"]
    forked, fresh = described(tmp_path / "forked", *line), described(tmp_path / "fresh", *line)
    assert ended(spawn(forked, {}, None)) == 0
    subprocess.run([sys.executable, "-m", "dlopt.run.job", str(fresh)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    ours, theirs = (checkpoints.load(folder / "checkpoints/last.pt").model for folder in (forked, fresh))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert "test" in (forked / OUTPUT).read_text()


def test_killing_a_job_does_not_affect_others(tmp_path: Path) -> None:
    line = ["model=mlp", "model.widths=[4]", "epochs=100000", "checkpoint.every_epochs=null"]
    first, second = (spawn(described(tmp_path / name, *line), {}, None) for name in ("first", "second"))
    deadline = time.monotonic() + 300
    while not all((tmp_path / name / "metrics.jsonl").exists() for name in ("first", "second")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    first.kill()
    assert ended(first) == -signal.SIGKILL and second.poll() is None
    second.stop()
    assert ended(second) == 75
    assert (RunFolder(tmp_path / "second").summary() or {})["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_a_job_outlives_its_server_and_can_still_be_stopped(tmp_path: Path) -> None:
    """The server may be killed for want of memory. The job is stopped (SIGSTOP), too."""
    line = ["model=mlp", "model.widths=[4]", "epochs=100000", "checkpoint.every_epochs=null"]
    job = spawn(described(tmp_path / "run", *line), {}, None)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]
    job._process.join()  # multiprocessing takes the job for ended
    assert job.poll() is None and RunFolder(tmp_path / "run").is_live()
    os.kill(job._process.pid or 0, signal.SIGSTOP)
    job.stop()
    assert ended(job) == "returned"
    assert (RunFolder(tmp_path / "run").summary() or {})["status"] == "interrupted"
    job.kill()  # has ended
    assert ended(spawn(described(tmp_path / "next", *line[:2], "epochs=1"), {}, None)) == 0  # by another server


def test_jobs_have_their_own_environment_and_cores(tmp_path: Path) -> None:
    name = f"package_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        "import gc, os, pathlib, threading, torch\n"
        "class Sgd(torch.optim.SGD):\n"
        "    def __init__(self, params, *, lr: float) -> None:\n"
        "        super().__init__(params, lr=lr)\n"
        "        threads = [each.name for each in threading.enumerate()]\n"
        "        facts = [os.environ.get('CUDA_VISIBLE_DEVICES'), len(os.sched_getaffinity(0)), os.getcwd()]\n"
        "        facts += [gc.get_freeze_count() > 100_000]\n"
        "        pathlib.Path(os.environ['PLACE']).write_text(repr([*facts, torch.cuda.is_initialized(), threads]))\n"
    )
    folder = described(tmp_path / "run", "model=mlp", "epochs=1")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {
        "allow_packages": [name],
        "optimizer": {"_target_": f"{name}.Sgd", "lr": 0.1, "groups": [], "layer_decay": None, "state_dtype": None},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    core = min(os.sched_getaffinity(0))
    environment = {"CUDA_VISIBLE_DEVICES": "7", "PLACE": str(tmp_path / "facts")}
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        process = spawn(folder, environment, {core})
    finally:
        os.chdir(before)
    assert ended(process) == 0, (folder / OUTPUT).read_text()
    assert (tmp_path / "facts").read_text() == repr(["7", 1, str(tmp_path), True, False, ["MainThread", "sweep"]])


def test_modules_in_the_working_directory_do_not_replace_those_of_python(tmp_path: Path) -> None:
    folder = described(tmp_path / "run", "model=mlp", "model.widths=[4]", "epochs=1")
    work = tmp_path / "work"
    work.mkdir()
    for name in ("attr", "random", "socket"):
        (work / f"{name}.py").write_text("raise SystemExit(7)")
    code = (
        "import sys, time; from pathlib import Path; from dlopt.sweeps.pool import spawn\n"
        "if __name__ == '__main__':\n    process = spawn(Path(sys.argv[1]), {}, None)\n"
        "    while process.poll() is None: time.sleep(0.05)\n    sys.exit(process.poll())\n"
    )
    (tmp_path / "sweep.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(tmp_path / "sweep.py"), str(folder)], env=environment, cwd=work, check=True)
    assert (RunFolder(folder).summary() or {})["status"] == "finished"


@pytest.mark.slow
def test_job_of_a_killed_sweep_writes_a_checkpoint_and_ends(tmp_path: Path) -> None:
    folder = described(
        tmp_path / "run", "model=mlp", "model.widths=[4]", "epochs=100000", "checkpoint.every_epochs=null"
    )
    code = (
        "import sys, time; from pathlib import Path; from dlopt.sweeps.pool import spawn\n"
        "if __name__ == '__main__':\n    process = spawn(Path(sys.argv[1]), {}, None); time.sleep(600)\n"
    )
    (tmp_path / "sweep.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "sweep.py"), str(folder)]
    sweep = subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists():
        assert time.monotonic() < deadline and sweep.poll() is None
        time.sleep(0.1)
    sweep.kill()
    _, err = sweep.communicate()  # until the server has ended, too
    assert err == ""
    while RunFolder(folder).is_live():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (RunFolder(folder).summary() or {})["status"] == "interrupted"
    assert (folder / "checkpoints/last.pt").is_file()


FUNCTIONS = """
import torch

class Squares:
    def __init__(self, count):
        self.value = lambda index: (torch.tensor([float(index)]), index % 2)  # what cannot be pickled
        self.count = count
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        return self.value(index)
"""


@pytest.fixture
def squares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A dataset that a worker reads."""
    (tmp_path / "squares.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return [
        "model=mlp", "model.widths=[4]", "epochs=1", "data=custom", "data.workers=1", "data.memory=false",
        "data.train._target_=squares.Squares", "+data.train.count=200", "allow_packages=[squares]",
    ]  # fmt: skip


def test_loader_workers_are_forked_from_the_job(squares: list[str], tmp_path: Path) -> None:
    """As in a run outside of a sweep: a dataset that holds functions works, and workers share the job's memory."""
    process = spawn(described(tmp_path / "run", *squares), {}, None)
    assert ended(process) == 0, (tmp_path / "run" / OUTPUT).read_text()


def test_a_job_that_fails_does_not_wait_for_its_workers(squares: list[str], tmp_path: Path) -> None:
    """They outlive a termination signal by a minute."""
    process = spawn(described(tmp_path / "run", *squares, "epochs=9", "optimizer.lr=1e30"), {}, None)
    deadline = time.monotonic() + 300
    while RunFolder(tmp_path / "run").summary() is None:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    assert ended(process, seconds=30) == 1


@pytest.mark.parametrize("name", ["output", "config"])
def test_missing_folder_or_config_fails(name: str, tmp_path: Path) -> None:
    if name == "config":
        (tmp_path / "run").mkdir()
    assert ended(spawn(tmp_path / "run", {}, None)) != 0
