"""All metrics that dlopt computes in an evaluation, by name."""

from collections.abc import Iterable, Mapping

from dlopt.metrics import classes, labels, regression, text
from dlopt.metrics.declaration import Declaration

LOSS = Declaration("loss", "min", "nats", "mean of the loss over the samples (of a text: over the tokens)", "always")
_ALL = (LOSS, *classes.METRICS, *regression.METRICS, *labels.METRICS, *text.METRICS)

DECLARED: Mapping[str, Declaration] = {name: each for each in _ALL for name in each.names}
REQUESTABLE: tuple[str, ...] = tuple(dict.fromkeys(each.name for each in _ALL if each.needs))
"""The names that `evaluate.metrics` takes."""

ABOUT: Mapping[str, str] = {name: next(each.about for each in _ALL if each.name == name) for name in REQUESTABLE}
"""Their descriptions; of metrics of several tasks the first one."""
OF_TESTS = frozenset(each.name for each in _ALL if each.when == "tested")
"""The names of metrics that only tests compute, and evaluations that request them."""


def named(names: Iterable[str], metrics: Iterable[Declaration]) -> list[Declaration]:
    """Returns the `metrics` with one of the names."""
    return [each for each in metrics if not {*each.names}.isdisjoint(names)]
