"""`dlopt trajectory`: learning-rate curves of the chosen schedules in one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import HydraException
from omegaconf import DictConfig

from dlopt.config.compose import Composer, parse_arguments, to_plain
from dlopt.config.schema import check_arguments
from dlopt.errors import UserError
from dlopt.folders import make_new
from dlopt.ranges import Count

if TYPE_CHECKING:
    from dlopt.analysis.curves import Curve

USAGE = """\
dlopt trajectory schedule=a,b [key=value]: draws the learning-rate curves of schedules into one picture

  dlopt trajectory schedule=cosine_warmup,step,one_cycle epochs=30
  dlopt trajectory schedule=cosine schedule.warmup_epochs=0,2,5 optimizer.lr=0.1
  dlopt trajectory schedule='glob(*)' log_y=true

Any key may have several values: a curve for each combination. Besides the keys of `dlopt train` (which see):
  steps_per_epoch=N   updates in one epoch (100); the data are not read
  log_y=true          logarithmic axis of the learning rate
  output=DIR          folder of learning_rates.png and learning_rates.svg (outputs/trajectory/<date>_<time>)
"""


@dataclass(frozen=True, kw_only=True)
class _Own:
    """The keys of this command alone."""

    steps_per_epoch: Count = 100
    log_y: bool = False
    output: str | None = None


@dataclass(frozen=True)
class _Job:
    """The overrides of one curve: those to compose with, those of them that vary, those its schedule has no key for."""

    overrides: list[str]
    varied: list[str]
    skipped: list[str]


def trajectory(arguments: list[str]) -> int:
    """Draws, and prints where the picture is. Raises `UserError`."""
    parsed = parse_arguments(arguments)
    if parsed.help:
        print(USAGE, end="")
        return 0
    composer = Composer(parsed.config_name, parsed.config_dir)
    own, overrides = _own(composer, parsed.overrides)
    curves: list[Curve] = []
    skipped: dict[str, list[str]] = {}  # schedules by the override that is not for them
    for job in _jobs(composer, overrides):
        config = composer.compose(job.overrides)
        schedule = str(config.hydra.runtime.choices.schedule)
        names = [line.removeprefix("schedule.") for line in job.varied if not line.startswith("schedule=")]
        each = _curve(", ".join([schedule, *names]), config, job.overrides, own.steps_per_epoch)
        if each not in curves:  # a varied key that this schedule does not have
            curves.append(each)
        for line in job.skipped:
            skipped.setdefault(line.split("=")[0], []).append(schedule)
    for path in _picture(curves, composer, own, overrides):
        print(path)
    for key, names in skipped.items():
        print(f"{key}: there is no such key in {', '.join(dict.fromkeys(names))}, drawn without it")
    return 0


def _own(composer: Composer, overrides: Sequence[str]) -> tuple[_Own, list[str]]:
    """This command's keys, and the overrides that are left for the config."""
    names = ("steps_per_epoch", "log_y", "output")
    mine = [line for line in overrides if line.partition("=")[0] in names]
    for line in overrides:
        if line.startswith("function="):
            raise UserError(f"{line}: only learning-rate curves are drawn so far: schedule=a,b")
    for override in composer.parse(mine):
        if override.is_sweep_override():
            raise UserError(f"{override.input_line}: one value is needed, for all curves stand in one picture")
    values = {override.get_key_element(): override.value() for override in composer.parse(mine)}
    return _Own(**check_arguments("", _Own, values)), [line for line in overrides if line not in mine]


def _jobs(composer: Composer, overrides: list[str]) -> list[_Job]:
    """One job per combination of values. A key that only some of the schedules have is left to these."""
    from dlopt.analysis.curves import MOST

    parsed = composer.parse(overrides)
    try:
        combinations = BasicSweeper.split_arguments(parsed, None)[0]
    except HydraException as error:
        raise UserError(str(error)) from None
    sweeps = {override.get_key_element() for override in parsed if override.is_sweep_override()}
    whole = [lines for lines in combinations if not any(line.startswith("schedule=_") for line in lines)]
    combinations = whole or combinations  # glob(*) finds fragments too
    if len(combinations) > MOST:
        raise UserError(f"{' '.join(overrides)}: {len(combinations)} curves; {MOST} at most can be told apart")
    offered = [_schedule_keys(composer, lines) for lines in combinations]
    known = set[str]().union(*offered)
    jobs = []
    for lines, keys in zip(combinations, offered, strict=True):
        skipped = [line for line in lines if _schedule_key(line) in known - keys]
        kept = [line for line in lines if line not in skipped]
        jobs.append(_Job(kept, [line for line in kept if line.split("=")[0] in sweeps], skipped))
    return jobs


def _schedule_keys(composer: Composer, lines: list[str]) -> set[str]:
    if not any(_schedule_key(line) for line in lines):
        return set()
    config = composer.compose([line for line in lines if not _schedule_key(line)])
    return {str(key) for key in config.schedule}


def _schedule_key(line: str) -> str:
    """x of schedule.x=...; nothing of other overrides."""
    key = line.lstrip("+").partition("=")[0]
    return key.split(".")[1] if key.startswith("schedule.") else ""


def _curve(label: str, config: DictConfig, overrides: list[str], steps_per_epoch: int) -> "Curve":
    from dlopt import schedules
    from dlopt.analysis.curves import curve
    from dlopt.config.experiment import parse

    experiment = parse(*to_plain(config, overrides))
    settings, lr = experiment.settings, experiment.optimizer.arguments.get("lr")
    if lr is None:
        raise UserError(f"optimizer={config.hydra.runtime.choices.optimizer}: it has no learning rate to draw")
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
    from dlopt.analysis.curves import draw, save

    fixed = [o.input_line for o in composer.parse(overrides) if not o.is_sweep_override()]
    lengths = {f"{each.epochs[-1]:g}" for each in curves}
    title = f"Learning rate of {curves[0].label}" if len(curves) == 1 else "Learning-rate schedules"
    title += f" over {' '.join(lengths)} epoch{'' if lengths == {'1'} else 's'}" if len(lengths) == 1 else ""
    typed = " ".join(str(line) for line in fixed if not str(line).startswith(("schedule=", "epochs=")))
    figure = draw(curves, title=title, subtitle=typed, steps_per_epoch=own.steps_per_epoch, log_y=own.log_y)
    try:
        if own.output is None:
            folder = make_new(Path("outputs/trajectory") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), "output")
        else:
            folder = Path(own.output)
            folder.mkdir(parents=True, exist_ok=True)
        return save(figure, folder, "learning_rates")
    except OSError as error:
        raise UserError(f"output={own.output}: the picture cannot be written there: {error.strerror}") from None
