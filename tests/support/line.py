"""Runs commands in the test process, which imports torch only once."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dlopt import cli
from dlopt.basics.interruption import SIGNALS
from dlopt.machine.device import set_deterministic
from tests.support.sizes import TINY

SMALL = TINY


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str
    seconds: float


def run(line: str) -> int:
    """Runs `dlopt LINE` in the current folder; returns the exit code, and raises the command's errors."""
    command, arguments = cli.find(line.split())
    return command(arguments)


def dlopt(folder: Path, *arguments: str) -> Result:
    """Runs `dlopt ARGUMENTS` in `folder`."""
    out, err = io.StringIO(), io.StringIO()
    start = time.process_time()
    code: object = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_state_kept())
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(mock.patch.object(sys, "argv", ["dlopt", *arguments]))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int), f"left with {code!r}"
    return Result(code, out.getvalue(), err.getvalue(), time.process_time() - start)


def refused(folder: Path, *arguments: str) -> str:
    """Returns the error message of a refused command: exit code 2, one line, quickly, no files left behind."""
    before = entries(folder)
    result = dlopt(folder, *arguments)
    assert result.code == 2, result
    if "--json" in arguments:
        assert json.loads(result.out)["error"]["exit_code"] == 2
    else:
        assert result.out in ("", "dry run: nothing is trained\n")
    assert "Traceback" not in result.err
    assert result.err.startswith("dlopt: ") and result.err.count("\n") == 1, result.err
    assert entries(folder) == before
    assert result.seconds < 20  # of processor time: it has neither trained nor read a large data set
    return result.err


def entries(folder: Path) -> set[str]:
    """Lists files and folders, but not the bytecode that Python writes beside imported packages."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def only(folder: Path, pattern: str) -> Path:
    [path] = folder.glob(pattern)
    return path


@contextlib.contextmanager
def _state_kept() -> Iterator[None]:
    """Restores what a run changes in its process: environment, sys.path, torch settings, signal handlers.

    Not warning filters.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    environment, path = dict(os.environ), list(sys.path)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = path
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        set_deterministic(False)


class HeldByAnotherProcess:
    """Context manager in which another process holds the lock of a run folder."""

    def __init__(self, folder: Path) -> None:
        lock = "l = dlopt.basics.folders.RunFolder(pathlib.Path(sys.argv[1])).lock()"
        code = f"import sys, pathlib, dlopt.basics.folders; {lock}; print(flush=True); input()"
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", code, str(folder)], **pipes)

    def __enter__(self) -> "subprocess.Popen[bytes]":
        assert self.process.stdout is not None
        self.process.stdout.readline()
        return self.process

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()
