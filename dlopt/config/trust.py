"""Checks the `hydra` node of a config, through which a config file could run code before dlopt checks anything else:
callbacks, sweeper, launcher, logging, environment variables.

Hydra's own blocklist lets `torch.load` pass, and `logging.config` calls anything under the key `()`. The composed node
is checked, so it does not matter whether a value comes from the command line, a file or an interpolation.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dlopt.config.schema import show
from dlopt.errors import UserError
from dlopt.plain import flatten

_PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")  # installed packages that Hydra discovers itself
_SEARCH_COMPONENTS = {  # of hydra/sweeper=dlopt_optuna
    "hydra.sweeper.sampler._target_": r"dlopt\.sweeps\.samplers\.[a-z]\w*",
    "hydra.sweeper.pruner._target_": r"dlopt\.sweeps\.samplers\.[a-z]\w*",
}
_HANDLERS = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler")
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def check_hydra(config: DictConfig, typed: Iterable[str]) -> None:
    """Raises `UserError` if Hydra's node names code, or sets environment variables from a file. `typed`: overrides."""
    hydra: Any = OmegaConf.to_container(config.hydra, resolve=False)
    for key, value in leaves(hydra, "hydra"):
        name = key.rsplit(".", 1)[-1]
        if name == "_target_":
            is_plugin = key in ("hydra.sweeper._target_", "hydra.launcher._target_") and str(value).startswith(_PLUGINS)
            pattern = _SEARCH_COMPONENTS.get(key)  # samplers and pruners: `build_study_spec` checks their arguments
            if not is_plugin and not (pattern and re.fullmatch(pattern, str(value))):
                raise UserError(f"{key}={show(value)}: only Hydra plug-ins are allowed here")
        if key.startswith(("hydra.job_logging.", "hydra.hydra_logging.")):
            _check_logging(key, name, str(value))
        # Only a value that is one interpolation can resolve to a block; with other text around it, it is a string.
        if isinstance(value, str) and value.startswith("${") and _is_block(config, key):
            raise UserError(f"{key}={value}: a block of Hydra's config must not be an interpolation")
    if hydra["job"]["env_set"] and not any(line.lstrip("+").startswith("hydra.job.env_set") for line in typed):
        raise UserError("hydra.job.env_set: set in a config file, but accepted from the command line only")


def _check_logging(key: str, name: str, text: str) -> None:
    if name == "()" or (name == "class" and text not in _HANDLERS):
        raise UserError(f"{key}={text}: logging must not name callables; allowed classes: {', '.join(_HANDLERS)}")
    is_object = text.startswith(("ext://", "cfg://")) or ("${" in text and name != "filename")
    if is_object and text not in _STREAMS:
        raise UserError(f"{key}={text}: logging must not name objects; allowed: {', '.join(_STREAMS)}")


def _is_block(config: DictConfig, key: str) -> bool:
    """Returns whether an interpolation resolves to a block, which could contain a `_target_`."""
    try:
        return OmegaConf.is_config(OmegaConf.select(config, key))
    except OmegaConfBaseException:
        return False  # resolvable only inside a job (${hydra.job.num}): a scalar


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of nested dicts and lists by dotted key; items of lists by their index."""
    for key, value in flatten(node, prefix).items():
        if isinstance(value, list):
            for i, item in enumerate(value):
                yield from leaves(item, f"{key}.{i}")
        else:
            yield key, value
