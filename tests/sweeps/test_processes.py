"""Jobs forked from a process that has imported torch: the same bits, each for itself, none outlives its sweep."""

import json
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
from torch import Tensor

from dlopt.basics.folders import RunFolder
from dlopt.config.compose import Composer
from dlopt.config.resolve import choices_of, to_plain
from dlopt.run.record import describe
from dlopt.sweeps.jobs import OUTPUT
from dlopt.sweeps.pool import Forked, spawn
from dlopt.training.checkpoint import checkpoints
from tests.support.slurm import LONG, Slow

ROOT = Path(__file__).resolve().parents[2]


class Starting(Slow):
    """Starts a process that would never end."""

    def __init__(self) -> None:
        child = subprocess.Popen(["sleep", "1000"])
        Path(os.environ["STARTED"]).write_text(str(child.pid))


class Forking(Slow):
    """Forks, and both processes return into the training."""

    def __init__(self) -> None:
        self.has_forked = False

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        if not self.has_forked:
            self.has_forked = True
            if (child := os.fork()) != 0:
                Path(os.environ["STARTED"]).write_text(str(child))
        return super().__getitem__(index)


def described(folder: Path, *overrides: str) -> Path:
    config = Composer(words=overrides).compose(["data.subset=100", "threads=1", "tracking=[]", *overrides])
    describe(folder, to_plain(config)[1], [], choices_of(config))
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


def run_with(data: str, tmp_path: Path) -> int:
    """Runs a job with a dataset of this module; returns the process that the dataset has started."""
    words = [word for word in LONG if not word.startswith(("parallel", "epochs", "data.train"))]
    words += ["data.subset=null", "epochs=3", f"data.train._target_={__name__}.{data}"]
    assert ended(spawn(described(tmp_path / "run", *words), {"STARTED": str(tmp_path / "started")}, None)) == 0
    return int((tmp_path / "started").read_text())


def test_the_children_of_a_job_end_with_it(tmp_path: Path) -> None:
    child = run_with("Starting", tmp_path)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}/status").exists() and "zombie" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_job_that_forks_writes_once(tmp_path: Path) -> None:
    """The forked process ends before it writes; the metrics are those of one process, each epoch once."""
    run_with("Forking", tmp_path)
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3]
    output = (tmp_path / "run" / OUTPUT).read_text()
    assert output.count("a forked process of this run ends, because its parent writes the same folder") == 1
    assert output.count("finished after 3 epochs") == 1


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
        "optimizer": {"_target_": f"{name}.Sgd", "lr": 0.1, "groups": [], "layer_decay": None},
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
