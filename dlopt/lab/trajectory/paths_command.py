"""`dlopt trajectory function=...`: runs optimizers on a function of two variables and plots their paths."""

import itertools
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Interval

from dlopt.basics.formats import terminal_width, wrap
from dlopt.basics.status_line import status_line, waiting
from dlopt.commands.shared.command_line import Combination, skipped_keys
from dlopt.commands.shared.usage import command_key_names
from dlopt.config.choices import CONFIG_NAME
from dlopt.config.overrides import refuse_several
from dlopt.config.reads import refuse_unread_hydra
from dlopt.extend import (
    DONE,
    Line,
    Names,
    Positive,
    Seed,
    UserError,
    group_of,
    key_of,
    output_folder,
    without,
    writing,
)
from dlopt.lab.trajectory.output import Output
from dlopt.results import drawing

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dlopt.extend import Component
    from dlopt.lab.trajectory.functions import Function
    from dlopt.lab.trajectory.paths import Trajectory
    from dlopt.lab.trajectory.tolerance import Decay
    from dlopt.schedules import Warmup

_GROUPS = ("function", "optimizer", "schedule")
_MATRIX = "dlopt.lab.trajectory.functions.MatrixQuadratic"
_LINE_SEARCH_EVALUATIONS = 25  # default for L-BFGS


@dataclass(frozen=True, kw_only=True)
class PathSettings:
    """The keys of dlopt/lab/conf/trajectory.yaml."""

    steps: Annotated[int, Interval(ge=1, le=100_000), "N: number of updates (default: 50)"]
    seed: Annotated[Seed, "N: seed of noisy functions (default: 0)"]
    tune_lr: Annotated[
        bool,
        "BOOL: choose the learning rate of each path, unless optimizer.lr is given (default: true): on a quadratic the "
        "closed-form optimum of gradient descent and momentum, elsewhere the fastest of a grid whose path stays in the "
        "picture",
    ]
    tolerances: Annotated[
        list[Positive],
        "[X,...]: also save tolerance.png: where stopping=tolerance would end each path, and on a quadratic the closed "
        "form of gradient descent (default: [])",
    ]
    animation: Annotated[Literal["gif", "mp4"] | None, "gif|mp4: also save an animation (default: null)"]
    output: Output
    allow_packages: Annotated[list[str], "[a,b]: packages of your own functions and optimizers (default: [])"]


@dataclass(frozen=True)
class _PathJob:
    function_name: str
    label: str
    settings: PathSettings
    function: "Component"
    optimizer: "Component"
    schedule: "Component"
    warmup: "Warmup"
    tunes_lr: bool
    has_constant_lr: bool
    fixes_momentum: bool  # typed


def draw_paths(line: Line) -> int:
    """Saves the plot of the paths; the config is trajectory.yaml, unless --config-name names another."""
    from dlopt.extend import Composer

    with waiting("loading PyTorch ..."):
        from dlopt.lab.trajectory.functions import MatrixQuadratic
        from dlopt.lab.trajectory.matrix import draw_components
        from dlopt.lab.trajectory.paths import animate, draw_trajectories, table
        from dlopt.lab.trajectory.tolerance import draw_ends, end_table, ends

    if line.composer.config_name == CONFIG_NAME:
        line = replace(line, composer=Composer("trajectory", line.composer.config_dir, line.typed))
    _refuse_others(line.overrides)
    own = [each for each in line.overrides if group_of(each) in PathSettings.__dataclass_fields__]
    refuse_several(line.composer.parse(own), "one value is needed, the same for all paths")
    jobs = line.jobs(_GROUPS, len(drawing.COLOURS))
    path_jobs = [_check_job(line.composer.compose(job.overrides), job) for job in jobs]
    settings = path_jobs[0].settings
    if settings.animation == "mp4" and shutil.which("ffmpeg") is None:
        raise UserError("animation=mp4: ffmpeg is not installed; use animation=gif")
    function = _common_function(path_jobs)
    if function.window is None and settings.animation is not None:
        raise UserError(f"animation={settings.animation}: only for functions of two variables; use animation=null")
    paths: dict[str, Trajectory] = {}
    rates: dict[str, float | None] = {}
    notes: dict[str, str] = {}
    decays: dict[str, Decay | None] = {}
    for path_job in path_jobs:
        path, choice = _follow(path_job)
        label = ", ".join([path_job.label, *(f"{key} {value:.3g}" for key, value in choice.keys.items())])
        paths[label], rates[label] = path, choice.rate
        decays[label] = _decay(path_job, function, choice.rate)
        if choice.note:
            notes.setdefault(choice.note, path_job.label)
    name = path_jobs[0].function_name.replace("_", " ")
    title = f"{'Path' if len(paths) == 1 else 'Paths'} on {function.describe(name)}"
    said = ("function", "function.condition", "steps", "output", "animation", "tolerances")  # in title or axes
    subtitle = " ".join(without(line.fixed(), *said))
    folder = output_folder(settings.output, "trajectory")
    with writing(folder):
        if isinstance(function, MatrixQuadratic):
            figure = draw_components(function, paths, title=title, subtitle=subtitle)
        else:
            figure = draw_trajectories(function, paths, title=title, subtitle=subtitle)
        written = drawing.save(figure, folder, "paths")
        if settings.animation is not None:
            animation = folder / f"paths.{settings.animation}"
            animate(function, paths, animation, title=name)
            written.append(animation)
        lines = []
        if settings.tolerances:
            found = ends(paths, settings.tolerances)
            title = f"Stopping rule of gradient descent on {function.describe(name)}"
            figure = draw_ends(found, decays, title=title, subtitle=subtitle)
            written += drawing.save(figure, folder, "tolerance")
            lines = end_table(found, decays)
    skipped = skipped_keys([(path_job.label, job) for path_job, job in zip(path_jobs, jobs, strict=True)])
    width = terminal_width(sys.stdout)
    remarks = [line for note in notes for line in wrap(note, width)]
    ignored = [line for note in skipped for line in wrap(note, width)]
    print(*table(paths, rates, width), *lines, *remarks, *written, *ignored, sep="\n")
    return DONE


def _decay(job: _PathJob, function: "Function", rate: float | None) -> "Decay | None":
    """Returns the closed form of plain gradient descent at a constant rate on a quadratic; None for other paths."""
    import torch

    from dlopt.lab.trajectory.functions import Quadratic
    from dlopt.lab.trajectory.tolerance import decay
    from dlopt.optim import SGDW

    keys = job.optimizer.arguments
    is_plain = job.optimizer.is_a(SGDW, torch.optim.SGD) and keys["momentum"] == 0 and keys["weight_decay"] == 0
    if not isinstance(function, Quadratic) or not is_plain or not job.has_constant_lr or rate is None:
        return None
    return decay(function, rate)


def _refuse_others(overrides: Sequence[str]) -> None:
    """Raises `UserError` for keys of `dlopt train`, which have no effect here."""
    allowed = [*PathSettings.__dataclass_fields__, *_GROUPS]
    refuse_unread_hydra(overrides, "dlopt trajectory", ("hydra.searchpath",), {}, allowed)
    for line in overrides:
        key = group_of(line)
        if key not in (*allowed, "hydra"):
            raise Names("key of optimizer paths", allowed, "dlopt trajectory --help").unknown(key, line)


def _check_job(config: "DictConfig", job: Combination) -> _PathJob:
    import torch

    from dlopt.config.resolve import choices_of, to_plain
    from dlopt.config.run_config import GROUPS
    from dlopt.config.schema import check_arguments, component, trusted_packages
    from dlopt.instruments.lr_range import uses_line_search
    from dlopt.optim import Muon
    from dlopt.optim.newton import UndampedNewton
    from dlopt.schedules import Warmup

    plain, _ = to_plain(config)
    # `data` is set by optimizer=gradient_descent (full batch) and has no effect here.
    keys = {key: value for key, value in plain.items() if key not in (*_GROUPS, "data")}
    settings = PathSettings(**check_arguments("", PathSettings, keys, related=_GROUPS))
    packages = trusted_packages(settings.allow_packages)
    for name in _GROUPS:
        if not isinstance(plain[name], dict) or "_target_" not in plain[name]:
            raise UserError(f"{name}: choose one; `dlopt options {name}` lists all")
    warmup = {key: plain["schedule"].pop(key) for key in command_key_names(Warmup) if key in plain["schedule"]}
    overridden = set(map(key_of, job.overrides))
    optimizer = component("optimizer", plain["optimizer"], GROUPS["optimizer"].runtime, packages)
    if optimizer.is_a(Muon, torch.optim.Muon) and plain["function"].get("_target_") != _MATRIX:
        name = choices_of(config)["optimizer"]
        raise UserError(f"optimizer={name}: orthogonalizes matrices, not vectors; use function=matrix")
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
    size = math.prod(first.shape)
    points = torch.linspace(-1, 1, 4 * size, dtype=torch.float64).view(4, size).sin()
    if first.window is not None:
        left, right, bottom, top = first.window
        points = torch.tensor([[left, bottom], [right, top], [left, top], [0.3, 0.7]], dtype=torch.float64)
    for function in functions[1:]:
        same = function.shape == first.shape and function.window == first.window
        if type(function) is not type(first) or not same or not torch.equal(function(points), first(points)):
            raise UserError("function: one plot shows one function; only its noise (batch_size, ...) may vary")
    return first


@dataclass(frozen=True)
class _Choice:
    """The learning rate of a path (None with a line search), the keys that were chosen for it, and how."""

    rate: float | None
    keys: Mapping[str, float]
    note: str = ""


def _follow(job: _PathJob) -> tuple["Trajectory", _Choice]:
    from torch.optim import Optimizer

    from dlopt import schedules
    from dlopt.instruments.lr_range import uses_line_search
    from dlopt.lab.trajectory.paths import MAX_TRIALS, RATES, best_rate, follow

    settings = job.settings
    function = job.function.build()

    def run(optimizer: "Component") -> "Trajectory":
        factor = schedules.build(job.schedule.build, job.warmup, steps=settings.steps, steps_per_epoch=1)
        build = lambda params: optimizer.build_as(Optimizer, params=params)  # noqa: E731
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
    with status_line() as show:

        def trial(lr: float) -> "Trajectory":
            show(f"{job.label}: learning rate {next(tried)} of at most {MAX_TRIALS}")
            return run(job.optimizer.partial(lr=lr))

        try:
            rate = best_rate(trial, function)
        except ValueError as error:
            raise UserError(f"optimizer of {job.label}: {error}; set optimizer.lr") from None
    path = run(job.optimizer.partial(lr=rate))
    inside = "whose path stays in the picture" if path.stays_in_the_plot(function) else "(every path leaves the window)"
    note = f"other lr: of {len(RATES)} from {RATES[0]:g} to {RATES[-1]:g}, the fastest {inside}; set optimizer.lr"
    return path, _Choice(rate, {"lr": rate}, note)


def _closed_form(job: _PathJob, function: "Function") -> Mapping[str, float] | None:
    """Returns the optimal keys on a quadratic without noise, at a constant learning rate; None elsewhere."""
    from dlopt.lab.trajectory.functions import Quadratic
    from dlopt.lab.trajectory.paths import optimum

    if not isinstance(function, Quadratic) or function.curvatures is None or not job.has_constant_lr:
        return None
    return optimum(job.optimizer, *function.curvatures, fixed_momentum=job.fixes_momentum)
