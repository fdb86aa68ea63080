"""Turns a composed config into a checked `Experiment`, and finds the keys that a replaced callable leaves behind."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dlopt.config.experiment import GROUPS, Experiment, Settings
from dlopt.config.rules import check_combinations
from dlopt.config.schema import check_arguments, component, parameters_of, resolve_target, show, trusted_packages
from dlopt.errors import UserError
from dlopt.plain import is_below

_TARGET = "._target_"


def parse(config: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> Experiment:
    """Checks a composed and resolved config (plain dicts and lists). Raises `UserError`.

    `saved`: the form to write to disk, where it differs (it keeps `${oc.env:...}` unresolved).
    """
    if isinstance(config.get("experiment"), Mapping):
        raise UserError("experiment: the first line of a recipe's file must be `# @package _global_`")
    run_keys = {key: value for key, value in config.items() if key not in GROUPS}
    settings = Settings(**check_arguments("", Settings, run_keys, related=tuple(GROUPS)))
    packages = (*trusted_packages(), *settings.allow_packages)
    find_local_packages(settings.allow_packages)
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
        components[name] = component(name, arguments, (*group.runtime, *names), packages, related=names)
        if group.common is not None:
            common = {key: value for key, value in node.items() if key in names}
            components[group.common.__name__] = group.common(**check_arguments(name, group.common, common))
    to_save = config if saved is None else saved
    experiment = Experiment(
        settings=settings,
        data_settings=components.pop("DataSettings"),
        grouping=components.pop("Grouping"),
        warmup=components.pop("Warmup"),
        config={**{key: to_save[key] for key in run_keys}, **{name: to_save[name] for name in GROUPS}},
        auto_lr=config["optimizer"].get("lr") == "auto",
        **components,
    )
    check_combinations(experiment)
    return experiment


def find_local_packages(packages: Sequence[str]) -> None:
    """Makes `packages`, if any, importable from the current folder, as with `python -m dlopt`."""
    if packages and not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def former_keys(config: Mapping[str, Any], overrides: Iterable[str]) -> list[tuple[str, str]]:
    """Returns (group, key) of each key that belongs only to a callable that `overrides` replace (`model._target_=...`).

    A callable with `**kwargs` would swallow these keys, others would reject them. Keeps keys in the signature of the
    new callable, keys of all choices of the group, and keys in `overrides`.
    """
    typed = {line.lstrip("+").partition("=")[0] for line in overrides}
    found = []
    for name in (key.removesuffix(_TARGET) for key in sorted(typed) if key.endswith(_TARGET)):
        node, group = config.get(name), GROUPS.get(name)
        if group is None or not isinstance(node, Mapping):
            continue
        names = _signature(f"{name}{_TARGET}", node.get("_target_"), config.get("allow_packages"))
        if names is not None:
            kept = {"_target_", *names, *group.common_names}
            is_typed = {key for key in node if any(is_below(each, (f"{name}.{key}",)) for each in typed)}
            found += [(name, key) for key in node if key not in kept | is_typed]
    return found


def _signature(key: str, path: Any, packages: Any) -> set[str] | None:
    """Returns the names of the callable's parameters; None for an invalid callable, which `parse` reports."""
    if not isinstance(packages, list) or not isinstance(path, str):
        return None
    find_local_packages(packages)
    try:
        target = resolve_target(key, path, (*trusted_packages(), *map(str, packages)))
    except UserError:
        return None
    return {name for name, each in parameters_of(target).items() if each.kind is not each.VAR_KEYWORD}
