"""`dlopt trajectory`: what an optimizer or a schedule does, in one picture: paths, learning rates, loss landscapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from dlopt.commands.line import not_written, output_folder, own_keys, read_line
from dlopt.commands.series import Job, fixed, jobs, tell_skipped
from dlopt.config.compose import Composer, to_plain
from dlopt.errors import UserError
from dlopt.ranges import Count

if TYPE_CHECKING:
    from dlopt.analysis.trajectory import Curve

USAGE = """\
dlopt trajectory function=CHOICE optimizer=a,b [key=value]: draws the paths of optimizers on a test function

  dlopt trajectory function=quadratic optimizer=gradient_descent,momentum,newton
  dlopt trajectory function=rosenbrock optimizer=momentum,adam,bfgs steps=200
  dlopt trajectory function=digits function.batch_size=1,16,full optimizer=gradient_descent optimizer.lr=1
  functions: quadratic, noisy_quadratic, rosenbrock, beale, himmelblau, saddle, plateau, digits
  function.KEY=V      its keys: function.condition=50 function.angle=30 function.start=[-1,2] ...
  steps=N             updates of each path (50)
  seed=N              of the noise, where the function has some
  tune_lr=BOOL        each path takes the learning rate with which it falls fastest, unless optimizer.lr is typed (true)
  animation=gif|mp4   the same as a film too
  Weight decay is off unless optimizer.weight_decay is typed. L-BFGS makes one iteration an update here.

dlopt trajectory schedule=a,b [key=value]: draws the learning-rate curves of schedules into one picture

  dlopt trajectory schedule=cosine_warmup,step,one_cycle epochs=30
  dlopt trajectory schedule=cosine schedule.warmup_epochs=0,2,5 optimizer.lr=0.1
  dlopt trajectory schedule='glob(*)' log_y=true
  steps_per_epoch=N   updates in one epoch (100); the data are not read
  log_y=true          logarithmic axis of the learning rate
  and the keys of `dlopt train` (which see)

dlopt trajectory checkpoint=PATH [key=value]: draws the loss around a trained model, on a plane through its weights

  dlopt train checkpoint.keep=100 epochs=20; dlopt trajectory checkpoint=outputs/train/DATE/checkpoints/last.pt
  directions=path     the plane in which the training's checkpoints vary most (PCA), with its path; random: two random
                      directions with filter normalization (Li et al. 2018); auto: path where three checkpoints are kept
  points=N            N x N points (21)
  samples=N           training samples of the loss (500)
  span=X              of random directions: how far, in norms of the filters (1)
  seed=N              of random directions

Of functions and schedules any key may have several values: a curve for each combination.
  output=DIR          folder of the pictures, PNG and SVG (outputs/trajectory/<date>_<time>)
"""


@dataclass(frozen=True, kw_only=True)
class _Own:
    """The keys of learning-rate curves alone."""

    steps_per_epoch: Count = 100
    log_y: bool = False
    output: str | None = None


def trajectory(arguments: list[str]) -> int:
    """Draws, and prints where the picture is. Raises `UserError`."""
    line = read_line(arguments, USAGE, several="several values need no flag here: optimizer=momentum,adam")
    if line is None:
        return 0
    keys = {each.partition("=")[0] for each in line.overrides}
    if "checkpoint" in keys:
        from dlopt.commands.landscape import draw_landscape

        return draw_landscape(line.overrides)
    if "function" in {key.partition(".")[0] for key in keys}:
        from dlopt.commands.paths import draw_paths

        return draw_paths(line.composer("trajectory"), line.overrides)
    if "optimizer" in keys and "schedule" not in {key.partition(".")[0] for key in keys}:
        typed = next(each for each in line.overrides if each.startswith("optimizer="))
        raise UserError(f"{typed}: its path on which function? add function=quadratic (or schedule=cosine, for that)")
    return _learning_rates(line.composer(), line.overrides)


def _learning_rates(composer: Composer, typed: Sequence[str]) -> int:
    from dlopt.analysis.drawing import MOST

    own, overrides = own_keys(composer, typed, _Own)
    curves: list[Curve] = []
    drawn: list[tuple[str, Job]] = []
    for job in jobs(composer, overrides, ("schedule",), MOST):
        config = composer.compose(job.overrides)
        schedule = str(config.hydra.runtime.choices.schedule)
        names = [line.removeprefix("schedule.") for line in job.varied if not line.startswith("schedule=")]
        each = _curve(", ".join([schedule, *names]), config, job.overrides, own.steps_per_epoch)
        if each not in curves:  # a varied key that this schedule does not have
            curves.append(each)
        drawn.append((schedule, job))
    for path in _picture(curves, composer, own, overrides):
        print(path)
    for line in tell_skipped(drawn):
        print(line)
    return 0


def _curve(label: str, config: DictConfig, overrides: list[str], steps_per_epoch: int) -> "Curve":
    from dlopt import schedules
    from dlopt.analysis.trajectory import curve
    from dlopt.config.parsing import parse

    experiment = parse(*to_plain(config, overrides))
    settings, lr = experiment.settings, experiment.optimizer.arguments.get("lr")
    if lr is None:
        raise UserError(f"optimizer={config.hydra.runtime.choices.optimizer}: it has no learning rate to draw")
    if experiment.auto_lr:
        raise UserError("optimizer.lr=auto: only `dlopt train` looks for the learning rate; type a number here")
    if settings.scale_lr != "none":
        raise UserError(f"scale_lr={settings.scale_lr}: what is drawn is optimizer.lr itself; type scale_lr=none")
    steps = settings.epochs * steps_per_epoch if settings.steps is None else settings.steps
    horizon = steps if settings.schedule_epochs is None else round(settings.schedule_epochs * steps_per_epoch)
    schedule, warmup = experiment.schedule, experiment.warmup
    factor = schedules.build(schedule.build, warmup, steps=horizon, steps_per_epoch=steps_per_epoch)
    if schedule.target is schedules.Plateau:
        label += " (if nothing improves)"
    every = settings.evaluate.every_epochs
    return curve(label, factor, lr=lr, steps=steps, steps_per_epoch=steps_per_epoch, evaluate_every=every)


def _picture(curves: list["Curve"], composer: Composer, own: _Own, overrides: list[str]) -> list[Path]:
    """Draws under a title that says what was typed for all curves."""
    from dlopt.analysis.drawing import save
    from dlopt.analysis.trajectory import curves_picture

    lengths = {f"{each.epochs[-1]:g}" for each in curves}
    title = f"Learning rate of {curves[0].label}" if len(curves) == 1 else "Learning-rate schedules"
    title += f" over {' '.join(lengths)} epoch{'' if lengths == {'1'} else 's'}" if len(lengths) == 1 else ""
    typed = " ".join(line for line in fixed(composer, overrides) if not line.startswith(("schedule=", "epochs=")))
    figure = curves_picture(curves, title=title, subtitle=typed, steps_per_epoch=own.steps_per_epoch, log_y=own.log_y)
    folder = output_folder(own.output, "trajectory")
    try:
        return save(figure, folder, "learning_rates")
    except OSError as error:
        raise not_written(folder, error) from None
