"""Parameters of callables, and values as typed: what the help of commands needs, without pydantic."""

import dataclasses
import functools
import inspect
import json
import typing
from collections.abc import Callable, Mapping
from typing import Any


@functools.cache
def parameters_of(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a callable by name, with evaluated annotations."""
    signature = inspect.signature(target)
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except Exception:  # third-party annotations that do not evaluate: the arguments pass unchecked
        hints = {}
    parameters = [p.replace(annotation=hints.get(n, p.annotation)) for n, p in signature.parameters.items()]
    return {unpacked.name: unpacked for parameter in parameters for unpacked in _unpack(parameter)}


def named_parameters(target: Callable[..., Any]) -> list[str]:
    """Returns the names of the parameters except `*args` and `**kwargs`."""
    return [name for name, p in parameters_of(target).items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def _unpack(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    """Expands `**keys: Unpack[SomeTypedDict]` (PEP 692) into one parameter per key; keeps any other parameter."""
    if typing.get_origin(parameter.annotation) is not typing.Unpack:
        return [parameter]
    [keys] = typing.get_args(parameter.annotation)
    hints = typing.get_type_hints(keys, include_extras=True)
    defaults, new = dict.fromkeys(keys.__optional_keys__), inspect.Parameter
    return [
        new(name, new.KEYWORD_ONLY, default=defaults.get(name, new.empty), annotation=hint)
        for name, hint in hints.items()
    ]


def show(value: Any) -> str:
    """Formats a value as on the command line."""
    if isinstance(value, float):
        return repr(value)  # JSON has no nan
    return value if isinstance(value, str) else json.dumps(value, default=str)


def as_typed(value: Any) -> str:
    """Like `show`, also of a list and of a block of keys: without quotes, and without keys that are null."""
    if dataclasses.is_dataclass(value):
        return f"{{{', '.join(f'{key}: {show(each)}' for key, each in vars(value).items() if each is not None)}}}"
    return f"[{','.join(map(show, value))}]" if isinstance(value, list) else show(value)


def several_values(values: list[Any]) -> str:
    """Returns how the values of a list become an axis of a sweep, for the message that refuses the list."""
    return f"a list is one value; several values, one run each, with -m: {','.join(map(show, values))}"
