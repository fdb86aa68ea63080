"""Configs saved by an older dlopt: keys that have come since are filled in."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from dlopt.config.choices import config_folder
from dlopt.config.compose import Composer, resolve_saved, to_plain
from dlopt.config.experiment import GROUPS
from dlopt.config.parsing import parse
from dlopt.config.schema import parameters_of, resolve_target, trusted_packages
from dlopt.errors import UserError


def completed(saved: Mapping[str, Any], trusted: Sequence[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """`saved` with the keys that it lacks at the values that dlopt would give them now; lines on what was filled in.

    `trusted`: packages whose callables it may name. A config that is complete, or that cannot be completed, comes back
    as it is.
    """
    kept = dict(saved)
    try:
        parse(resolve_saved({**kept, "allow_packages": list(trusted)}))
        return kept, []
    except UserError:
        pass
    composer = Composer()
    shipped = to_plain(composer.compose([]), [])[1]
    lines: list[str] = []
    for key, value in shipped.items():
        if key not in kept:
            kept[key] = value
            lines.append(f"{key}={'...' if isinstance(value, Mapping) else value}")
        elif isinstance(value, Mapping) and isinstance(kept[key], Mapping):
            lacking = _lacking(key, kept[key], trusted) if key in GROUPS else value.keys() - kept[key].keys()
            node = _choice(composer, key, kept[key]) if key in GROUPS and lacking else value
            more = {name: each for name, each in node.items() if name in lacking}
            kept[key] = {**kept[key], **more}
            lines += [f"{key}.{name}={each}" for name, each in more.items()]
    return kept, lines


def _lacking(group: str, node: Mapping[str, Any], trusted: Sequence[str]) -> set[str]:
    """The keys that the group's callable, or every choice of the group, needs and the node has not."""
    common, runtime = GROUPS[group].common, GROUPS[group].runtime
    target = resolve_target(f"{group}._target_", str(node.get("_target_")), (*trusted_packages(), *trusted))
    wanted = {
        name
        for name, each in parameters_of(target).items()
        if each.kind == each.KEYWORD_ONLY and each.default is each.empty and name not in runtime
    }
    return (wanted | {each.name for each in (() if common is None else fields(common))}) - node.keys()


def _choice(composer: Composer, group: str, node: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the group's choices that name the same callable, as far as these agree on them."""
    found: list[dict[str, Any]] = []
    for name in composer.choices(group):
        if _target(config_folder() / group / f"{name}.yaml") != node.get("_target_"):
            continue
        try:
            choice = to_plain(composer.compose([f"{group}={name}"]), [])[1][group]
        except UserError:
            continue  # it needs a value
        found.append(choice)
    if not found:
        return {}
    return {key: value for key, value in found[0].items() if all(each.get(key) == value for each in found)}


def _target(path: Path) -> str | None:
    """What a choice's file names as its callable, or the file that it builds upon."""
    content = yaml.safe_load(path.read_text()) or {}
    if "_target_" in content:
        return str(content["_target_"])
    bases = [base for base in content.get("defaults", []) if isinstance(base, str) and base != "_self_"]
    return next((found for base in bases if (found := _target(path.with_name(f"{base}.yaml")))), None)
