"""Starts and runs the ranks of commands that measure (`dlopt find-lr`)."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dlopt.config.parsing import parse
from dlopt.config.resolve import resolve_saved
from dlopt.config.run_config import RunConfig
from dlopt.machine.world import RANK, current
from dlopt.parallel.processes import launch, rendezvous

RankOutcome = tuple[Mapping[str, Any], int]  # content of rank-N.json, and the exit code


def run_ranks(
    module: str, folder: Path, config: Mapping[str, Any], processes: int, options: Mapping[str, str]
) -> list[int]:
    """Runs `python -m module FOLDER` as ranks with the environment variables `options`; returns their exit codes.

    A single process belongs to no process group. Raises KeyboardInterrupt after Ctrl-C.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), allow_unicode=True))
    command = launch.python_module(module, str(folder))
    if processes == 1:
        return [subprocess.run(command, env={**os.environ, **options}).returncode]
    codes, _, stopped = launch.run_processes(command, processes, options)
    if stopped:
        raise KeyboardInterrupt
    return codes


def run_rank(
    measure: Callable[[RunConfig, Path, int], Mapping[str, Any]], explain: Callable[[Exception], RankOutcome | None]
) -> int:
    """Writes the result of `measure(run_config, folder, rank)` to FOLDER/rank-N.json; returns the exit code.

    FOLDER is the only command-line argument; the config is FOLDER/config.yaml. `explain` returns None for a bug, which
    is raised.
    """
    if RANK in os.environ:
        launch.end_rank_with_parent()
    folder, world = Path(sys.argv[1]), current()
    rank = 0 if world is None else world.rank
    config = yaml.safe_load((folder / "config.yaml").read_text())
    outcome: Mapping[str, Any]
    try:
        outcome, code = measure(parse(resolve_saved(config), config), folder, rank), 0
        rendezvous.leave()
    except Exception as error:
        explanation = explain(error)
        if explanation is None:
            raise
        outcome, code = explanation
    (folder / f"rank-{rank}.json").write_text(json.dumps(outcome))
    return code
