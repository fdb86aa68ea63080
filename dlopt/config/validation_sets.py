"""The named validation sets of a run: `validation.NAME.KEY=VALUE`.

A set is the data of the run with other values of some keys, or, with the key `data`, another choice of the group data.
Its block is completed when the config is composed, so that the saved config has all of its keys. Imports no torch.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf, open_dict

from dlopt.basics.errors import UserError
from dlopt.config.parameters import show
from dlopt.data.settings import DataSettings
from dlopt.metrics.names import EVALUATED

KEY = "validation"
CHOICE, USE = "data", "use"
"""The keys of a block that are no keys of its data: the choice, and which of its splits is the validation set."""
Use = Literal["train", "val", "test"]
SHARED = tuple(each.name for each in fields(DataSettings))
"""Keys that every set has from the data of the run: batch size, image size, ..."""
# What the model reads; a set of another choice has these from the data of the run, if it has them at all.
_OF_MODEL = ("tokenizer", "vocabulary", "sequence_length")
# Splits of the data of the run, which are not those of other files.
_OTHER_SPLITS = ("val", "test", "val_file", "test_file")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*(_[A-Za-z0-9]+)*")


def complete(config: DictConfig, data_of: Callable[[str, str], Any]) -> None:
    """Completes the blocks of `validation` in a composed config. Raises `UserError`.

    `data_of(choice, key)`: composes the block of a choice of the group data with its default values.
    """
    typed: Any = OmegaConf.to_container(config, resolve=False).get(KEY)  # type: ignore[union-attr]
    if not isinstance(typed, dict):  # null, or a value that the type of the key refuses
        return
    trained: Any = OmegaConf.to_container(config.data, resolve=False)
    chosen = str(config.hydra.runtime.choices.data)
    blocks = {}
    for name, block in typed.items():
        key = f"{KEY}.{name}"
        if not isinstance(block, dict):
            raise UserError(f"{key}={show(block)}: a block of keys; for another choice of data: {key}.{CHOICE}=CHOICE")
        choice = block.get(CHOICE, chosen)
        if not isinstance(choice, str):
            raise UserError(f"{key}.{CHOICE}={show(choice)}: must be a choice; `dlopt options data` lists them")
        defaults: Any = OmegaConf.to_container(data_of(choice, f"{key}.{CHOICE}"), resolve=False)
        kept = _inherited(trained, defaults) if choice == chosen else _carried(trained, defaults)
        for other in block:
            if other in SHARED or (other in _OF_MODEL and other in kept and block[other] != kept[other]):
                raise UserError(
                    f"{key}.{other}={show(block[other])}: a validation set has data.{other} of the run; leave it out"
                )
        completed: dict[Any, Any] = {CHOICE: choice, **kept}
        blocks[name] = OmegaConf.merge(completed, block)
    with open_dict(config):
        config[KEY] = blocks


def _inherited(trained: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of the run's data without those of its other splits."""
    own = {key: value for key, value in trained.items() if key not in SHARED}
    return own | {key: defaults[key] for key in _OTHER_SPLITS if key in own and key in defaults}


def _carried(trained: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the default keys of another choice, with those of the run's data that the model depends on."""
    own = {key: value for key, value in defaults.items() if key not in SHARED}
    return own | {key: trained[key] for key in _OF_MODEL if key in own and trained.get(key) is not None}


def check_names(names: Iterable[str], own_metrics: Iterable[str]) -> None:
    """Raises `UserError` for a name with which val_NAME_METRIC would not be unique.

    `own_metrics`: names of the user's.
    """
    names = list(names)
    metrics = [*EVALUATED, *own_metrics]
    for name in names:
        key = f"{KEY}.{name}"
        if not _NAME.fullmatch(name):
            raise UserError(f"{key}: not a name of a validation set; use letters, digits, and _ between them")
        metric = next((each for each in metrics if each.startswith(f"{name}_")), None)
        if metric is not None:
            raise UserError(f"{key}: val_{metric} is a metric of the validation set without a name; use another name")
        other = next((each for each in names if each.startswith(f"{name}_")), None)
        if other is not None:
            raise UserError(f"{key}: the metrics of {KEY}.{other} also begin with val_{name}_; use another name")
