"""`from=RUN`: turns the config of an earlier run into overrides and adds the overrides of the command line.

The overrides are the run's choices by name and every value that differs from those choices' defaults. The new run is
therefore composed, checked and trusted like any other, and no longer needs the old folder.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dlopt.basics.errors import FileError, UserError
from dlopt.basics.folders import RunFolder
from dlopt.basics.plain_values import flatten, load_json
from dlopt.basics.roles import Role
from dlopt.config.compose import Composer
from dlopt.config.keys import LABELS, role_of
from dlopt.config.older import of_today
from dlopt.config.overrides import SPACE, key_of, keys_of, quoted_plain
from dlopt.config.packages import entries
from dlopt.config.settings import AUTO_TASK

_MISSING = object()


def inherit(composer: Composer, overrides: Sequence[str]) -> list[str]:
    """Replaces `from=RUN` by the overrides of that run; returns other command lines unchanged.

    A typed choice (`optimizer=adamw`) replaces the run's whole group. Raises `UserError`.
    """
    sources = [line for line in overrides if key_of(line) == "from"]
    if not sources:
        return list(overrides)
    source, typed = sources[0], [line for line in overrides if line not in sources]
    keys = [key for line in typed for key in keys_of(line)]
    if SPACE in keys and "optimizer" not in keys:
        raise UserError(f"{source}: the run sets the keys of its optimizer; with {SPACE}=, type optimizer= as well")
    folder = RunFolder(_path(composer, sources))
    folder.refuse_other_format(source)
    config = folder.config()
    if config is None:
        raise FileError(f"{source}: not a run folder: {folder.path} has no readable config.yaml")
    typed_action = {"on_divergence": "stop"} if "on_divergence" in keys else {}  # the typed one follows below
    config = of_today({**config, **typed_action}, trains=True)
    saved = flatten(config)
    _check(saved, config.get("allow_packages"), source, {key: line for line in typed for key in keys_of(line)})
    groups = [group for group in composer.groups() if role_of(group) is not Role.COMMAND]
    replaced = [key for key in keys if key in groups]
    if "task" not in replaced and saved.get("task._target_") != AUTO_TASK:
        replaced.append("loss")  # a task of the user's own computes its own
    choices = _choices(composer, folder, [group for group in groups if group not in replaced], source)
    inherited = {
        key: value
        for key, value in saved.items()
        if role_of(key) is not Role.COMMAND and key not in LABELS and key.partition(".")[0] not in replaced
    }
    if isinstance(saved.get("epochs"), str) and saved.get("steps") is not None:  # counted: the new run is as long
        del inherited["steps" if "epochs" in keys else "epochs"]
    lines: list[str] = []
    # Interpolated keys (init_seed: ${seed}) come second: with `seed` overridden, most need no override of their own.
    for interpolated in (False, True):
        lines += _differences(composer, [*choices, *lines], inherited, interpolated)
    return [*choices, *(line for line in lines if key_of(line) not in keys), *typed]


def _path(composer: Composer, sources: Sequence[str]) -> Path:
    override = composer.parse(list(sources))[0]
    value = override.value()
    if len(sources) > 1 or override.is_sweep_override() or not isinstance(value, str) or not value:
        raise UserError(f"{' '.join(sources)}: must be the folder of one run")
    path = Path(value)
    return path.parent if path.name == "config.yaml" else path


def _check(saved: Mapping[str, Any], packages: Any, source: str, typed: Mapping[str, str]) -> None:
    """Raises `UserError` for recipes on the same command line, packages that are not trusted, and invalid keys.

    Keys become part of a command line here, where `hydra.*` or a leading `+` would do something else than set a value.
    """
    for recipe in ("experiment", "debug", *entries("dlopt.series")):
        if recipe in typed:
            raise UserError(f"{typed[recipe]}: a run's config is complete; a recipe cannot be combined with from=")
    if packages and "allow_packages" not in typed:
        names = ",".join(map(str, packages)) if isinstance(packages, list) else str(packages)
        raise UserError(f"{source}: its config names callables of {names}; to trust them, set allow_packages=[{names}]")
    for key in saved:
        if not re.fullmatch(r"\w[\w-]*(\.[\w-]+)*", key) or key.partition(".")[0] == "hydra":
            raise UserError(f"{source}: its config has the invalid key {key!r}")


def _choices(composer: Composer, folder: RunFolder, groups: Sequence[str], source: str) -> list[str]:
    """Returns the run's choices as overrides, in the order of `groups`."""
    try:
        saved = load_json(folder.path / "environment.json")["choices"]
        choices = {group: str(saved[group]) for group in groups if group in saved}
    except (OSError, ValueError, KeyError, TypeError):
        raise FileError(f"from={folder.path}: its environment.json, which names the choices, is damaged") from None
    callables = {group: name for group, name in choices.items() if "." in name}  # typed in place of a choice
    for group, name in choices.items():
        if group not in callables and name not in composer.choices(group):
            raise UserError(
                f"{source}: its choice {group}={name} was not found; add the --config-dir that the run was started with"
            )
    return [f"{group}={name}" for group, name in choices.items()]


def _differences(composer: Composer, lines: list[str], target: Mapping[str, Any], interpolated: bool) -> list[str]:
    """Returns overrides for the keys in which the config composed from `lines` differs from `target`.

    Keys whose composed value is an interpolation count only if `interpolated`.
    """
    config = composer.compose(lines)
    raw = flatten(OmegaConf.to_container(config, resolve=False))
    overrides = []
    for key, value in target.items():
        old = raw.get(key, _MISSING)
        is_reference = isinstance(old, str) and "${" in old and old != value
        if is_reference and interpolated:
            selected = OmegaConf.select(config, key, throw_on_resolution_failure=False)
            old = OmegaConf.to_container(selected) if OmegaConf.is_config(selected) else selected
        if (is_reference and not interpolated) or (old == value and type(old) is type(value)):
            continue
        overrides.append(f"{'++' if old is _MISSING else ''}{key}={quoted_plain(value)}")
    return overrides
