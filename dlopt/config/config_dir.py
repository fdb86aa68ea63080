"""Checks the files of `--config-dir` before Hydra reads them."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override

from dlopt.basics.errors import UserError
from dlopt.basics.plain_values import check_yaml
from dlopt.config.choices import config_folders
from dlopt.config.overrides import TEXTS


class ConfigDir:
    """The user's folder of config files; remembers which of its files are checked.

    Raises `UserError` for a file that is too large for a config, has a value that the command line reads otherwise,
    includes a file outside of the folder, or has the name of a different file of dlopt, which Hydra would read instead.
    """

    def __init__(self, folder: Path, config_name: str) -> None:
        """Checks the files that Hydra lists, and the primary config."""
        self._folder = folder
        self._checked: set[Path] = set()
        self.primary = folder / f"{config_name.removesuffix('.yaml')}.yaml"
        files = _listed_files(folder)
        self._check([*files, *([self.primary] if self.primary.is_file() and self.primary not in files else [])])

    def check_choices(self, choices: Iterable[Override]) -> None:
        """Checks the files that overrides select and that are not checked yet: those of groups that dlopt lacks."""
        files = []
        for choice in choices:
            for name in _names(choice.value()):
                file = self._folder / choice.key_or_group / f"{name}.yaml"
                if file not in self._checked and file.is_file():
                    files.append(file)
        self._check(files)

    def _check(self, files: list[Path]) -> None:
        """Checks files, the last one first, and those to which their defaults lists lead."""
        self._checked.update(files)
        waiting = list(files)
        while waiting:
            path = waiting.pop()
            for included in self._included(path):
                if included not in self._checked and included.is_file():
                    self._checked.add(included)
                    waiting.append(included)
            self._refuse_hidden(path)

    def _included(self, path: Path) -> list[Path]:
        """Returns the files that the defaults list of a file names, whether or not they exist."""
        try:
            text = check_yaml(path, texts=TEXTS).decode()
        except OSError as error:
            raise UserError(f"{self._shown(path)} cannot be read: {error}") from None
        except ValueError as error:  # includes UnicodeDecodeError
            raise UserError(f"{self._shown(path)} {error}") from None
        files = []
        for entry in _defaults(text):
            if ".." in entry.split("/"):
                raise UserError(
                    f"{self._shown(path)} has {entry!r} in its defaults list; move this file into the folder"
                )
            start = self._folder if entry.startswith("/") else path.parent
            files.append(start / f"{entry.strip('/').removesuffix('.yaml')}.yaml")
        return files

    def _refuse_hidden(self, path: Path) -> None:
        """Raises `UserError` if dlopt or a package has a different file of this name."""
        name = os.path.relpath(path, self._folder)
        for folder in config_folders():
            shipped = folder / name
            if shipped.is_file():
                if shipped.read_bytes() != path.read_bytes():
                    raise UserError(f"{self._shown(path)} is also a file of dlopt; rename it")
                return

    def _shown(self, path: Path) -> str:
        return f"--config-dir={self._folder}: {os.path.relpath(path, self._folder)}"


def _listed_files(folder: Path) -> list[Path]:
    """Returns the YAML files below `folder` that Hydra lists: at the top and in the groups' folders."""
    groups = {path.name for place in config_folders() for path in place.iterdir() if path.is_dir()}
    files = list(folder.glob("*.yaml"))
    for group in groups:
        files += (folder / group).rglob("*.yaml")
    return sorted(files, reverse=True)  # the last one is checked first


def _defaults(text: str) -> list[str]:
    """Returns the configs that the defaults list of a file names, as paths: optimizer/adamw, /optimizer/adamw."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:  # Hydra reports it, if it reads the file
        return []
    entries = content.get("defaults") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        return []
    paths = []
    for entry in entries:
        pairs = entry.items() if isinstance(entry, dict) else [("", entry)]
        for key, value in pairs:
            group = _group(key)
            for name in _names(value):
                file = name.partition("@")[0]
                paths.append(f"{group}/{file}" if group else file)
    return paths


def _group(key: Any) -> str:
    """Returns the group of a key in a defaults list: /optimizer of "override /optimizer@teacher"."""
    words = str(key).split() if key else []
    return words[-1].partition("@")[0] if words else ""


def _names(value: Any) -> list[str]:
    """Returns the names of a choice, which may be several: `+group=[a,b]`."""
    names = value if isinstance(value, list) else [value]
    return [str(name) for name in names]
