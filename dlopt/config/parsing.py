"""Turns a composed config into a checked `RunConfig`."""

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import Any

from dlopt.basics.errors import UserError
from dlopt.config.conflicts import Run, refuse_conflicts
from dlopt.config.early_checks import run_settings
from dlopt.config.parameters import show
from dlopt.config.rules import check_combinations
from dlopt.config.run_config import GROUPS, RunConfig, ValidationSet
from dlopt.config.schema import Component, check_arguments, check_value, component, resolve_target, trusted_packages
from dlopt.config.settings_rules import check_run_monitor
from dlopt.config.user_parts import user_metrics, user_observers
from dlopt.config.validation_sets import CHOICE, KEY, USE, Use, check_names
from dlopt.metrics.declaration import Direction
from dlopt.metrics.names import Metric, base_name, known_direction, without_set


def parse(
    config: Mapping[str, Any], saved: Mapping[str, Any] | None = None, choices: Mapping[str, str] | None = None
) -> RunConfig:
    """Checks a composed and resolved config (plain dicts and lists). Raises `UserError`.

    Args:
        config: the values.
        saved: the form to write to disk, where it differs (it keeps `${oc.env:...}` unresolved).
        choices: the choice of each group, for messages.
    """
    settings = run_settings(config)
    packages = trusted_packages(settings.allow_packages)
    directions = _directions(config, packages)
    metric = without_set(settings.monitor, settings.validation or ())
    mode = settings.monitor_mode or directions.get(base_name(metric))
    settings = replace(settings, monitor_mode=mode, directions=directions or None)
    check_run_monitor(settings, directions)
    components: dict[str, Any] = {}
    for name, group in GROUPS.items():
        node = config.get(name)
        if not isinstance(node, Mapping):
            raise UserError(
                f"{name}={show(node)}: must be one of the group's choices; `dlopt options {name}` lists them"
            )
        if "_target_" not in node:
            raise UserError(f"{name}._target_: missing; the choice must name a callable: _target_: package.module.Name")
        names = group.common_names
        arguments = {key: value for key, value in node.items() if key not in names}
        if name == "optimizer" and arguments.get("lr") == "auto":
            arguments["lr"] = 1.0  # placeholder for the learning rate that the range test will choose
        checked = component(name, arguments, (*group.runtime, *names), packages, related=names)
        components[name] = replace(checked, name=(choices or {}).get(name, ""))
        if group.common is not None:
            common = {key: value for key, value in node.items() if key in names}
            components[group.common.__name__] = group.common(**check_arguments(name, group.common, common))
    to_save = _with_lists(config if saved is None else saved, config, {**vars(settings), **components})
    for name, group in GROUPS.items():
        if group.common is not None:
            to_save[name] = _with_lists(to_save[name], config[name], components[group.common.__name__])
    declared = {"monitor_mode": settings.monitor_mode, "directions": directions} if directions else {}
    run_config = RunConfig(
        settings=settings,
        data_settings=components.pop("DataSettings"),
        grouping=components.pop("Grouping"),
        warmup=components.pop("Warmup"),
        decay_settings=components.pop("DecaySettings"),
        config={**{key: to_save[key] for key in [*(key for key in config if key not in GROUPS), *GROUPS]}, **declared},
        user_metrics=user_metrics(settings.evaluate.metrics, packages),
        user_observers=user_observers(config["observers"], packages),
        validation=_validation_sets(settings.validation or {}, packages),
        auto_lr=config["optimizer"].get("lr") == "auto",
        **components,
    )
    check_names(run_config.validation, [*run_config.user_metrics, *run_config.directions])
    refuse_conflicts(Run(run_config.settings, config, run_config))
    check_combinations(run_config)
    return run_config


def _validation_sets(blocks: Mapping[str, Mapping[str, Any]], packages: tuple[str, ...]) -> dict[str, ValidationSet]:
    """Checks the completed blocks of `validation`."""
    group, sets = GROUPS["data"], {}
    for name, block in blocks.items():
        key = f"{KEY}.{name}"
        # Older runs have saved `test_split` of tables, which is one of the common names today.
        node = {key: value for key, value in block.items() if key not in (CHOICE, USE, *group.common_names)}
        data = component(key, node, (*group.runtime, *group.common_names), packages, related=(CHOICE, USE))
        use = check_value(f"{key}.{USE}", block.get(USE), Use | None)
        sets[name] = ValidationSet(replace(data, name=block.get(CHOICE, "")), use)
    return sets


def _directions(config: Mapping[str, Any], packages: tuple[str, ...]) -> dict[str, Direction]:
    """Returns the directions of the values of a task of the user's own, which its class declares."""
    node = config.get("task")
    path = node.get("_target_") if isinstance(node, Mapping) else None
    target = resolve_target("task._target_", path, packages) if isinstance(path, str) else None
    values = getattr(target, "values", {})
    if not isinstance(values, Mapping) or any(value not in ("min", "max") for value in values.values()):
        raise UserError(f"task={path}: values={values!r}: must name each value with min or max: {{'error': 'min'}}")
    for name, direction in values.items():
        if not isinstance(name, str) or not name.isidentifier() or name == "loss":
            raise UserError(f"task={path}: values: {name!r} cannot name a value; use a word, except loss")
        if known_direction(Metric("val", name).column) not in (None, direction):
            raise UserError(f"task={path}: values: the direction of dlopt's metric {name} is not {direction}")
    return dict(values)


def _with_lists(saved: Any, plain: Any, checked: Any) -> Any:
    """Returns a saved value with lists where a single value was set instead, as in `tracking=wandb`.

    Args:
        plain: the value, resolved; checked: as its type has turned it into a list.
    """
    if isinstance(checked, list | tuple) and isinstance(plain, str | int | float):
        return [saved]
    if not isinstance(saved, Mapping) or not isinstance(plain, Mapping):
        return saved
    inner = checked.arguments if isinstance(checked, Component) else checked
    inner = vars(inner) if is_dataclass(inner) else inner if isinstance(inner, Mapping) else {}
    return {key: _with_lists(value, plain.get(key), inner.get(key)) for key, value in saved.items()}
