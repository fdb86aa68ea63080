"""What packages add to dlopt: commands, choices, keys of recipes, sections of the report. Imports nothing heavy.

An installed package declares its additions by entry points, in its pyproject.toml:

| group                | name = value                                                                               |
|----------------------|--------------------------------------------------------------------------------------------|
| `dlopt`              | any name = a package with a folder `conf`, whose callables configs may name                |
| `dlopt.commands`     | command = function(arguments) -> exit code                                                 |
| `dlopt.renamed`      | former name of a command = its name                                                        |
| `dlopt.series`       | key of a recipe = function(composer, flags, config) -> exit code, which `dlopt train` calls |
| `dlopt.spaces`       | `space=NAME` of a sweep = function(composer, optimizer, overrides) -> overrides with ranges |
| `dlopt.reports`      | any name = function(records) -> `Section` of `dlopt report`, or None                       |
| `dlopt.configurable` | any name = a module below dlopt whose callables configs may name                           |

The packages in `PACKAGES` declare them in a dict `ENTRY_POINTS`, so that they work in a source tree.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from dlopt._version import ROOT

PACKAGES = ("dlopt.lab",)


@functools.cache
def shipped() -> list[ModuleType]:
    """Imports the packages that come with dlopt; a copy of dlopt may lack any of them."""
    return [importlib.import_module(name) for name in PACKAGES if find_spec(name) is not None]


@functools.cache
def entries(group: str) -> Mapping[str, str]:
    """Returns the entry points of a group, `MODULE:FUNCTION` by name; `PACKAGES` take precedence."""
    found: dict[str, str] = {}
    for package in shipped():
        found |= package.ENTRY_POINTS.get(group, {})
    for entry in sorted(_installed().select(group=group), key=lambda entry: entry.name):
        found.setdefault(entry.name, entry.value)
    return found


@functools.cache
def _installed() -> Any:
    from importlib.metadata import entry_points  # slow to import, and to scan all packages

    return entry_points()


def function(path: str) -> Callable[..., Any]:
    """Imports what an entry names."""
    module, _, name = path.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def leave_working_folder(names: Iterable[str], kept: Path) -> None:
    """Removes the current folder from sys.path, and folders outside of `kept` that have one of these packages.

    What was edited there since the sweep was submitted must not run, nor what was not copied, except in the folders of
    the variable `IN_PLACE`. An entry of PYTHONPATH or of an editable installation may lead there.
    """
    import os
    import sysconfig  # every command imports this module

    from dlopt.basics.folders import IN_PLACE

    in_place = [path for path in os.environ.get(IN_PLACE, "").split(os.pathsep) if path]
    others = [Path(path).resolve() for path in {*sysconfig.get_paths().values(), *in_place, str(kept)}]
    packages = {name.partition(".")[0] for name in names} | ({"dlopt"} if ROOT.is_relative_to(kept) else set())

    def is_left(entry: str) -> bool:
        path = Path(entry).resolve()
        if {"site-packages", "dist-packages"} & set(path.parts) or any(map(path.is_relative_to, others)):
            return False
        has_package = any((path / name).exists() or (path / f"{name}.py").exists() for name in packages)
        return path.is_relative_to(Path.cwd().resolve()) or has_package

    sys.path[:] = [entry for entry in sys.path if not is_left(entry)]


def series_of(config: Mapping[str, Any]) -> str | None:
    """Returns the key by which a recipe makes a series of runs out of its config; None if it is one run."""
    return next((key for key in entries("dlopt.series") if config.get(key) is not None), None)
