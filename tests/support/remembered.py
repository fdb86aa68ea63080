"""Halves the time in which Hydra composes a config, of which tests compose thousands.

Parses each text of a config file once per process: Hydra reads some thirty files for each config. A text is a text:
changed files are noticed. For each file, Hydra also collects what an interpolated choice (`model: ${data}_net`) may
refer to: only done for files that have such a choice.
"""

import functools
import io
import pickle
from pathlib import Path
from typing import Any

import yaml
from hydra._internal import defaults_list
from omegaconf import OmegaConf

_load = OmegaConf.load
_interpolation_map = defaults_list._create_interpolation_map


@functools.cache
def _parsed(text: str) -> bytes:
    return pickle.dumps(_load(io.StringIO(text)))


def load(file: Any) -> Any:
    """As `OmegaConf.load`, of a path or an open file."""
    if isinstance(file, str | Path):
        with open(file, encoding="utf-8") as opened:
            return load(opened)
    start = file.tell()
    try:
        return pickle.loads(_parsed(file.read()))
    except yaml.YAMLError:  # names the file
        file.seek(start)
        return _load(file)


def interpolation_map(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
    """As Hydra's `_create_interpolation_map`; None for defaults without interpolations, which do not read it."""
    is_read = any(each.is_interpolation() for each in defaults if not each.is_self())
    return _interpolation_map(overrides, defaults, self_added) if is_read else None


def remember_configs() -> None:
    OmegaConf.load = staticmethod(load)  # type: ignore[assignment]
    defaults_list._create_interpolation_map = interpolation_map  # type: ignore[assignment]
