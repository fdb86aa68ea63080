"""Processes that `dlopt train` starts itself."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dlopt.errors import USER_ERROR
from dlopt.losses import MSE
from dlopt.parallel.launch import count_processes, python_module, run_processes
from tests.parallel.ranks import ROOT


def is_rank_1() -> bool:
    return "1" in (os.environ.get("DLOPT_RANK"), os.environ.get("RANK"))


class FailingLossOnRank1(MSE):
    """As a bug does it: in the middle of an update."""

    called = 0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.called += 1
        if is_rank_1() and self.called > 30:
            raise ZeroDivisionError(f"nothing at {time.time()}")
        return super().forward(outputs, targets)


class FailingOnRank1(torch.utils.data.Dataset[tuple[Tensor, float]]):
    """A regression whose samples one rank cannot have once the training goes on."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.given = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        self.given += 1
        if is_rank_1() and self.given > 3 * self.count:
            raise ZeroDivisionError(f"nothing at {time.time()}")
        return torch.full((3,), index / self.count), index / self.count


def command(folder: Path, *overrides: str) -> list[str]:
    lines = ["device=cpu", "threads=1", "tracking=[]", "parallel=ddp", "parallel.processes=2", *overrides]
    return [sys.executable, "-m", "dlopt", "train", f"hydra.run.dir={folder}", *lines]


SMALL = ["data.subset=100", "data.workers=0", "model=mlp", "model.widths=[8]"]


def test_a_signal_ends_all_with_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    line = command(folder, *SMALL, "epochs=100000", "checkpoint.every_epochs=null")
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text()) < 100:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert (folder / "checkpoints" / "last.pt").exists()
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"


def rank_1(folder: Path) -> int:
    """Its process."""
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (
                b"DLOPT_RANK=1" in (each / "environ").read_bytes()
                and str(folder).encode() in (each / "cmdline").read_bytes()
            ):
                return int(each.name)
    raise LookupError(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_rank_that_waits_for_the_others_is_not_torn_by_a_signal_that_comes_again(tmp_path: Path) -> None:
    """As Slurm sends it a second time when a busy node is slow to answer: rank 0 is still writing the checkpoint."""
    folder = tmp_path / "run"
    large = [
        "data.subset=100",
        "data.workers=0",
        "model=mlp",
        "model.widths=[4096,4096]",
        "checkpoint.asynchronous=false",
    ]
    line = command(folder, *large, "epochs=100000", "checkpoint.every_epochs=null", "stopping=none")
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text()) < 100:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.1)
    rank = rank_1(folder)
    while not (folder / "summary.json").exists():
        os.kill(rank, signal.SIGTERM)
        time.sleep(0.01)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 75, told
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"


BAD_LOSS = [*SMALL, "loss=mse", "loss._target_=tests.parallel.test_launch.FailingLossOnRank1"]
BAD_DATA = [
    "data=custom", "data.train._target_=tests.parallel.test_launch.FailingOnRank1", "+data.train.count=60",
    "data.test=null", "data.memory=false", "data.workers=0", "model=mlp", "normalize=none", "loss=mse",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "what", "mode"),
    [
        ("dlopt", BAD_LOSS, "ddp"),
        ("dlopt", BAD_LOSS, "fsdp"),
        ("dlopt", BAD_LOSS, "filter"),
        ("dlopt", BAD_LOSS, "pipeline"),
        ("torchrun", BAD_LOSS, "ddp"),
        ("torchrun", BAD_LOSS, "filter"),
        ("dlopt", BAD_DATA, "ddp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "data" if value is BAD_DATA else "loss",
)
def test_an_exception_on_one_rank_ends_all_within_half_a_minute_and_names_it(
    tmp_path: Path, launcher: str, what: list[str], mode: str
) -> None:
    line = command(tmp_path / "run", *what, f"parallel={mode}", "allow_packages=[tests]", "epochs=1000")
    if launcher == "torchrun":
        line[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=180)
    ended = time.time()
    assert done.returncode == 1, done.stderr
    told = [each for each in done.stderr.splitlines() if each.startswith("dlopt: ")]
    assert len(told) == 1, "what it did to the others is not worth a message"
    found = re.fullmatch(r"dlopt: rank 1: .*: ZeroDivisionError: nothing at ([\d.]+)", told[0])
    assert found is not None, told
    assert ended - float(found[1]) < 30
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "rank 1: " in summary["reason"]


@pytest.mark.slow
def test_a_users_mistake_leaves_no_folder(tmp_path: Path) -> None:
    line = command(tmp_path / "run", *SMALL, "parallel.static_graph=true", "accumulate=2")
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("dlopt: parallel.static_graph=true") and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [*launcher, *command(tmp_path / "run", *SMALL, "epochs=2")[1:]]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["processes"]) == ("finished", 2)


def test_how_many_processes_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert count_processes({}, "auto") == 1
    assert count_processes({"processes": None}, "auto") == 1
    assert count_processes({"processes": 3}, "auto") == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert count_processes({"processes": None}, "cuda") == 2
    assert count_processes({"processes": 3}, "cpu") == 3


def test_a_folder_of_the_users_does_not_shadow_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("random", "signal", "dlopt"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(99)")
    monkeypatch.chdir(tmp_path)
    codes, _, _ = run_processes(python_module("dlopt.job", "nowhere"), 1, {})
    assert codes == [USER_ERROR], "there is no config.yaml to run"
