"""Generates the reference from the code and from conf/: commands, groups, the keys of a run, the Python API.

The overviews are in the repository, too, where their links lead to conf/ (docs/generate.py writes them). The pages of
single commands and groups are written before Sphinx reads its sources, and only if they changed, so a second build is
quick. The suffix .myst separates them from the pages in the repository.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import os
import pydoc
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from markup import block, code, docstring, table, text

import dlopt
from dlopt.cli import find
from dlopt.commands.command_table import every_command
from dlopt.commands.listing import summary
from dlopt.commands.options import choices_of, every_group
from dlopt.commands.shared.usage import command_keys, declaring
from dlopt.config.choices import Catalogue, Choice, Key, config_folder
from dlopt.config.parameters import parameters_of, show
from dlopt.config.run_config import GROUPS, Settings
from dlopt.config.schema import annotation_of, describe_type
from dlopt.lab.comparison.comparison import Comparison
from dlopt.metrics.declared import LOSS
from dlopt.python import api
from dlopt.sweeps.search import SearchSettings
from dlopt.tasks.kinds import KINDS

ROOT = Path(__file__).resolve().parents[2]
CATALOGUE = Catalogue()
COLUMNS = ("Key", "Default", "Accepts", "Meaning")

Owners = Mapping[str, Sequence[Callable[..., Any]]]
"""Maps a place in the config (optimizer, optimizer.base) to the callables and dataclasses that take its keys."""


def write(docs: Path) -> None:
    """Writes every page below `docs`, and removes pages of commands and groups that are gone."""
    pages = {docs / f"{name}.myst": page for name, page in generate().items()}
    for folder in ("commands", "groups"):
        (docs / "reference" / folder).mkdir(exist_ok=True)
    for stale in {*(docs / "reference").rglob("*.myst")} - pages.keys():
        stale.unlink()
    for path, page in pages.items():
        if not path.exists() or path.read_text(encoding="utf-8") != page:
            path.write_text(page, encoding="utf-8")


def generate() -> dict[str, str]:
    """Returns the generated pages by their names in the documentation."""
    commands = {f"reference/commands/{name}": command_page(name) for name in every_command()}
    groups = {f"reference/groups/{file_name(group)}": group_page(group) for group in every_group(CATALOGUE)}
    return {**commands, **groups, "reference/python": python_page()}


def file_name(group: str) -> str:
    return group.replace("/", "-")


def label(group: str, choice: str) -> str:
    """The target of links to a choice."""
    return f"choice-{file_name(group)}-{file_name(choice)}"


# -- commands


def command_page(name: str) -> str:
    path = every_command()[name]
    module = importlib.import_module(path.partition(":")[0])
    lines = [f"# dlopt {name}", "", text(summary(path)), "", block("text", _help(name))]
    rows = [row for target in declaring(module) for row in _own_rows(target)] if name != "train" else []
    if rows:
        lines += ["## Values", "", table(COLUMNS[:3], list(dict.fromkeys(rows)))]
    lines += ["See also: [keys of a run](../settings.md), [groups and choices](../groups.md)."]
    return "\n".join(lines) + "\n"


def _own_rows(target: Callable[..., Any]) -> list[tuple[str, str, str]]:
    parameters = parameters_of(target)
    keys = [key for key in command_keys(target) if not key.is_flag]
    return [(code(key.name), _default(parameters[key.name]), text(accepted(target, key.name))) for key in keys]


def accepted(target: Callable[..., Any], name: str) -> str:
    """Describes the values that an argument accepts, as the errors do: `a number > 0`."""
    return describe_type(annotation_of(target, name))


def commands_table(*, linked: bool = False) -> str:
    """Every command with its summary; `linked`: to its page on the site."""
    link = "[{}](commands/{}.myst)" if linked else "{}"
    rows = [(link.format(code(name), name), text(summary(path))) for name, path in every_command().items()]
    return table(("Command", "Purpose"), rows)


def _help(name: str) -> list[str]:
    out = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="80"),
        contextlib.redirect_stdout(out),
        contextlib.suppress(SystemExit),  # argparse
    ):
        command, arguments = find([name, "--help"])
        command(arguments)
    return out.getvalue().rstrip().splitlines()


def _default(parameter: inspect.Parameter) -> str:
    return "required" if parameter.default is parameter.empty else code(show(parameter.default))


# -- groups and their choices


def group_page(group: str) -> str:
    default, choices = every_group(CATALOGUE)[group], choices_of(CATALOGUE, group)
    of_commands = {name for each in CATALOGUE.groups_of_commands().values() for name in each}
    names = [choice.name for choice in choices]
    selected = f"Default: {_link(group, default, names)}." if default else "Default: none."
    lines = [f"# {group}", "", f"Select a choice with {code(f'{group}=CHOICE')}. {selected}"]
    if group in GROUPS or "/" in group or group in of_commands:
        place = group.replace("/", ".")
        lines[-1] += f" Set its keys with {code(f'{place}.KEY=VALUE')}."
    rows = [(_link(group, choice.name, names), text(choice.description)) for choice in choices]
    lines += ["", table(("Choice", "Description"), rows)]
    return "\n".join([*lines, *map(_choice_section, choices)])


def _link(group: str, choice: str, names: Sequence[str]) -> str:
    return f"[{code(choice)}](#{label(group, choice)})" if choice in names else code(choice)


def _choice_section(choice: Choice) -> str:
    lines = [f"({label(choice.group, choice.name)})=", f"## {choice.name}", "", text(choice.description), ""]
    if len(choice.header) > 1:
        lines += [block("text", choice.header[1:])]
    target = CATALOGUE.target(choice)
    if target is not None:
        lines += [f"Callable: {code(target)}", ""]
        if not target.startswith(("torch.", "torchvision.")):
            lines += [docstring(_locate(target)), ""]
    keys = CATALOGUE.keys(choice)
    return "\n".join([*lines, table(COLUMNS, [_row(key, _owners(choice, keys)) for key in keys]), ""])


def _owners(choice: Choice, keys: Sequence[Key]) -> Owners:
    """Finds the callables that take the keys of a choice: its own, those of nested components, and the run's."""
    targets = {key.name.removesuffix("._target_"): key.value for key in keys if key.name.endswith("._target_")}
    targets[choice.group.replace("/", ".")] = CATALOGUE.target(choice)
    if choice.group in ("experiment", "debug"):
        chosen = CATALOGUE.groups() | {key.name: key.value for key in keys}
        targets |= {group: _target_of(group, chosen[group]) for group in GROUPS}
        targets["comparison"] = f"{Comparison.__module__}.{Comparison.__qualname__}"
    given = {place: target for place, target in targets.items() if target not in (None, "???", "null")}
    owners = {"": [Settings], **{place: [_locate(target)] for place, target in given.items()}}
    for group, shared in GROUPS.items():
        if shared.common is not None:
            owners.setdefault(group, []).append(shared.common)
    return owners


@functools.cache
def _target_of(group: str, name: str) -> str | None:
    found = [CATALOGUE.target(choice) for choice in CATALOGUE.choices(group) if choice.name == name]
    return found[0] if found else None


def _locate(target: str) -> Callable[..., Any]:
    """Imports the callable; for a plug-in of Hydra, the function or dataclass that checks its settings."""
    if target.startswith("hydra_plugins."):
        function = getattr(pydoc.locate(f"dlopt.sweeps.{target}"), "function", None)
        found = pydoc.locate(function) if function else SearchSettings
    else:
        found = pydoc.locate(target)
    if not callable(found):
        raise LookupError(f"{target}: no such callable")
    return found


def _row(key: Key, owners: Owners) -> tuple[str, str, str, str]:
    return code(key.name), code(key.value), text(_accepted(key.name, owners)), text(key.comment)


def _accepted(name: str, owners: Owners) -> str:
    """Describes the values of a key by the signature that takes it; empty for keys that no signature names."""
    group = name.split("@")[0]
    if group in every_group(CATALOGUE):
        return f"a choice of `{group}`"
    if name.endswith("._target_"):
        return "the dotted name of a callable"
    for place in sorted(owners, key=len, reverse=True):
        if not place or name.startswith(f"{place}."):
            path = name.removeprefix(f"{place}." if place else "").split(".")
            found = [described for owner in owners[place] if (described := _described(owner, path))]
            if found:
                return found[0]
    return ""


def _described(owner: Callable[..., Any], path: Sequence[str]) -> str:
    parameter = parameters_of(owner).get(path[0])
    if parameter is None:
        return ""
    if len(path) == 1:
        return accepted(owner, path[0])
    inner, rest = parameter.annotation, path[1:]
    if typing.get_origin(inner) is list and rest[0].isdigit():  # an item of a list of blocks
        inner, rest = typing.get_args(inner)[0], rest[1:]
    is_block = dataclasses.is_dataclass(inner) and isinstance(inner, type)
    return _described(inner, rest) if is_block and rest else ""


# -- keys of a run


def settings() -> str:
    """The keys of conf/train.yaml that belong to no group, in the sections of the file."""
    path = config_folder() / "train.yaml"
    owners: Owners = {"": [Settings], "optimizer": [GROUPS["optimizer"].common or Settings]}
    sections = _sections(path)
    rows: dict[str, list[tuple[str, str, str, str]]] = {}
    for key in CATALOGUE.keys(Choice("", "train", path)):
        first = key.name.split(".")[0]
        if first in sections and first != "hydra":
            rows.setdefault(sections[first], []).append(_row(key, owners))
    lines = []
    for title, own in rows.items():
        lines += [f"## {title[:1].upper()}{title[1:]}", "", table(COLUMNS, own)]
    return "\n".join(lines)


_WHEN = {"always": "always", "tested": "tests, on request", "requested": "on request"}


def metrics() -> str:
    """The metrics of each task."""
    lines = []
    for task in KINDS:
        rows = [(code(each.name), _BETTER[each.direction], _WHEN[each.when], text(each.about))
                for each in (LOSS, *task.metrics)]  # fmt: skip
        lines += [f"## {task.title}", "", table(("Metric", "Better", "Computed", "Meaning"), rows)]
    return "\n".join(lines)


_BETTER = {"min": "lower", "max": "higher"}


def _sections(path: Path) -> dict[str, str]:
    """Maps the top-level keys below the defaults list to the title (`# -- title`) that they follow."""
    title, found = "", {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"# -- (.+)", line):
            title = heading[1]
        elif title and (key := re.match(r"(\w+):", line)):
            found[key[1]] = title
    return found


def choices_table(*, linked: bool = False) -> str:
    """Every group with its choices; defaults are bold. `linked`: to their pages on the site, else to the folder."""
    rows = []
    for group, default in every_group(CATALOGUE).items():
        choices = choices_of(CATALOGUE, group)
        names = [choice.name for choice in choices]
        shown = [_link(group, name, names) if linked else code(name) for name in names]
        folder = Path(os.path.relpath(choices[0].path.parent, ROOT / "docs" / "reference")).as_posix()
        page = f"groups/{file_name(group)}.myst" if linked else folder
        words = [f"**{each}**" if name == default else each for name, each in zip(names, shown, strict=True)]
        rows.append((f"[{code(group)}]({page})", " ".join(words)))
    return table(("Group", "Choices"), rows)


# -- the Python API


def python_page() -> str:
    """The public functions of the package, then the classes of what they return, from their docstrings."""
    functions = [name for name in dlopt.__all__ if not name.startswith("_")]
    classes = [name for name in api.__all__ if name not in functions]
    lines = ["# Python API", ""]
    lines += ["`import dlopt` is enough for all functions; it imports PyTorch when a function first needs it.", ""]
    lines += ["Examples: [use dlopt from Python](../howto/python.md).", ""]
    for name in functions:
        lines += [
            f"## dlopt.{name}",
            "",
            _signature(f"dlopt.{name}", getattr(api, name)),
            docstring(getattr(api, name)),
            "",
        ]
    for name in classes:
        lines += [f"## {name}", "", docstring(getattr(api, name)), "", *_members(name, getattr(api, name))]
    return "\n".join(lines) + "\n"


def _members(name: str, target: type) -> list[str]:
    """The public methods and properties that a class defines itself."""
    rows, lines = [], []
    for attribute, value in vars(target).items():
        function = value.fget if isinstance(value, property) else getattr(value, "func", None)
        if attribute.startswith("_") or attribute == "forward":
            continue
        if function is not None:
            rows.append((code(attribute), text(" ".join(inspect.getdoc(value or function).split()))))
        elif inspect.isfunction(value):
            lines += [f"### {name}.{attribute}", "", _signature(f"{name}.{attribute}", value), docstring(value), ""]
    return [table(("Property", "Meaning"), rows), *lines]


def _signature(name: str, target: Callable[..., Any]) -> str:
    """The call, with types without their modules: dlopt.load(run: str | PathLike[str]) -> Model."""
    types = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", str(inspect.signature(target)))
    return block("python", [name + types.replace("(self, ", "(").replace("(self)", "()")])
