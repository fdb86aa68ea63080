"""`dlopt trajectory schedule=...`: plots the learning rate of schedules against the epoch."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from dlopt.basics.formats import terminal_width, wrap
from dlopt.commands.shared.command_line import Combination, skipped_keys
from dlopt.config.reads import RECIPE
from dlopt.extend import DONE, Count, Line, UserError, output_folder, without, writing
from dlopt.lab.trajectory.output import Output
from dlopt.results import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dlopt.schedules import Factor

# Of scale_lr only none is supported.
READS = (
    "schedule", "schedule_epochs", "epochs", "steps", "scale_lr", *RECIPE, "optimizer", "evaluate.every_epochs",
)  # fmt: skip


def draw_learning_rates(
    line: Line,
    *,
    steps_per_epoch: Annotated[Count, "N: updates per epoch; the data is not loaded"] = 100,
    log_y: Annotated[bool, "BOOL: logarithmic learning-rate axis"] = False,
    output: Output = None,
) -> int:
    curves: list[Curve] = []
    labelled: list[tuple[str, Combination]] = []
    for job in line.jobs(("schedule",), drawing.MAX_CURVES):
        label, schedule_curve = _curve(line, job, steps_per_epoch)
        if schedule_curve not in curves:  # equal where the schedule does not have the varied key
            curves.append(schedule_curve)
        labelled.append((label, job))
    lengths = {f"{each.epochs[-1]:g}" for each in curves}
    title = f"Learning rate of {curves[0].label}" if len(curves) == 1 else "Learning-rate schedules"
    title += f" over {' '.join(lengths)} epoch{'' if lengths == {'1'} else 's'}" if len(lengths) == 1 else ""
    subtitle = " ".join(without(line.fixed(), "schedule", "epochs"))
    figure = draw_schedules(curves, title=title, subtitle=subtitle, steps_per_epoch=steps_per_epoch, log_y=log_y)
    folder = output_folder(output, "trajectory")
    with writing(folder):
        written = drawing.save(figure, folder, "learning_rates")
    ignored = [line for note in skipped_keys(labelled) for line in wrap(note, terminal_width(sys.stdout))]
    print(*written, *ignored, sep="\n")
    return DONE


def _curve(line: Line, job: Combination, steps_per_epoch: int) -> tuple[str, "Curve"]:
    """Returns the name of the schedule and its curve."""
    from dlopt import schedules

    run_config, choices = line.run_config(job.overrides)
    settings, lr = run_config.settings, run_config.optimizer.arguments.get("lr")
    if lr is None:
        raise UserError(f"optimizer={choices['optimizer']}: has no learning rate")
    if run_config.auto_lr:
        raise UserError("optimizer.lr=auto: only available in `dlopt train`; must be a number here")
    if settings.scale_lr != "none":
        raise UserError(f"scale_lr={settings.scale_lr}: not supported here; use scale_lr=none")
    steps = settings.whole_epochs * steps_per_epoch if settings.steps is None else settings.steps
    horizon = steps if settings.schedule_epochs is None else round(settings.schedule_epochs * steps_per_epoch)
    schedule, warmup = run_config.schedule, run_config.warmup
    factor = schedules.build(schedule.build, warmup, steps=horizon, steps_per_epoch=steps_per_epoch)
    name = choices["schedule"]
    label = ", ".join([name, *(each.removeprefix("schedule.") for each in without(job.varied, "schedule"))])
    if schedule.target is schedules.Plateau:
        label += " (without improvement)"
    every = settings.evaluate.every_epochs
    return name, curve(label, factor, lr=lr, steps=steps, steps_per_epoch=steps_per_epoch, evaluate_every=every)


_POINTS = 4000  # more points are not visible


@dataclass(frozen=True)
class Curve:
    """Learning-rate curve: `rates[i]` holds from `epochs[i]` (fractional) to `epochs[i + 1]`."""

    label: str
    epochs: Sequence[float]
    rates: Sequence[float]


def curve(
    label: str, factor: "Factor", *, lr: float, steps: int, steps_per_epoch: float, evaluate_every: float = 1.0
) -> Curve:
    """Computes the rates of updates 0..steps-1 (at most about 4000 of them, evenly spread), up to the end of the last.

    A schedule that follows a validation metric gets the same metric every `evaluate_every` epochs, i.e. no improvement.
    """
    from dlopt.schedules import Schedule

    schedule: Any = Schedule.of(factor)
    stride = math.ceil(steps / _POINTS)
    between = max(round(evaluate_every * steps_per_epoch), 1)
    epochs, rates, evaluations = [], [], 0
    for t in range(0, steps, stride):
        while schedule.follows is not None and (evaluations + 1) * between <= t:
            schedule.follows.update({schedule.follows.monitor: 0.5})
            evaluations += 1
        epochs.append(t / steps_per_epoch)
        rates.append(lr * factor(t))
    return Curve(label, [*epochs, steps / steps_per_epoch], [*rates, rates[-1]])


def draw_schedules(
    curves: Sequence[Curve], *, title: str, subtitle: str = "", steps_per_epoch: float, log_y: bool
) -> "Figure":
    """Plots all curves in one figure; a logarithmic axis omits rates of zero."""
    figure = drawing.figure(9.5, 5)
    axes = figure.add_subplot()
    for i, curve in enumerate(curves):
        width = 3.0 - 1.6 * i / max(len(curves) - 1, 1)  # a curve below another shows at its sides
        axes.plot(
            curve.epochs, curve.rates, label=curve.label, drawstyle="steps-post", **drawing.style(i, linewidth=width)
        )
    axes.set_title(drawing.title_with_subtitle(title, subtitle), fontsize=11)
    epoch = f"epoch ({steps_per_epoch:g} update{'' if steps_per_epoch == 1 else 's'} each)"
    axes.set(xlabel=epoch, ylabel="learning rate", xlim=(0, max(curve.epochs[-1] for curve in curves)))
    if log_y:
        axes.set_yscale("log", nonpositive="mask")
        top = max(max(curve.rates) for curve in curves)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], top * 1e-6))
    else:
        axes.set_ylim(bottom=0)
    drawing.clean_axes(axes)
    figure.legend(loc="outside right upper", frameon=False, handlelength=3.5)
    return figure
