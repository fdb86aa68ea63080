"""Processes that dlopt starts itself: rank by rank `python -m dlopt.job FOLDER`, watched until the last has ended."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dlopt
from dlopt.errors import DONE, FAILED, INTERRUPTED, USER_ERROR, RunError, UserError
from dlopt.interruption import Interruption
from dlopt.parallel.rendezvous import PROCESSES, RANK, STORE

PARENT, RECORD, QUIET = "DLOPT_PARENT", "DLOPT_RECORD", "DLOPT_QUIET"
_GRACE = 5.0  # seconds in which ranks may end by themselves once one has failed


def count_processes(arguments: Mapping[str, Any], device: str) -> int:
    """Returns the processes to start for a mode with these arguments. Raises `UserError` if there are too few GPUs."""
    if "processes" not in arguments:
        return 1
    import torch

    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    processes = arguments["processes"]
    if processes is None:
        return max(gpus, 1)
    if gpus and processes > gpus:
        raise UserError(f"parallel.processes={processes}: this machine has {gpus} GPUs; start fewer, or set device=cpu")
    return int(processes)


def python_module(module: str, *arguments: str) -> list[str]:
    """Returns the command that runs a module of dlopt in a process of its own.

    -P keeps the current folder off the path, where a `random.py` would be imported in place of Python's own;
    `allow_packages` appends the folder again (`config/parsing.py`). Not where dlopt itself was found that way.
    """
    is_here = Path(dlopt.__file__).parents[1] == Path.cwd()
    return [sys.executable, *([] if is_here else ["-P"]), "-m", module, *arguments]


def run_group(folder: Path, processes: int, checkpoint: str | None, *, record: bool, console: bool) -> int:
    """Runs FOLDER/config.yaml in so many processes; returns their exit code.

    `checkpoint`: to resume from; None: the folder's newest, if it has one. `record`: whether to record a user's mistake
    in the folder. `console`: whether the first rank shows progress. Raises `RunError` naming the rank when one was
    killed.
    """
    command = python_module("dlopt.job", str(folder), *([checkpoint] if checkpoint else []))
    options = {RECORD: "1" if record else "", QUIET: "" if console else "1"}
    codes, stuck, interruption = run_processes(command, processes, options)
    if interruption and all(code in (DONE, INTERRUPTED, -signal.SIGTERM, -signal.SIGKILL) for code in codes):
        return INTERRUPTED
    for rank, code in enumerate(codes):
        if code < 0 and rank not in stuck:
            name = signal.Signals(-code).name
            raise RunError(f"rank {rank} was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else ""))
    return next((code for code in (USER_ERROR, FAILED, INTERRUPTED) if code in codes), max(codes))


def run_processes(
    command: Sequence[str], processes: int, environment: Mapping[str, str]
) -> tuple[list[int], set[int], Interruption]:
    """Runs `command` so many times as the ranks of one world, with `environment` in addition to this process's own.

    Returns exit codes, ranks that had to be killed once another had failed, and whether a signal asked all to stop.
    """
    folder = Path(tempfile.mkdtemp(prefix="dlopt-"))
    shared = {PROCESSES: str(processes), STORE: str(folder / "store"), PARENT: str(os.getpid())}
    children: list[subprocess.Popen[bytes]] = []
    with Interruption() as interruption:
        try:
            for rank in range(processes):
                own = {"TORCH_CPP_LOG_LEVEL": "FATAL", **os.environ, **shared, **environment, RANK: str(rank)}
                children.append(subprocess.Popen(command, env=own))
            stuck = _watch(children, interruption)
        finally:
            for child in _running(children):
                child.kill()
            codes = [child.wait() for child in children]
            shutil.rmtree(folder, ignore_errors=True)
    return codes, stuck, interruption


def _watch(children: "list[subprocess.Popen[bytes]]", interruption: Interruption) -> set[int]:
    """Returns when all have ended, with the ranks that had to be killed.

    Passes a signal on. Once a rank has failed, the others get a while to follow.
    """
    is_passed_on, stuck = False, set()
    deadline: float | None = None
    while running := _running(children):
        if deadline is None and any(child.returncode not in (None, DONE, INTERRUPTED) for child in children):
            deadline = time.monotonic() + _GRACE
        if deadline is not None and time.monotonic() > deadline:
            for child in running:
                stuck.add(children.index(child))
                child.kill()
        if interruption and not is_passed_on:
            is_passed_on = True
            for child in running:
                child.terminate()
        time.sleep(0.05)
    return stuck


def _running(children: "list[subprocess.Popen[bytes]]") -> "list[subprocess.Popen[bytes]]":
    return [child for child in children if child.poll() is None]


def end_rank_with_parent() -> None:
    """In a started rank: a launcher that is killed takes it along."""
    from dlopt.processor import end_with_parent

    end_with_parent()
    if os.getppid() != int(os.environ[PARENT]):
        os._exit(FAILED)  # it was killed before the line above
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the run catches it: the launcher passes signals on


def end_with_torchrun() -> None:
    """In a rank of torchrun, which gives its ranks sessions of their own: if it is killed they would train on."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from dlopt.processor import end_with_parent

        end_with_parent()
