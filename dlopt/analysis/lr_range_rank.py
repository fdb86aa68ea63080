"""`python -m dlopt.analysis.lr_range_rank FOLDER`: one rank of a learning-rate range test.

It does what FOLDER/config.yaml and FOLDER/sweep.json say and writes FOLDER/rank-N.json.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from dlopt.analysis.lr_range import LearningRates, Sweep, find, load_first_weights
from dlopt.assembly.setup import parallel_of, set_up
from dlopt.assembly.training import unseen
from dlopt.config.compose import resolve_saved
from dlopt.config.experiment import Experiment, parse
from dlopt.errors import RunError, UserError
from dlopt.parallel import launch
from dlopt.parallel import world as worlds


def test_range(experiment: Experiment, keys: Sweep, folder: Path) -> LearningRates:
    """The test of this process, or of this rank among several. `folder` is not written."""
    setup = set_up(experiment, parallel=parallel_of(experiment))
    load_first_weights(setup)
    return find(setup, keys, lambda setup: unseen(setup, folder))


def main() -> int:
    if worlds.RANK in os.environ:
        launch.end_with_parent()
    folder = Path(sys.argv[1])
    world = worlds.current()
    rank = 0 if world is None else world.rank
    config = yaml.safe_load((folder / "config.yaml").read_text())
    keys = Sweep(**json.loads((folder / "sweep.json").read_text()))
    outcome: dict[str, Any]
    try:
        outcome = asdict(test_range(parse(resolve_saved(config), config), keys, folder))
        worlds.leave()
        code = 0
    except (UserError, RunError) as error:
        code = 2 if isinstance(error, UserError) else 1
        outcome = {"error": str(error)}
    (folder / f"rank-{rank}.json").write_text(json.dumps(outcome))
    return code


def _end(code: int) -> None:
    if worlds.current() is None:
        sys.exit(code)
    worlds.end_process(code)


if __name__ == "__main__":
    _end(main())
