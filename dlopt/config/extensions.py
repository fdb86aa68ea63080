"""Choices that installed packages bring along.

A package says so in its pyproject.toml, by the name of a module that has a folder `conf`:

    [project.entry-points.dlopt]
    mine = "mine"

Its YAML files are then choices like dlopt's own, which they cannot replace, and `_target_` may name its callables: who
installs a package trusts it.
"""

import functools
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from dlopt.errors import UserError


@dataclass(frozen=True)
class Extension:
    package: str
    folder: Path


@functools.cache
def extensions() -> tuple[Extension, ...]:
    """What is installed, by name; nothing of it is imported. Raises `UserError` where a package has no such folder."""
    found = []
    for entry in sorted(entry_points(group="dlopt"), key=lambda each: each.name):
        package = entry.value.split(":")[0].split(".")[0]
        spec = find_spec(package)
        places = [] if spec is None else list(spec.submodule_search_locations or [])
        folders = [folder for place in places if (folder := Path(place, "conf")).is_dir()]
        if not folders:
            raise UserError(
                f"{entry.name}: this installed package says that it extends dlopt, but {package}/conf is no folder; "
                "update or uninstall it"
            )
        found.append(Extension(package, folders[0]))
    return tuple(found)
