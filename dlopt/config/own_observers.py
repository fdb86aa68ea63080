"""Observers of the user's own: the objects that `observers` names."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dlopt.basics.errors import UserError
from dlopt.config.schema import Component, component, dotted_name, show

METHODS = {"after_update": ("step", "loss", "model"), "after_evaluation": ("metrics",), "at_end": ("summary",)}
"""The methods that an observer may have, with their arguments (`dlopt.training.user_observers.RunObserver`)."""


def own_observers(entries: Sequence[Any], packages: Iterable[str]) -> tuple[Component, ...]:
    """Checks the entries of `observers`; raises `UserError`."""
    packages = tuple(packages)
    checked = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise UserError(f"observers.{i}={show(entry)}: must name a class: observers=[{{_target_: mine.Watch}}]")
        checked.append(component(f"observers.{i}", entry, (), packages))
        if inspect.isclass(checked[-1].target):  # known before it is built
            check_methods(checked[-1], checked[-1].target)
    return tuple(checked)


def check_methods(entry: Component, observer: Any) -> None:
    """Raises `UserError` unless an observer, or its class, has one of the methods."""
    if not any(callable(getattr(observer, name, None)) for name in METHODS):
        signatures = ", ".join(f"{name}({', '.join(arguments)})" for name, arguments in METHODS.items())
        raise UserError(f"{entry.key}._target_={dotted_name(entry.target)}: has none of the methods {signatures}")
