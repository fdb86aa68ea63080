"""`dlopt trajectory`: plots optimizer paths, learning-rate schedules or loss landscapes."""

from dlopt.extend import Line, UserError, group_of, key_of, on_config
from dlopt.lab.trajectory import landscape_command, learning_rates, paths_command

# Of the help:
_READS, draw_learning_rates = learning_rates.READS, learning_rates.draw_learning_rates
_READS_OF_LANDSCAPES, draw_landscape = landscape_command.READS, landscape_command.draw_landscape
PathSettings = paths_command.PathSettings

USAGE = """\
Plot optimizer paths, learning-rate schedules or loss landscapes

Usage:
  dlopt trajectory function=CHOICE optimizer=a,b [key=value]   optimizer paths on a test function
  dlopt trajectory schedule=a,b [key=value]                    learning rate vs. epoch
  dlopt trajectory checkpoint=PATH [key=value]                 loss on a plane through the weights of a model

Examples:
  dlopt trajectory function=quadratic optimizer=gradient_descent,momentum,newton
  dlopt trajectory function=rosenbrock optimizer=momentum,adam,bfgs steps=200
  dlopt trajectory function=matrix optimizer=gradient_descent,adam,muon,soap optimizer.momentum=0
  dlopt trajectory function=saddle optimizer=momentum,newton,newton_undamped function.start=[-1.5,0.1]
  dlopt trajectory function=digits function.batch_size=1,16,full optimizer=gradient_descent optimizer.lr=1
  dlopt trajectory schedule=cosine_warmup,step,one_cycle epochs=30
  dlopt trajectory schedule=cosine schedule.warmup_epochs=0,2,5 optimizer.lr=0.1
  dlopt trajectory schedule='glob(*)' log_y=true
  dlopt train checkpoint.keep=100 epochs=20; dlopt trajectory checkpoint=outputs/train/DATE/checkpoints/last.pt

Keys of functions and schedules accept several values: one curve per combination.

Optimizer paths (function=quadratic, noisy_quadratic, rosenbrock, beale, himmelblau, saddle, plateau, digits or
matrix):
  function.KEY=VALUE :: key of the function: function.condition=50 function.angle=30 function.start=[-1,2] ...
  {PathSettings}
  Weight decay is 0 unless optimizer.weight_decay is given. L-BFGS makes one iteration per update.

Learning-rate schedules:
  {draw_learning_rates}
and these keys of `dlopt train`:
    {_READS}

Loss landscapes:
  {draw_landscape}
and these keys of its config:
    {_READS_OF_LANDSCAPES}
"""


@on_config("trajectory", None, several="not needed here; list the values: optimizer=momentum,adam")
def trajectory(line: Line) -> int:
    """Saves one of the three plots and prints its path. Raises `UserError`."""
    keys, groups = set(map(key_of, line.overrides)), set(map(group_of, line.overrides))
    if "checkpoint" in keys:
        line.refuse_config_files("with checkpoint=; a checkpoint contains its config")
        return draw_landscape(line.overrides)
    if "function" in groups:
        return paths_command.draw_paths(line)
    if "optimizer" in keys and "schedule" not in groups:
        optimizer = next(override for override in line.overrides if key_of(override) == "optimizer")
        raise UserError(f"{optimizer}: add a function (function=quadratic) or a schedule (schedule=cosine)")
    return line.call(draw_learning_rates, "dlopt trajectory schedule=...", _READS)
