"""Handing a checked command line over to Hydra's own main."""

import contextlib
import copy
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.utils import configure_log
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from dlopt.config.choices import config_folder
from dlopt.config.compose import CONFIG_NAME


def run_hydra(arguments: list[str], task: Callable[[DictConfig], Any], composed: DictConfig | None = None) -> None:
    """`hydra.main` on `arguments`. It may leave through SystemExit.

    `composed`: what these arguments amount to, where that is known: one job, which then is not composed again.
    """
    if task is nothing:
        logging.raiseExceptions = False  # Hydra shows through logging: a closed pipe (`| head`) is no error
    former, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        with contextlib.nullcontext() if composed is None else _already(composed):
            hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=CONFIG_NAME)(task)()
    finally:
        sys.argv = former


def in_folder(config: DictConfig, folder: Path) -> DictConfig:
    """The config as `hydra.run.dir=folder` would have made it."""
    changed = copy.deepcopy(config)
    with read_write(changed.hydra):
        OmegaConf.update(changed, "hydra.run.dir", str(folder))
        changed.hydra.overrides.hydra.append(f"hydra.run.dir={quoted(folder)}")
    return changed


@contextlib.contextmanager
def _already(config: DictConfig) -> Iterator[None]:
    """Hydra takes `config` where it would compose twice, to ask for the mode and to run: a tenth of a second each."""
    kept = Hydra.get_mode, Hydra.compose_config

    def restore() -> None:
        Hydra.get_mode, Hydra.compose_config = kept  # type: ignore[method-assign]

    def get_mode(self: Hydra, *arguments: Any, **keys: Any) -> RunMode:
        return RunMode.RUN

    def compose_config(self: Hydra, *arguments: Any, with_log_configuration: bool = False, **keys: Any) -> DictConfig:
        restore()  # whatever the task composes is something else
        if with_log_configuration:
            configure_log(config.hydra.hydra_logging, config.hydra.verbose)
        return config

    Hydra.get_mode, Hydra.compose_config = get_mode, compose_config  # type: ignore[method-assign]
    try:
        yield
    finally:
        restore()


def nothing(config: DictConfig) -> None:
    """The task where Hydra only shows something."""


def quoted(path: Path) -> str:
    """A path as a value of Hydra's override grammar."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
