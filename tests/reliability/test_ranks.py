"""Killed or stopped ranks: the other ranks exit, the error names the rank, the run can be resumed."""

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dlopt.parallel.processes import rendezvous
from tests.support.faults import fork
from tests.support.ports import free_port
from tests.support.ranks import ENDLESS, ROOT, TWO, command
from tests.support.runs import at_update, metrics, resume
from tests.support.sizes import RICH, STEPS_PER_EPOCH

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def children(pid: int) -> list[int]:
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_loader_workers_exit_with_a_killed_run(tmp_path: Path) -> None:
    reading, writing = os.pipe()

    def work() -> None:
        with at_update(STEPS_PER_EPOCH + 1, lambda: (os.write(writing, b"x"), time.sleep(600))):
            resume(tmp_path, *RICH, "data.memory=false", "data.workers=2")

    child = fork(work)
    os.read(reading, 1)
    workers = [pid for pid in children(child) if is_alive(pid)]
    assert len(workers) >= 2
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert until(lambda: not any(map(is_alive, workers)), 60)


class Store:
    def __init__(self, *waiting: int) -> None:
        self.keys = {f"waited{rank}" for rank in waiting}

    def set(self, key: str, value: str) -> None:
        self.keys.add(key)

    def check(self, keys: list[str]) -> bool:
        return self.keys >= set(keys)


def test_missing_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    late = RuntimeError("as gloo raises it, whatever the cause")
    assert rendezvous.missing_ranks(late) == [], "without other ranks"
    monkeypatch.setattr(rendezvous, "current", lambda: rendezvous.World("torchrun", 1, 4, 1, 4))
    monkeypatch.setattr(rendezvous, "_ROLL_CALL", 0.0)
    monkeypatch.setattr(rendezvous, "join_store", lambda *_, **__: Store(0))
    assert rendezvous.missing_ranks(late) == [], "an error of its own: all connections are open"
    monkeypatch.setattr(rendezvous, "_has_lost_connection", lambda: True)
    assert rendezvous.missing_ranks(late) == [2, 3]
    assert rendezvous.missing_ranks(NotImplementedError("no collective raises this")) == []


# -- real processes


SAVING = [*ENDLESS, "checkpoint.every_steps=50"]


@contextlib.contextmanager
def started(line: list[str], folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Starts a run that trains for some epochs; kills all of its processes afterwards."""
    process = subprocess.Popen(
        line,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL),  # it ends with the tests, however these end
    )
    try:
        assert until(lambda: len(lines(folder)) > 5 or process.poll() is not None, 150)
        assert process.poll() is None, process.communicate()[1]
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def lines(folder: Path) -> list[object]:
    try:
        return list(metrics(folder))
    except (FileNotFoundError, json.JSONDecodeError):
        return []


def ranks(process: "subprocess.Popen[str]") -> list[int]:
    pids = [pid for pid in children(process.pid) if b"dlopt" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(pids) == 2
    return pids  # in the order in which they were started


@pytest.mark.slow
def test_killed(tmp_path: Path) -> None:
    """First a rank; then, in the resumed run, the launcher."""
    folder = tmp_path / "run"

    def kill(who: str, *more: str) -> None:
        before = len(lines(folder))
        with started([*command(folder, TWO, *SAVING), *more], folder) as process:
            assert until(lambda: len(lines(folder)) > before + 5, 150)
            pids = ranks(process)
            os.kill(process.pid if who == "launcher" else pids[1], signal.SIGKILL)
            assert until(lambda: not any(map(is_alive, pids)), 60), "no rank outlives the others"
            stderr = process.communicate(timeout=300)[1]
            assert process.returncode == (-9 if who == "launcher" else 1)
            assert who == "launcher" or "rank 1 was killed by SIGKILL" in stderr

    kill("rank")
    kill("launcher", "resume=auto")
    before = len(lines(folder))
    with started([*command(folder, TWO, *SAVING), "resume=auto"], folder) as process:
        assert until(lambda: len(lines(folder)) > before + 5, 150)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=150)
        assert process.returncode == 75
    assert [line["epoch"] for line in metrics(folder)] == list(range(1, len(metrics(folder)) + 1))


@pytest.mark.slow
def test_error_names_a_stopped_rank(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    line = command(folder, TWO, *SAVING, "parallel.timeout_minutes=0.4")
    with started(line, folder) as process:
        os.kill(ranks(process)[1], signal.SIGSTOP)
        stderr = process.communicate(timeout=300)[1]
        assert process.returncode == 1
    assert "rank 1 exited, or did not respond within parallel.timeout_minutes" in stderr, stderr
    assert "Traceback" not in stderr
    assert json.loads((folder / "summary.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_a_stopped_rank_ends_with_the_others(tmp_path: Path) -> None:
    """The launcher continues it: the run ends with a checkpoint, not after the timeout of 10 minutes."""
    folder = tmp_path / "run"
    with started(command(folder, TWO, *SAVING), folder) as process:
        pids = ranks(process)
        os.kill(pids[1], signal.SIGSTOP)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)
        assert process.returncode == 75
        assert not any(map(is_alive, pids))


@pytest.mark.slow
def test_a_rank_of_a_launcher_ends_if_another_one_is_stopped(tmp_path: Path) -> None:
    """As under srun, which then waits a minute and kills the stopped rank."""
    folder, processes = tmp_path / "run", []
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    try:
        for rank in range(2):
            variables = {**os.environ, **address, "RANK": str(rank)}
            processes.append(
                subprocess.Popen(command(folder, *SAVING), cwd=ROOT, env=variables, stderr=subprocess.PIPE)
            )
        assert until(lambda: len(lines(folder)) > 5, 150)
        processes[1].send_signal(signal.SIGSTOP)
        time.sleep(1)
        processes[0].send_signal(signal.SIGUSR1)
        stderr = processes[0].communicate(timeout=300)[1].decode()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 1
    assert "dlopt: hangs 20 s after a stop signal: another rank does not respond" in stderr


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with started([*launcher, "--max-restarts", "2", *command(folder, *SAVING)[1:]], folder) as process:
        os.kill(ranks(process)[1], signal.SIGKILL)
        before = len(lines(folder))
        assert until(lambda: len(lines(folder)) > before + 10, 120)
        assert re.match(r"\d+$", str(metrics(folder)[-1]["step"]))
        epochs = [line["epoch"] for line in metrics(folder)]
        assert epochs == list(range(1, len(epochs) + 1)), "no line lost or repeated"
        pids = ranks(process)
        process.kill()
        assert until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 60), "they would train on"
