"""dlopt's own launcher: starts one `python -m dlopt.run.job FOLDER` per rank and waits for all of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlopt._version import ROOT
from dlopt.basics.errors import DONE, FAILED, INTERRUPTED, USER_ERROR, RunError, UserError
from dlopt.basics.interruption import GRACE, SIGNALS, Interruption, ignore_hangup
from dlopt.basics.scratch import scratch
from dlopt.machine.world import PROCESSES, RANK
from dlopt.parallel.processes.rendezvous import STORE

PARENT, RECORD, QUIET = "DLOPT_PARENT", "DLOPT_RECORD", "DLOPT_QUIET"
_FAILED_GRACE = 5.0  # seconds for the other ranks to exit after one has failed; then they are killed


def count_processes(arguments: Mapping[str, Any], device: str) -> int:
    """Returns the number of processes to start for a mode. Raises `UserError` if there are too few GPUs."""
    if "processes" not in arguments:
        return 1
    import torch

    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    processes = arguments["processes"]
    if processes is None:
        return max(gpus, 1)
    if gpus and processes > gpus:
        raise UserError(
            f"parallel.processes={processes}: this machine has {gpus} GPUs; start fewer processes, or set device=cpu"
        )
    return int(processes)


def python_module(module: str, *arguments: str) -> list[str]:
    """Returns the command that runs a module of dlopt in a new process.

    -P keeps the working directory off sys.path, where a `random.py` would shadow Python's own; `allow_packages` appends
    the directory again (`config/parsing.py`). Without -P if dlopt itself is imported from it.
    """
    in_checkout = ROOT.parent == Path.cwd()
    return [sys.executable, *([] if in_checkout else ["-P"]), "-m", module, *arguments]


def is_quiet() -> bool:
    """Returns whether the process that has started this rank shows no progress."""
    return os.environ.get(QUIET) == "1"


def run_group(folder: Path, processes: int, checkpoint: str | None, *, record: bool, console: bool) -> int:
    """Runs FOLDER/config.yaml in `processes` processes and returns one exit code for all.

    `checkpoint`: to resume from; None for the folder's newest, if any. `record`: whether to record config errors in the
    folder. `console`: whether rank 0 shows progress. Raises `RunError` as `group_code`.
    """
    command = python_module("dlopt.run.job", str(folder), *([checkpoint] if checkpoint else []))
    options = {RECORD: "1" if record else "", QUIET: "" if console else "1"}
    return group_code(*run_processes(command, processes, options))


def group_code(codes: Sequence[int], killed: set[int], interruption: Interruption) -> int:
    """Returns one exit code for all ranks, given the results of `run_processes`.

    Raises `RunError` naming the rank if one was killed from outside.
    """
    # A rank that has not installed its handlers is killed by the signal, which may reach all processes of a terminal.
    stopped = (DONE, INTERRUPTED, -signal.SIGKILL, *(-number for number in SIGNALS))
    if interruption and all(code in stopped for code in codes):
        return INTERRUPTED
    for rank, code in enumerate(codes):
        if code < 0 and rank not in killed:  # killed from outside
            name = signal.Signals(-code).name
            raise RunError(f"rank {rank} was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else ""))
    return next((code for code in (USER_ERROR, FAILED, INTERRUPTED) if code in codes), max(codes))


def run_processes(
    command: Sequence[str], processes: int, environment: Mapping[str, str]
) -> tuple[list[int], set[int], Interruption]:
    """Runs `command` once per rank, with `environment` in addition to this process's own.

    Returns the exit codes, the ranks killed here after another had failed, and the interruption, if a signal came.
    """
    children: list[subprocess.Popen[bytes]] = []
    with Interruption() as interruption, scratch() as folder:
        shared = {PROCESSES: str(processes), STORE: str(folder / "store"), PARENT: str(os.getpid())}
        try:
            for rank in range(processes):
                variables = {"TORCH_CPP_LOG_LEVEL": "FATAL", **os.environ, **shared, **environment, RANK: str(rank)}
                children.append(start_rank(command, variables))
            killed = _wait(children, interruption)
        finally:
            for child in _running(children):
                child.kill()
            codes = [child.wait() for child in children]
    return codes, killed, interruption


def start_rank(command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Starts a rank in a new interpreter."""
    return subprocess.Popen(command, env=environment)


def _wait(children: "list[subprocess.Popen[bytes]]", interruption: Interruption) -> set[int]:
    """Waits until all ranks have ended; returns the ranks that had to be killed.

    Forwards a stop signal once, after which the ranks get `GRACE` seconds; after a failure, in which they may hang in a
    collective, the others get `_FAILED_GRACE`.
    """
    is_forwarded, has_failed, killed = False, False, set()
    deadline: float | None = None
    while running := _running(children):
        if not has_failed and any(child.returncode not in (None, DONE, INTERRUPTED) for child in children):
            has_failed, deadline = True, time.monotonic() + _FAILED_GRACE
        if deadline is not None and time.monotonic() > deadline:
            for child in running:
                killed.add(children.index(child))
                child.kill()
        if interruption and not is_forwarded:
            is_forwarded = True
            deadline = time.monotonic() + GRACE if deadline is None else deadline
            for child in running:
                child.terminate()
                child.send_signal(signal.SIGCONT)  # a stopped rank would neither end nor let the others end
        time.sleep(0.05)
    return killed


def _running(children: "list[subprocess.Popen[bytes]]") -> "list[subprocess.Popen[bytes]]":
    return [child for child in children if child.poll() is None]


def end_rank_with_parent() -> None:
    """In a rank of dlopt's launcher: makes the kernel kill this process when the launcher dies."""
    from dlopt.basics.interruption import end_with_parent

    end_with_parent()
    if os.getppid() != int(os.environ[PARENT]):
        os._exit(FAILED)  # the launcher died before the line above took effect
    # Ctrl-C and a hangup reach every process of the terminal, and the launcher forwards them, too. Ctrl-C is ignored
    # here until the run installs its handler.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ignore_hangup()


def end_with_torchrun() -> None:
    """In a rank of torchrun: makes the kernel kill this process when torchrun dies."""
    # torchrun starts ranks in new sessions, where they would outlive it and keep training.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from dlopt.basics.interruption import end_with_parent

        end_with_parent()
