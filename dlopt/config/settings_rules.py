"""Checks combinations of the keys of a run that belong to no group. Imports no torch."""

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from dlopt.basics.errors import UserError, did_you_mean, require_package
from dlopt.config.parameters import show
from dlopt.config.settings import Settings
from dlopt.metrics.declared import DECLARED
from dlopt.metrics.names import VAL_ACCURACY, VAL_LOSS, Direction, Metric, without_set

_MAX_NAME = 100
MONITORS = ("auto", VAL_LOSS.column, VAL_ACCURACY.column)
_NAMED = [Metric("val", name).column for name, each in DECLARED.items() if not each.by_class or name in each.also]
_OF_CLASSES = tuple(Metric("val", f"{each.name}/").column for each in {*DECLARED.values()} if each.by_class)
_TAG = re.compile(r"\w[\w.+-]*")


def check_settings(settings: Settings) -> None:
    """Raises `UserError` for values that exclude each other, and for invalid values that no type rejects."""
    check_tags(settings.tags)
    _check_name(settings.name)
    for key, path in (("resume", settings.resume), ("init_from", settings.init_from)):
        if path == "":
            raise UserError(f"{key}=: the path of a checkpoint is needed, or {key}=null")
    if settings.dry_run and settings.resume is not None:
        raise UserError(f"dry_run=true: estimates a whole run, not the rest of one; leave out resume={settings.resume}")
    _check_tracking(settings.tracking)
    _check_diagnostics(settings)
    every = settings.evaluate
    if every.every_steps is not None and every.every_epochs != 1:
        raise UserError(
            f"evaluate.every_steps={every.every_steps} and evaluate.every_epochs={every.every_epochs}: exclude each "
            "other; set evaluate.every_epochs=1 or evaluate.every_steps=null"
        )
    _check_compile(settings)
    _check_growth(settings)


def check_tags(tags: Iterable[str]) -> None:
    """Raises `UserError` for a tag that a condition of `dlopt runs` could not name."""
    for tag in tags:
        if not _TAG.fullmatch(tag):
            raise UserError(f"tags=[{tag}]: not a tag; allowed: letters, digits, and after the first also _ . + -")


def _check_name(name: str) -> None:
    if not name.strip() or len(name.encode()) > _MAX_NAME:
        raise UserError(f"name={name}: a run's name must have between 1 and {_MAX_NAME} bytes")
    if name in (".", "..") or any(character in name for character in "/\\\0\n\r\t") or not name.isprintable():
        raise UserError(
            f"name={name!r}: a run's name must be a folder name: not . or .., no slashes, no control characters"
        )


def _check_tracking(sinks: list[Any]) -> None:
    for sink in sinks:
        if sink != "tensorboard":
            require_package(f"tracking=[{','.join(sinks)}]", sink, sink)


def check_run_monitor(settings: Settings, values: Iterable[str] = ()) -> None:
    """Checks the metric `monitor`. `values`: names of those of a task of the user's own. Raises `UserError`."""
    functions = [entry.rpartition(".")[2] for entry in settings.evaluate.metrics if "." in entry]
    user_metrics = [*functions, *values]
    check_monitor("monitor", settings.monitor, user_metrics, settings.monitor_mode, settings.validation or ())


def check_monitor(
    key: str, monitor: str, user_metrics: Iterable[str], direction: Direction | None, sets: Iterable[str]
) -> None:
    """Raises `UserError` for an unknown metric, and for one of `user_metrics` without a `direction`.

    `sets`: names of the validation sets that have one.
    """
    user_metrics = [Metric("val", name).column for name in user_metrics]
    allowed = (*dict.fromkeys([*MONITORS, *_NAMED]), *user_metrics, *(VAL_LOSS.on_set(name).column for name in sets))
    metric = without_set(monitor, sets)
    if metric in user_metrics and direction is None:
        raise UserError(
            f"{key}={monitor}: whether smaller or larger values of your own metric are better must be set: "
            "monitor_mode=min or monitor_mode=max"
        )
    if metric not in allowed and not metric.startswith(_OF_CLASSES):
        raise UserError(
            f"{key}={monitor}: there is no validation metric of this name; {did_you_mean(monitor, allowed)}"
            f"allowed: {', '.join([*allowed, *(f'{each}NAME' for each in _OF_CLASSES)])}"
        )


def _check_diagnostics(settings: Settings) -> None:
    if settings.diagnostics and not settings.tracking:
        shown = ",".join(settings.diagnostics)
        raise UserError(f"diagnostics=[{shown}]: requires a tracker; set tracking=[tensorboard]")
    first, last = settings.profile_steps
    if last < first + 2:
        raise UserError(
            f"profile_steps=[{first},{last}]: too short, since the first update profiles memory and the others time; "
            f"set at least [{first},{first + 2}]"
        )


def shown_accumulate(settings: Settings) -> str:
    """Shows the value of `accumulate` as it is typed."""
    if settings.batch_growth is None:
        return str(settings.micro_batches)
    keys = [f"{name}: {show(value)}" for name, value in vars(settings.batch_growth).items() if value is not None]
    return f"{{{', '.join(keys)}}}"


def _check_growth(settings: Settings) -> None:
    growth = settings.batch_growth
    if growth is None:
        return
    key, numbers = f"accumulate={shown_accumulate(settings)}", growth.micro_batches
    units = {unit: milestones for unit, milestones in vars(growth).items() if unit != "micro_batches"}
    given = {unit: milestones for unit, milestones in units.items() if milestones is not None}
    if len(given) != 1:
        raise UserError(f"{key}: needs milestones in one unit: steps, epochs or samples")
    ((unit, milestones),) = given.items()
    if len(numbers) != len(milestones) + 1:
        raise UserError(
            f"{key}: micro_batches needs one number more than {unit}, the first for the beginning: "
            "{micro_batches: [1, 2], steps: [1000]}"
        )
    if any(b <= a for a, b in (*pairwise(numbers), *pairwise(milestones))):
        raise UserError(f"{key}: micro_batches and {unit} must increase")
    if odd := next((number for number in numbers if number % numbers[0]), None):
        raise UserError(
            f"{key}: {odd} is no multiple of {numbers[0]}, the micro-batches of data.batch_size samples; a batch grows "
            "by whole multiples"
        )
    if settings.checkpoint.at_restarts:
        raise UserError(
            f"checkpoint.at_restarts=true: an update of a batch that grows may cross a restart ({key}); set it to false"
        )


def _check_compile(settings: Settings) -> None:
    """Refuses what torch.compile and its CUDA graphs, in which each pass overwrites the previous, do not support."""
    if settings.activation_checkpointing != "none" and settings.compile not in (False, "auto"):
        raise UserError(
            f"activation_checkpointing={settings.activation_checkpointing}: not supported with "
            f"compile={str(settings.compile).lower()}, whose compiler decides what to recompute; use compile=false, or "
            "activation_checkpointing=none"
        )
    if settings.compile not in ("reduce-overhead", "max-autotune"):
        return
    advice = "use compile=max-autotune-no-cudagraphs"
    if settings.cuda_graphs is True:
        raise UserError(f"cuda_graphs=true: compile={settings.compile} records CUDA graphs of its own; {advice}")
    if settings.batch_growth is not None or settings.micro_batches > 1:
        raise UserError(
            f"accumulate={shown_accumulate(settings)}: the CUDA graphs of compile={settings.compile} overwrite the "
            f"gradients of the previous micro-batch; {advice}"
        )
