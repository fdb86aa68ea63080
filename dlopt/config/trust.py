"""What a config may make run before dlopt itself does: Hydra's callbacks, sweeper, launcher, logging and environment.

Hydra's own blocklist lets `torch.load` pass, and `logging.config` calls whatever stands under `()`. So the composed
node is checked, wherever its values come from: the command line, a file, or a value that is itself a block.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dlopt.config.schema import show
from dlopt.errors import UserError
from dlopt.plain import flatten

_PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")  # installed, and found by Hydra itself
_PARTS = {  # of hydra/sweeper=dlopt_optuna
    "hydra.sweeper.sampler._target_": r"dlopt\.sweeps\.samplers\.[a-z]\w*",
    "hydra.sweeper.pruner._target_": r"dlopt\.sweeps\.samplers\.[a-z]\w*",
}
_HANDLERS = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler")
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def check_hydra(config: DictConfig, typed: Iterable[str]) -> None:
    """Raises `UserError` when Hydra's part of the config names code, or sets the environment from a file."""
    hydra = OmegaConf.to_container(config.hydra, resolve=False)
    assert isinstance(hydra, dict)
    for key, value in leaves(hydra, "hydra"):
        name = key.rsplit(".", 1)[-1]
        if name == "_target_":
            plugin = key in ("hydra.sweeper._target_", "hydra.launcher._target_") and str(value).startswith(_PLUGINS)
            part = key in _PARTS and re.fullmatch(_PARTS[key], str(value))  # checked again against its signature
            if not plugin and not part:
                raise UserError(f"{key}={show(value)}: of callables, only Hydra's plug-ins may be named here")
        if key.startswith(("hydra.job_logging.", "hydra.hydra_logging.")):
            _check_logging(key, name, str(value))
        if isinstance(value, str) and "${" in value and _is_block(config, key):
            raise UserError(f"{key}={value}: a block of Hydra's config may not come from elsewhere")
    if hydra["job"]["env_set"] and not any(line.lstrip("+").startswith("hydra.job.env_set") for line in typed):
        raise UserError("hydra.job.env_set: stands in a config file; it has to be typed on the command line")


def _check_logging(key: str, name: str, text: str) -> None:
    if name == "()" or (name == "class" and text not in _HANDLERS):
        raise UserError(f"{key}={text}: logging may name no callable; allowed as class: {', '.join(_HANDLERS)}")
    is_object = text.startswith(("ext://", "cfg://")) or ("${" in text and name != "filename")
    if is_object and text not in _STREAMS:
        raise UserError(f"{key}={text}: logging may name no object; allowed: {', '.join(_STREAMS)}")


def _is_block(config: DictConfig, key: str) -> bool:
    """Whether an interpolation stands for keys of its own, a `_target_` among them perhaps."""
    try:
        return OmegaConf.is_config(OmegaConf.select(config, key))
    except OmegaConfBaseException:
        return False  # known only within a job: a text


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of nested dicts and lists by dotted key; the items of a list by their number."""
    for key, value in flatten(node, prefix).items():
        if isinstance(value, list):
            for i, item in enumerate(value):
                yield from leaves(item, f"{key}.{i}")
        else:
            yield key, value
