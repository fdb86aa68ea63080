"""`dlopt options`: every choice of every group with one line each; a group's choices with their keys."""

import argparse
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import NoReturn

from dlopt.config.choices import Catalogue, Choice, Key
from dlopt.errors import DONE, UserError, shorten, suggest

_MARK = "*"  # of the default, as in `git branch`
_WIDEST = 120
_SHARED = 0.75  # of a group's choices have a key just so: it is shown once for all

# Hydra's own groups, of which dlopt has choices: how the jobs of -m are chosen, and where they run.
_SWEEPS = {
    "hydra/launcher": "serial",
    "hydra/sweeper": "basic",
    "hydra/sweeper/sampler": "tpe",
    "hydra/sweeper/pruner": "none",
}
_TRAJECTORY = {"function": "quadratic"}  # of `dlopt trajectory` alone


def options(arguments: list[str]) -> int:
    """Prints every group, or the keys of the groups and choices (`optimizer`, `optimizer=sgd`) that are named."""
    parser = argparse.ArgumentParser(
        prog="dlopt options",
        description="Lists every choice of every group; of the groups that are named, the keys and their defaults too.",
    )
    parser.error = _refuse  # type: ignore[method-assign]
    parser.add_argument("names", nargs="*", metavar="group | group=choice", help="optimizer, schedule=cosine ...")
    parser.add_argument("--config-dir", "-cd", help="folder of your own choices, as for dlopt train")
    parsed = parser.parse_args(arguments)
    catalogue = Catalogue(parsed.config_dir)
    page = _Page()
    if not parsed.names:
        _overview(catalogue, page)
    for name in parsed.names:
        group, equals, choice = name.partition("=")
        if group not in every_group(catalogue):
            raise UserError(_no_group(catalogue, name))
        choices = choices_of(catalogue, group)
        if equals:
            choices = [each for each in choices if each.name == choice] or _no_choice(catalogue, group, choice)
        _group(catalogue, group, choices, page)
    print("\n".join(page.lines))
    return DONE


def every_group(catalogue: Catalogue) -> dict[str, str | None]:
    """Maps each group to its default choice, including the groups of sweeps and of `dlopt trajectory`."""
    return {**catalogue.groups(), **_TRAJECTORY, **_SWEEPS}


def choices_of(catalogue: Catalogue, group: str) -> list[Choice]:
    """Lists the choices of a group, without those of the groups below it (hydra/sweeper/sampler)."""
    nested = group in _SWEEPS
    return [choice for choice in catalogue.choices(group) if not (nested and "/" in choice.name)]


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; `dlopt options --help` shows what is allowed")


def _no_group(catalogue: Catalogue, typed: str) -> str:
    groups = list(catalogue.groups())
    pairs = {choice.name: f"{group}={choice.name}" for group in groups for choice in catalogue.choices(group)}
    close = get_close_matches(typed.partition("=")[0].lower(), [*groups, *pairs], n=1, cutoff=0.6)
    hint = f"did you mean {pairs.get(close[0], close[0])}? " if close else ""
    return f"{typed}: unknown group; {hint}groups: {shorten(typed.partition('=')[0], groups, 'dlopt options')}"


def _no_choice(catalogue: Catalogue, group: str, typed: str) -> NoReturn:
    names = [choice.name for choice in catalogue.choices(group)]
    hint = suggest(typed, names, f"dlopt options {group}", prefix=f"{group}=", title="choices")
    raise UserError(f"{group}={typed}: unknown choice; {hint}")


class _Page:
    """Lines as wide as the terminal. Where nobody looks (a pipe, a file) nothing is wrapped, so that grep finds whole
    lines, unless COLUMNS says otherwise."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._is_terminal = sys.stdout.isatty()
        known = self._is_terminal or os.environ.get("COLUMNS", "").isdigit()
        self._width = min(max(shutil.get_terminal_size().columns, 40), _WIDEST) if known else None

    def heading(self, text: str, bold: bool = True) -> None:
        lines = textwrap.wrap(text, self._width, break_on_hyphens=False) if self._width else [text]
        self.lines += [f"\033[1m{line}\033[0m" for line in lines] if bold and self._is_terminal else lines

    def gap(self) -> None:
        if self.lines:
            self.lines.append("")

    def rows(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """(mark, left, right) each; the right column is wrapped and begins a line of its own below a long left one."""
        limit = 36 if self._width is None else min(36, self._width * 2 // 5)
        short = [len(left) for _, left, _ in rows if len(left) <= limit]
        column = max(short, default=limit)
        for mark, left, right in rows:
            begin = f"{mark:1} {left}"
            if not right:
                self.lines.append(begin.rstrip())
            elif self._width is None:
                self.lines.append(f"{begin:{column + 2}}  {right}")
            else:
                wrapped = textwrap.wrap(right, self._width - column - 4, break_on_hyphens=False)
                if len(left) > column:
                    self.lines.append(begin)
                    begin = ""
                for line in wrapped:
                    self.lines.append(f"{begin:{column + 2}}  {line}")
                    begin = ""


def _overview(catalogue: Catalogue, page: _Page) -> None:
    for group, default in catalogue.groups().items():
        choices = catalogue.choices(group)
        page.heading(group)
        page.rows([(_MARK if choice.name == default else "", choice.name, choice.description) for choice in choices])
        if not choices:
            page.rows([("", "(no choices)", "")])
        page.lines.append("")
    page.heading(f"of sweeps (-m): {', '.join(_SWEEPS)}; of dlopt trajectory: {', '.join(_TRAJECTORY)}", bold=False)
    page.heading(
        f"{_MARK} the default. Type group=choice; `dlopt options GROUP` shows the keys of a group.", bold=False
    )


def _group(catalogue: Catalogue, group: str, choices: Sequence[Choice], page: _Page) -> None:
    default = every_group(catalogue)[group]
    keys = {choice.name: catalogue.keys(choice) for choice in choices}
    shared = [] if default is None else _shared(keys.values())  # each recipe is read as a whole
    page.gap()
    page.heading(f"{group}={'|'.join(each.name for each in choices) if len(choices) == 1 else 'CHOICE'}")
    note = "none unless one is chosen" if default is None else f"{default} unless another is chosen"
    own = "" if default is None else f"; a key is typed as {group.replace('/', '.')}.KEY=VALUE"
    page.heading(f"{note}{own}", bold=False)
    if shared:
        page.gap()
        page.heading("every choice has, where it does not say otherwise below")
        page.rows([_row(group, key) for key in shared])
    for choice in choices:
        page.gap()
        mark = f"{_MARK} " if choice.name == default else ""
        page.heading(f"{mark}{choice.name}: {choice.description}")
        for line in choice.header[1:]:
            page.heading(line, bold=False)
        page.rows([_row(group, key) for key in keys[choice.name] if key not in shared])


def _shared(every: Iterable[Sequence[Key]]) -> list[Key]:
    """The keys that all choices have, and most of them with the same value and comment."""
    every = list(every)
    if len(every) < 2:
        return []
    names = set.intersection(*({key.name for key in keys} for keys in every))
    counts = Counter(key for keys in every for key in keys if key.name in names)
    return [key for key, count in counts.items() if count >= _SHARED * len(every)]


def _row(group: str, key: Key) -> tuple[str, str, str]:
    package = group.replace("/", ".")
    return "", f"  {key.name.removeprefix(f'{package}.')}={key.value}", key.comment
