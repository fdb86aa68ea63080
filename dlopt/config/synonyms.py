"""What to type in dlopt for the keys, choices and flags of other tools, as listed in synonyms.yaml."""

import functools
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from dlopt.basics.names import Names
from dlopt.basics.plain_values import load_yaml
from dlopt.config.overrides import parts_of


@functools.cache
def table(name: str) -> dict[str, str]:
    """Maps each word of other tools to the advice in its row. `name`: keys or choices."""
    rows = load_yaml(Path(__file__).with_name("synonyms.yaml"))[name]
    return {word: advice for words, advice in rows.items() for word in words.split()}


def for_key(key: str, value: str) -> str:
    """Returns what to type instead of an unknown key; '' if there is no row for it."""
    row = table("keys").get(key.lower(), "")
    group, placeholder = parts_of(row.partition(" (")[0])
    # scheduler=none: schedule=none would be refused in turn.
    advice = for_choice(group, value) if placeholder == "{}" and value else ""
    return advice or _format(row, value)


def for_choice(group: str, choice: str) -> str:
    """Returns what to type instead of an unknown choice; '' if there is no row for it."""
    rows = (row for pattern, row in table("choices").items() if fnmatchcase(f"{group}={choice}", pattern))
    return _format(next(rows, ""), choice)


def choice_names(group: str, choices: Iterable[str], key: str = "") -> Names:
    """Returns the names of a group's choices. `key`: what is typed for the group, if not its name."""
    names = [name for name in choices if not group.startswith("hydra/") or "/" not in name]  # hydra/sweeper/sampler
    instead = functools.partial(_for_unknown_choice, group, names)
    return Names("choice", names, f"dlopt options {group}", f"{key or group}=", instead=instead)


def _for_unknown_choice(group: str, names: Sequence[str], choice: str) -> str:
    inside = [name for name in names if choice and name.startswith(f"{choice}/")]
    if inside:
        example = f"{group}={inside[0]}"
        return f"use {example} (or another of this folder; `dlopt options '{group}={choice}/*'` lists them)"
    return for_choice(group, choice)


def for_flag(arguments: Iterable[str], flags: Iterable[str]) -> str:
    """Explains the first argument with two dashes (`--epochs 5`) that is none of the `flags`; '' if there is none."""
    arguments, flags = list(arguments), set(flags)
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, value = parts_of(argument)
        if not flag.startswith("--") or flag in flags or flag == "--":
            continue
        key = flag.removeprefix("--").replace("-", "_")
        if "=" not in argument and following and not following.startswith("-") and "=" not in following:
            argument, value = f"{argument} {following}", following
        advice = for_key(key, value or "VALUE") or f"use {key}={value or 'VALUE'}"
        return f"{argument}: an override is key=value, without dashes; {advice}"
    return ""


def _format(row: str, value: str) -> str:
    return row and f"use {row.replace('{}', value)}"
