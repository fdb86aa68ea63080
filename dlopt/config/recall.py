"""Composes configs from memory.

Hydra merges some thirty files key by key for each config, which takes 60 to 170 ms. The jobs of a sweep differ mostly
in values: the config of each selection of files is remembered, and the values are set in a copy, as Hydra would.
Most choices set nothing outside the block of their group: they replace this block in a copy, too; and a recipe
(`experiment=...`) replaces some blocks and sets keys.
"""

import functools
import os
import pickle
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dlopt.config.choices import config_folder
from dlopt.config.overrides import key_of

_MOST = 200  # remembered configs, of some 30 kB each
_BEFORE_VALUES = ("hydra.searchpath", "hydra.job.env_copy")  # Hydra reads these keys while it composes
_NAME = (re.compile(r"\w+"), re.compile(r"[\w/]+"))  # of a fragment (in its group's folder), of a recipe (anywhere)
_REQUEST = (re.compile(r"override /(\w+)@_global_\.\1"), re.compile(r"override /(\w+)"))  # in a choice; in a recipe
_memory: dict[Hashable, bytes] = {}


def recall(values: Sequence[Override], load: Callable[[], DictConfig], key: Hashable) -> DictConfig | None:
    """Returns a copy of the config that `load` composes, with `values` set in it; None if only Hydra can compose it.

    Raises Hydra's error for a value that cannot be set.

    Args:
        values: overrides that select no files, except sweeps, which a job replaces by single values.
        load: composes the config of the other overrides.
        key: of this config among the remembered ones, which all composers share.
    """
    if any(each.package or each.is_delete() or key_of(each) in _BEFORE_VALUES for each in values):
        return None
    found = _memory.pop(key, b"")
    _memory[key] = found or pickle.dumps(load())  # the last one used is the last to be dropped
    if len(_memory) > _MOST:
        del _memory[next(iter(_memory))]
    config: DictConfig = pickle.loads(_memory[key])  # ten times faster than OmegaConf's own copy
    if config.hydra.searchpath:  # its folders may have other groups and choices
        return None
    for each in values:
        _set(config, each)
    config.hydra.runtime.cwd = os.getcwd()
    return config


def has_remembered() -> bool:
    """Returns whether this process has composed a config: it may compose more."""
    return bool(_memory)


def replace_choices(config: DictConfig, typed: Mapping[str, str], primary: Path) -> bool:
    """Puts the choices of a command line into the default config; returns whether this is all that they change.

    Args:
        typed: the choice of each group; the choice of `experiment` is a recipe, which changes groups and keys.
        primary: the file with the defaults list, `train.yaml`, which has the groups' folders beside it.
    """
    defaults, keys = _read(primary)
    groups = {str(group): name for each in defaults if isinstance(each, DictConfig) for group, name in each.items()}
    chosen = config.hydra.runtime.choices
    requested: dict[str, str] = {}
    contents: dict[str, list[DictConfig]] = {}
    for group in reversed(groups):  # Hydra's order: a choice may request choices of the groups above it
        name = typed.get(group, requested.pop(group, groups[group]))
        if name is None:  # no recipe
            continue
        folder = primary.parent / group
        parts = _parts(folder / f"{name}.yaml", folder, group == "experiment")
        if parts is None:
            return False
        requested = {**parts.requested, **requested}
        if name != chosen.get(group):
            contents[group] = [_read(file)[1] for file in parts.files]
        chosen[group] = name
    recipe = contents.pop("experiment", [])
    known = groups.keys() >= typed.keys() and all(group in config for group in contents)
    if requested or not known:  # of a group below, or unknown
        return False
    for group, blocks in contents.items():
        config[group] = OmegaConf.merge(keys.get(group, {}), *blocks)
    with open_dict(config), read_write(config.hydra):
        config.merge_with(*recipe)
    return True


class _Parts(NamedTuple):
    """The files that make up a choice, in the order of Hydra's merge, and the choices that they request, by group."""

    files: tuple[Path, ...]
    requested: Mapping[str, str]


@functools.cache
def _parts(file: Path, folder: Path, is_recipe: bool) -> _Parts | None:
    """Returns the parts that a choice or fragment includes; None if only Hydra can compose it.

    Args:
        file: of the choice or fragment.
        folder: the folder of its group, or its own, which contains the fragments that it names.
        is_recipe: whether it changes all groups, or only its own.
    """
    text = file.read_text(encoding="utf-8") if file.is_file() else "@package"
    if (text.count("@package"), text.startswith("# @package _global_\n")) != (is_recipe, is_recipe):
        return None
    files: list[Path] = []
    requested: list[tuple[str, str]] = []
    nested: dict[str, str] = {}
    for each in _read(file)[0]:
        if isinstance(each, DictConfig):
            for key, name in each.items():
                if (match := _REQUEST[is_recipe].fullmatch(str(key))) is None:
                    return None
                requested.append((match[1], str(name)))
        elif each == "_self_":
            files.append(file)
        else:
            top = config_folder() if is_recipe and each.startswith("/") else folder
            fragment = top / f"{each.strip('/')}.yaml"
            parts = _parts(fragment, fragment.parent, is_recipe) if _NAME[is_recipe].fullmatch(each) else None
            if parts is None:
                return None
            files += parts.files
            nested |= parts.requested  # Hydra reads a list from its end: the last fragment wins
    return _Parts(tuple(files), nested | dict(reversed(requested)))  # and in a file the first one


@functools.cache
def _read(file: Path) -> tuple[list[Any], DictConfig]:
    """Returns the defaults list of a file, with `_self_` (last by default), and the rest of its content."""
    content = OmegaConf.load(file)
    assert isinstance(content, DictConfig)
    defaults = list(content.pop("defaults", None) or [])
    return defaults if "_self_" in defaults else [*defaults, "_self_"], content


def _set(config: DictConfig, override: Override) -> None:
    """Sets a value in a composed config. Raises an error where Hydra would, except for lists in place of blocks."""
    key, value, line = override.key_or_group, override.value(), override.input_line
    is_new = override.is_add() and not isinstance(value, dict | list)
    is_block = isinstance(value, dict)  # anything else in place of a block is explained where the block is checked
    try:
        if is_new and OmegaConf.select(config, key, throw_on_missing=False) is not None:
            raise ConfigCompositionException(f"Could not append to config. An item is already at '{key}'.")
        OmegaConf.update(config, key, value, merge=is_block, force_add=override.is_add() or override.is_force_add())
    except (OmegaConfBaseException, ValueError) as error:  # ValueError: a key inside a list: tracking.wandb=true
        is_unknown = override.type is OverrideType.CHANGE and isinstance(error, ConfigAttributeError | ConfigKeyError)
        reason = f"Could not override '{key}'.\nTo append to your config use +{line}" if is_unknown else str(error)
        raise ConfigCompositionException(reason) from error
