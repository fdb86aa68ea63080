"""`dlopt options`: lists groups, choices, keys and their defaults; so does the page of `dlopt train --help`."""

import argparse
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NoReturn

from dlopt.basics.errors import DONE, UserError
from dlopt.basics.formats import wrap
from dlopt.basics.names import Names
from dlopt.commands.command_table import every_command
from dlopt.commands.listing import summary
from dlopt.commands.shared.document import print_document
from dlopt.commands.shared.text_columns import two_columns, wrap_row
from dlopt.config.choices import Catalogue, Choice, Key, config_folder
from dlopt.config.flags import documented_flags
from dlopt.config.overrides import parts_of
from dlopt.config.synonyms import choice_names, for_key, table
from dlopt.metrics.declared import ABOUT, OF_TESTS, REQUESTABLE

USAGE = """\
List groups, choices, keys and their defaults

Usage: dlopt options [group | group=choice | key ...] [--config-dir DIR] [--json]

Examples:
  dlopt options                     # all groups and choices
  dlopt options optimizer
  dlopt options schedule=cosine 'model=vgg*'
  dlopt options lr                  # all keys of this name, or with it in their names
  dlopt options early stopping      # keys and choices with these words in their names or descriptions

  --config-dir DIR :: folder with your own choices, as in dlopt train
  --json :: print a JSON document: the groups of runs and sweeps, or those that are named, with the keys of their \
choices and what is allowed; with GROUP=CHOICE also the comments
"""

# Looked for first; the other groups follow in the order of train.yaml.
_FIRST = ("model", "data", "optimizer", "schedule", "augmentation", "init", "loss")
_MARK = "*"  # marks the default, as in `git branch`
_MAX_WIDTH = 120
_SHARED = 0.75  # minimum fraction of choices with the same key, value and comment to list the key only once

_MAX_FOUND = 10  # choices, and keys, with a term in their descriptions; names of the keys of a group

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
    catalogue = Catalogue(parsed.config_dir)
    if parsed.json:
        print_document({"groups": _entries(catalogue, parsed.names)})
    else:
        print("\n".join(_lines(catalogue, parsed.names)))
    return DONE


def _lines(catalogue: Catalogue, names: Sequence[str]) -> list[str]:
    """Returns the lines that describe groups and choices, or keys if no name is that of a group."""
    page = _Page()
    groups = every_group(catalogue)
    names = [_with_path(name) for name in names]
    if not names:
        _add_groups(catalogue, page)
    elif any(parts_of(name)[0] in groups for name in names) and not _is_term(catalogue, names):
        for selection in [_selected(catalogue, name) for name in names]:
            if page.lines:
                page.text("")
            if selection.has_pattern:
                _add_keys(catalogue, selection, page)
            else:
                _add_choices(catalogue, selection, page)
    else:
        # Words of one term: `weight decay`; or names of several keys: `lr momentum`.
        is_term = len(names) > 1 and _add_term(catalogue, " ".join(names), page)
        for name in () if is_term else names:
            if not _add_term(catalogue, name, page):
                raise _known_names(catalogue).unknown(parts_of(name)[0], name)
    return page.lines


def _with_path(name: str) -> str:
    """Returns the name of a group of sweeps with its path: `hydra/launcher=slurm` of `launcher=slurm`."""
    group, _ = parts_of(name)
    if group == "sampler":  # a group of runs, too
        return name
    full = next((each for each in SWEEPS if each.rpartition("/")[2] == group), group)
    return f"{full}{name.removeprefix(group)}"


def _is_term(catalogue: Catalogue, names: Sequence[str]) -> bool:
    """Returns whether names are the words of one key or metric, although one of them names a group: `weight decay`."""
    if len(names) == 1 or any("=" in name for name in names):
        return False
    word = _letters("".join(names))
    is_known = any(word in _letters(name) for name in (*_keys_by_name(catalogue), *ABOUT))
    return is_known or for_key(_key_form(" ".join(names)), "VALUE") != ""


# -- groups and choices


@dataclass(frozen=True)
class _Selection:
    """A group with its default and some of its choices. `has_pattern`: they were named, `model=vgg*`."""

    group: str
    default: str | None
    choices: Sequence[Choice]
    has_pattern: bool = False

    @property
    def package(self) -> str:
        """The position of the group's keys in the config: hydra.launcher."""
        return self.group.replace("/", ".")


def _selected(catalogue: Catalogue, name: str) -> _Selection:
    """Returns what `model` or `model=vgg*` names. Raises `UserError`."""
    group, pattern = parts_of(name)
    groups = every_group(catalogue)
    if group not in groups:
        raise _known_names(catalogue).unknown(group, name)
    choices = choices_of(catalogue, group)
    if "=" not in name:
        return _Selection(group, groups[group], choices)
    matching = [each for each in choices if fnmatchcase(each.name, pattern)]
    if not matching:
        raise choice_names(group, [choice.name for choice in choices]).unknown(pattern)
    return _Selection(group, groups[group], matching, has_pattern=True)


def _add_groups(catalogue: Catalogue, page: "_Page") -> None:
    """Adds all groups with their choices."""
    for group, default in _groups(catalogue).items():
        page.choices(group, catalogue.choices(group), default)
        page.text("")
    sweeps = f"Sweeps (-m): {', '.join(SWEEPS)}"
    for command, groups in catalogue.groups_of_commands().items():
        sweeps += f"; dlopt {command}: {', '.join(groups)}"
    page.text(sweeps)
    page.text(f"{_MARK} default. Select with group=choice; `dlopt options GROUP=CHOICE` lists its keys.")


def _add_choices(catalogue: Catalogue, selection: _Selection, page: "_Page") -> None:
    """Adds a table of choices, and the names of all of their keys."""
    group, default, choices = selection.group, selection.default, selection.choices
    page.choices(group, choices, default)
    if not choices:
        return
    names = {choice.name: [key.name for key in catalogue.keys(choice)] for choice in choices}
    own = _most_common_first(catalogue, selection.package, names.values())
    if own and default is not None:  # an experiment sets keys of other groups
        more = f", and {len(own) - _MAX_FOUND} more" if len(own) > _MAX_FOUND else ""
        page.text("", f"keys ({selection.package}.KEY=VALUE): {', '.join(own[:_MAX_FOUND])}{more}")
    example = choices[0].name
    for choice in (default, *names):
        if choice is not None and names.get(choice):
            example = choice
            break
    mark = "" if default is None else f"{_MARK} default. "
    commands = f"`dlopt options {group}={example}` lists the keys of a choice with their defaults"
    page.text("", f"{mark}{commands}, `dlopt options '{group}=*'` those of all choices.")


def _most_common_first(catalogue: Catalogue, package: str, choices: Iterable[Sequence[str]]) -> list[str]:
    """Returns the group's own keys without their group: keys of most choices first, those of train.yaml last."""
    counts: Counter[str] = Counter()
    for names in choices:
        counts.update(name.removeprefix(f"{package}.") for name in names if name.startswith(package))
    of_all = {key.name for key in _keys_of_train(catalogue)}
    return sorted(counts, key=lambda name: (f"{package}.{name}" in of_all, -counts[name], name))


def _add_keys(catalogue: Catalogue, selection: _Selection, page: "_Page") -> None:
    """Adds the keys of the choices with their defaults."""
    default, choices, package = selection.default, selection.choices, selection.package
    keys = {choice.name: catalogue.keys(choice) for choice in choices}
    shared = [] if default is None else _shared(list(keys.values()))  # an experiment lists all of its keys
    page.text(f"{selection.group}={choices[0].name if len(choices) == 1 else 'CHOICE'}", bold=True)
    page.text("default: none" if default is None else f"default: {default}; set keys with {package}.KEY=VALUE")
    if shared:
        page.text("")
        page.text("keys of all choices (exceptions below)", bold=True)
        page.keys(package, shared)
    for choice in choices:
        mark = f"{_MARK} " if choice.name == default else ""
        page.text("")
        page.text(f"{mark}{choice.name}: {choice.description}", bold=True)
        page.text(*choice.header[1:])
        page.keys(package, [key for key in keys[choice.name] if key not in shared])


def _shared(choices: Sequence[Sequence[Key]]) -> list[Key]:
    """Returns the keys that all choices have, most of them with the same value and comment."""
    if len(choices) < 2:
        return []
    names = set.intersection(*({key.name for key in keys} for keys in choices))
    counts: Counter[Key] = Counter()
    for keys in choices:
        counts.update(key for key in keys if key.name in names)
    return [key for key, count in counts.items() if count >= _SHARED * len(choices)]


def _entries(catalogue: Catalogue, names: Sequence[str]) -> list[dict[str, Any]]:
    """Describes the named groups and the keys of their choices, or those of runs and sweeps without keys, in a JSON
    document."""
    groups = [_selected(catalogue, _with_path(name)) for name in names or [*_groups(catalogue), *SWEEPS]]
    commands = catalogue.groups_of_commands()
    entries = []
    for each in groups:
        of_commands = [command for command, of_command in commands.items() if each.group in of_command]
        entries.append(
            {
                "name": each.group,
                "default": each.default,
                "commands": of_commands or ["train -m" if each.group in SWEEPS else "train"],
                "choices": [_choice_entry(catalogue, each, choice, with_keys=bool(names)) for choice in each.choices],
            }
        )
    return entries


def _choice_entry(catalogue: Catalogue, of: _Selection, choice: Choice, *, with_keys: bool) -> dict[str, Any]:
    keys: list[dict[str, Any]] = []
    if with_keys:
        from dlopt.config.early_checks import annotations_in  # imports pydantic
        from dlopt.config.schema import alternatives

        known = annotations_in(of.group, catalogue.target(choice) or "")
        for key in catalogue.keys(choice):
            name = key.name.removeprefix(f"{of.package}.")
            allowed = alternatives(known[name]) if name in known else None
            comment = {"comment": key.comment} if of.has_pattern else {}
            keys.append({"name": key.name, "value": key.value, "allowed": allowed, **comment})
    return {"name": choice.name, "description": choice.description, "keys": keys if with_keys else None}


# -- keys by their name


@dataclass(frozen=True)
class _Found:
    """A key, and the choice that has it: optimizer=sgd; "" for a key of train.yaml."""

    key: Key
    choice: str = ""


def _add_term(catalogue: Catalogue, term: str, page: "_Page") -> bool:
    """Adds what a term of the field or of other tools means here; returns whether there is anything.

    These are: what to type instead, keys with the term in their names, choices, other keys and commands with it in
    their names or descriptions. Upper case and separators do not count: `Weight decay` finds weight_decay.
    """
    found, word = _keys_by_name(catalogue), _letters(term)
    named = [each for each in found if each == term or each.endswith(f".{term}")]
    advice = "" if named else for_key(_key_form(term), "VALUE")
    choices: list[Choice] = []
    described: list[str] = []
    metrics: list[str] = []
    commands: list[tuple[str, str]] = []
    if len(word) > 1:
        metrics = [name for name, about in ABOUT.items() if _has(word, name) or _has(word, about)]
    if len(word) > 2:
        named += [each for each in found if _has(word, each) and each not in named]
        every = [choice for group in _groups(catalogue) for choice in catalogue.choices(group)]
        choices = [each for each in every if _has(word, each.name) or _has(word, each.description)]
        described = [name for name, keys in found.items() if name not in named and _has(word, keys[0].key.comment)]
        summaries = {name: summary(path) for name, path in every_command().items()}
        commands = [(f"  dlopt {name}", line) for name, line in summaries.items() if _has(word, f"{name} {line}")]
    if not (advice or named or metrics or choices or described or commands):
        return False
    page.text(*[""] * bool(page.lines), f"keys: {term}" if named else term, bold=True)
    if advice:
        page.text(f"  {advice}")
    page.rows([_row_of_key(found[each]) for each in named])
    rows = [(f"  {name}", f"{'test metric' if name in OF_TESTS else 'metric'}: {ABOUT[name]}") for name in metrics]
    page.rows([*rows[:_MAX_FOUND], *_more(rows)])
    rows = [(f"  {each.group}={each.name}", each.description) for each in choices]
    page.rows([*rows[:_MAX_FOUND], *_more(rows)])
    rows = [_row_of_key(found[each]) for each in described]
    page.rows([*rows[:_MAX_FOUND], *_more(rows), *commands])
    return True


def _key_form(term: str) -> str:
    return re.sub(r"[\s-]+", "_", term)


def _letters(text: str) -> str:
    return re.sub(r"[\s_.-]", "", text.lower())


def _has(word: str, text: str) -> bool:
    """Returns whether a text has a word of `_letters`; one of up to three must begin a word: roc is not in process."""
    if len(word) > 3:
        return word in _letters(text)
    return re.search(r"(?<![a-z0-9])" + r"[\s_.-]*".join(map(re.escape, word)), text.lower()) is not None


def _more(rows: Sequence[object]) -> list[tuple[str, str]]:
    return [(f"  ... and {len(rows) - _MAX_FOUND} more", "")] if len(rows) > _MAX_FOUND else []


def _keys_by_name(catalogue: Catalogue) -> dict[str, list[_Found]]:
    """Returns all keys: those of train.yaml, then those of each group, its default choice first."""
    found = {key.name: [_Found(key)] for key in keys_of_runs(catalogue)}
    for group, default in _groups(catalogue).items():
        if group in ("experiment", "debug"):  # they set keys of other groups
            continue
        for choice in sorted(catalogue.choices(group), key=lambda each: each.name != default):
            for key in catalogue.keys(choice):
                if key.name.startswith(f"{group}."):
                    found.setdefault(key.name, []).append(_Found(key, f"{group}={choice.name}"))
    return found


def _row_of_key(found: Sequence[_Found]) -> tuple[str, str]:
    """Returns a key with its first default, and its comment with the choices that have it."""
    key = found[0].key
    choices = [each.choice for each in found if each.choice]
    origin = ""
    if choices:
        more = f" and {len(choices) - 1} more choices" if len(choices) > 1 else ""
        origin = f" ({choices[0]}{more})"
    return f"  {key.name}={key.value}", f"{key.comment}{_declared(key)}{origin}".strip()


def _declared(key: Key) -> str:
    """Returns the values of a key that code declares, so that its comment does not list them."""
    return f"; metrics: {', '.join(REQUESTABLE)}" if key.name == "evaluate.metrics" else ""


# -- the catalogue


def _groups(catalogue: Catalogue) -> dict[str, str | None]:
    """Maps the groups of a run to their default choices, most frequently used groups first."""
    groups = catalogue.groups()
    others = [group for group in groups if group not in _FIRST]
    return {group: groups[group] for group in (*_FIRST, *others)}


def every_group(catalogue: Catalogue) -> dict[str, str | None]:
    """Maps each group, including groups of sweeps and of single commands, to its default choice."""
    groups = catalogue.groups()
    for of_command in catalogue.groups_of_commands().values():
        groups |= of_command
    return groups | SWEEPS


def choices_of(catalogue: Catalogue, group: str) -> list[Choice]:
    """Lists the choices of a group, without its subgroups (hydra/sweeper/sampler)."""
    return [choice for choice in catalogue.choices(group) if group not in SWEEPS or "/" not in choice.name]


def keys_of_runs(catalogue: Catalogue) -> list[Key]:
    """Returns the keys of train.yaml that belong to no group."""
    groups = (*catalogue.groups(), "hydra")
    return [key for key in _keys_of_train(catalogue) if key.name.split(".")[0] not in groups and "/" not in key.name]


def _keys_of_train(catalogue: Catalogue) -> list[Key]:
    """Returns the keys of train.yaml, those that it gives to all choices of a group included."""
    return catalogue.keys(Choice("", "train", config_folder() / "train.yaml"))


def complete(_: Sequence[str]) -> list[str]:
    """Completes the name of a group."""
    return [*Catalogue().groups()]


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; `dlopt options --help` shows what is allowed")


def _known_names(catalogue: Catalogue) -> Names:
    """Returns the groups, and what to type for each choice and key."""
    groups = _groups(catalogue)
    forms = {key: key for key in _keys_by_name(catalogue)}
    forms |= {word: parts_of(advice)[0] for word, advice in table("keys").items() if advice.endswith("={}")}
    forms |= {choice.name: f"{group}={choice.name}" for group in groups for choice in catalogue.choices(group)}
    return Names("group, choice or key", groups, "dlopt options", forms=forms)


# -- the help of `dlopt train`


def tables_of_train(config_dir: str | None) -> str:
    """Returns the tables of the help of `dlopt train`, with the choices of `config_dir`."""
    catalogue = Catalogue(config_dir)
    sections: dict[str, Sequence[tuple[str, str]]] = {
        "Groups and choices (* default):": _rows_of_groups(catalogue),
        "`dlopt options optimizer=sgd` lists the keys of a choice.": [],
        "Keys of the run:": [
            *((f"{key.name}={key.value}", key.comment) for key in keys_of_runs(catalogue)),
            ("from=RUN", "start from the config of the run in folder RUN, changed by the other overrides"),
            ("output=DIR", "folder of the run, or with -m of the sweep (default: outputs/NAME/DATE)"),
        ],
        "Sweeps (-m; * default):": _rows_of_sweeps(),
        "Flags:": documented_flags(),
        "Write lists as [a,b]. Quote values with spaces or commas twice: name=\"'two words'\"": [],
    }
    lines: list[str] = []
    for title, rows in sections.items():
        lines += ["", title]
        if rows:
            lines += two_columns(rows)
    return "\n".join([*lines, ""])


def _rows_of_groups(catalogue: Catalogue) -> list[tuple[str, str]]:
    rows = []
    for group, default in _groups(catalogue).items():
        choices = catalogue.choices(group)
        if group == "experiment":  # too many for a page
            rows.append((group, f"{len(choices)} recipes: `dlopt options experiment`"))
        else:
            rows.append((group, _names(choices, default)))
    return rows


def _rows_of_sweeps() -> list[tuple[str, str]]:
    """Returns the groups of sweeps with dlopt's own choices; of the sweepers only the search, which has a syntax."""
    rows = [("hydra/sweeper=dlopt_optuna", "search with Optuna: interval(a,b), choice(a,b), tag(log,interval(a,b))")]
    for group, default in SWEEPS.items():
        if group != "hydra/sweeper":
            rows.append((group, _names(choices_of(Catalogue(), group), default)))
    return rows


def _names(choices: Sequence[Choice], default: str | None) -> str:
    names = [f"{each.name}*" if each.name == default else each.name for each in choices]
    return ", ".join(names) or "no choices yet"


# -- lines of text


class _Page:
    """Formats lines, wrapped to the terminal or to COLUMNS. Pipes and files are not wrapped, which suits grep."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._is_terminal = sys.stdout.isatty()
        known = self._is_terminal or os.environ.get("COLUMNS", "").isdigit()
        self._width = min(max(shutil.get_terminal_size().columns, 40), _MAX_WIDTH) if known else None

    def text(self, *lines: str, bold: bool = False) -> None:
        for line in lines:
            wrapped = wrap(line, self._width)
            if bold and self._is_terminal:
                wrapped = [f"\033[1m{each}\033[0m" for each in wrapped]
            self.lines += wrapped

    def choices(self, group: str, choices: Sequence[Choice], default: str | None) -> None:
        """Adds a group and a row per choice; by families, if there are any: the default's first, then the largest."""
        self.text(group, bold=True)
        families: dict[str, list[tuple[str, str]]] = {}
        has_families = any(each.family for each in choices)
        for choice in sorted(choices, key=lambda each: has_families and each.name != default):
            mark = _MARK if choice.name == default else " "
            families.setdefault(choice.family or "other", []).append((f"{mark} {choice.name}", choice.description))
        first, *others = families or [""]
        rows = families.get(first, [])
        if others:
            rows = []
            for family in [first, *sorted(others, key=lambda each: (each == "other", -len(families[each])))]:
                rows += [(f"{family}:", ""), *families[family]]
        self.rows(rows or [("  (no choices)", "")])

    def keys(self, package: str, keys: Iterable[Key]) -> None:
        """Adds a row per key, named without the group."""
        self.rows([(f"    {key.name.removeprefix(f'{package}.')}={key.value}", key.comment) for key in keys])

    def rows(self, rows: Sequence[tuple[str, str]]) -> None:
        """Adds rows (left, right); wraps the right column, on a new line if the left one is long."""
        limit = 38 if self._width is None else min(38, self._width * 2 // 5 + 2)
        column = max((len(left) for left, _ in rows if len(left) <= limit), default=limit)
        for left, right in rows:
            self.lines += wrap_row(left, right, column, self._width)
