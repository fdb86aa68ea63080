"""Parts of the user's own that settings name: functions of `evaluate.metrics`, objects of `observers`."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dlopt.basics.calls import can_call
from dlopt.basics.errors import UserError
from dlopt.basics.names import Names
from dlopt.config.parameters import show
from dlopt.config.schema import Component, component, dotted_name, resolve_target
from dlopt.metrics.declared import OF_TESTS, REQUESTABLE
from dlopt.metrics.names import EVALUATED

METHODS = {"after_update": ("step", "loss", "model"), "after_evaluation": ("metrics",), "at_end": ("summary",)}
"""The methods that an observer may have, with their arguments (`dlopt.training.user_observers.RunObserver`)."""


# -- metrics


def user_metrics(entries: Sequence[str], packages: Iterable[str]) -> dict[str, Callable[..., Any]]:
    """Returns the user's functions by name: of mine.metrics.kappa it is kappa.

    `packages`: those that may be named. Raises `UserError` for an entry that is no metric of dlopt and not such a
    function, and for two of one name.
    """
    functions: dict[str, Callable[..., Any]] = {}
    packages = tuple(packages)
    for entry in entries:
        setting, name = f"evaluate.metrics={entry}", entry.rpartition(".")[2]
        if entry in REQUESTABLE:
            continue
        if "." not in entry:
            hint = Names("metric", REQUESTABLE).hint(entry)
            raise UserError(f"{setting}: unknown metric; {hint}, or a function of your own: mine.metrics.{entry}")
        function = resolve_target("evaluate.metrics", entry, packages)
        if inspect.isclass(function) or not can_call(function, 2):
            raise UserError(f"{setting}: must be a function of (outputs, targets) that returns a number")
        # A function may replace a metric that only tests compute: it has the name in runs before dlopt had the metric.
        if name in EVALUATED and (name not in OF_TESTS or name in entries):
            raise UserError(f"{setting}: dlopt has a metric {name}; give the function another name")
        if name in functions:
            raise UserError(f"{setting}: another metric is called {name}, too; give one of the functions another name")
        functions[name] = function
    return functions


# -- observers


def user_observers(entries: Sequence[Any], packages: Iterable[str]) -> tuple[Component, ...]:
    """Checks the entries of `observers`; raises `UserError`."""
    packages = tuple(packages)
    checked = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise UserError(f"observers.{i}={show(entry)}: must name a class: observers=[{{_target_: mine.Watch}}]")
        checked.append(component(f"observers.{i}", entry, (), packages))
        if inspect.isclass(checked[-1].target):  # known before it is built
            methods_of(checked[-1], checked[-1].target)
    return tuple(checked)


def methods_of(entry: Component, observer: Any) -> dict[str, Callable[..., Any]]:
    """Returns the methods of an observer, or of its class, by name. Raises `UserError` if it has none."""
    found = {name: method for name in METHODS if callable(method := getattr(observer, name, None))}
    if not found:
        signatures = ", ".join(f"{name}({', '.join(arguments)})" for name, arguments in METHODS.items())
        raise UserError(f"{entry.key}._target_={dotted_name(entry.target)}: has none of the methods {signatures}")
    return found
