"""The checked experiment: every group's component, the keys that a group's choices share, and the run's settings."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dlopt.config.rules import check_combinations
from dlopt.config.schema import Component, check_arguments, component, show, trusted_packages
from dlopt.config.settings import Settings
from dlopt.data.settings import DataSettings
from dlopt.errors import UserError
from dlopt.parameters import Grouping
from dlopt.schedules import Warmup


@dataclass(frozen=True)
class Group:
    """What the choices of one group have in common: arguments known only at run time, and keys that each of them has.

    A callable that names a common key in its signature is handed its value.
    """

    runtime: tuple[str, ...] = ()
    common: type | None = None


GROUPS: Mapping[str, Group] = {
    "data": Group((), DataSettings),
    "normalize": Group(("input_shape",)),
    "sampler": Group(("targets", "samples", "batch_size", "seed")),
    "augmentation": Group(("input_shape", "classes", "train")),
    "model": Group(("input_shape", "classes")),
    "init": Group(("model", "generator", "inputs")),
    "loss": Group(("classes",)),
    "optimizer": Group(("params",), Grouping),
    "schedule": Group(("horizon",), Warmup),
    "clip": Group(("model",)),
    "stopping": Group(("model", "norm")),
    "parallel": Group(("device", "accumulate", "batch_size", "precision", "threads")),
}


@dataclass(frozen=True)
class Experiment:
    settings: Settings
    data: Component
    data_settings: DataSettings
    normalize: Component
    sampler: Component
    augmentation: Component
    model: Component
    init: Component
    loss: Component
    optimizer: Component
    grouping: Grouping
    schedule: Component
    warmup: Warmup
    clip: Component
    stopping: Component
    parallel: Component
    config: Mapping[str, Any] = field(repr=False)  # as it is saved: resolved, but for what the environment gave
    auto_lr: bool = False  # optimizer.lr=auto: the learning rate is still to be found


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
