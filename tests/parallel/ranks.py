"""Calls a function of a test module in several processes, with the rank in the environment that dlopt reads.

As a script: one of these processes.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(function: str, processes: int, folder: Path, *arguments: Any) -> list[str]:
    """Calls `module:name` in `processes` processes and returns their outputs. Fails if any of them fails."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "DLOPT_PROCESSES": str(processes),
        "DLOPT_STORE": str(folder / "store"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, __file__, function, json.dumps(arguments)]
    started = [
        subprocess.Popen(
            command,
            env={**environment, "DLOPT_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    outputs = [process.communicate(timeout=900)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def main() -> None:
    module, _, name = sys.argv[1].partition(":")
    getattr(importlib.import_module(module), name)(*json.loads(sys.argv[2]))
    from dlopt.parallel import rendezvous

    rendezvous.leave()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
