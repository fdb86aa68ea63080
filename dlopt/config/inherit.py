"""`from=RUN`: the config of an earlier run as overrides, to which those of the command line are added.

The run's choices are taken by name, and every value in which the run differs from them by key. The new run is therefore
composed, checked and trusted like any other, and does not need the old folder any more.
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

_RECIPES = ("experiment", "comparison")  # whose effects are in the saved config, key by key
_LEFT = ("resume", "allow_packages")  # belong to a command line, not to what is computed
_MISSING = object()


def inherit(composer: Composer, overrides: Sequence[str]) -> list[str]:
    """Replaces `from=RUN` by the overrides that it stands for; leaves other command lines as they are.

    A typed choice (`optimizer=adamw`) replaces the run's whole group. Raises `UserError`.
    """
    sources = [line for line in overrides if _key(line) == "from"]
    if not sources:
        return list(overrides)
    source, typed = sources[0], [line for line in overrides if line not in sources]
    keys = [_key(line) for line in typed]
    folder = RunFolder(_path(composer, sources))
    folder.refuse_newer(source)
    config = folder.config()
    if config is None:
        raise UserError(f"{source}: a run's folder is needed; there is no readable config.yaml in {folder.path}")
    saved = flatten(config)
    _check(saved, config.get("allow_packages"), source, dict(zip(keys, typed, strict=True)))
    groups = [group for group in composer.groups() if group not in _RECIPES]
    choices = _choices(composer, folder, [group for group in groups if group not in keys], source)
    left = (*_LEFT, *(key for key in keys if key in groups))
    wanted = {key: value for key, value in saved.items() if key.partition(".")[0] not in left}
    lines: list[str] = []
    for interpolated in (False, True):  # what follows another key (init_seed: ${seed}) may need no line of its own
        lines += _differences(composer, [*choices, *lines], wanted, interpolated)
    return [*choices, *(line for line in lines if _key(line) not in keys), *typed]


def _key(line: str) -> str:
    return line.lstrip("+").partition("=")[0]


def _path(composer: Composer, sources: Sequence[str]) -> Path:
    override = composer.parse(list(sources))[0]
    value = override.value()
    if len(sources) > 1 or override.is_sweep_override() or not isinstance(value, str) or not value:
        raise UserError(f"{' '.join(sources)}: the folder of one run is needed")
    path = Path(value)
    return path.parent if path.name == "config.yaml" else path


def _check(saved: Mapping[str, Any], packages: Any, source: str, typed: Mapping[str, str]) -> None:
    """Refuses recipes on top, packages that are not trusted, and keys that act as something else on a command line."""
    for recipe in _RECIPES:
        if recipe in typed:
            raise UserError(f"{typed[recipe]}: a run's config is complete; a recipe is not put on top of it")
    if packages and "allow_packages" not in typed:
        names = ",".join(map(str, packages)) if isinstance(packages, list) else str(packages)
        raise UserError(f"{source}: its config names callables of {names}; trust them by allow_packages=[{names}]")
    for key in saved:
        if not re.fullmatch(r"\w[\w-]*(\.[\w-]+)*", key) or key.partition(".")[0] == "hydra":
            raise UserError(f"{source}: its config has the key {key!r}, which no run has")


def _choices(composer: Composer, folder: RunFolder, groups: Sequence[str], source: str) -> list[str]:
    """The run's choices as overrides."""
    try:
        chosen = json.loads((folder.path / "environment.json").read_text())["choices"]
        found = {group: str(chosen[group]) for group in groups if group in chosen}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"from={folder.path}: its environment.json, which names the choices, is damaged") from None
    for group, name in found.items():
        if name not in composer.choices(group):
            raise UserError(
                f"{source}: it chose {group}={name}, which is not here; add the --config-dir that it was started with"
            )
    return [f"{group}={name}" for group, name in found.items()]


def _differences(composer: Composer, lines: list[str], wanted: Mapping[str, Any], interpolated: bool) -> list[str]:
    """Overrides for the keys in which what `lines` compose differs; for interpolations only if `interpolated`."""
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
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
