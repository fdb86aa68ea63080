"""`dlopt grid`: prints the arguments of one job of a sweep, for the tasks of another scheduler."""

from dlopt.basics.errors import DONE, UserError
from dlopt.commands.completion import keys_of_train
from dlopt.commands.shared.command_line import read_line
from dlopt.config.overrides import grid

USAGE = """\
Print the arguments of one job of a sweep, for other schedulers

Usage: dlopt grid NUMBER [group=choice] [key=a,b]

NUMBER counts the combinations of values from 0, in the order of `dlopt train -m`. Prints one argument per line.
Call it in each task of a job array. On Slurm, `dlopt train -m hydra/launcher=slurm` submits a whole sweep.

Examples:
  dlopt grid 2 optimizer=sgd,adamw seed=0,1                # optimizer=adamw, seed=0
  dlopt grid 2 optimizer=sgd,adamw seed=0,1 | xargs -d '\\n' dlopt train
"""

complete = keys_of_train


def overrides_of(number: int, arguments: list[str]) -> list[str]:
    """Returns the overrides of job `number`, after the flags that name config files. Raises `UserError`."""
    from hydra.types import RunMode  # both imports are slow, and the help does not need them

    from dlopt.sweeps.axes import is_grid, read_axes

    line = read_line(arguments, several="not needed here; grid prints one job of the sweep")
    config, _, axes = read_axes(line.composer, line.overrides)
    if not is_grid(config):
        raise UserError("dlopt grid: a search draws its jobs when they start; list the values, or run `dlopt train -m`")
    jobs = grid(axes)
    is_study = config.hydra.mode == RunMode.MULTIRUN  # of the recipe, whose jobs are to be run one by one
    if not 0 <= number < len(jobs):
        raise UserError(f"job {number}: the sweep has jobs 0 to {len(jobs) - 1}: {' '.join(arguments)}")
    return [*line.composer.flags, *jobs[number], *(["hydra.mode=RUN"] if is_study else [])]


def print_job(arguments: list[str]) -> int:
    """Prints the arguments of one job, one per line. Raises `UserError`."""
    if not arguments or not arguments[0].isdecimal() or len(arguments[0]) > 18:
        typed = " ".join(["grid", *arguments])
        raise UserError(f"{typed}: the first argument must be the number of a job, from 0")
    print("\n".join(overrides_of(int(arguments[0]), arguments[1:])))
    return DONE
