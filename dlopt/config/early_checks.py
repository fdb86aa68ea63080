"""Checks the values of a config that need no torch, whose import takes seconds: most mistakes are found at once.

`parsing.parse` checks everything again, with the signatures themselves.
"""

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dlopt.basics.errors import FileError, UserError
from dlopt.basics.plain_values import flatten, is_below
from dlopt.config.conflicts import Run, refuse_conflicts
from dlopt.config.overrides import key_of
from dlopt.config.parameters import show
from dlopt.config.schema import RANGES, check_arguments, check_value
from dlopt.config.settings import AUTO_TASK, GROUPS, Settings
from dlopt.config.settings_rules import check_run_monitor, check_settings
from dlopt.config.signatures import annotations_of
from dlopt.data.settings import refuse_folds

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

# Keys of all choices of a group, in addition to the arguments of their callables.
_COMMON = {
    "data": "dlopt.data.settings.DataSettings",
    "schedule": "dlopt.schedules.Warmup",
    "optimizer": "dlopt.optim.parameters.Grouping",
    "decay": "dlopt.schedules.decay.DecaySettings",
}


def run_settings(config: Mapping[str, Any]) -> Settings:
    """Returns the checked keys of a config that belong to no group. Raises `UserError`."""
    settings = _typed_settings(config)
    check_settings(settings)
    refuse_conflicts(Run(settings, config))
    return settings


def _typed_settings(config: Mapping[str, Any]) -> Settings:
    """Returns these keys without checking their combinations. Raises `UserError` for a wrong value."""
    if isinstance(config.get("experiment"), Mapping):
        raise UserError("experiment: the first line of a recipe's file must be `# @package _global_`")
    keys = {key: value for key, value in config.items() if key not in GROUPS}
    if isinstance(keys.get("observers"), list):
        keys["observers"] = []  # components: `user_observers` checks them
    return Settings(**check_arguments("", Settings, keys, related=tuple(GROUPS)))


def check_early(config: Mapping[str, Any], overrides: "Iterable[str | Override]") -> None:
    """Checks the run's own keys, and what `overrides` set in components of dlopt and torch. Raises `UserError`.

    `config`: resolved, as plain dicts and lists.
    """
    settings = run_settings(config)
    if settings.resume not in (None, "auto") and not os.path.lexists(settings.resume):
        raise FileError(f"resume={settings.resume}: no such file; resume=auto resumes the newest unfinished run")
    if isinstance(settings.epochs, str) and settings.steps is not None and "epochs" in map(key_of, overrides):
        raise UserError(f"epochs={settings.epochs}: steps={settings.steps} sets the number of updates; leave one out")
    task = flatten(config).get("task._target_")
    if task in (None, AUTO_TASK):
        check_run_monitor(settings)
    elif typed := [key for key in map(key_of, overrides) if key.partition(".")[0] == "loss"]:
        raise UserError(f"{typed[0]}: task={task} computes its own loss; leave {typed[0]} out")
    if "run_id" in config:  # a saved config has one, and is not checked here
        raise UserError(f"run_id={config['run_id']}: dlopt gives every run its id; to name a run, use name or tags")
    if "directions" in config:
        raise UserError("directions: the class of a task declares them, as the attribute `values`")
    for key in map(key_of, overrides):
        _check_argument(config, key)
    data = config.get("data")
    if isinstance(data, Mapping) and data.get("test_split") and "data.test_split" in map(key_of, overrides):
        _refuse_test_split(data)
    if isinstance(data, Mapping):
        folds, fold = data.get("folds"), data.get("fold")
        if all(isinstance(each, int | None) for each in (folds, fold)):  # others are refused with their type
            refuse_folds(folds, fold, data.get("order"))
        typed = [] if folds is None else [*map(key_of, overrides)]
        if "data.val_split" in typed:
            raise UserError(f"data.val_split={show(data.get('val_split'))}: data.folds={folds} validates; leave it out")
        if "data.split_seed" in typed:
            value = show(data.get("split_seed"))
            raise UserError(f"data.split_seed={value}: data.folds={folds} divides alike for all seeds; leave it out")
    if isinstance(data, Mapping) and data.get("_target_") == "dlopt.data.tables.table.table":
        from dlopt.data.tables.kinds import check_table

        check_table(data)


def _refuse_test_split(data: Mapping[str, Any]) -> None:
    """Raises `UserError` if other keys name the test set. The default of a table yields to its column."""
    values = flatten(data)
    for key in ("split_column", "test_file", "test", "test._target_", "test_size"):
        if values.get(key):
            named = f"data.{key}={show(values[key])} names the test set"
            raise UserError(f"data.test_split={show(data['test_split'])}: {named}; use 0")


def check_values(config: Mapping[str, Any], overrides: "Iterable[str | Override]") -> None:
    """Checks the values that `check_early` checks, each value alone. Raises `UserError`."""
    _typed_settings(config)
    for key in map(key_of, overrides):
        _check_argument(config, key)


def _check_argument(config: Mapping[str, Any], key: str) -> None:
    """Checks the value of a dotted key, an argument of the innermost component around it."""
    group, _, name = key.rpartition(".")
    values = flatten(config)
    target, value = values.get(f"{group}._target_"), values.get(key)
    is_component = isinstance(value, list) and "_target_" in str(value)
    if key not in values or is_component or (key == "optimizer.lr" and value == "auto"):
        return
    annotations = annotations_in(group, str(target))
    if target is not None and name in annotations:
        check_value(key, value, annotations[name])


def annotations_in(group: str, target: str) -> dict[str, Any]:
    """Returns the types of a component's arguments, by name, as far as they are known without importing it."""
    ranges = RANGES if is_below(target, ("torch",)) else {}
    return {**ranges, **annotations_of(target), **annotations_of(_COMMON.get(group, ""))}
