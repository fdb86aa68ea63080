"""`dlopt options`: lists groups, choices, keys and their defaults; so does the page of `dlopt train --help`."""

import argparse
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NoReturn

from dlopt.command_line.layout import two_columns, wrap_row
from dlopt.config.choices import Catalogue, Choice, Key, config_folder
from dlopt.config.overrides import parts_of
from dlopt.errors import DONE, UserError, shorten, suggest

USAGE = """\
List groups, the choices of a group, or the keys of a choice with their defaults

Usage: dlopt options [group | group=choice ...] [--config-dir DIR]

Examples:
  dlopt options                     # all groups and choices
  dlopt options optimizer
  dlopt options schedule=cosine 'model=vgg*'

  --config-dir DIR :: folder with your own choices, as in dlopt train
"""

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
_TRAJECTORY = {"function": "quadratic"}  # only in `dlopt trajectory`

_FLAGS = (
    ("-m, --multirun", "run a sweep, one run per combination: optimizer.lr=0.1,0.01 seed=0,1"),
    ("-c, --cfg job", "print the composed config and exit"),
    ("--info defaults", "print which file each part of the config comes from; --info config: the complete config"),
    ("-cd, --config-dir DIR", "folder with your own choices: DIR/optimizer/mine.yaml is optimizer=mine"),
    ("-cn, --config-name NAME", "primary config (default: train)"),
    ("--hydra-help", "list the other flags of Hydra"),
)
_INTRODUCTION = """\
Train a model, or run a sweep with -m

Usage: dlopt train [group=choice] [key=value] [flags]

Examples:
  dlopt train model=mlp optimizer=adamw epochs=5
  dlopt train -m optimizer.lr=0.01,0.03,0.1 seed=0,1,2
  dlopt train resume=auto"""


def options(arguments: list[str]) -> int:
    """Prints all groups, the choices of a group (`model`), or the keys of choices (`model=mlp`, `model=vgg*`)."""
    parser = argparse.ArgumentParser(prog="dlopt options", add_help=False)  # Hydra's parser imports Hydra: slow
    parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument("names", nargs="*")
    parser.add_argument("--config-dir", "-cd")
    parsed = parser.parse_args(arguments)
    catalogue = Catalogue(parsed.config_dir)
    page = _Page()
    if not parsed.names:
        _overview(catalogue, page)
    for name in parsed.names:
        group, choice = parts_of(name)
        if group not in every_group(catalogue):
            raise UserError(f"{name}: unknown group; {_similar(catalogue, group)}")
        choices = choices_of(catalogue, group)
        if "=" in name:
            choices = [each for each in choices if fnmatchcase(each.name, choice)] or _no_choice(
                catalogue, group, choice
            )
            _keys(catalogue, group, choices, page)
        else:
            _choices(catalogue, group, choices, page)
    print("\n".join(page.lines))
    return DONE


def every_group(catalogue: Catalogue) -> dict[str, str | None]:
    """Maps each group, also those of sweeps and of `dlopt trajectory`, to its default choice."""
    return {**catalogue.groups(), **_TRAJECTORY, **SWEEPS}


def choices_of(catalogue: Catalogue, group: str) -> list[Choice]:
    """Lists the choices of a group, without those of its subgroups (hydra/sweeper/sampler)."""
    nested = group in SWEEPS
    return [choice for choice in catalogue.choices(group) if not (nested and "/" in choice.name)]


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; `dlopt options --help` shows what is allowed")


def _similar(catalogue: Catalogue, name: str) -> str:
    """Returns the group or choice that is most similar to an unknown group, and all groups."""
    groups = list(catalogue.groups())
    pairs = {choice.name: f"{group}={choice.name}" for group in groups for choice in catalogue.choices(group)}
    close = get_close_matches(name.lower(), [*groups, *pairs], n=1, cutoff=0.6)
    hint = f"did you mean {pairs.get(close[0], close[0])}? " if close else ""
    return f"{hint}groups: {shorten(name, groups, 'dlopt options')}"


def _no_choice(catalogue: Catalogue, group: str, name: str) -> NoReturn:
    names = [choice.name for choice in catalogue.choices(group)]
    hint = suggest(name, names, f"dlopt options {group}", prefix=f"{group}=", title="choices")
    raise UserError(f"{group}={name}: unknown choice; {hint}")


class _Page:
    """Formats lines, wrapped to the terminal or to COLUMNS. Pipes and files are not wrapped, which suits grep."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._is_terminal = sys.stdout.isatty()
        known = self._is_terminal or os.environ.get("COLUMNS", "").isdigit()
        self._width = min(max(shutil.get_terminal_size().columns, 40), _MAX_WIDTH) if known else None

    def heading(self, text: str, bold: bool = True) -> None:
        lines = textwrap.wrap(text, self._width, break_on_hyphens=False) if self._width else [text]
        self.lines += [f"\033[1m{line}\033[0m" for line in lines] if bold and self._is_terminal else lines

    def gap(self) -> None:
        if self.lines:
            self.lines.append("")

    def choices(self, group: str, choices: Sequence[Choice], default: str | None) -> None:
        """Adds a group and a row per choice."""
        self.heading(group)
        rows = [(_MARK if choice.name == default else "", choice.name, choice.description) for choice in choices]
        self.rows(rows or [("", "(no choices)", "")])

    def rows(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """Adds rows (mark, left, right); wraps the right column, on a new line if the left one is long."""
        limit = 36 if self._width is None else min(36, self._width * 2 // 5)
        short = [len(left) for _, left, _ in rows if len(left) <= limit]
        column = max(short, default=limit)
        for mark, left, right in rows:
            self.lines += wrap_row(f"{mark:1} {left}", right, column + 2, self._width)


def _overview(catalogue: Catalogue, page: _Page) -> None:
    for group, default in catalogue.groups().items():
        page.choices(group, catalogue.choices(group), default)
        page.lines.append("")
    page.heading(f"Sweeps (-m): {', '.join(SWEEPS)}; dlopt trajectory: {', '.join(_TRAJECTORY)}", bold=False)
    page.heading(f"{_MARK} default. Select with group=choice; `dlopt options GROUP=CHOICE` lists its keys.", bold=False)


def _choices(catalogue: Catalogue, group: str, choices: Sequence[Choice], page: _Page) -> None:
    """Adds a table of choices, and the names of all of their keys."""
    default = every_group(catalogue)[group]
    package = group.replace("/", ".")
    page.gap()
    page.choices(group, choices, default)
    if not choices:
        return
    keys = {choice.name: catalogue.keys(choice) for choice in choices}
    own = {
        key.name.removeprefix(f"{package}.") for each in keys.values() for key in each if key.name.startswith(package)
    }
    if own and default is not None:  # an experiment sets keys of other groups
        page.gap()
        page.heading(f"keys ({package}.KEY=VALUE): {', '.join(sorted(own))}", bold=False)
    example = next((name for name in (default, *keys) if name is not None and keys.get(name)), choices[0].name)
    mark = "" if default is None else f"{_MARK} default. "
    commands = f"`dlopt options {group}={example}` lists the keys of a choice with their defaults"
    page.gap()
    page.heading(f"{mark}{commands}, `dlopt options '{group}=*'` those of all choices.", bold=False)


def _keys(catalogue: Catalogue, group: str, choices: Sequence[Choice], page: _Page) -> None:
    """Adds the keys of the choices with their defaults."""
    default = every_group(catalogue)[group]
    keys = {choice.name: catalogue.keys(choice) for choice in choices}
    shared = [] if default is None else _shared(keys.values())  # an experiment lists all of its keys
    page.gap()
    page.heading(f"{group}={choices[0].name if len(choices) == 1 else 'CHOICE'}")
    syntax = "" if default is None else f"; set keys with {group.replace('/', '.')}.KEY=VALUE"
    page.heading(f"default: {default or 'none'}{syntax}", bold=False)
    if shared:
        page.gap()
        page.heading("keys of all choices (exceptions below)")
        page.rows([_row(group, key) for key in shared])
    for choice in choices:
        page.gap()
        mark = f"{_MARK} " if choice.name == default else ""
        page.heading(f"{mark}{choice.name}: {choice.description}")
        for line in choice.header[1:]:
            page.heading(line, bold=False)
        page.rows([_row(group, key) for key in keys[choice.name] if key not in shared])


def _shared(choices: Iterable[Sequence[Key]]) -> list[Key]:
    """Returns the keys that all choices have, most of them with the same value and comment."""
    choices = list(choices)
    if len(choices) < 2:
        return []
    names = set.intersection(*({key.name for key in keys} for keys in choices))
    counts = Counter(key for keys in choices for key in keys if key.name in names)
    return [key for key, count in counts.items() if count >= _SHARED * len(choices)]


def _row(group: str, key: Key) -> tuple[str, str, str]:
    package = group.replace("/", ".")
    return "", f"  {key.name.removeprefix(f'{package}.')}={key.value}", key.comment


def help_page(config_dir: str | None) -> str:
    """Returns the help text, with the choices of `config_dir`."""
    catalogue = Catalogue(config_dir)
    groups = catalogue.groups()
    lines = [*_INTRODUCTION.splitlines(), "", "Groups and choices (* default):"]
    lines += two_columns(
        [(group, _listed(group, catalogue.choices(group), default)) for group, default in groups.items()]
    )
    lines += ["", "`dlopt options optimizer=sgd` lists the keys of a choice.", "", "Keys of the run:"]
    primary = Choice("", "train", config_folder() / "train.yaml")
    keys = [key for key in catalogue.keys(primary) if key.name.split(".")[0] not in (*groups, "hydra")]
    keys = [key for key in keys if "/" not in key.name]  # the defaults list itself
    lines += two_columns([(f"{key.name}={key.value}", key.comment) for key in keys])
    lines += two_columns(
        [("from=RUN", "start from the config of the run in folder RUN, changed by the other overrides")]
    )
    rows = [("hydra/sweeper=dlopt_optuna", "search with Optuna: interval(a,b), choice(a,b), tag(log,interval(a,b))")]
    others = [(group, default) for group, default in SWEEPS.items() if group != "hydra/sweeper"]
    rows += [(group, _names(choices_of(Catalogue(), group), default)) for group, default in others]  # dlopt's own
    lines += ["", "Sweeps (-m; * default):", *two_columns(rows)]
    lines += ["", "Flags:", *two_columns(_FLAGS), ""]
    lines += ["Write lists as [a,b]. Quote values with spaces or commas twice: name=\"'two words'\""]
    return "\n".join(lines)


def _listed(group: str, choices: Sequence[Choice], default: str | None) -> str:
    """Returns the names of a group's choices; recipes are too many for a page."""
    return f"{len(choices)} recipes: `dlopt options experiment`" if group == "experiment" else _names(choices, default)


def _names(choices: Sequence[Choice], default: str | None) -> str:
    return ", ".join(f"{each.name}*" if each.name == default else each.name for each in choices) or "no choices yet"
