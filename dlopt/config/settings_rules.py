"""Checks the keys of a run that belong to no group, each alone (`conflicts`: two of them). Imports no torch."""

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from dlopt.basics.errors import UserError, require_package
from dlopt.basics.names import Names
from dlopt.config.parameters import as_typed
from dlopt.config.settings import Growth, Settings
from dlopt.metrics.declared import DECLARED
from dlopt.metrics.names import VAL_ACCURACY, VAL_LOSS, Direction, Metric, without_set

_MAX_NAME = 100
MONITORS = ("auto", VAL_LOSS.column, VAL_ACCURACY.column)
_NAMED = [Metric("val", name).column for name, each in DECLARED.items() if not each.by_class or name in each.also]
_OF_CLASSES = tuple(Metric("val", f"{each.name}/").column for each in {*DECLARED.values()} if each.by_class)
_TAG = re.compile(r"\w[\w.+-]*")


def check_settings(settings: Settings) -> None:
    """Raises `UserError` for invalid values that no type rejects."""
    check_tags(settings.tags)
    _check_name(settings.name)
    for key, path in (("resume", settings.resume), ("init_from", settings.init_from)):
        if path == "":
            raise UserError(f"{key}=: the path of a checkpoint is needed, or {key}=null")
    _check_tracking(settings.tracking)
    _check_profile(*settings.profile_steps)
    if settings.batch_growth is not None:
        _check_growth(settings.batch_growth)


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
            require_package(f"tracking=[{','.join(sinks)}]", sink)


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
        patterns = [f"{each}NAME" for each in _OF_CLASSES]
        raise Names("validation metric", [*allowed, *patterns], prefix=f"{key}=").unknown(monitor)


def _check_profile(first: int, last: int) -> None:
    if last < first + 2:
        raise UserError(
            f"profile_steps=[{first},{last}]: too short, since the first update profiles memory and the others time; "
            f"set at least [{first},{first + 2}]"
        )


def _check_growth(growth: Growth) -> None:
    key, numbers = f"accumulate={as_typed(growth)}", growth.micro_batches
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
