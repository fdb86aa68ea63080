"""Calls the observers of the user's own (`observers`) during a run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from dlopt.basics.calls import can_call
from dlopt.basics.errors import RunError, UserError
from dlopt.config.schema import Component, dotted_name
from dlopt.config.user_parts import METHODS, methods_of


class RunObserver(Protocol):
    """What dlopt calls of an observer. Each method is optional; none may change its arguments."""

    def after_update(self, step: int, loss: Tensor, model: nn.Module) -> None:
        """Called after update `step` (from 1), unless it was skipped, with the mean loss of its batch, a scalar.

        `loss.item()` waits for a GPU. With several processes, `model` is what process 0 holds of the model.
        """

    def after_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Called after each evaluation with its line of metrics.jsonl."""

    def at_end(self, summary: Mapping[str, Any]) -> None:
        """Called after the final test, or when the run was interrupted, with the content of summary.json."""


class UserObservers:
    """The observers of a run, whose errors end it. Only the main process has them.

    Raises `UserError` for an observer that cannot be built, or whose methods have other arguments.
    """

    def __init__(self, entries: Sequence[Component]) -> None:
        self._calls: dict[str, list[tuple[str, Callable[..., Any]]]] = {name: [] for name in METHODS}
        for entry in entries:
            path = dotted_name(entry.target)
            try:
                observer = entry.build()
            except Exception as error:
                raise UserError(f"{entry.key}._target_={path}: raised {type(error).__name__}: {error}") from error
            for name, method in methods_of(entry, observer).items():
                if not can_call(method, len(METHODS[name])):
                    raise UserError(f"{entry.key}._target_={path}: {name} must take ({', '.join(METHODS[name])})")
                self._calls[name].append((f"{entry.key}: {path}.{name}", method))

    def after_update(self, step: int, loss: Tensor, model: nn.Module) -> None:
        self._call("after_update", step, loss, model)

    def after_evaluation(self, metrics: Mapping[str, Any]) -> None:
        self._call("after_evaluation", metrics)

    def at_end(self, summary: Mapping[str, Any]) -> None:
        self._call("at_end", summary)

    def _call(self, name: str, *arguments: Any) -> None:
        for label, method in self._calls[name]:
            try:
                # A copy of each dict: an observer must not change what the next one, or the run's files, get.
                method(*(dict(each) if isinstance(each, Mapping) else each for each in arguments))
            except Exception as error:
                raise RunError(f"{label} raised {type(error).__name__}: {error}") from error


NO_OBSERVERS = UserObservers(())
