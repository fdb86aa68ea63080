"""Composes configs from memory.

Hydra merges some thirty files key by key for each config, which takes 60 to 170 ms. The jobs of a sweep differ mostly
in values: the config of each selection of files is remembered, and the values are set in a copy, as Hydra would.
"""

import os
import pickle
from collections.abc import Callable, Hashable, Sequence

from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dlopt.config.overrides import key_of

_MOST = 200  # remembered configs, of some 30 kB each
_BEFORE_VALUES = ("hydra.searchpath", "hydra.job.env_copy")  # Hydra reads these keys while it composes
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


def _set(config: DictConfig, override: Override) -> None:
    """Sets a value in a composed config. Raises an error where Hydra would, except for lists in place of blocks."""
    key, value = override.key_or_group, override.value()
    is_new = override.is_add() and not isinstance(value, dict | list)
    if is_new and OmegaConf.select(config, key, throw_on_missing=False) is not None:
        raise ConfigCompositionException(key)
    is_block = isinstance(value, dict)  # anything else in place of a block is explained where the block is checked
    OmegaConf.update(config, key, value, merge=is_block, force_add=override.is_add() or override.is_force_add())
