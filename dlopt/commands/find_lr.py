"""`dlopt find-lr`: runs a learning-rate range test, plots it and suggests learning rates."""

import os
import shlex
from typing import TYPE_CHECKING, Annotated

from dlopt.basics.emphasis import print_emphasized
from dlopt.basics.errors import DONE, UserError
from dlopt.basics.folders import short_path
from dlopt.commands.shared.command_line import Line, on_config, output_folder, writing
from dlopt.commands.shared.document import show_result
from dlopt.config.overrides import without
from dlopt.config.reads import RECIPE, UPDATE
from dlopt.instruments.lr_range_keys import RangeTest

if TYPE_CHECKING:
    from dlopt.instruments.lr_range import LearningRates

_READS = (*UPDATE, *RECIPE, "scale_lr")  # scale_lr: only none
USAGE = """\
Run a learning-rate range test

Usage: dlopt find-lr [RUN] [group=choice] [key=value]    # RUN: with the config of a run

Examples:
  dlopt find-lr
  dlopt find-lr model=mlp optimizer=adamw updates=200 max_lr=1
  dlopt train optimizer.lr=auto     # run the test, then train with the suggestion "steepest"

Increases the learning rate exponentially with every update until the loss diverges, without schedule and warmup, and
discards the model. Suggests two rates: at the steepest slope of the smoothed loss, and, more cautiously, in the middle
of its longest descent (valley).

  {RangeTest}
  {find_lr}
and these keys of `dlopt train`:
    {_READS}
"""


_HINTS = {
    "resume": "use init_from=PATH to start from weights",
    "steps": "updates=N sets the length of the test",
    "epochs": "updates=N sets the length of the test",
    "schedule": "the test raises the learning rate from min_lr to max_lr",
    "decay": "the test has no schedule of the weight decay",
}


def learning_rates(lines: list[str]) -> "LearningRates":
    """Returns the result of the test, of the arguments of `dlopt find-lr` without `output`. Raises `UserError`."""
    from dlopt.config.compose import Composer
    from dlopt.config.flags import parse_arguments

    parsed, several = parse_arguments(lines), "find_lr() runs one test at a time"
    line = Line(Composer(config_dir=parsed.config_dir, words=parsed.overrides), parsed.overrides)
    result, _ = line.call(_measure, "find_lr()", _READS, hints=_HINTS, several=several)
    assert result is not None  # not on one of several ranks
    return result


@on_config("find-lr", _READS, several="find-lr runs one test at a time", one=True, hints=_HINTS)
def find_lr(
    line: Line,
    *,
    output: Annotated[
        str | None, "DIR: folder of find_lr.png, .svg and .json (default: outputs/find-lr/DATE_TIME)"
    ] = None,
) -> int:
    """Runs the test, prints the suggestions and saves the plot. Raises `UserError`."""
    from dlopt.instruments.lr_range import describe, write
    from dlopt.tracking.console import Screen

    result, line = _measure(line)
    if result is None:  # rank > 0: rank 0 reports
        return DONE
    folder = output_folder(output, "find-lr")
    with writing(folder):
        overrides = " ".join(line.fixed()) or "default experiment"
        paths = write(result, folder, f"Learning-rate range test: {overrides}")
    screen = Screen()
    for text in describe(result):
        screen.message(text)
    print(*map(short_path, paths), sep="\n")
    rates = {"steepest": result.steepest, "valley": result.valley, "diverged": result.diverged}
    show_result({**rates, "files": [os.path.abspath(path) for path in paths]})
    if result.steepest is not None:
        kept = without(line.overrides, "optimizer.lr")
        command = ["dlopt", "train", *line.composer.flags, *kept, f"optimizer.lr={result.steepest:.2g}"]
        print_emphasized(f"next:\n  {shlex.join(command)}")
    return DONE


def _measure(line: Line) -> tuple["LearningRates | None", Line]:
    """Returns the result of the test, None on ranks > 0, and the line without the keys of the test."""
    from dlopt.instruments.lr_range import check, measure, trial

    arguments, line = line.take(RangeTest)
    range_test = RangeTest(**arguments)
    check(range_test)
    run_config, _ = line.run_config()
    trial(run_config, range_test)  # refuses optimizers without a learning rate
    if run_config.settings.scale_lr != "none":  # of a recipe: training would multiply the suggestion once more
        raise UserError(
            f"scale_lr={run_config.settings.scale_lr}: the test finds the learning rate for this batch size; set "
            "scale_lr=none, here and in the training"
        )
    return measure(run_config, range_test), line
