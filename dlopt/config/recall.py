"""Composes configs from memory.

Hydra merges some thirty files key by key for each config, which takes 60 to 170 ms. The jobs of a sweep differ mostly
in values: the config of each selection of files is remembered, and the values are set in a copy, as Hydra would.
Most choices set nothing outside the block of their group: they replace this block in a copy, too.
"""

import functools
import os
import pickle
import re
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dlopt.config.overrides import key_of

_MOST = 200  # remembered configs, of some 30 kB each
_BEFORE_VALUES = ("hydra.searchpath", "hydra.job.env_copy")  # Hydra reads these keys while it composes
_NAME = re.compile(r"\w+")  # of a file in the folder of a group, not below it
_memory: dict[Hashable, bytes] = {}


def recall(
    choices: Sequence[Override], values: Sequence[Override], load: Callable[[], DictConfig], key: Hashable
) -> DictConfig | None:
    """Returns a copy of the config of `choices`, with `values` set in it.

    None: only Hydra can compose these overrides, or explain what is wrong with them.

    Args:
        choices: overrides that select files.
        values: the other overrides, except sweeps, which a job replaces by single values.
        load: composes the config of `choices`.
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
    try:
        for each in values:
            _set(config, each)
    except (OmegaConfBaseException, ConfigCompositionException):
        return None
    except ValueError as error:  # a key inside a list, which takes indices: tracking.wandb=true
        raise ConfigCompositionException(str(error)) from error
    config.hydra.runtime.cwd = os.getcwd()
    return config


def has_remembered() -> bool:
    """Returns whether this process has composed a config: it may compose more."""
    return bool(_memory)


def replace_choice(config: DictConfig, group: str, choice: str, primary: Path) -> bool:
    """Replaces the block of a group by that of another choice; returns whether this is all that the choice changes.

    Args:
        primary: the file with the defaults list, `train.yaml`, which has the groups' folders beside it.
    """
    chosen = config.hydra.runtime.choices
    if group not in config or not all(_NAME.fullmatch(str(name)) for name in (choice, chosen.get(group))):
        return False
    files = _files(primary.parent / group / f"{choice}.yaml")
    if files is None or _files(primary.parent / group / f"{chosen[group]}.yaml") is None:
        return False
    config[group] = OmegaConf.merge(_read(primary).get(group, {}), *map(_read, files))
    chosen[group] = choice
    return True


@functools.cache
def _files(file: Path) -> tuple[Path, ...] | None:
    """Returns the files that make up a choice, in the order of Hydra's merge; None: it changes more than its group."""
    defaults = OmegaConf.select(OmegaConf.load(file), "defaults", default=["_self_"]) if file.is_file() else []
    if "_self_" not in defaults or "@package" in file.read_text(encoding="utf-8"):
        return None
    found: list[Path] = []
    for each in defaults:
        is_fragment = isinstance(each, str) and _NAME.fullmatch(each)
        files = (file,) if each == "_self_" else _files(file.with_name(f"{each}.yaml")) if is_fragment else None
        if files is None:
            return None
        found += files
    return tuple(found)


@functools.cache
def _read(file: Path) -> DictConfig:
    content = OmegaConf.load(file)
    assert isinstance(content, DictConfig)
    content.pop("defaults", None)
    return content


def _set(config: DictConfig, override: Override) -> None:
    """Sets a value in a composed config. Raises an error where Hydra would, except for lists in place of blocks."""
    key, value = override.key_or_group, override.value()
    is_new = override.is_add() and not isinstance(value, dict | list)
    if is_new and OmegaConf.select(config, key, throw_on_missing=False) is not None:
        raise ConfigCompositionException(key)
    is_block = isinstance(value, dict)  # anything else in place of a block is explained where the block is checked
    OmegaConf.update(config, key, value, merge=is_block, force_add=override.is_add() or override.is_force_add())
