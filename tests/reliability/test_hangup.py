"""A closed terminal, a lost connection, and starts that are cut off."""

import contextlib
import json
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from dlopt.basics.folders import LAUNCHER_LOCK, RunFolder, make
from dlopt.basics.interruption import (
    Interrupted,
    Interruption,
    flush_streams,
    killed_by_signals,
    leave_closed_terminal,
    print_line,
    streams_kept,
)
from dlopt.basics.locks import hold
from dlopt.training.checkpoint.checkpoints import load
from tests.support.line import dlopt, refused
from tests.support.processes import start
from tests.support.runs import at_update, in_fork
from tests.support.sizes import TINY

IN_RUN = "hydra.run.dir=run"
LONG = (*TINY[:3], "threads=1", "tracking=[]", "epochs=100000", "stopping=none")


# -- a terminal that is closed


def is_hung_up(descriptor: int) -> bool:
    """Returns whether the terminal is gone, or has been replaced by /dev/null since."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(dict(poll.poll(0)).get(descriptor, 0) & select.POLLHUP) or not os.isatty(descriptor)


def in_terminal(arguments: tuple[str, ...], terminal: str, nohup: bool) -> None:
    """Runs in the new process: the command in a session of its own, whose terminal is closed at the second update."""
    from dlopt import cli

    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    descriptor = os.open(terminal, os.O_RDWR)  # the first one of a session becomes its terminal
    for stream in (0, 1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(i, mode, 1, closefd=False) for i, mode in enumerate("rww"))
    sys.argv = ["dlopt", *arguments]

    def until_closed() -> None:
        Path("ready").touch()
        while not is_hung_up(1):
            time.sleep(0.01)
        print("nobody reads this", file=sys.stderr if nohup else sys.stdout)

    with at_update(2, until_closed):
        cli.main()


def close_terminal(folder: Path, *arguments: str, is_ready: Callable[[], bool], nohup: bool = False) -> BaseProcess:
    """Runs `dlopt ARGUMENTS` in a terminal that is closed once the command is ready; waits for its end."""
    main, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = start(in_terminal, (arguments, os.ttyname(side), nohup), environment, folder, {})
    os.set_blocking(main, False)
    while not is_ready():
        process.join(0.05)
        with contextlib.suppress(BlockingIOError):
            os.read(main, 1 << 16)  # else the terminal is full, and the command waits
        assert process.exitcode is None
    os.close(side)
    os.close(main)
    process.join()
    return process


def test_closed_terminal_stops_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    ready = (tmp_path / "ready").exists
    process = close_terminal(tmp_path, "train", *LONG, IN_RUN, is_ready=ready)
    run = RunFolder(tmp_path / "run")
    assert process.exitcode == 75
    assert load(run.checkpoints / "last.pt").step >= 2
    assert (run.summary() or {})["status"] == "interrupted"
    log = (run.path / "train.log").read_text()
    assert "SIGHUP: stopped" in log and "Traceback" not in log and not (run.path / "traceback.txt").exists()


def test_nohup_keeps_a_run_in_a_closed_terminal(tmp_path: Path) -> None:
    """Printing to it is an error of the user's code only; see the argument of `print` above."""
    ready = (tmp_path / "ready").exists
    with patch.object(sys, "stderr", open(os.devnull, "w")):
        process = close_terminal(tmp_path, "train", *TINY, "epochs=3", IN_RUN, is_ready=ready, nohup=True)
    assert process.exitcode == 0
    assert (RunFolder(tmp_path / "run").summary() or {})["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sweep", "ranks", "workers"])
def test_closed_terminal_stops_all_processes(name: str, tmp_path: Path) -> None:
    lines = {
        "sweep": ("-m", *LONG, "seed=0,1", "hydra.sweep.dir=run", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
        "ranks": (*LONG, "parallel=ddp", "parallel.processes=2", "device=cpu", IN_RUN),
        "workers": (*LONG, "data.workers=2", "data.memory=false", IN_RUN),
    }
    runs = [RunFolder(tmp_path / "run" / number) for number in ("0", "1")] if name == "sweep" else []
    runs = runs or [RunFolder(tmp_path / "run")]

    def have_begun() -> bool:
        return (tmp_path / "ready").exists() if name == "workers" else all(run.has_begun() for run in runs)

    process = close_terminal(tmp_path, "train", *lines[name], is_ready=have_begun)
    assert process.exitcode == 75
    for run in runs:
        assert (run.summary() or {})["status"] == "interrupted" and (run.checkpoints / "last.pt").exists()
        assert "Traceback" not in "".join(path.read_text() for path in run.path.glob("*.log"))


def test_a_signal_raises_until_it_may_wait_for_an_update() -> None:
    with Interruption(raises=True) as interruption:
        with pytest.raises(Interrupted, match="SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):  # one that could not be raised, as in a destructor
            interruption.raise_if_received()
        interruption.defer()
        signal.raise_signal(signal.SIGUSR1)
        interruption.raise_if_received()
        assert interruption and interruption.reason == "SIGUSR1"


def test_ignored_hangup_stays_ignored() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interruption and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with killed_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_output_that_nobody_reads_is_dropped() -> None:
    """Neither an error nor the exit code 120 of an interpreter that cannot flush; also for a closed pipe."""
    for kind in ("terminal", "pipe"):

        def work(kind: str = kind) -> None:
            reader, writer = pty.openpty() if kind == "terminal" else os.pipe()
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.close(writer)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.close(reader)
            sys.stdout.write("lost")
            print_line("lost")
            leave_closed_terminal()
            print("lost", flush=True)
            flush_streams()
            assert os.readlink("/proc/self/fd/1") == os.devnull or sys.platform != "linux"

        assert in_fork(work) == 0, kind


def test_a_print_before_the_signal_arrives_is_dropped() -> None:
    """The kernel signals the shell only, which signals its jobs; other errors are raised."""

    def work() -> None:
        reader, writer = pty.openpty()
        os.dup2(writer, 1)
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
        os.close(writer)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        os.close(reader)
        with streams_kept():
            print("lost")
            sys.stdout.writelines(["lost\n"])
            with pytest.raises(OSError, match="No space left"):
                print("full", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    assert in_fork(work) == 0


def test_open_streams_are_kept(tmp_path: Path) -> None:
    def work() -> None:
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.dup2(os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT), 2)
        leave_closed_terminal()
        os.write(1, b"piped")
        os.write(2, b"written")
        assert os.read(reader, 10) == b"piped" and (tmp_path / "file").read_text() == "written"

    assert in_fork(work) == 0


# -- starts that are cut off

WINDOWS = {  # a function that is called between the creation of the folder and the first checkpoint -> call it first
    "dlopt.run.folder.make": True,
    "dlopt.run.record.describe": False,
    "dlopt.run.record.write_json": True,
    "dlopt.training.run.build_workload": False,
    "dlopt.training.run.log_header": True,
    "dlopt.training.checkpoint.checkpoints.write": False,
}


def cut_off(target: str, is_after: bool, number: signal.Signals, folder: Path, *arguments: str) -> int:
    """Runs `dlopt ARGUMENTS` in a process that gets the signal where it calls `target`; returns its exit code."""
    module, _, name = target.rpartition(".")
    __import__(module)
    original = getattr(sys.modules[module], name)

    def work() -> None:
        def signalled(*values: Any, **keys: Any) -> Any:
            if is_after:
                original(*values, **keys)
            os.kill(os.getpid(), number)
            return None if is_after else original(*values, **keys)

        with patch(target, signalled):
            os._exit(dlopt(folder, *arguments).code)

    return os.waitstatus_to_exitcode(in_fork(work))


@pytest.mark.parametrize(
    ("target", "number"),
    [
        *((target, signal.SIGKILL) for target in WINDOWS),
        *(("dlopt.run.record.write_json", number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)),
        # The set-up may take minutes, and has nothing to save.
        ("dlopt.training.run.build_workload", signal.SIGTERM),
        ("dlopt.training.run.log_header", signal.SIGINT),
    ],
)
def test_a_start_that_was_cut_off_blocks_nothing(target: str, number: signal.Signals, tmp_path: Path) -> None:
    line = ("train", *TINY, "epochs=1", IN_RUN)
    code = cut_off(target, WINDOWS[target], number, tmp_path, *line)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 75)
    assert (tmp_path / "run").exists() and not (tmp_path / "run/checkpoints/last.pt").exists()
    result = dlopt(tmp_path, *line)
    assert result.code == 0, result.err
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1


def test_a_resumption_that_was_cut_off_blocks_nothing(tmp_path: Path) -> None:
    assert dlopt(tmp_path, "train", *TINY, "schedule_epochs=2", "epochs=1", "hydra.run.dir=source").code == 0
    line = ("train", *TINY, "schedule_epochs=2", "resume=source", IN_RUN)
    cut_off("dlopt.training.run.build_workload", False, signal.SIGKILL, tmp_path, *line)
    assert (tmp_path / "run/metrics.jsonl").exists()  # copied
    result = dlopt(tmp_path, *line)
    assert result.code == 0, result.err
    assert [json.loads(each)["epoch"] for each in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_run_with_a_result_is_still_refused(tmp_path: Path) -> None:
    for name in ("summary.json", "metrics.jsonl", "checkpoints/last.pt"):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n{}\n")
        assert "unfinished run; resume it with" in refused(tmp_path, "train", *TINY, IN_RUN)
        path.unlink()


def test_a_launcher_whose_ranks_start_is_live(tmp_path: Path) -> None:
    """Before rank 0 has taken the lock."""
    make(tmp_path / "run", "hydra.run.dir")
    reading, writing = os.pipe()
    reader, writer = os.fdopen(reading, "rb", 0), os.fdopen(writing, "wb", 0)
    child = os.fork()
    if child == 0:
        lock = hold(tmp_path / "run" / LAUNCHER_LOCK)
        writer.write(b"x")
        signal.pause()
        lock.close()
    reader.read(1)
    try:
        assert "another run is active" in refused(tmp_path, "train", *TINY, IN_RUN)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


SWEEP = ("train", "-m", *TINY, "epochs=1", "seed=0,1", "hydra.sweep.dir=sweep")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["dlopt.sweeps.jobs.write_yaml", "dlopt.sweeps.jobs.describe"])
@pytest.mark.parametrize("search", [False, True])
def test_a_sweep_that_was_cut_off_blocks_nothing(target: str, search: bool, tmp_path: Path) -> None:
    more = ["hydra/sweeper=dlopt_optuna", "hydra.sweeper.n_trials=2"] if search else []
    line = [*SWEEP[:-2], "optimizer.lr=interval(0.01,0.1)", SWEEP[-1], *more] if search else [*SWEEP]
    if search:
        pytest.importorskip("optuna")
        target = target.replace("sweeps.sweep", "sweeps.search")
    cut_off(target, False, signal.SIGKILL, tmp_path, *line)
    assert (tmp_path / "sweep").exists()
    result = dlopt(tmp_path, *line)
    assert result.code == 0, result.err
    assert "resume=auto" in refused(tmp_path, *line) or search
