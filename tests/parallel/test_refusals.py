"""Impossible setups: one error line with the numbers, before anything is written."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.parallel.processes.launch import count_processes
from dlopt.parallel.processes.process_group import join
from tests.support.line import dlopt, refused
from tests.support.ranks import ROOT
from tests.support.sizes import TINY

MODES = ("ddp", "fsdp", "filter", "columns", "pipeline", "spatial", "hybrid")


@pytest.mark.parametrize("mode", MODES)
def test_nccl_without_cuda(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused(tmp_path, "train", f"parallel={mode}", "parallel.processes=2", "device=cuda", *TINY)
    assert message == "dlopt: device=cuda: no CUDA device is available; use device=cpu or device=auto\n"


def test_more_processes_than_gpus_from_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("auto", "cuda"):
        with pytest.raises(
            UserError, match=r"^parallel\.processes=3: this machine has 2 GPUs; start fewer processes, or"
        ):
            count_processes({"processes": 3}, device)


@pytest.mark.parametrize("mode", MODES)
def test_more_processes_than_gpus_from_a_launcher(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = (
        rf"^parallel={mode}: 4 processes on this machine, which has 2 GPUs; start fewer processes, or set device=cpu$"
    )
    with pytest.raises(UserError, match=message):
        join(mode, torch.device("cuda"), processes=None, timeout_minutes=1.0, master_addr=None, master_port=None)


RANKS = ({"RANK": "0", "WORLD_SIZE": "2"}, {"SLURM_PROCID": "0", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "2"})


@pytest.mark.parametrize("environment", RANKS)
def test_sweeps_inside_a_launcher(tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    message = refused(tmp_path, "train", "-m", *TINY, "seed=0,1")
    assert message.startswith(
        "dlopt: -m: cannot run inside torchrun or srun, because every rank would start the sweep; "
    )
    assert "every rank would start all trials" in refused(tmp_path, "benchmark", "optimizer=sgd")


def test_a_sweep_in_an_interactive_step_of_one_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_PROCID": "0", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}.items():
        monkeypatch.setenv(name, value)  # srun --pty bash
    assert dlopt(tmp_path, "train", "-m", *TINY, "seed=0,1", "dry_run=true").code == 0


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("dlopt: ")]


@pytest.mark.slow
def test_sweep_under_torchrun(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [
        *launcher,
        "-m",
        "dlopt",
        "train",
        "-m",
        *TINY,
        "device=cpu",
        "seed=0,1",
        f"hydra.sweep.dir={tmp_path}/sweep",
    ]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and not (tmp_path / "sweep").exists()
    reason = "cannot run inside torchrun or srun, because every rank would start the sweep; start it from a shell"
    assert f"dlopt: -m: {reason}" in done.stderr, done.stderr
    assert lines(done) == [f"dlopt: -m: {reason}"], done.stderr


@pytest.mark.slow
def test_every_sweep_job_starts_its_own_processes(tmp_path: Path) -> None:
    keys = ["parallel=ddp", "parallel.processes=2", "model.norm=none", "tracking=[]", "device=cpu", "seed=0,1"]
    done = dlopt(tmp_path, "train", "-m", *TINY, *keys, "hydra.sweep.dir=sweep")
    assert done.code == 0, done.err
    for job in ("0", "1"):
        summary = json.loads((tmp_path / "sweep" / job / "summary.json").read_text())
        assert (summary["status"], summary["processes"]) == ("finished", 2)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_unreachable_master(tmp_path: Path, launcher: str) -> None:
    """Nothing listens at the address; the timeout is configured."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        slurm = {"PROCID": 1, "STEP_ID": 0, "NTASKS": 2, "NNODES": 2, "JOB_ID": 1, "NODEID": 1, "LOCALID": 0}
        torch_run = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        torch_run |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        launcher_environment = (
            {f"SLURM_{name}": value for name, value in slurm.items()} if launcher == "srun" else torch_run
        )
        keys = ["parallel=ddp", "parallel.timeout_minutes=0.05", "device=cpu", f"hydra.run.dir={tmp_path}/run"]
        if launcher == "srun":
            keys += ["parallel.master_addr=127.0.0.1", f"parallel.master_port={port}"]
        environment = {**os.environ, **{name: str(value) for name, value in launcher_environment.items()}}
        line = [sys.executable, "-m", "dlopt", "train", *TINY, *keys]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and len(lines(done)) == 1, done.stderr
    message = lines(done)[0]
    assert f"rank 1 of 2 could not reach 127.0.0.1:{port} within parallel.timeout_minutes=0.05" in message
    assert message.endswith("; set parallel.master_addr and parallel.master_port")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_missing_ranks(tmp_path: Path) -> None:
    """Rank 0 of srun waits for the other, which has not started."""
    slurm = {"PROCID": 0, "STEP_ID": 0, "NTASKS": 2, "NNODES": 1, "JOB_ID": 1, "NODEID": 0, "LOCALID": 0}
    environment = os.environ | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    keys = ["parallel=ddp", "parallel.timeout_minutes=0.05", f"parallel.master_port={port}", "device=cpu"]
    line = [sys.executable, "-m", "dlopt", "train", *TINY, *keys, f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    [message] = lines(done)
    assert done.returncode == 2 and "not all of the 2 ranks have joined within this time" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
        address, _, port = endpoint.partition(":")
        launcher_environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": port}
        line = [sys.executable, "-m", "dlopt", "train", *TINY, "parallel=ddp", f"hydra.run.dir={tmp_path}/run"]
        environment = {**os.environ, **launcher_environment}
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert lines(done) == [f"dlopt: MASTER_PORT={port}: port in use at {address}; choose another one"]
    assert not (tmp_path / "run").exists()
