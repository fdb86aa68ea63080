"""The help of a command: its text, with tables of the keys that its functions declare.

A command declares a key of its own once, as a keyword-only parameter with a type and one line of help:
`updates: Annotated[Count, "N: timed updates"] = 20`. Parsing checks the value against the type; `--help`, shell
completion and the reference show the line. "N" is a placeholder; "--" instead makes the key a flag: `--paths`.

How the key goes with others follows the help: `file: Annotated[str | None, "PATH: the text", "not with prompt"]`, or
"needs size or shape", or "required without images". The help shows these words, and parsing checks what they say.
"""

import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from types import ModuleType
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from dlopt.basics.errors import UserError
from dlopt.commands.shared.text_columns import two_columns

_WIDTH = 118  # columns of a table in a wide terminal
_FORM = re.compile(r"(not with|needs|required without) (\w+(?: or \w+)*)")
_TABLE = re.compile(r"( *)(?:\{(\w+)\}|(\S.*?) :: (.*))")  # a line of a table: declared keys, or a written row


class CommandKey(NamedTuple):
    """A key of a command. `line`: as typed, updates=N or --paths; `forms`: a rule, and the keys that it names."""

    name: str
    line: str
    help: str
    forms: Sequence[tuple[str, list[str]]] = ()

    @property
    def is_flag(self) -> bool:
        return self.line.startswith("-")

    @property
    def label(self) -> str:
        """The key in messages: updates, --paths."""
        return self.line if self.is_flag else self.name


def command_key_names(target: Callable[..., Any]) -> list[str]:
    """Returns the names of the keyword-only parameters."""
    from dlopt.config.parameters import parameters_of

    return [name for name, parameter in parameters_of(target).items() if parameter.kind is parameter.KEYWORD_ONLY]


def command_keys(target: Callable[..., Any]) -> list[CommandKey]:
    """Returns the keys that a function or a dataclass declares, with their defaults in the help."""
    from dlopt.config.parameters import parameters_of

    parameters = parameters_of(target)
    return [_key(name, parameters[name]) for name in command_key_names(target)]


def check_forms(target: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Raises `UserError` for keys that are set together, or that are missing, against what `target` declares."""
    keys = {key.name: key for key in command_keys(target)}
    typed = [name for name, value in values.items() if value is not None and value is not False]
    for key in keys.values():
        for rule, others in key.forms:
            found = [keys[name].label for name in others if name in typed]
            lines = " or ".join(keys[name].line for name in others)
            if key.name in typed and rule == "needs" and not found:
                raise UserError(f"{key.label}: needs {lines}")
            if key.name in typed and rule != "needs" and found:
                raise UserError(f"{' with '.join([key.label, *found])}: only one of them may be set")
            if key.name not in typed and rule == "required without" and not found:
                raise UserError(f"{key.line} or {lines}: one of them is required")


def usage(module: ModuleType) -> str:
    """Returns the help of a command: `module.USAGE` with its tables filled in.

    In a table, `{find_lr}` expands to the keys that the function declares, `{_READS}` to a sequence of keys, and
    `tta=none :: no augmentation` is a row.
    """
    lines: list[str] = []
    for is_table, group in groupby(module.USAGE.splitlines(), lambda line: bool(_TABLE.fullmatch(line))):
        together = [*group]
        lines += _table(module, together) if is_table else together
    return "\n".join(lines) + "\n"


def declaring(module: ModuleType) -> list[Callable[..., Any]]:
    """Returns the functions and dataclasses that declare the keys of a command, in the order of its help."""
    return [named for named in _named(module) if callable(named)]


def reads_of(module: ModuleType) -> list[str]:
    """Returns the keys of `dlopt train`, or of the config in a checkpoint, that the help of a command lists."""
    return [key for named in _named(module) if isinstance(named, tuple) for key in named]


def typed_words(module: ModuleType) -> Iterator[str]:
    """Yields what completes the first letters of a key or flag of a command: `updates=`, `--paths`."""
    for target in declaring(module):
        yield from (key.line if key.is_flag else f"{key.name}=" for key in command_keys(target))
    yield from re.findall(r"^ *([\w.]+=)\S* :: ", module.USAGE, re.MULTILINE)


def _named(module: ModuleType) -> list[Any]:
    """Returns the sources of the help's tables: functions, dataclasses and sequences of keys."""
    return [getattr(module, name) for name in re.findall(r"^ *\{(\w+)\}$", module.USAGE, re.MULTILINE)]


def _key(name: str, parameter: inspect.Parameter) -> CommandKey:
    documented = get_args(parameter.annotation) if get_origin(parameter.annotation) is Annotated else ()
    text, *forms = [each for each in documented if isinstance(each, str)] or [""]
    if not text or not all(map(_FORM.fullmatch, forms)):
        raise TypeError(f'{name}: declare its help, and how it goes with others: "VALUE: help", "not with KEY"')
    value, _, line = text.partition(": ")
    if value != "--" and parameter.default not in (parameter.empty, None) and "default: " not in line:
        line += f" (default: {_format(parameter.default)})"
    rules = [(rule, others.split(" or ")) for form in forms for rule, others in _FORM.findall(form)]
    return CommandKey(name, f"--{name}" if value == "--" else f"{name}={value}", "; ".join([line, *forms]), rules)


def _format(default: Any) -> str:
    """Formats a default as a user would type it: 1e-6, [a,b]."""
    from dlopt.config.parameters import show

    if isinstance(default, list):
        return f"[{','.join(map(_format, default))}]"
    return f"{default:g}".replace("e-0", "e-") if isinstance(default, float) else show(default)


def _table(module: ModuleType, lines: Sequence[str]) -> list[str]:
    found = [match for line in lines if (match := _TABLE.fullmatch(line))]
    indent = len(found[0][1])
    width = min(max(shutil.get_terminal_size().columns, 60), _WIDTH)
    rows: list[tuple[str, str]] = []
    for _, name, left, right in (match.groups() for match in found):
        named = getattr(module, name) if name else None
        if isinstance(named, tuple):
            return textwrap.wrap(", ".join(named), width, initial_indent=" " * indent, subsequent_indent=" " * indent)
        rows += [(left, right)] if named is None else [(key.line, key.help) for key in command_keys(named)]
    return two_columns(rows, indent=indent, width=width)
