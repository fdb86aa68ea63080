"""Calls a function of a test module in several processes, with the rank in the environment that dlopt reads."""

import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from dlopt import cli
from tests.support.processes import start

ROOT = Path(__file__).resolve().parents[2]


def command(folder: Path, *overrides: str) -> list[str]:
    """Returns the command line of a small run in `folder` with parallel=ddp."""
    small = ["data.subset=100", "data.workers=0", "model=mlp", "model.widths=[8]", "device=cpu", "threads=1"]
    lines = [*small, "tracking=[]", "parallel=ddp", *overrides]
    return [sys.executable, "-m", "dlopt", "train", f"hydra.run.dir={folder}", *lines]


TWO = "parallel.processes=2"
ENDLESS = ["epochs=100000", "stopping=none"]


def run_ranks(function: str, processes: int, folder: Path, *arguments: Any) -> list[str]:
    """Calls `module:name` in `processes` processes and returns their outputs. Fails if any of them fails."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "DLOPT_PROCESSES": str(processes), "DLOPT_STORE": str(folder / "store")}
    with tempfile.TemporaryDirectory() as temporary:
        outputs = [Path(temporary) / str(rank) for rank in range(processes)]
        started = []
        for rank, output in enumerate(outputs):
            variables = environment | {"DLOPT_RANK": str(rank)}
            started.append(start(_call, (function, arguments), variables, Path.cwd(), {1: output, 2: output}))
        for process in started:
            process.join(900)
        texts = [output.read_text() for output in outputs]
        for process, text in zip(started, texts, strict=True):
            if process.exitcode is None:
                process.kill()
            assert process.exitcode == 0, text
        return texts


def run_command(folder: str, *arguments: str) -> None:
    """Runs `dlopt ARGUMENTS` as one of several ranks, for `run_ranks`; ends the process.

    Here and not in a test module, which each rank would import with its reference implementations.
    """
    os.chdir(folder)
    sys.argv = ["dlopt", *arguments]
    cli.main()


def _call(function: str, arguments: tuple[Any, ...]) -> None:
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(*arguments)
    from dlopt.parallel.processes import rendezvous

    rendezvous.leave()
