"""Processes that dlopt starts itself: rank by rank `python -m dlopt.job FOLDER`, watched until the last has ended."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dlopt.errors import RunError, UserError
from dlopt.interruption import Interruption
from dlopt.parallel.world import MEETING, PROCESSES, RANK

PARENT, RECORD, QUIET = "DLOPT_PARENT", "DLOPT_RECORD", "DLOPT_QUIET"
_GRACE = 5.0  # seconds in which ranks may end by themselves once one has failed
_PR_SET_PDEATHSIG = 1


def wanted(arguments: Mapping[str, Any], device: str) -> int:
    """Processes to be started for a mode with these arguments. Raises `UserError` where there are too few GPUs."""
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


def run_group(folder: Path, processes: int, checkpoint: str | None, *, record: bool, console: bool) -> int:
    """Runs what FOLDER/config.yaml says in so many processes; returns their exit code.

    `checkpoint`: to go on from; None: the folder's newest, if it has one. `record`: whether a user's mistake is to be
    recorded in the folder. `console`: whether the first rank shows how it goes. Raises `RunError` naming the rank when
    one was killed.
    """
    command = [sys.executable, "-m", "dlopt.job", str(folder), *([checkpoint] if checkpoint else [])]
    told = {RECORD: "1" if record else "", QUIET: "" if console else "1"}
    codes, stuck, asked = run_processes(command, processes, told)
    if asked and all(code in (0, 75, -signal.SIGTERM, -signal.SIGKILL) for code in codes):
        return 75
    for rank, code in enumerate(codes):
        if code < 0 and rank not in stuck:
            name = signal.Signals(-code).name
            raise RunError(f"rank {rank} was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else ""))
    return next((code for code in (2, 1, 75) if code in codes), max(codes))


def run_processes(
    command: Sequence[str], processes: int, environment: Mapping[str, str]
) -> tuple[list[int], set[int], Interruption]:
    """Runs `command` so many times as the ranks of one world, with `environment` besides this process's own.

    Returns exit codes, ranks that had to be killed once another had failed, and whether a signal asked all to stop.
    """
    meeting = Path(tempfile.mkdtemp(prefix="dlopt-"))
    shared = {PROCESSES: str(processes), MEETING: str(meeting / "store"), PARENT: str(os.getpid())}
    children: list[subprocess.Popen[bytes]] = []
    try:
        with Interruption() as asked, _killed_at_the_end(children):
            for rank in range(processes):
                own = {"TORCH_CPP_LOG_LEVEL": "FATAL", **os.environ, **shared, **environment, RANK: str(rank)}
                children.append(subprocess.Popen(command, env=own))
            stuck = _watch(children, asked)
            codes = [child.wait() for child in children]
    finally:
        shutil.rmtree(meeting, ignore_errors=True)
    return codes, stuck, asked


def _watch(children: "list[subprocess.Popen[bytes]]", asked: Interruption) -> set[int]:
    """Returns when all have ended, with the ranks that had to be killed.

    A signal is passed on; where one rank has failed, the others get a while to follow.
    """
    told, stuck = False, set()
    deadline: float | None = None
    while any(child.poll() is None for child in children):
        failed = [child for child in children if child.returncode not in (None, 0, 75)]
        if failed and deadline is None:
            deadline = time.monotonic() + _GRACE
        if deadline is not None and time.monotonic() > deadline:
            for rank, child in enumerate(children):
                if child.poll() is None:
                    stuck.add(rank)
                    child.kill()
        if asked and not told:
            told = True
            for child in children:
                if child.poll() is None:
                    child.terminate()
        time.sleep(0.05)
    return stuck


@contextlib.contextmanager
def _killed_at_the_end(children: "list[subprocess.Popen[bytes]]") -> Iterator[None]:
    try:
        yield
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()


def end_with_parent() -> None:
    """In a started rank: a launcher that is killed takes it along."""
    _die_with_parent()
    if os.getppid() != int(os.environ[PARENT]):
        os._exit(1)  # it was killed before the line above
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the run catches it: the launcher passes signals on


def end_with_torchrun() -> None:
    """In a rank of torchrun's, which gives its ranks sessions of their own: if it is killed they would train on."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _die_with_parent()


def _die_with_parent() -> None:
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
