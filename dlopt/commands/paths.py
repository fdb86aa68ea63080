"""`dlopt trajectory function=...`: paths of optimizers on a test function."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import DictConfig

from dlopt.commands.line import not_written, output_folder
from dlopt.commands.series import Job, fixed, jobs, tell_skipped
from dlopt.config.compose import Composer, choices_of, to_plain
from dlopt.config.experiment import GROUPS
from dlopt.config.schema import Component, check_arguments, component, trusted_packages
from dlopt.errors import UserError
from dlopt.ranges import Count, Seed
from dlopt.schedules import Warmup

if TYPE_CHECKING:
    from dlopt.analysis.trajectory import Path
    from dlopt.functions import Function

_GROUPS = ("function", "optimizer", "schedule")
_SEARCHES = ("max_evaluations", "max_backtracks", "line_search_fn")  # keys of optimizers that search along a line
_SEARCH = 25  # evaluations of a line search where nothing is typed
_WARMUP = tuple(Warmup.__dataclass_fields__)


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
    warmup: Warmup
    tunes: bool  # its learning rate is to be chosen


def draw_paths(composer: Composer, overrides: list[str]) -> int:
    """Draws, prints a table and where the pictures are. Raises `UserError`."""
    from dlopt.analysis.drawing import COLOURS, save
    from dlopt.analysis.trajectory import animate, paths_picture, table

    _refuse_others(overrides)
    found = jobs(composer, overrides, _GROUPS, len(COLOURS))
    plans = [_plan(composer.compose(job.overrides), job) for job in found]
    settings = plans[0].settings
    if any(plan.settings != settings for plan in plans):
        raise UserError("all paths stand in one picture: of steps, seed, tune_lr, animation and output give one value")
    if settings.animation == "mp4" and shutil.which("ffmpeg") is None:
        raise UserError("animation=mp4: ffmpeg is not installed; use animation=gif")
    function = _one_function(plans)
    paths: dict[str, Path] = {}
    rates: dict[str, float | None] = {}
    for plan in plans:
        path, rate = _follow(plan)
        label = f"{plan.label}, lr {rate:g}" if plan.tunes else plan.label
        paths[label], rates[label] = path, rate
    name = plans[0].name.replace("_", " ")
    title = f"{'Path' if len(paths) == 1 else 'Paths'} on {name}"
    typed = [line for line in fixed(composer, overrides) if not line.startswith(("function=", "output=", "animation="))]
    folder = output_folder(settings.output, "trajectory")
    try:
        written = save(paths_picture(function, paths, title=title, subtitle=" ".join(typed)), folder, "paths")
        if settings.animation is not None:
            film = folder / f"paths.{settings.animation}"
            animate(function, paths, film, title=name)
            written.append(film)
    except OSError as error:
        raise not_written(folder, error) from None
    skipped = tell_skipped([(plan.label, job) for plan, job in zip(plans, found, strict=True)])
    for line in (*table(paths, rates), *written, *skipped):
        print(line)
    return 0


def _refuse_others(overrides: Sequence[str]) -> None:
    """Keys of a training, which mean nothing here."""
    allowed = [*_Settings.__dataclass_fields__, *_GROUPS]
    for line in overrides:
        key = line.lstrip("+").partition("=")[0].partition(".")[0].partition("@")[0]
        if key not in allowed and not key.startswith("hydra"):
            close = get_close_matches(key, allowed, n=1, cutoff=0.6)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"{line}: paths on a function have no key {key}; {hint}allowed: {', '.join(allowed)}")


def _plan(config: DictConfig, job: Job) -> _Plan:
    plain, _ = to_plain(config, job.overrides)
    keys = {key: value for key, value in plain.items() if key not in (*_GROUPS, "data")}  # data: of gradient_descent
    settings = _Settings(**check_arguments("", _Settings, keys, related=_GROUPS))
    packages = (*trusted_packages(), *settings.allow_packages)
    for name in _GROUPS:
        if not isinstance(plain[name], dict) or "_target_" not in plain[name]:
            raise UserError(f"{name}: one of the group's choices is needed")
    warmup = {key: plain["schedule"].pop(key) for key in _WARMUP if key in plain["schedule"]}
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


def _follow(plan: _Plan) -> tuple["Path", float | None]:
    """The path, and its learning rate where that counts."""
    from dlopt import schedules
    from dlopt.analysis.trajectory import best_rate, follow

    settings = plan.settings
    function = plan.function.build()

    def along(optimizer: Component) -> "Path":
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
