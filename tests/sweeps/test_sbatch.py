"""Job scripts that `hydra/launcher=slurm` submits."""

from pathlib import Path

import pytest

from dlopt.basics.errors import FAILED, UserError
from dlopt.sweeps import slurm as launcher
from dlopt.sweeps.pool import build_pool
from tests.support.line import dlopt, refused
from tests.sweeps.fake_slurm import SETTINGS, WriteTool


def test_options_of_sbatch(write_tool: WriteTool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The job script of a job with two nodes of 8 GPUs."""
    write_tool("sbatch", 'for script; do :; done\ncp "$script" script\necho Submitted batch job 7')
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    resources = {"nodes": 2, "tasks_per_node": 8, "gpus_per_node": 8, "cpus_per_task": 12}
    build_pool(launcher.slurm, {**SETTINGS, **resources}).start(0, tmp_path / "run", {})
    script = (tmp_path / "script").read_text()
    for option in ("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=12", "signal=USR1@120"):
        assert f"#SBATCH --{option}\n" in script, script


def test_job_does_not_end_while_the_controller_is_busy(
    write_tool: WriteTool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_tool("sbatch", "echo Submitted batch job 7")
    write_tool("squeue", "exit 1")
    monkeypatch.setattr(launcher, "_SUMMARY_SECONDS", 0.0)
    (tmp_path / "run").mkdir()
    job = build_pool(launcher.slurm, SETTINGS).start(0, tmp_path / "run", {})
    assert job.poll() is None
    write_tool("squeue", "")
    assert job.poll() == FAILED


def test_an_earlier_job_counts_as_running_until_squeue_answers(
    write_tool: WriteTool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_tool("sbatch", "echo Submitted batch job 8")
    write_tool("squeue", "exit 1")
    monkeypatch.setattr(launcher, "_SUMMARY_SECONDS", 0.0)
    (tmp_path / "run/slurm").mkdir(parents=True)
    (tmp_path / "run/slurm/job_id").write_text("7\n")
    pool = build_pool(launcher.slurm, SETTINGS)
    job = pool.find(tmp_path / "run")
    assert job is not None and job.poll() is None
    write_tool("squeue", "")  # it answers: job 7 has ended
    assert job.poll() == FAILED and pool.find(tmp_path / "run") is None


def test_several_processes_need_a_parallel_mode(
    write_tool: WriteTool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_tool("sbatch", "")
    monkeypatch.setattr("dlopt.sweeps.estimate.estimate_job", lambda *_: None)
    keys = ["-m", "hydra/launcher=slurm", "hydra.launcher.nodes=2", "seed=0,1", "dry_run=true"]
    assert "starts 2 processes per job, which would train the same model" in refused(tmp_path, "train", *keys)
    assert dlopt(tmp_path, "train", *keys, "parallel=ddp").code == 0


def test_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="sbatch was not found"):
        build_pool(launcher.slurm, SETTINGS)
