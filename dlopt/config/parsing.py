"""From a composed config to the checked experiment."""

import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dlopt.config.experiment import GROUPS, Experiment, Settings
from dlopt.config.rules import check_combinations
from dlopt.config.schema import check_arguments, component, show, trusted_packages
from dlopt.errors import UserError


def parse(config: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> Experiment:
    """Checks a composed and resolved config (plain dicts and lists). Raises `UserError`.

    `saved` is the form that may be written to disk, where that differs.
    """
    run_keys = {key: value for key, value in config.items() if key not in GROUPS}
    settings = Settings(**check_arguments("", Settings, run_keys, related=tuple(GROUPS)))
    packages = (*trusted_packages(), *settings.allow_packages)
    if settings.allow_packages and not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # a person's package may stand in the current folder, as with `python -m dlopt`
    parts: dict[str, Any] = {}
    for name, group in GROUPS.items():
        node = config.get(name)
        if not isinstance(node, Mapping) or "_target_" not in node:
            if isinstance(node, Mapping):
                raise UserError(
                    f"{name}._target_: the choice names no callable to build: _target_: package.module.Name"
                )
            raise UserError(
                f"{name}={show(node)}: one of the group's choices is needed; `dlopt options {name}` lists them"
            )
        names = _field_names(group.common)
        own = {key: value for key, value in node.items() if key not in names}
        runtime = (*group.runtime, *names)
        if name == "optimizer" and own.get("lr") == "auto":
            own["lr"] = 1.0  # stands for what the run will find
        parts[name] = component(name, own, runtime, packages, related=names)
        if group.common is not None:
            common = {key: value for key, value in node.items() if key in names}
            parts[group.common.__name__] = group.common(**check_arguments(name, group.common, common))
    kept = config if saved is None else saved
    experiment = Experiment(
        settings=settings,
        data_settings=parts.pop("DataSettings"),
        grouping=parts.pop("Grouping"),
        warmup=parts.pop("Warmup"),
        config={**{key: kept[key] for key in run_keys}, **{name: kept[name] for name in GROUPS}},
        auto_lr=config["optimizer"].get("lr") == "auto",
        **parts,
    )
    check_combinations(experiment)
    return experiment


def _field_names(common: type | None) -> tuple[str, ...]:
    return () if common is None else tuple(each.name for each in fields(common))
