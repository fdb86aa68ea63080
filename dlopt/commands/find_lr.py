"""`dlopt find-lr`: a learning-rate range test, its picture, and what it suggests."""

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dlopt.commands.command import Line, on_experiment, output_folder, writing
from dlopt.errors import DONE, USER_ERROR, RunError, UserError
from dlopt.tracking.layout import short_path

if TYPE_CHECKING:
    from dlopt.analysis.lr_range import LearningRates, RangeTest
    from dlopt.config.experiment import Experiment

USAGE = """\
dlopt find-lr [group=choice] [key=value]: trains while the learning rate grows, and suggests one

  dlopt find-lr
  dlopt find-lr model=mlp optimizer=adamw updates=200 max_lr=1
  dlopt train optimizer.lr=auto                  finds one (the steepest slope) and trains with it

The rate grows from update to update until the loss diverges. Two suggestions: where the smoothed loss falls fastest,
and the middle of its longest descent (valley), which is more cautious. Schedule and warmup are left out; the model is
thrown away. Besides the keys of `dlopt train` (which see):
  min_lr=X, max_lr=X   first and last rate (1e-6, 10)
  updates=N            of the whole test (100)
  smoothing=X          weight of the past in the smoothed loss (0.9)
  diverge=X            the test ends at so many times the lowest smoothed loss (4)
  output=DIR           folder of find_lr.png, .svg and .json (outputs/find-lr/<date>_<time>)
"""


@on_experiment(USAGE, several="one learning rate is looked for at a time", one=True)
def find_lr(line: Line, *, output: str | None = None) -> int:
    """Finds, prints and draws. Raises `UserError`."""
    from dlopt.analysis.lr_range import RangeTest, check, trial, write

    own, line = line.take(RangeTest)
    keys = RangeTest(**own)
    check(keys)
    experiment, _ = line.experiment()
    trial(experiment, keys)  # whether the optimizer has a learning rate
    if experiment.settings.resume is not None:
        raise UserError(f"resume={experiment.settings.resume}: the test begins with fresh weights, or init_from=PATH")
    found = _found(experiment, keys)
    if found is None:
        return DONE  # another rank tells
    folder = output_folder(output, "find-lr")
    typed = " ".join(line.fixed()) or "the default experiment"
    with writing(folder):
        paths = write(found, folder, f"Learning-rate range test: {typed}")
    _tell(found)
    for path in paths:
        print(short_path(path))
    return DONE


def _found(experiment: "Experiment", keys: "RangeTest") -> "LearningRates | None":
    """The result of the main rank; None in others, where a launcher started them."""
    from dlopt.analysis.lr_range import test_range
    from dlopt.parallel.launch import count_processes
    from dlopt.parallel.rendezvous import current, leave

    world = current()
    if world is None and count_processes(experiment.parallel.arguments, experiment.settings.device) > 1:
        return _by_ranks(experiment, keys)
    found = test_range(experiment, keys, Path(os.devnull))
    if world is not None:
        leave()
    return found if world is None or world.is_main else None


def _by_ranks(experiment: "Experiment", keys: "RangeTest") -> "LearningRates":
    """The same in processes that are started here."""
    import yaml

    from dlopt.analysis.lr_range import LearningRates
    from dlopt.parallel.launch import count_processes, python_module, run_processes

    scratch = Path(tempfile.mkdtemp(prefix="dlopt-find-lr-"))
    try:
        (scratch / "config.yaml").write_text(yaml.safe_dump(dict(experiment.config), allow_unicode=True))
        (scratch / "sweep.json").write_text(json.dumps(asdict(keys)))
        command = python_module("dlopt.analysis.lr_range", str(scratch))
        processes = count_processes(experiment.parallel.arguments, experiment.settings.device)
        codes, _, asked = run_processes(command, processes, {})
        if asked:
            raise KeyboardInterrupt
        told = [json.loads(path.read_text()) for path in sorted(scratch.glob("rank-*.json"))]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for each in told:
        if "error" in each:
            raise UserError(each["error"]) if USER_ERROR in codes else RunError(each["error"])
    if any(codes) or not told:
        raise RunError(f"the processes of the test ended with {', '.join(map(str, codes))}")
    return LearningRates(**told[0])


def _tell(found: "LearningRates") -> None:
    end = "the loss diverged" if found.diverged else "the loss did not diverge: max_lr may be larger"
    print(f"{len(found.rates)} updates up to a learning rate of {found.rates[-1]:.3g}; {end}")
    if found.valley is None or found.steepest is None:
        print("the loss never fell: no suggestion; try other values of min_lr and max_lr, or more updates")
    else:
        print(f"steepest slope: optimizer.lr={found.steepest:.2g}")
        print(f"valley: optimizer.lr={found.valley:.2g}")
