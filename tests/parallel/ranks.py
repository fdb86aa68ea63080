"""Calls a function of a test module in several processes, with the rank in the environment that dlopt reads.

They are forked from the server of `dlopt.sweeps.pool`, which imports torch once for all tests of a worker.
"""

import importlib
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlopt.interruption import SIGNALS
from dlopt.sweeps.pool import warm_up

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(function: str, processes: int, folder: Path, *arguments: Any) -> list[str]:
    """Calls `module:name` in `processes` processes and returns their outputs. Fails if any of them fails."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "DLOPT_PROCESSES": str(processes), "DLOPT_STORE": str(folder / "store")}
    warm_up()
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as temporary:
        outputs = [Path(temporary) / str(rank) for rank in range(processes)]
        started = [
            context.Process(
                target=_call, args=(function, arguments, {**environment, "DLOPT_RANK": str(rank)}, os.getcwd(), output)
            )
            for rank, output in enumerate(outputs)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(900)
        texts = [output.read_text() for output in outputs]
        for process, text in zip(started, texts, strict=True):
            if process.exitcode is None:
                process.kill()
            assert process.exitcode == 0, text
        return texts


def _call(function: str, arguments: tuple[Any, ...], environment: Mapping[str, str], cwd: str, output: Path) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked in the server
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    multiprocessing.set_start_method(None, force=True)
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(*arguments)
    from dlopt.parallel import rendezvous

    rendezvous.leave()
