"""`python -m dlopt.analysis.lr_range_rank FOLDER`: one rank of a learning-rate range test.

It does what FOLDER/config.yaml and FOLDER/sweep.json say and writes FOLDER/rank-N.json.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dlopt.analysis.lr_range import LearningRates, Sweep, find, load_first_weights
from dlopt.analysis.ranks import Told, run_rank
from dlopt.config.experiment import Experiment
from dlopt.errors import RunError, UserError
from dlopt.parallel import rendezvous
from dlopt.training.build import parallel_of, set_up


def test_range(experiment: Experiment, keys: Sweep, folder: Path) -> LearningRates:
    """The test of this process, or of this rank among several. `folder` is not written."""
    setup = set_up(experiment, parallel=parallel_of(experiment))
    load_first_weights(setup)
    return find(setup, keys, folder)


def _measure(experiment: Experiment, folder: Path, _: int) -> dict[str, Any]:
    keys = Sweep(**json.loads((folder / "sweep.json").read_text()))
    return asdict(test_range(experiment, keys, folder))


def _explain(error: Exception) -> Told | None:
    if not isinstance(error, UserError | RunError):
        return None
    return {"error": str(error)}, 2 if isinstance(error, UserError) else 1


def _end(code: int) -> None:
    if rendezvous.current() is None:
        sys.exit(code)
    rendezvous.end_process(code)


if __name__ == "__main__":
    _end(run_rank(_measure, _explain))
