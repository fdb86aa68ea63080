"""Handing a checked command line over to Hydra's own main."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from dlopt.config.choices import config_folder
from dlopt.config.compose import CONFIG_NAME


def run_hydra(arguments: list[str], task: Callable[[DictConfig], Any]) -> None:
    """`hydra.main` on `arguments`. It may leave through SystemExit."""
    if task is nothing:
        logging.raiseExceptions = False  # Hydra shows through logging: a closed pipe (`| head`) is no error
    former, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=CONFIG_NAME)(task)()
    finally:
        sys.argv = former


def nothing(config: DictConfig) -> None:
    """The task where Hydra only shows something."""


def quoted(path: Path) -> str:
    """A path as a value of Hydra's override grammar."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
