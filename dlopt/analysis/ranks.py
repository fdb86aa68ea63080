"""A process of a command that measures something with several: what each of its ranks does around the measuring."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from dlopt.config.compose import resolve_saved
from dlopt.config.experiment import Experiment
from dlopt.config.parsing import parse
from dlopt.parallel import launch, rendezvous

RankOutcome = tuple[Mapping[str, Any], int]  # what is written, and the exit code


def run_rank(
    measure: Callable[[Experiment, Path, int], Mapping[str, Any]], explain: Callable[[Exception], RankOutcome | None]
) -> int:
    """Writes what `measure(experiment, folder, rank)` finds into FOLDER/rank-N.json; returns the exit code.

    FOLDER is the command line's one argument, and the experiment that of FOLDER/config.yaml. `explain`: what is
    written of an error instead; None: it is a bug, and raised.
    """
    if rendezvous.RANK in os.environ:
        launch.end_rank_with_parent()
    folder = Path(sys.argv[1])
    world = rendezvous.current()
    rank = 0 if world is None else world.rank
    config = yaml.safe_load((folder / "config.yaml").read_text())
    outcome: Mapping[str, Any]
    try:
        outcome, code = measure(parse(resolve_saved(config), config), folder, rank), 0
        rendezvous.leave()
    except Exception as error:
        told = explain(error)
        if told is None:
            raise
        outcome, code = told
    (folder / f"rank-{rank}.json").write_text(json.dumps(outcome))
    return code
