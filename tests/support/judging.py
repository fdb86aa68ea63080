"""Runs of `dlopt judge`, made without training."""

from pathlib import Path
from typing import Any

import yaml

from dlopt.lab.judge.running import Judgement, PairedRun
from tests.support.folders import make_run


def make_pair(judgement: Judgement, trial: PairedRun, **more: Any) -> Path:
    """Makes a run as the judgement would train it."""
    path = make_run(judgement.run_folder(trial).path, **more)
    seeds = dict.fromkeys(("seed", "init_seed", "order_seed", "augmentation_seed"), trial.seed)
    saved = {**judgement.sides[trial.side].plan.saved, **seeds, "tags": [judgement.entry.name]}
    (path / "config.yaml").write_text(yaml.dump(saved, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper)))
    return path
