"""Lists the commands for `dlopt --help`, without importing them: that would take a second.

The line of a command is the first line of its help, the constant `USAGE` of its module. Commands are listed by room:
those of dlopt, those of its laboratory, and those of each installed package.
"""

import re
from collections.abc import Mapping
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path

_SUMMARY = re.compile(r'^USAGE = """(?:\\\n)?(.+)$', re.MULTILINE)
_TITLE = re.compile(r'"""(\w+): ')  # docstring of a room of dlopt: """Laboratory: ..."""


def sections(commands: Mapping[str, str]) -> str:
    """Returns a paragraph per room: its title, and a line per command. `commands`: name -> module:function."""
    rooms: dict[str, list[str]] = {}
    for name, path in commands.items():
        parts = path.split(".")
        rooms.setdefault(".".join(parts[:2]) if parts[0] == "dlopt" else parts[0].partition(":")[0], []).append(name)
    column = max(map(len, commands)) + 2
    paragraphs = []
    for room, names in rooms.items():
        lines = [f"  {name:{column}}{summary(commands[name])}".rstrip() for name in names]
        paragraphs.append("\n".join([f"{_title(room)}:", *lines, ""]))
    return "\n".join(paragraphs)


def summary(path: str) -> str:
    """Returns the first line of the help of a command, "" if there is none. `path`: module:function."""
    found = _SUMMARY.search(_source(path.partition(":")[0]))
    return found[1] if found else ""


def _title(room: str) -> str:
    found = _TITLE.match(_source(room)) if room.startswith("dlopt.") else None
    return found[1] if found else f"Package {room}"


def _source(module: str) -> str:
    """Returns the source of a module without importing it or the packages that contain it; "" if it is not found."""
    top, *rest = module.split(".")
    spec: ModuleSpec | None = find_spec(top)
    for count in range(len(rest)):
        if spec is None:
            break
        name = ".".join([top, *rest[: count + 1]])
        spec = PathFinder.find_spec(name, spec.submodule_search_locations)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return ""
    return Path(spec.origin).read_text(encoding="utf-8")
