"""Starts functions in separate processes that are forked from the server of `dlopt.sweeps.pool`.

The server imports torch once for all tests of a worker; a new interpreter needs seconds for the import.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from dlopt.interruption import SIGNALS
from dlopt.sweeps.pool import warm_up


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
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # its own children must not be forked from the server
    with _coverage():
        function(*arguments)


@contextlib.contextmanager
def _coverage() -> Iterator[None]:
    """Records coverage as the configuration file in COVERAGE_OF_PROCESSES says (see scripts/mutants.py)."""
    if "COVERAGE_OF_PROCESSES" not in os.environ:
        yield
        return
    from coverage import Coverage

    recorder = Coverage(config_file=os.environ["COVERAGE_OF_PROCESSES"], data_suffix=True)
    recorder.start()
    try:
        yield
    finally:
        recorder.stop()
        recorder.save()


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def run_dlopt(folder: Path, *arguments: str, environment: Mapping[str, str] = os.environ) -> Done:
    """Runs `dlopt ARGUMENTS` in a process of its own; PYTHONPATH is honoured."""
    with tempfile.TemporaryDirectory() as temporary:
        files = {1: Path(temporary) / "stdout", 2: Path(temporary) / "stderr"}
        process = start(_dlopt, (arguments,), environment, folder, files)
        process.join(300)
        assert process.exitcode is not None
        return Done(process.exitcode, files[1].read_text(), files[2].read_text())


def _dlopt(arguments: tuple[str, ...]) -> None:
    from dlopt import cli

    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv = ["dlopt", *arguments]
    cli.main()
