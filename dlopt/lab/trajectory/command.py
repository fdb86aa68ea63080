"""`dlopt trajectory`: plots optimizer paths, learning-rate schedules or loss landscapes."""

import itertools
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Interval
from omegaconf import DictConfig

from dlopt.command_line.line import (
    Combination,
    Line,
    fitting,
    on_checkpoint,
    on_experiment,
    output_folder,
    saved_experiment,
    skipped_keys,
    writing,
)
from dlopt.command_line.reads import LEARNING_RATE, RECIPE, refuse_unread_hydra
from dlopt.command_line.usage import own_names
from dlopt.config.choices import CONFIG_NAME
from dlopt.config.compose import Composer
from dlopt.config.overrides import group_of, key_of, without
from dlopt.config.resolve import choices_of, to_plain
from dlopt.config.schema import Component, check_arguments, component, trusted_packages
from dlopt.errors import DONE, UserError, suggest
from dlopt.ranges import Count, Positive, Seed
from dlopt.results import drawing

if TYPE_CHECKING:
    from dlopt.lab.trajectory.functions import Function
    from dlopt.lab.trajectory.landscape import Plane
    from dlopt.lab.trajectory.paths import Curve, Trajectory
    from dlopt.schedules import Warmup
    from dlopt.training.build import Workload

_READS = (*LEARNING_RATE, *RECIPE, "optimizer", "evaluate.every_epochs")
_READS_OF_LANDSCAPES = ("data", "device", "threads", "allow_packages")
USAGE = """\
Plot optimizer paths, learning-rate schedules or loss landscapes

Usage:
  dlopt trajectory function=CHOICE optimizer=a,b [key=value]   optimizer paths on a test function
  dlopt trajectory schedule=a,b [key=value]                    learning rate vs. epoch
  dlopt trajectory checkpoint=PATH [key=value]                 loss on a plane through the weights of a model

Examples:
  dlopt trajectory function=quadratic optimizer=gradient_descent,momentum,newton
  dlopt trajectory function=rosenbrock optimizer=momentum,adam,bfgs steps=200
  dlopt trajectory function=saddle optimizer=momentum,newton,newton_undamped function.start=[-1.5,0.1]
  dlopt trajectory function=digits function.batch_size=1,16,full optimizer=gradient_descent optimizer.lr=1
  dlopt trajectory schedule=cosine_warmup,step,one_cycle epochs=30
  dlopt trajectory schedule=cosine schedule.warmup_epochs=0,2,5 optimizer.lr=0.1
  dlopt trajectory schedule='glob(*)' log_y=true
  dlopt train checkpoint.keep=100 epochs=20; dlopt trajectory checkpoint=outputs/train/DATE/checkpoints/last.pt

Keys of functions and schedules accept several values: one curve per combination.

Optimizer paths (function=quadratic, noisy_quadratic, rosenbrock, beale, himmelblau, saddle, plateau or digits):
  function.KEY=VALUE :: key of the function: function.condition=50 function.angle=30 function.start=[-1,2] ...
  {_Settings}
  Weight decay is 0 unless optimizer.weight_decay is given. L-BFGS makes one iteration per update.

Learning-rate schedules:
  {_draw_learning_rates}
and these keys of `dlopt train`:
    {_READS}

Loss landscapes:
  checkpoint=PATH :: a checkpoint, or a run folder: its best.pt, or else last.pt
  {_draw_landscape}
and these keys of its config:
    {_READS_OF_LANDSCAPES}
"""

_Output = Annotated[str | None, "DIR: folder of the plots, PNG and SVG (default: outputs/trajectory/DATE_TIME)"]
_GROUPS = ("function", "optimizer", "schedule")
_LINE_SEARCH_EVALUATIONS = 25  # default for L-BFGS
_MIN_CHECKPOINTS = 3  # two differences span a plane


@on_experiment("trajectory", None, several="not needed here; list the values: optimizer=momentum,adam")
def trajectory(line: Line) -> int:
    """Saves one of the three plots and prints its path. Raises `UserError`."""
    keys, groups = set(map(key_of, line.overrides)), set(map(group_of, line.overrides))
    if "checkpoint" in keys:
        line.refuse_config_files("with checkpoint=; a checkpoint contains its config")
        return _draw_landscape(line.overrides)
    if "function" in groups:
        name = line.composer.config_name
        name = "trajectory" if name == CONFIG_NAME else name
        return _draw_paths(replace(line, composer=Composer(name, line.composer.config_dir)))
    if "optimizer" in keys and "schedule" not in groups:
        optimizer = next(override for override in line.overrides if key_of(override) == "optimizer")
        raise UserError(f"{optimizer}: add a function (function=quadratic) or a schedule (schedule=cosine)")
    return line.call(_draw_learning_rates, "dlopt trajectory schedule=...", _READS)


# -- learning-rate curves


def _draw_learning_rates(
    line: Line,
    *,
    steps_per_epoch: Annotated[Count, "N: updates per epoch; the data is not loaded"] = 100,
    log_y: Annotated[bool, "BOOL: logarithmic learning-rate axis"] = False,
    output: _Output = None,
) -> int:
    from dlopt.lab.trajectory.paths import draw_schedules

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
    print(*written, *skipped_keys(labelled), sep="\n")
    return DONE


def _curve(line: Line, job: Combination, steps_per_epoch: int) -> tuple[str, "Curve"]:
    """Returns the name of the schedule and its curve."""
    from dlopt import schedules
    from dlopt.lab.trajectory.paths import curve

    experiment, choices = line.experiment(job.overrides)
    settings, lr = experiment.settings, experiment.optimizer.arguments.get("lr")
    if lr is None:
        raise UserError(f"optimizer={choices['optimizer']}: has no learning rate")
    if experiment.auto_lr:
        raise UserError("optimizer.lr=auto: only available in `dlopt train`; must be a number here")
    if settings.scale_lr != "none":
        raise UserError(f"scale_lr={settings.scale_lr}: not supported here; use scale_lr=none")
    steps = settings.epochs * steps_per_epoch if settings.steps is None else settings.steps
    horizon = steps if settings.schedule_epochs is None else round(settings.schedule_epochs * steps_per_epoch)
    schedule, warmup = experiment.schedule, experiment.warmup
    factor = schedules.build(schedule.build, warmup, steps=horizon, steps_per_epoch=steps_per_epoch)
    name = choices["schedule"]
    label = ", ".join([name, *(each.removeprefix("schedule.") for each in without(job.varied, "schedule"))])
    if schedule.target is schedules.Plateau:
        label += " (without improvement)"
    every = settings.evaluate.every_epochs
    return name, curve(label, factor, lr=lr, steps=steps, steps_per_epoch=steps_per_epoch, evaluate_every=every)


# -- optimizer paths


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """The keys of conf/trajectory.yaml."""

    steps: Annotated[int, Interval(ge=1, le=100_000), "N: number of updates (default: 50)"]
    seed: Annotated[Seed, "N: seed of noisy functions (default: 0)"]
    tune_lr: Annotated[
        bool,
        "BOOL: choose the learning rate of each path, unless optimizer.lr is given (default: true): on a quadratic the "
        "closed-form optimum of gradient descent and momentum, elsewhere the fastest of a grid whose path stays in the "
        "picture",
    ]
    animation: Annotated[Literal["gif", "mp4"] | None, "gif|mp4: also save an animation (default: null)"]
    output: _Output
    allow_packages: Annotated[list[str], "[a,b]: packages of your own functions and optimizers (default: [])"]


@dataclass(frozen=True)
class _PathJob:
    function_name: str
    label: str
    settings: _Settings
    function: Component
    optimizer: Component
    schedule: Component
    warmup: "Warmup"
    tunes_lr: bool
    has_constant_lr: bool
    fixes_momentum: bool  # typed


def _draw_paths(line: Line) -> int:
    from dlopt.lab.trajectory.paths import animate, draw_trajectories, table

    _refuse_others(line.overrides)
    jobs = line.jobs(_GROUPS, len(drawing.COLOURS))
    path_jobs = [_check_job(line.composer.compose(job.overrides), job) for job in jobs]
    settings = path_jobs[0].settings
    if any(path_job.settings != settings for path_job in path_jobs):
        raise UserError("steps, seed, tune_lr, animation, output: one value is needed, the same for all paths")
    if settings.animation == "mp4" and shutil.which("ffmpeg") is None:
        raise UserError("animation=mp4: ffmpeg is not installed; use animation=gif")
    function = _common_function(path_jobs)
    paths: dict[str, Trajectory] = {}
    rates: dict[str, float | None] = {}
    notes: dict[str, str] = {}
    for path_job in path_jobs:
        path, choice = _follow(path_job)
        label = ", ".join([path_job.label, *(f"{key} {value:.3g}" for key, value in choice.keys.items())])
        paths[label], rates[label] = path, choice.rate
        if choice.note:
            notes.setdefault(choice.note, path_job.label)
    name = path_jobs[0].function_name.replace("_", " ")
    title = f"{'Path' if len(paths) == 1 else 'Paths'} on {name}"
    hidden = ("function=", "output=", "animation=")
    subtitle = " ".join(override for override in line.fixed() if not override.startswith(hidden))
    folder = output_folder(settings.output, "trajectory")
    with writing(folder):
        figure = draw_trajectories(function, paths, title=title, subtitle=subtitle)
        written = drawing.save(figure, folder, "paths")
        if settings.animation is not None:
            animation = folder / f"paths.{settings.animation}"
            animate(function, paths, animation, title=name)
            written.append(animation)
    skipped = skipped_keys([(path_job.label, job) for path_job, job in zip(path_jobs, jobs, strict=True)])
    print(*table(paths, rates), *notes, *written, *skipped, sep="\n")
    return DONE


def _refuse_others(overrides: Sequence[str]) -> None:
    """Raises `UserError` for keys of `dlopt train`, which have no effect here."""
    allowed = [*_Settings.__dataclass_fields__, *_GROUPS]
    refuse_unread_hydra(overrides, "dlopt trajectory", ("hydra.searchpath",), {}, allowed)
    for line in overrides:
        key = group_of(line)
        if key not in (*allowed, "hydra"):
            hint = suggest(key, allowed, "dlopt trajectory --help")
            raise UserError(f"{line}: unknown key of optimizer paths; {hint}")


def _check_job(config: DictConfig, job: Combination) -> _PathJob:
    import torch

    from dlopt.analysis.lr_range import uses_line_search
    from dlopt.config.experiment import GROUPS
    from dlopt.optim import Muon
    from dlopt.optim.newton import UndampedNewton
    from dlopt.schedules import Warmup

    plain, _ = to_plain(config, job.overrides)
    # `data` is set by optimizer=gradient_descent (full batch) and has no effect here.
    keys = {key: value for key, value in plain.items() if key not in (*_GROUPS, "data")}
    settings = _Settings(**check_arguments("", _Settings, keys, related=_GROUPS))
    packages = (*trusted_packages(), *settings.allow_packages)
    for name in _GROUPS:
        if not isinstance(plain[name], dict) or "_target_" not in plain[name]:
            raise UserError(f"{name}: choose one; `dlopt options {name}` lists all")
    warmup = {key: plain["schedule"].pop(key) for key in own_names(Warmup) if key in plain["schedule"]}
    overridden = set(map(key_of, job.overrides))
    optimizer = component("optimizer", plain["optimizer"], GROUPS["optimizer"].runtime, packages)
    if optimizer.is_a(Muon, torch.optim.Muon):
        name = choices_of(config)["optimizer"]
        raise UserError(f"optimizer={name}: not supported on test functions; it orthogonalizes matrices, not vectors")
    if "weight_decay" in optimizer.arguments and "optimizer.weight_decay" not in overridden:
        optimizer = optimizer.partial(weight_decay=0.0)  # the decay pulls towards the origin, not to the minimum
    if "max_iter" in optimizer.arguments and "optimizer.max_iter" not in overridden:
        optimizer = optimizer.partial(max_iter=1, max_eval=_LINE_SEARCH_EVALUATIONS)  # L-BFGS: plot every iteration
    choices = choices_of(config)
    return _PathJob(
        function_name=choices["function"],
        label=job.label({group: choices[group] for group in _GROUPS}, "optimizer"),
        settings=settings,
        function=component("function", plain["function"], (), packages),
        optimizer=optimizer,
        schedule=component("schedule", plain["schedule"], GROUPS["schedule"].runtime, packages),
        warmup=Warmup(**check_arguments("schedule", Warmup, warmup)),
        tunes_lr=settings.tune_lr
        and "lr" in optimizer.arguments
        and "optimizer.lr" not in overridden
        and not uses_line_search(optimizer)
        and optimizer.target is not UndampedNewton,  # whose step has a length of its own
        has_constant_lr=choices["schedule"] == "constant" and not any(key[:9] == "schedule." for key in overridden),
        fixes_momentum="optimizer.momentum" in overridden,
    )


def _common_function(path_jobs: Sequence[_PathJob]) -> "Function":
    """Returns the function of all paths; only its noise may differ between them."""
    import torch

    functions: list[Any] = [path_job.function.build() for path_job in path_jobs]
    first = functions[0]
    left, right, bottom, top = first.window
    points = torch.tensor([[left, bottom], [right, top], [left, top], [0.3, 0.7]], dtype=torch.float64)
    for function in functions[1:]:
        same = torch.equal(function(points), first(points)) and function.window == first.window
        if type(function) is not type(first) or not same:
            raise UserError("function: one plot shows one function; only its noise (batch_size, ...) may vary")
    return first


@dataclass(frozen=True)
class _Choice:
    """The learning rate of a path (None with a line search), the keys that were chosen for it, and how."""

    rate: float | None
    keys: Mapping[str, float]
    note: str = ""


def _follow(job: _PathJob) -> tuple["Trajectory", _Choice]:
    from dlopt import schedules
    from dlopt.analysis.lr_range import uses_line_search
    from dlopt.lab.trajectory.paths import RATES, best_rate, follow

    settings = job.settings
    function = job.function.build()

    def run(optimizer: Component) -> "Trajectory":
        factor = schedules.build(job.schedule.build, job.warmup, steps=settings.steps, steps_per_epoch=1)
        build = lambda params: optimizer.build(params=params)  # noqa: E731
        return follow(function, build, steps=settings.steps, seed=settings.seed, factor=factor)

    if not job.tunes_lr:
        rate = None if uses_line_search(job.optimizer) else job.optimizer.arguments.get("lr")
        return run(job.optimizer), _Choice(rate, {})
    keys = _closed_form(job, function)
    if keys is not None:
        name = "Polyak 1964" if "momentum" in keys else "2 / (L + mu) for gradient descent"
        note = f"{'lr and momentum' if 'momentum' in keys else 'lr'} in closed form for this quadratic: {name}"
        return run(job.optimizer.partial(**keys)), _Choice(keys["lr"], keys, note)
    tried = itertools.count(1)

    def trial(lr: float) -> "Trajectory":
        _show(f"{job.label}: trying learning rate {next(tried)}")
        return run(job.optimizer.partial(lr=lr))

    try:
        rate = best_rate(trial, function)
    except ValueError as error:
        raise UserError(f"optimizer of {job.label}: {error}; set optimizer.lr") from None
    finally:
        _show("")
    path = run(job.optimizer.partial(lr=rate))
    inside = "whose path stays in the picture" if path.is_within(function.window) else "(every path leaves the window)"
    note = f"other lr: of {len(RATES)} from {RATES[0]:g} to {RATES[-1]:g}, the fastest {inside}; set optimizer.lr"
    return path, _Choice(rate, {"lr": rate}, note)


def _closed_form(job: _PathJob, function: "Function") -> Mapping[str, float] | None:
    """Returns the optimal keys on a quadratic without noise, at a constant learning rate; None elsewhere."""
    from dlopt.lab.trajectory.functions import Quadratic
    from dlopt.lab.trajectory.paths import optimum

    if not isinstance(function, Quadratic) or function.curvatures is None or not job.has_constant_lr:
        return None
    return optimum(job.optimizer, *function.curvatures, fixed_momentum=job.fixes_momentum)


def _show(message: str) -> None:
    """Replaces the current line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r{message}\033[K", end="", file=sys.stderr, flush=True)


# -- loss landscapes


@on_checkpoint("trajectory", _READS_OF_LANDSCAPES)
def _draw_landscape(
    path: Path,
    changes: dict[str, Any],
    *,
    directions: Annotated[
        Literal["auto", "random", "path"],
        "NAME: path: plane of the largest variance of the training's checkpoints (PCA), with the optimizer path; "
        "random: two random directions with filter normalization (Li et al. 2018); auto: path if there are at least "
        "three checkpoints, else random (default: auto)",
    ] = "auto",
    points: Annotated[int, Interval(ge=3, le=501), "N: grid of N x N points"] = 21,
    samples: Annotated[Count, "N: training samples for the loss"] = 500,
    span: Annotated[Positive, "X: range of random directions, relative to the filter norms"] = 1.0,
    seed: Annotated[Seed, "N: seed of random directions"] = 0,
    output: _Output = None,
) -> int:
    from dlopt.lab.trajectory.landscape import draw, random_plane, surface
    from dlopt.random import generator
    from dlopt.training.build import build_workload
    from dlopt.training.checkpoint import load

    state = load(path)
    experiment = saved_experiment(state["config"], changes, path)
    with fitting(path):
        workload = build_workload(experiment, state["normalize"])
        workload.load(state)
    found = None if directions == "random" else _path_plane(workload, path, is_required=directions == "path")
    if found is None:
        plane, epoch = random_plane(workload.module, span, generator("cpu", seed)), state["progress"]["epoch"]
        title = f"Loss landscape of {path}, epoch {epoch}"
    else:
        plane, epoch = found
        title = f"Loss landscape of {path.parent.parent}, path to epoch {epoch}"
    folder = output_folder(output, "trajectory")
    loss, count = _loss(workload, samples)
    heights = surface(workload.module, loss, plane, points, _progress(points**2))
    subtitle = f"{count} training samples, {points} x {points} points"
    with writing(folder):
        written = drawing.save(draw(plane, heights, title=title, subtitle=subtitle), folder, "landscape")
    print(*written, sep="\n")
    return DONE


def _path_plane(workload: "Workload", path: Path, *, is_required: bool) -> "tuple[Plane, int] | None":
    """Returns the plane of the checkpoints in the folder of `path`, and the last one's epoch; None: they are too few.

    The path is that of the weights, also if their average is evaluated.
    """
    from dlopt.lab.comparison.probes import checkpoints
    from dlopt.lab.trajectory.landscape import trajectory_plane

    states: list[Mapping[str, Any]] = list(checkpoints(path.parent.parent))
    if len(states) >= _MIN_CHECKPOINTS:
        names = [name for name, _ in workload.module.named_parameters()]
        weights = [[state["model"][name].to(workload.device) for name in names] for state in states]
        plane = trajectory_plane(weights, [state["progress"]["step"] for state in states])
        return plane, states[-1]["progress"]["epoch"]
    if is_required:
        raise UserError(
            f"directions=path: needs {_MIN_CHECKPOINTS} checkpoints, but {path.parent} contains {len(states)}; "
            "train with checkpoint.keep=100"
        )
    return None


def _loss(workload: "Workload", count: int) -> tuple[Any, int]:
    """Returns a function that computes the loss on evenly spaced training samples, and the number of samples."""
    import torch

    from dlopt.training.build import evaluation_batches

    samples = workload.dataset.train
    indices = torch.linspace(0, len(samples) - 1, min(count, len(samples))).long()
    batches = list(evaluation_batches(workload, samples.select(indices)).epoch(0))
    inputs, targets = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    model, loss = workload.precision.autocast(workload.model), workload.precision.autocast(workload.loss)
    return lambda: loss(model(inputs), targets), len(indices)


def _progress(total: int) -> Callable[[int], None]:
    """Returns a callback that shows the progress in a terminal."""
    if not sys.stderr.isatty():
        return lambda done: None
    return lambda done: print(
        f"\r{done}/{total} points", end="\n" if done == total else "", file=sys.stderr, flush=True
    )
