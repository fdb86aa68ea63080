"""`dlopt trajectory`: what an optimizer or a schedule does, in one picture: paths, learning rates, loss landscapes."""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Interval
from omegaconf import DictConfig

from dlopt.commands.command import (
    Job,
    Line,
    on_checkpoint,
    on_experiment,
    output_folder,
    own_names,
    skipped_keys,
    writing,
)
from dlopt.config.compose import CONFIG_NAME, Composer, choices_of, resolve_saved, to_plain
from dlopt.config.saved import with_changes
from dlopt.config.schema import Component, check_arguments, component, trusted_packages
from dlopt.errors import DONE, UserError, suggest
from dlopt.ranges import Count, Positive, Seed

if TYPE_CHECKING:
    from dlopt.analysis.landscape import Plane
    from dlopt.analysis.trajectory import Curve, Trajectory
    from dlopt.functions import Function
    from dlopt.schedules import Warmup
    from dlopt.training.build import Workload

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


_GROUPS = ("function", "optimizer", "schedule")
_SEARCHES = ("max_evaluations", "max_backtracks", "line_search_fn")  # keys of optimizers that search along a line
_SEARCH = 25  # evaluations of a line search where nothing is typed
_LEAST = 3  # checkpoints of a path: two differences span the plane


@on_experiment(USAGE, several="several values need no flag here: optimizer=momentum,adam")
def trajectory(line: Line) -> int:
    """Draws, and prints where the picture is. Raises `UserError`."""
    keys = {each.partition("=")[0] for each in line.overrides}
    groups = {key.partition(".")[0] for key in keys}
    if "checkpoint" in keys:
        return _draw_landscape(line.overrides)
    if "function" in groups:
        typed = line.composer.config_name
        name = "trajectory" if typed == CONFIG_NAME else typed
        return _draw_paths(replace(line, composer=Composer(name, line.composer.config_dir)))
    if "optimizer" in keys and "schedule" not in groups:
        typed = next(each for each in line.overrides if each.startswith("optimizer="))
        raise UserError(f"{typed}: its path on which function? add function=quadratic (or schedule=cosine, for that)")
    return line.call(_draw_learning_rates)


# -- learning-rate curves


def _draw_learning_rates(
    line: Line, *, steps_per_epoch: Count = 100, log_y: bool = False, output: str | None = None
) -> int:
    from dlopt.analysis.drawing import MAX_CURVES, save
    from dlopt.analysis.trajectory import draw_schedules

    curves: list[Curve] = []
    drawn: list[tuple[str, Job]] = []
    for job in line.jobs(("schedule",), MAX_CURVES):
        label, each = _curve(line, job, steps_per_epoch)
        if each not in curves:  # a varied key that this schedule does not have
            curves.append(each)
        drawn.append((label, job))
    lengths = {f"{each.epochs[-1]:g}" for each in curves}
    title = f"Learning rate of {curves[0].label}" if len(curves) == 1 else "Learning-rate schedules"
    title += f" over {' '.join(lengths)} epoch{'' if lengths == {'1'} else 's'}" if len(lengths) == 1 else ""
    typed = " ".join(each for each in line.fixed() if not each.startswith(("schedule=", "epochs=")))
    figure = draw_schedules(curves, title=title, subtitle=typed, steps_per_epoch=steps_per_epoch, log_y=log_y)
    folder = output_folder(output, "trajectory")
    with writing(folder):
        written = save(figure, folder, "learning_rates")
    print(*written, *skipped_keys(drawn), sep="\n")
    return DONE


def _curve(line: Line, job: Job, steps_per_epoch: int) -> tuple[str, "Curve"]:
    """The schedule's name, and its curve."""
    from dlopt import schedules
    from dlopt.analysis.trajectory import curve

    experiment, choices = line.experiment(job.overrides)
    settings, lr = experiment.settings, experiment.optimizer.arguments.get("lr")
    if lr is None:
        raise UserError(f"optimizer={choices['optimizer']}: it has no learning rate to draw")
    if experiment.auto_lr:
        raise UserError("optimizer.lr=auto: only `dlopt train` looks for the learning rate; type a number here")
    if settings.scale_lr != "none":
        raise UserError(f"scale_lr={settings.scale_lr}: what is drawn is optimizer.lr itself; type scale_lr=none")
    steps = settings.epochs * steps_per_epoch if settings.steps is None else settings.steps
    horizon = steps if settings.schedule_epochs is None else round(settings.schedule_epochs * steps_per_epoch)
    schedule, warmup = experiment.schedule, experiment.warmup
    factor = schedules.build(schedule.build, warmup, steps=horizon, steps_per_epoch=steps_per_epoch)
    name = choices["schedule"]
    label = ", ".join([name, *(each.removeprefix("schedule.") for each in job.varied if each[:9] != "schedule=")])
    if schedule.target is schedules.Plateau:
        label += " (if nothing improves)"
    every = settings.evaluate.every_epochs
    return name, curve(label, factor, lr=lr, steps=steps, steps_per_epoch=steps_per_epoch, evaluate_every=every)


# -- paths on test functions


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """conf/trajectory.yaml explains these."""

    steps: Count
    seed: Seed
    tune_lr: bool
    animation: Literal["gif", "mp4"] | None
    output: str | None
    allow_packages: list[str]


@dataclass(frozen=True)
class _Plan:
    """One path to follow, checked."""

    name: str  # of the function
    label: str
    settings: _Settings
    function: Component
    optimizer: Component
    schedule: Component
    warmup: "Warmup"
    tunes: bool  # its learning rate is to be chosen


def _draw_paths(line: Line) -> int:
    """Draws, prints a table and where the pictures are."""
    from dlopt.analysis.drawing import COLOURS, save
    from dlopt.analysis.trajectory import animate, draw_trajectories, table

    _refuse_others(line.overrides)
    jobs = line.jobs(_GROUPS, len(COLOURS))
    plans = [_plan(line.composer.compose(job.overrides), job) for job in jobs]
    settings = plans[0].settings
    if any(plan.settings != settings for plan in plans):
        raise UserError("all paths stand in one picture: of steps, seed, tune_lr, animation and output give one value")
    if settings.animation == "mp4" and shutil.which("ffmpeg") is None:
        raise UserError("animation=mp4: ffmpeg is not installed; use animation=gif")
    function = _one_function(plans)
    paths: dict[str, Trajectory] = {}
    rates: dict[str, float | None] = {}
    for plan in plans:
        path, rate = _follow(plan)
        label = f"{plan.label}, lr {rate:g}" if plan.tunes else plan.label
        paths[label], rates[label] = path, rate
    name = plans[0].name.replace("_", " ")
    title = f"{'Path' if len(paths) == 1 else 'Paths'} on {name}"
    typed = [each for each in line.fixed() if not each.startswith(("function=", "output=", "animation="))]
    folder = output_folder(settings.output, "trajectory")
    with writing(folder):
        written = save(draw_trajectories(function, paths, title=title, subtitle=" ".join(typed)), folder, "paths")
        if settings.animation is not None:
            film = folder / f"paths.{settings.animation}"
            animate(function, paths, film, title=name)
            written.append(film)
    skipped = skipped_keys([(plan.label, job) for plan, job in zip(plans, jobs, strict=True)])
    print(*table(paths, rates), *written, *skipped, sep="\n")
    return DONE


def _refuse_others(overrides: Sequence[str]) -> None:
    """Keys of a training, which mean nothing here."""
    allowed = [*_Settings.__dataclass_fields__, *_GROUPS]
    for line in overrides:
        key = line.lstrip("+").partition("=")[0].partition(".")[0].partition("@")[0]
        if key not in allowed and not key.startswith("hydra"):
            hint = suggest(key, allowed, "dlopt trajectory --help")
            raise UserError(f"{line}: unknown key of optimizer paths; {hint}")


def _plan(config: DictConfig, job: Job) -> _Plan:
    from dlopt.config.experiment import GROUPS
    from dlopt.schedules import Warmup

    plain, _ = to_plain(config, job.overrides)
    keys = {key: value for key, value in plain.items() if key not in (*_GROUPS, "data")}  # data: of gradient_descent
    settings = _Settings(**check_arguments("", _Settings, keys, related=_GROUPS))
    packages = (*trusted_packages(), *settings.allow_packages)
    for name in _GROUPS:
        if not isinstance(plain[name], dict) or "_target_" not in plain[name]:
            raise UserError(f"{name}: one of the group's choices is needed")
    warmup = {key: plain["schedule"].pop(key) for key in own_names(Warmup) if key in plain["schedule"]}
    typed = {line.lstrip("+").partition("=")[0] for line in job.overrides}
    optimizer = component("optimizer", plain["optimizer"], GROUPS["optimizer"].runtime, packages)
    if optimizer.target.__name__ == "Muon":
        raise UserError("optimizer=muon: it orthogonalizes matrices, and a point of the plane is a vector")
    if "weight_decay" in optimizer.arguments and "optimizer.weight_decay" not in typed:
        optimizer = optimizer.partial(weight_decay=0.0)  # it would pull towards the origin, away from the minimum
    if "max_iter" in optimizer.arguments and "optimizer.max_iter" not in typed:
        optimizer = optimizer.partial(max_iter=1, max_eval=_SEARCH)  # of L-BFGS: the path shows every iteration
    searches = any(optimizer.arguments.get(key) is not None for key in _SEARCHES)
    chosen = choices_of(config)
    return _Plan(
        name=chosen["function"],
        label=job.label({group: chosen[group] for group in _GROUPS}, "optimizer"),
        settings=settings,
        function=component("function", plain["function"], (), packages),
        optimizer=optimizer,
        schedule=component("schedule", plain["schedule"], GROUPS["schedule"].runtime, packages),
        warmup=Warmup(**check_arguments("schedule", Warmup, warmup)),
        tunes=settings.tune_lr and "lr" in optimizer.arguments and "optimizer.lr" not in typed and not searches,
    )


def _one_function(plans: Sequence[_Plan]) -> "Function":
    """The function of all paths, which may differ in the noise that they see of it."""
    import torch

    functions: list[Any] = [plan.function.build() for plan in plans]
    first = functions[0]
    left, right, bottom, top = first.window
    corners = torch.tensor([[left, bottom], [right, top], [left, top], [0.3, 0.7]], dtype=torch.float64)
    for each in functions[1:]:
        same = torch.equal(each(corners), first(corners)) and each.window == first.window
        if type(each) is not type(first) or not same:
            raise UserError(
                "function: all paths are drawn over the contours of one function; of what changes these give one value"
            )
    return first


def _follow(plan: _Plan) -> tuple["Trajectory", float | None]:
    """The path, and its learning rate where that counts."""
    from dlopt import schedules
    from dlopt.analysis.trajectory import best_rate, follow

    settings = plan.settings
    function = plan.function.build()

    def along(optimizer: Component) -> "Trajectory":
        factor = schedules.build(plan.schedule.build, plan.warmup, steps=settings.steps, steps_per_epoch=1)
        build = lambda params: optimizer.build(params=params)  # noqa: E731
        return follow(function, build, steps=settings.steps, seed=settings.seed, factor=factor)

    if not plan.tunes:
        given = plan.optimizer.arguments.get("lr")
        searches = any(plan.optimizer.arguments.get(key) is not None for key in _SEARCHES)
        return along(plan.optimizer), None if searches else given
    try:
        rate = best_rate(lambda lr: along(plan.optimizer.partial(lr=lr)), function.least)
    except ValueError as error:
        raise UserError(f"optimizer of {plan.label}: {error}; type optimizer.lr") from None
    return along(replace(plan.optimizer, arguments={**plan.optimizer.arguments, "lr": rate})), rate


# -- loss landscapes


@on_checkpoint("trajectory", "", ("data", "device", "threads", "allow_packages"))
def _draw_landscape(
    path: Path,
    changes: dict[str, Any],
    *,
    directions: Literal["auto", "random", "path"] = "auto",
    points: Annotated[int, Interval(ge=3, le=501)] = 21,
    samples: Count = 500,
    span: Positive = 1.0,
    seed: Seed = 0,
    output: str | None = None,
) -> int:
    """Draws, and prints where the picture is. Raises `UserError`."""
    from dlopt.analysis.drawing import save
    from dlopt.analysis.landscape import draw, random_plane, surface
    from dlopt.config.parsing import parse
    from dlopt.random import generator
    from dlopt.training.build import build_workload
    from dlopt.training.checkpoint import load

    state = load(path)
    workload = build_workload(parse(resolve_saved(with_changes(state["config"], changes, path))), state["normalize"])
    workload.module.load_state_dict(state["ema"] or state["model"])
    plane = None if directions == "random" else _path_plane(workload, path, is_needed=directions == "path")
    if plane is None:
        origin = [p.detach().clone() for p in workload.module.parameters()]
        plane = random_plane(origin, span, generator("cpu", seed))
    folder = output_folder(output, "trajectory")
    loss, count = _loss(workload, samples)
    heights = surface(workload.module, loss, plane, points, _progress(points**2))
    title = f"Loss around {path}, epoch {state['progress']['epoch']}"
    subtitle = f"{count} training samples, {points} x {points} points"
    with writing(folder):
        written = save(draw(plane, heights, title=title, subtitle=subtitle), folder, "landscape")
    print(*written, sep="\n")
    return DONE


def _path_plane(workload: "Workload", path: Path, *, is_needed: bool) -> "Plane | None":
    """The plane through the checkpoints beside `path`; None where there are too few of them."""
    from dlopt.analysis.landscape import trajectory_plane
    from dlopt.analysis.probes import checkpoints

    states: list[Mapping[str, Any]] = list(checkpoints(path.parent.parent))
    if len(states) >= _LEAST:
        names = [name for name, _ in workload.module.named_parameters()]
        weights = [[state["model"][name].to(workload.device) for name in names] for state in states]
        return trajectory_plane(weights, [state["progress"]["step"] for state in states])
    if is_needed:
        raise UserError(
            f"directions=path: beside {path} there are {len(states)} checkpoints, and {_LEAST} are needed; "
            "train with checkpoint.keep=100"
        )
    return None


def _loss(workload: "Workload", count: int) -> tuple[Any, int]:
    """The loss over evenly chosen training samples, as a function of the module's weights, and how many these are."""
    import torch

    from dlopt.training.build import evaluation_batches

    samples = workload.dataset.train
    indices = torch.linspace(0, len(samples) - 1, min(count, len(samples))).long()
    batches = list(evaluation_batches(workload, samples.select(indices)).epoch(0))
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model, loss = workload.precision.autocast(workload.model), workload.precision.autocast(workload.loss)
    return lambda: loss(model(inputs), targets), len(indices)


def _progress(total: int) -> Callable[[int], None]:
    """Shows at a terminal how many points are done."""
    if not sys.stderr.isatty():
        return lambda done: None
    return lambda done: print(
        f"\r{done}/{total} points", end="\n" if done == total else "", file=sys.stderr, flush=True
    )
