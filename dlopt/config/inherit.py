"""`from=RUN`: the config of an earlier run as overrides, on which what is typed comes.

The run's choices are taken by name and every value in which it differs from them by key, so that the new run is
composed, checked and trusted like any other, and needs the old folder no more.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from dlopt.config.compose import Composer
from dlopt.errors import UserError
from dlopt.folders import RunFolder
from dlopt.plain import flatten

_KEY = "from"
_RECIPES = ("experiment", "comparison")  # whose effects stand in the saved config, key by key
_LEFT = ("resume", "allow_packages")  # belong to a command line, not to what is computed
_MISSING = object()


def inherit(composer: Composer, overrides: Sequence[str]) -> list[str]:
    """The overrides with `from=RUN` replaced by what it stands for; as they are where there is none.

    A typed choice (`optimizer=adamw`) replaces the run's whole group. Raises `UserError`.
    """
    asked = [line for line in overrides if line.lstrip("+").partition("=")[0] == _KEY]
    if not asked:
        return list(overrides)
    typed = [line for line in overrides if line not in asked]
    folder = RunFolder(_path(composer, asked))
    folder.refuse_newer(asked[0])
    saved = folder.config()
    if saved is None:
        raise UserError(f"{asked[0]}: a run's folder is needed; there is no readable config.yaml in {folder.path}")
    groups = [group for group in composer.groups() if group not in _RECIPES]
    chosen = [line.lstrip("+").partition("=")[0] for line in typed]
    for line, key in zip(typed, chosen, strict=True):
        if key in _RECIPES:
            raise UserError(f"{line}: a run's config is complete; a recipe is not put on top of it")
    _refuse_foreign(saved, asked[0], chosen)
    kept = [group for group in groups if group not in chosen]
    choices = [f"{group}={name}" for group, name in _choices(folder, kept).items()]
    _check_choices(composer, choices, asked[0])
    _refuse_odd_keys(flatten(saved), asked[0])
    replaced = [key for key in chosen if key in groups]
    wanted = {key: value for key, value in flatten(saved).items() if key.partition(".")[0] not in (*_LEFT, *replaced)}
    lines: list[str] = []
    for interpolated in (False, True):  # what follows another key (init_seed: ${seed}) may need no line of its own
        lines += _differences(composer, [*choices, *lines], wanted, interpolated)
    return [*choices, *(line for line in lines if line.lstrip("+").partition("=")[0] not in chosen), *typed]


def _path(composer: Composer, asked: Sequence[str]) -> Path:
    overrides = composer.parse(list(asked))
    value = overrides[0].value()
    if len(asked) > 1 or overrides[0].is_sweep_override() or not isinstance(value, str) or not value:
        raise UserError(f"{' '.join(asked)}: the folder of one run is needed")
    path = Path(value)
    return path.parent if path.name == "config.yaml" else path


def _refuse_foreign(saved: Mapping[str, Any], line: str, typed: Sequence[str]) -> None:
    packages = saved.get("allow_packages")
    if packages and "allow_packages" not in typed:
        names = ",".join(map(str, packages)) if isinstance(packages, list) else str(packages)
        raise UserError(f"{line}: its config names callables of {names}; trust them by allow_packages=[{names}]")


def _refuse_odd_keys(saved: Mapping[str, Any], line: str) -> None:
    """What is no plain key would act as something else on a command line, and Hydra's part is none of a run's."""
    for key in saved:
        if not re.fullmatch(r"\w[\w-]*(\.[\w-]+)*", key) or key.partition(".")[0] == "hydra":
            raise UserError(f"{line}: its config has the key {key!r}, which no run has")


def _choices(folder: RunFolder, groups: Sequence[str]) -> dict[str, str]:
    try:
        environment = json.loads((folder.path / "environment.json").read_text())
        found = environment["choices"]
        return {group: str(found[group]) for group in groups if group in found}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{_KEY}={folder.path}: its environment.json, which names the choices, is damaged") from None


def _check_choices(composer: Composer, choices: Sequence[str], asked: str) -> None:
    for line in choices:
        group, _, name = line.partition("=")
        if name not in composer.choices(group):
            raise UserError(
                f"{asked}: it chose {line}, which is not here; add the --config-dir that it was started with"
            )


def _differences(composer: Composer, lines: list[str], wanted: Mapping[str, Any], interpolated: bool) -> list[str]:
    """Overrides for the keys in which what `lines` compose differs; interpolations only where asked for."""
    config = composer.compose(lines)
    raw = flatten(OmegaConf.to_container(config, resolve=False))
    found = []
    for key, value in wanted.items():
        old = raw.get(key, _MISSING)
        is_reference = isinstance(old, str) and "${" in old and old != value
        if is_reference and interpolated:
            selected = OmegaConf.select(config, key, throw_on_resolution_failure=False)
            old = OmegaConf.to_container(selected) if OmegaConf.is_config(selected) else selected
        if (is_reference and not interpolated) or (old == value and type(old) is type(value)):
            continue
        found.append(f"{'++' if old is _MISSING else ''}{key}={_typed(value)}")
    return found


def _typed(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{_typed(item)}' for key, item in value.items())}}}"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else repr(value)
