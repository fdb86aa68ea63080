"""`dlopt options`: lists groups, choices, keys and their defaults; so does the page of `dlopt train --help`."""

import argparse
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NoReturn

from dlopt.basics.errors import DONE, UserError, shorten, suggest
from dlopt.commands.shared.document import print_document
from dlopt.commands.shared.text_columns import two_columns, wrap_row
from dlopt.config.choices import Catalogue, Choice, Key, config_folder
from dlopt.config.flags import documented_flags
from dlopt.config.overrides import parts_of
from dlopt.metrics.declared import REQUESTABLE

USAGE = """\
List groups, choices, keys and their defaults

Usage: dlopt options [group | group=choice | key ...] [--config-dir DIR] [--json]

Examples:
  dlopt options                     # all groups and choices
  dlopt options optimizer
  dlopt options schedule=cosine 'model=vgg*'
  dlopt options lr                  # all keys of this name, or with it in their names

  --config-dir DIR :: folder with your own choices, as in dlopt train
  --json :: print a JSON document; it has the keys of the choices of each group that is named
"""

# Looked for first; the other groups follow in the order of train.yaml.
_FIRST = ("model", "data", "optimizer", "schedule", "augmentation", "init", "loss")
_MARK = "*"  # marks the default, as in `git branch`
_MAX_WIDTH = 120
_SHARED = 0.75  # minimum fraction of choices with the same key, value and comment to list the key only once

# Hydra's groups that configure sweeps (-m).
SWEEPS = {
    "hydra/launcher": "serial",
    "hydra/sweeper": "basic",
    "hydra/sweeper/sampler": "tpe",
    "hydra/sweeper/pruner": "none",
}


def options(arguments: list[str]) -> int:
    """Prints all groups, the choices of a group (`model`), or the keys of choices (`model=mlp`, `model=vgg*`)."""
    parser = argparse.ArgumentParser(prog="dlopt options", add_help=False)  # not of overrides
    parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument("names", nargs="*")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--json", action="store_true")
    parsed = parser.parse_args(arguments)
    catalogue, page = Catalogue(parsed.config_dir), _Page()
    if (
        parsed.names
        and not parsed.json
        and not {parts_of(name)[0] for name in parsed.names} & {*every_group(catalogue)}
    ):
        for name in parsed.names:
            _found(catalogue, name, page)
        print("\n".join(page.lines))
        return DONE
    selections = [_selected(catalogue, name) for name in parsed.names]
    if parsed.json:
        every = [_Selection(group, choices_of(catalogue, group)) for group in every_group(catalogue)]
        print_document({"groups": [_entry(catalogue, each, keys=bool(selections)) for each in selections or every]})
        return DONE
    if not selections:
        for group, default in _groups(catalogue).items():
            page.choices(group, catalogue.choices(group), default)
            page.text("")
        of_commands = [f"; dlopt {name}: {', '.join(each)}" for name, each in catalogue.groups_of_commands().items()]
        page.text(f"Sweeps (-m): {', '.join(SWEEPS)}{''.join(of_commands)}")
        page.text(f"{_MARK} default. Select with group=choice; `dlopt options GROUP=CHOICE` lists its keys.")
    for each in selections:
        if page.lines:
            page.text("")
        show = _keys if each.has_pattern else _choices
        show(catalogue, each.group, each.choices, every_group(catalogue)[each.group], page)
    print("\n".join(page.lines))
    return DONE


@dataclass(frozen=True)
class _Selection:
    """A group with some of its choices. `has_pattern`: they were named, `model=vgg*`."""

    group: str
    choices: Sequence[Choice]
    has_pattern: bool = False


def _selected(catalogue: Catalogue, name: str) -> _Selection:
    """Returns what `model` or `model=vgg*` names. Raises `UserError`."""
    group, pattern = parts_of(name)
    if group not in every_group(catalogue):
        raise UserError(f"{name}: unknown group; {_similar(catalogue, group)}")
    choices = choices_of(catalogue, group)
    if "=" not in name:
        return _Selection(group, choices)
    matching = [each for each in choices if fnmatchcase(each.name, pattern)]
    if not matching:
        names = [choice.name for choice in choices]
        hint = suggest(pattern, names, f"dlopt options {group}", prefix=f"{group}=", title="choices")
        raise UserError(f"{name}: unknown choice; {hint}")
    return _Selection(group, matching, has_pattern=True)


def _entry(catalogue: Catalogue, selection: _Selection, *, keys: bool) -> dict[str, Any]:
    """Describes a group in a JSON document; with `keys`, also the keys of its choices."""
    group = selection.group
    commands = [name for name, groups in catalogue.groups_of_commands().items() if group in groups]
    return {
        "name": group,
        "default": every_group(catalogue)[group],
        "commands": commands or ["train -m" if group in SWEEPS else "train"],
        "choices": [
            {
                "name": choice.name,
                "description": choice.description,
                "keys": [vars(key) for key in catalogue.keys(choice)] if keys else None,
            }
            for choice in selection.choices
        ],
    }


def complete(_: Sequence[str]) -> list[str]:
    """Completes the name of a group."""
    return [*Catalogue().groups()]


def _groups(catalogue: Catalogue) -> dict[str, str | None]:
    """Maps the groups of a run to their default choices, most frequently used groups first."""
    groups = catalogue.groups()
    return {group: groups[group] for group in (*_FIRST, *(each for each in groups if each not in _FIRST))}


def _found(catalogue: Catalogue, name: str, page: "_Page") -> None:
    """Adds the keys with a name, `lr` or `optimizer.lr`, or else with the name in theirs. Raises `UserError`."""
    if "=" in name:
        raise UserError(f"{name}: unknown group; {_similar(catalogue, parts_of(name)[0])}")
    keys: dict[str, list[tuple[str, Key]]] = {}  # by name, with the choice that has it
    for key in keys_of_runs(catalogue):
        keys.setdefault(key.name, []).append(("", key))
    for group, default in _groups(catalogue).items():
        choices = catalogue.choices(group) if group not in ("experiment", "debug") else []
        for choice in sorted(choices, key=lambda each: each.name != default):
            for key in catalogue.keys(choice):
                if key.name.startswith(f"{group}."):
                    keys.setdefault(key.name, []).append((f"{group}={choice.name}", key))
    ends = [each for each in keys if each == name or each.endswith(f".{name}")]
    parts = [each for each in keys if name.lower() in each.lower()] if len(name) > 2 else []
    if not (found := list(dict.fromkeys([*ends, *parts]))):
        raise UserError(f"{name}: no group, choice or key; {_similar(catalogue, name, [*keys])}")
    rows = []
    for each in found:
        (_, first), names = keys[each][0], [choice for choice, _ in keys[each] if choice]
        more = f" ({names[0]}{f' and {len(names) - 1} more choices' if len(names) > 1 else ''})" if names else ""
        rows.append((f"  {each}={first.value}", f"{first.comment}{_declared(first)}{more}".strip()))
    page.text(*([] if not page.lines else [""]), f"keys: {name}", bold=True)
    page.rows(rows)


def keys_of_runs(catalogue: Catalogue) -> list[Key]:
    """Returns the keys of train.yaml that belong to no group."""
    keys = catalogue.keys(Choice("", "train", config_folder() / "train.yaml"))
    groups = (*catalogue.groups(), "hydra")
    return [key for key in keys if key.name.split(".")[0] not in groups and "/" not in key.name]


def _declared(key: Key) -> str:
    """Returns the values of a key that code declares, so that its comment does not list them."""
    return f"; metrics: {', '.join(REQUESTABLE)}" if key.name == "evaluate.metrics" else ""


def every_group(catalogue: Catalogue) -> dict[str, str | None]:
    """Maps each group, including groups of sweeps and of single commands, to its default choice."""
    of_commands = {name: choice for each in catalogue.groups_of_commands().values() for name, choice in each.items()}
    return {**catalogue.groups(), **of_commands, **SWEEPS}


def choices_of(catalogue: Catalogue, group: str) -> list[Choice]:
    """Lists the choices of a group, without its subgroups (hydra/sweeper/sampler)."""
    return [choice for choice in catalogue.choices(group) if group not in SWEEPS or "/" not in choice.name]


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; `dlopt options --help` shows what is allowed")


def _similar(catalogue: Catalogue, name: str, keys: Sequence[str] = ()) -> str:
    """Returns the group, choice or key that is most similar to an unknown group, and groups."""
    groups = list(_groups(catalogue))
    pairs = {choice.name: f"{group}={choice.name}" for group in groups for choice in catalogue.choices(group)}
    close = get_close_matches(name.lower(), [*groups, *pairs, *keys], n=1, cutoff=0.6)
    hint = f"did you mean {pairs.get(close[0], close[0])}? " if close else ""
    return f"{hint}groups: {shorten(name, groups, 'dlopt options')}"


class _Page:
    """Formats lines, wrapped to the terminal or to COLUMNS. Pipes and files are not wrapped, which suits grep."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._is_terminal = sys.stdout.isatty()
        known = self._is_terminal or os.environ.get("COLUMNS", "").isdigit()
        self._width = min(max(shutil.get_terminal_size().columns, 40), _MAX_WIDTH) if known else None

    def text(self, *lines: str, bold: bool = False) -> None:
        for line in lines:
            wrapped = textwrap.wrap(line, self._width, break_on_hyphens=False) if self._width and line else [line]
            self.lines += [f"\033[1m{each}\033[0m" for each in wrapped] if bold and self._is_terminal else wrapped

    def choices(self, group: str, choices: Sequence[Choice], default: str | None) -> None:
        """Adds a group and a row per choice."""
        self.text(group, bold=True)
        rows = [(f"{_MARK if each.name == default else ' '} {each.name}", each.description) for each in choices]
        self.rows(rows or [("  (no choices)", "")])

    def keys(self, package: str, keys: Iterable[Key]) -> None:
        self.rows([(f"    {key.name.removeprefix(f'{package}.')}={key.value}", key.comment) for key in keys])

    def rows(self, rows: Sequence[tuple[str, str]]) -> None:
        """Adds rows (left, right); wraps the right column, on a new line if the left one is long."""
        limit = 38 if self._width is None else min(38, self._width * 2 // 5 + 2)
        column = max((len(left) for left, _ in rows if len(left) <= limit), default=limit)
        for left, right in rows:
            self.lines += wrap_row(left, right, column, self._width)


def _choices(catalogue: Catalogue, group: str, choices: Sequence[Choice], default: str | None, page: _Page) -> None:
    """Adds a table of choices, and the names of all of their keys."""
    package = group.replace("/", ".")
    page.choices(group, choices, default)
    if not choices:
        return
    keys = {choice.name: [key.name for key in catalogue.keys(choice)] for choice in choices}
    own = Counter(
        name.removeprefix(f"{package}.") for each in keys.values() for name in each if name.startswith(package)
    )
    if own and default is not None:  # an experiment sets keys of other groups
        of_all = {key.name for key in catalogue.keys(Choice("", "train", config_folder() / "train.yaml"))}
        ordered = sorted(
            own, key=lambda name: (f"{package}.{name}" in of_all, -own[name], name)
        )  # of most choices first
        page.text("", f"keys ({package}.KEY=VALUE): {', '.join(ordered)}")
    example = next((name for name in (default, *keys) if name is not None and keys.get(name)), choices[0].name)
    mark = "" if default is None else f"{_MARK} default. "
    commands = f"`dlopt options {group}={example}` lists the keys of a choice with their defaults"
    page.text("", f"{mark}{commands}, `dlopt options '{group}=*'` those of all choices.")


def _keys(catalogue: Catalogue, group: str, choices: Sequence[Choice], default: str | None, page: _Page) -> None:
    """Adds the keys of the choices with their defaults."""
    package = group.replace("/", ".")
    keys = {choice.name: catalogue.keys(choice) for choice in choices}
    shared = [] if default is None else _shared(keys.values())  # an experiment lists all of its keys
    page.text(f"{group}={choices[0].name if len(choices) == 1 else 'CHOICE'}", bold=True)
    page.text(f"default: {default}; set keys with {package}.KEY=VALUE" if default is not None else "default: none")
    if shared:
        page.text("")
        page.text("keys of all choices (exceptions below)", bold=True)
        page.keys(package, shared)
    for choice in choices:
        page.text("")
        page.text(f"{f'{_MARK} ' if choice.name == default else ''}{choice.name}: {choice.description}", bold=True)
        page.text(*choice.header[1:])
        page.keys(package, [key for key in keys[choice.name] if key not in shared])


def _shared(choices: Iterable[Sequence[Key]]) -> list[Key]:
    """Returns the keys that all choices have, most of them with the same value and comment."""
    choices = list(choices)
    if len(choices) < 2:
        return []
    names = set.intersection(*({key.name for key in keys} for keys in choices))
    counts = Counter(key for keys in choices for key in keys if key.name in names)
    return [key for key, count in counts.items() if count >= _SHARED * len(choices)]


def tables_of_train(config_dir: str | None) -> str:
    """Returns the tables of the help of `dlopt train`, with the choices of `config_dir`."""
    catalogue = Catalogue(config_dir)
    groups = {group: _names(catalogue.choices(group), default) for group, default in _groups(catalogue).items()}
    recipes = f"{len(catalogue.choices('experiment'))} recipes: `dlopt options experiment`"  # too many for a page
    run = "start from the config of the run in folder RUN, changed by the other overrides"
    folder = "folder of the run, or with -m of the sweep (default: outputs/NAME/DATE)"
    sweeps = [("hydra/sweeper=dlopt_optuna", "search with Optuna: interval(a,b), choice(a,b), tag(log,interval(a,b))")]
    others = [(group, default) for group, default in SWEEPS.items() if group != "hydra/sweeper"]
    sweeps += [(group, _names(choices_of(Catalogue(), group), default)) for group, default in others]  # dlopt's own
    sections: dict[str, Sequence[tuple[str, str]]] = {
        "Groups and choices (* default):": [*(groups | {"experiment": recipes}).items()],
        "`dlopt options optimizer=sgd` lists the keys of a choice.": [],
        "Keys of the run:": [
            *((f"{key.name}={key.value}", key.comment) for key in keys_of_runs(catalogue)),
            ("from=RUN", run),
            ("output=DIR", folder),
        ],
        "Sweeps (-m; * default):": sweeps,
        "Flags:": documented_flags(),
        "Write lists as [a,b]. Quote values with spaces or commas twice: name=\"'two words'\"": [],
    }
    lines: list[str] = []
    for title, rows in sections.items():
        lines += ["", title, *(two_columns(rows) if rows else ())]
    return "\n".join([*lines, ""])


def _names(choices: Sequence[Choice], default: str | None) -> str:
    return ", ".join(f"{each.name}*" if each.name == default else each.name for each in choices) or "no choices yet"
