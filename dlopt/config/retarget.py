"""Drops the keys of a choice when the command line replaces the callable of the choice (`model._target_=...`)."""

from collections.abc import Iterable, Mapping
from typing import Any

from dlopt.config.experiment import GROUPS
from dlopt.config.parsing import find_local_packages
from dlopt.config.schema import parameters_of, resolve_target, trusted_packages
from dlopt.errors import UserError
from dlopt.plain import is_below

_TARGET = "._target_"


def former_keys(config: Mapping[str, Any], overrides: Iterable[str]) -> list[tuple[str, str]]:
    """Returns (group, key) of each key that belongs to the replaced callable only.

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
