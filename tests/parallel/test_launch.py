"""Processes started by dlopt's own launcher."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dlopt
from dlopt.basics.errors import INTERRUPTED, USER_ERROR, RunError
from dlopt.basics.folders import RunFolder
from dlopt.basics.interruption import Interruption
from dlopt.losses import MSE
from dlopt.parallel.processes import launch
from dlopt.parallel.processes.launch import count_processes, end_with_torchrun, group_code, python_module, run_processes
from tests.support.processes import Done, run_dlopt
from tests.support.ranks import ENDLESS, ROOT, TWO, command


def is_rank_1() -> bool:
    return "1" in (os.environ.get("DLOPT_RANK"), os.environ.get("RANK"))


class FailingLossOnRank1(MSE):
    """Fails in the middle of an update, as a bug would."""

    calls = 0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if is_rank_1() and self.calls > 30:
            raise ZeroDivisionError(f"nothing at {time.time()}")
        return super().forward(outputs, targets)


class FailingOnRank1(torch.utils.data.Dataset[tuple[Tensor, float]]):
    """A regression whose samples fail to load on rank 1 after some epochs."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.loaded = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        self.loaded += 1
        if is_rank_1() and self.loaded > 6 * self.count:
            raise ZeroDivisionError(f"nothing at {time.time()}")
        return torch.full((3,), index / self.count), index / self.count


class BadOnRank1(MSE):
    """Does on rank 1, in the middle of an update, what the environment says; each rank leaves its process id."""

    calls = 0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls == 1:
            Path(os.environ["BAD_FOLDER"], str(os.getpid())).touch()
        if is_rank_1() and self.training and self.calls == 10:
            match os.environ["BAD"]:
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "exits":
                    os._exit(0)
                case "memory":
                    raise MemoryError("cannot allocate 2 GiB")
                case "hangs":
                    time.sleep(600)
        return super().forward(outputs, targets)


def rank_1(folder: Path) -> int:
    """Returns the process id of rank 1."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (
                b"DLOPT_RANK=1" in (entry / "environ").read_bytes()
                and str(folder).encode() in (entry / "cmdline").read_bytes()
            ):
                return int(entry.name)
    raise LookupError(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_repeated_signals_do_not_kill_a_rank_waiting_for_a_checkpoint(tmp_path: Path) -> None:
    """Slurm may send the signal again on a busy node, while rank 0 is still writing the checkpoint."""
    folder = tmp_path / "run"
    large = ["model.widths=[4096,4096]", "checkpoint.asynchronous=false", "checkpoint.every_epochs=null"]
    process = subprocess.Popen(
        command(folder, TWO, *large, *ENDLESS), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text()) < 100:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.1)
    rank = rank_1(folder)
    while not (folder / "summary.json").exists():
        os.kill(rank, signal.SIGTERM)
        time.sleep(0.01)
    stderr = process.communicate(timeout=300)[1]
    assert process.returncode == 75, stderr
    assert (folder / "checkpoints" / "last.pt").exists()
    assert "overrides: output=" in (folder / "train.log").read_text()
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"


BAD_LOSS = ["loss=mse", "loss._target_=tests.parallel.test_launch.FailingLossOnRank1"]
BAD_DATA = [
    "data=custom", "data.train._target_=tests.parallel.test_launch.FailingOnRank1", "+data.train.count=60",
    "data.subset=null", "data.test=null", "data.memory=false", "normalize=none", "loss=mse",
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
        ("dlopt", BAD_DATA, "ddp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "data" if value is BAD_DATA else "loss",
)
def test_exception_on_one_rank_ends_all_within_30_seconds_and_is_reported_once(
    tmp_path: Path, launcher: str, what: list[str], mode: str
) -> None:
    line = command(tmp_path / "run", TWO, *what, f"parallel={mode}", "allow_packages=[tests]", "epochs=1000")
    done: Done | subprocess.CompletedProcess[str]
    if launcher == "torchrun":
        line[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    else:
        done = run_dlopt(ROOT, *line[3:])
    ended = time.time()
    assert done.returncode == 1, done.stderr
    messages = [entry for entry in done.stderr.splitlines() if entry.startswith("dlopt: ")]
    assert len(messages) == 1, "consequences on the other ranks are not reported"
    match = re.fullmatch(r"dlopt: rank 1: .*: ZeroDivisionError: nothing at ([\d.]+)", messages[0])
    assert match is not None, messages
    assert ended - float(match[1]) < 30
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and "rank 1: " in summary["reason"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("to", "number", "code"),
    [("rank", signal.SIGUSR1, 1), ("torchrun", signal.SIGTERM, 1), ("torchrun", signal.SIGKILL, -signal.SIGKILL)],
)
def test_signals_to_torchrun_and_to_one_of_its_ranks(tmp_path: Path, to: str, number: int, code: int) -> None:
    """All ranks write a checkpoint, and none outlives torchrun. See docs/cluster.md."""
    line = command(tmp_path / "run", TWO, *ENDLESS, "parallel=ddp")
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    line[1:1] = ["-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", "2"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as agent:
        wait_for((tmp_path / "run/checkpoints/last.pt").exists)
        ranks = [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]
        os.kill(ranks[-1] if to == "rank" else agent.pid, number)
        assert agent.wait(120) == code
    wait_for(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks))
    summary = RunFolder(tmp_path / "run").summary()
    assert summary is None if number == signal.SIGKILL else summary and summary["status"] == "interrupted"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bad", "mode", "message"),
    [
        ("killed", "fsdp", r"rank 1 was killed by SIGKILL \(out of memory\?\)"),
        ("killed", "pipeline", r"rank 1 was killed by SIGKILL \(out of memory\?\)"),
        ("exits", "ddp", "rank 1 exited"),
        ("memory", "fsdp", "rank 1: .*MemoryError: cannot allocate 2 GiB"),
        ("hangs", "pipeline", "rank 1 exited, or did not respond within parallel.timeout_minutes"),
    ],
)
def test_a_bad_rank_is_named_and_leaves_no_process(bad: str, mode: str, message: str, tmp_path: Path) -> None:
    loss = ["loss=mse", "loss._target_=tests.parallel.test_launch.BadOnRank1", "allow_packages=[tests]"]
    line = command(tmp_path / "run", TWO, *loss, f"parallel={mode}", "epochs=1000", "parallel.timeout_minutes=0.1")
    (tmp_path / "processes").mkdir()
    done = run_dlopt(ROOT, *line[3:], environment={**os.environ, "BAD": bad, "BAD_FOLDER": str(tmp_path / "processes")})
    assert done.returncode == 1, done.stderr
    said = [entry for entry in done.stderr.splitlines() if entry.startswith("dlopt: ")]
    assert re.search(message, said[-1]) and all("rank 1" in each for each in said), done.stderr
    assert ("Traceback" in done.stderr) == (bad == "memory"), "only an error in the user's code has one"
    processes = [int(path.name) for path in (tmp_path / "processes").iterdir()]
    assert processes and not any(map(is_running, processes)), "no rank outlives the run"
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "failed"


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_config_errors_leave_no_folder(tmp_path: Path) -> None:
    line = command(tmp_path / "run", TWO, "parallel.static_graph=true", "accumulate=2")
    done = run_dlopt(ROOT, *line[3:])
    assert done.returncode == 2
    # Of the rank that is the first to notice
    assert re.match(r"dlopt: (rank 1: )?parallel\.static_graph=true", done.stderr) and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert count_processes({}, "auto") == 1
    assert count_processes({"processes": None}, "auto") == 1
    assert count_processes({"processes": 3}, "auto") == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert count_processes({"processes": None}, "cuda") == 2
    assert count_processes({"processes": 3}, "cpu") == 3


@pytest.mark.slow
def test_files_in_the_working_directory_do_not_shadow_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("random", "signal", "dlopt"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(99)")
    monkeypatch.chdir(tmp_path)
    codes, _, _ = run_processes(python_module("dlopt.run.job", "nowhere"), 1, {})
    assert codes == [USER_ERROR], "config.yaml is missing"


def test_modules_are_found_in_a_checkout_and_hidden_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(dlopt.__file__).parents[1])
    assert "-P" not in python_module("dlopt.run.job")
    monkeypatch.chdir(tmp_path)
    assert "-P" in python_module("dlopt.run.job")


def shell(rank_0: str, rank_1: str) -> list[str]:
    return ["sh", "-c", f'if [ "$DLOPT_RANK" = 0 ]; then {rank_0}; else {rank_1}; fi']


def test_exit_codes_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_FAILED_GRACE", 600.0)
    assert group_code(*run_processes(shell("exit 0", "exit 0"), 2, {})) == 0
    assert group_code(*run_processes(shell("exit 1", "exit 2"), 2, {})) == 2
    with Interruption() as interruption:
        interruption.reason = "SIGTERM"
        assert group_code([INTERRUPTED, -signal.SIGKILL], set(), interruption) == INTERRUPTED, "Slurm's last signal"
    monkeypatch.setattr(launch, "_FAILED_GRACE", 0.1)
    codes, killed, interruption = run_processes(shell("exec sleep 600", "exit 3"), 2, {})
    assert (codes, killed) == ([-signal.SIGKILL, 3], {0}), "the other rank had its time to end"
    assert group_code(codes, killed, interruption) == 3
    with pytest.raises(RunError, match=r"^rank 1 was killed by SIGKILL \(out of memory\?\)$"):
        group_code(*run_processes(shell("exec sleep 600", "kill -KILL $$"), 2, {}))
    with pytest.raises(RunError, match=r"^rank 0 was killed by SIGSEGV$"):
        group_code(*run_processes(shell("kill -SEGV $$", "exit 0"), 2, {}))


def test_kills_ranks_that_do_not_end_after_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.1)
    deaf = "trap '' TERM; {} exec sleep 600"
    codes, killed, interruption = run_processes(shell(deaf.format("kill -TERM $PPID;"), deaf.format("")), 2, {})
    assert killed and set(codes) <= {-signal.SIGKILL, -signal.SIGTERM}
    assert group_code(codes, killed, interruption) == INTERRUPTED


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_ends_stopped_ranks_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stopped = "trap 'exit 75' TERM; echo $$ > pid; kill -STOP $$; sleep 600"
    waits = 'until grep -qs stopped "/proc/$(cat pid)/status"; do sleep 0.05; done; kill -TERM $PPID; exec sleep 600'
    codes, killed, interruption = run_processes(shell(stopped, f"{waits} 2>&-"), 2, {})
    assert (codes, killed) == ([INTERRUPTED, -signal.SIGTERM], set())
    assert group_code(codes, killed, interruption) == INTERRUPTED


def test_ranks_of_torchrun_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr("dlopt.basics.interruption.end_with_parent", lambda: called.append("yes"))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    end_with_torchrun()
    assert not called
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    end_with_torchrun()
    assert called == ["yes"]
