"""Starts functions, commands and ranks in processes that are forked from the server of `dlopt.sweeps.pool`.

The server imports torch once for all tests of a worker; a new interpreter needs seconds for the import.
"""

import faulthandler
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, reduction
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from dlopt.basics.interruption import SIGNALS
from dlopt.parallel.processes import launch
from dlopt.sweeps.pool import warm_up
from tests.support.ports import free_port

_WORKER = os.getpid()  # the process of the tests; another one in the jobs of a sweep
start_rank_in_new_interpreter = launch.start_rank


def start(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    environment: Mapping[str, str],
    folder: Path | str,
    streams: Mapping[int, Path | str],
) -> BaseProcess:
    """Starts `function(*arguments)` in `folder` with this environment; `streams`: file descriptor -> file."""
    warm_up()
    context = multiprocessing.get_context("forkserver")
    process = context.Process(
        target=_run, args=(function, arguments, dict(environment), str(folder), dict(streams)), daemon=False
    )
    process.start()
    return process


def _run(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    environment: Mapping[str, str],
    folder: str,
    streams: Mapping[int, Path | str],
) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked in the server
    for stream, path in streams.items():
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOCTTY, 0o666), stream)
    _become(function, arguments, environment, folder)


def _become(
    function: Callable[..., None], arguments: tuple[Any, ...], environment: Mapping[str, str], folder: str
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # its own children must not be forked from the server
    function(*arguments)


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def run_dlopt(folder: Path, *arguments: str, environment: Mapping[str, str] = os.environ) -> Done:
    """Runs `dlopt ARGUMENTS` in a process of its own; PYTHONPATH is honoured."""
    return _run_to_end(_dlopt, (arguments,), environment, folder)


def run_by_hand(folder: Path, *arguments: str, ranks: Sequence[Mapping[str, str | None]]) -> list[Done]:
    """Runs `dlopt ARGUMENTS` as ranks that no launcher has started, rank r in FOLDER/r; `ranks`: further variables.

    None removes one of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    """
    address = {"WORLD_SIZE": str(len(ranks)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank, own in enumerate(ranks):
        (folder / str(rank)).mkdir(parents=True, exist_ok=True)
        variables = {**os.environ, **address, "RANK": str(rank), **own}
        environment = {name: value for name, value in variables.items() if value is not None}
        files = {1: folder / f"stdout{rank}", 2: folder / f"stderr{rank}"}
        for file in files.values():
            file.write_text("")
        processes.append((start(_dlopt, (arguments,), environment, folder / str(rank), files), files))
    for process, _ in processes:
        process.join(120)
        if process.exitcode is None:
            process.kill()
    return [Done(process.exitcode or 0, files[1].read_text(), files[2].read_text()) for process, files in processes]


def run(function: Callable[..., object], *arguments: Any) -> Done:
    """Runs a function in a process of its own.

    Unlike a fork of the test's process, it has no threads, or locks of threads, that earlier tests have left.
    """
    return _run_to_end(_saying_where_it_hangs, (function, *arguments), os.environ, Path.cwd())


def _saying_where_it_hangs(function: Callable[..., object], *arguments: Any) -> None:
    faulthandler.enable(file=2)
    function(*arguments)


def _run_to_end(
    function: Callable[..., None], arguments: tuple[Any, ...], environment: Mapping[str, str], folder: Path
) -> Done:
    with tempfile.TemporaryDirectory() as temporary:
        files = {1: Path(temporary) / "stdout", 2: Path(temporary) / "stderr"}
        process = start(function, arguments, environment, folder, files)
        process.join(300)
        if process.exitcode is None:
            os.kill(process.pid or 0, signal.SIGABRT)
            process.join()
        assert process.exitcode is not None
        return Done(process.exitcode, files[1].read_text(), files[2].read_text())


def start_dlopt(folder: Path, *arguments: str, log: Path) -> BaseProcess:
    """Starts `dlopt ARGUMENTS` in a process group of its own, which its ranks belong to."""
    return start(_dlopt_in_session, (arguments,), os.environ, folder, {1: log, 2: log})


def _dlopt_in_session(arguments: tuple[str, ...]) -> None:
    os.setsid()
    _dlopt(arguments)


def _dlopt(arguments: tuple[str, ...]) -> None:
    from dlopt import cli

    _honour_pythonpath()
    sys.argv = ["dlopt", *arguments]
    cli.main()


def _honour_pythonpath() -> None:
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


# -- ranks of dlopt's launcher


class Rank:
    """A forked rank, with the methods of `subprocess.Popen` that the launcher calls."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self.kill, self.terminate = process.kill, process.terminate

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self._process.pid or 0, number)


class _Stream:
    """A stream of this process; pickled for another process, it is one of that process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.number),)


def _received(stream: Any) -> _Stream:
    return _Stream(stream.detach())


def start_rank(command: Sequence[str], environment: Mapping[str, str]) -> Any:
    """Replaces the launcher's function: forks the rank from the server, or from a job that the server has forked.

    Ranks start in new interpreters, as those of users do, in tests that start the launcher itself in a new one, and in
    those with the fixture `new_interpreters`.
    """
    if command[0] != sys.executable or "-m" not in command:
        return start_rank_in_new_interpreter(command, environment)
    module, *arguments = command[command.index("-m") + 1 :]
    method, streams = "fork", {}
    if os.getpid() == _WORKER:
        warm_up()
        parent = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        environment = {**environment, launch.PARENT: str(parent)}
        method, streams = "forkserver", {stream: _Stream(stream) for stream in (1, 2)}
    process = multiprocessing.get_context(method).Process(  # type: ignore[attr-defined]
        target=_run_rank, args=(module, arguments, dict(environment), os.getcwd(), streams), daemon=False
    )
    process.start()
    return Rank(process)


def _run_rank(
    module: str, arguments: list[str], environment: Mapping[str, str], folder: str, streams: Mapping[int, _Stream]
) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    for number, stream in streams.items():
        os.dup2(stream.number, number)
    _become(_run_module, (module, arguments), environment, folder)


def _run_module(module: str, arguments: list[str]) -> None:
    _honour_pythonpath()
    sys.argv = [module, *arguments]
    warnings.filterwarnings("ignore", "'dlopt.* found in sys.modules")
    runpy.run_module(module, run_name="__main__", alter_sys=True)
