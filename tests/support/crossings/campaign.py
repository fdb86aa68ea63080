"""A campaign: rows under trial, the refusals and the broken laws that they show."""

import itertools
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dlopt.basics.errors import UserError
from tests.support.crossings.features import DEFAULTS, FEATURES, KIND, Row, changed, is_possible
from tests.support.crossings.laws import Law
from tests.support.crossings.trial import DIVERGED, RefusedError, Trial
from tests.support.runs import run_config


@dataclass
class Found:
    """What the rows have shown so far: refusals, and broken laws with the smallest row that breaks each."""

    checked: Counter[str] = field(default_factory=Counter)
    refused: dict[str, Row] = field(default_factory=dict)
    refused_by_law: dict[str, str] = field(default_factory=dict)
    broken: list[tuple[int, str, Row, str]] = field(default_factory=list)


class Campaign:
    """Rows under trial, each in a folder that is removed afterwards."""

    def __init__(self, files: Path, laws: list[Law], seed: int) -> None:
        self.files, self.laws, self.seed, self.found = files, laws, seed, Found()
        self.numbers = itertools.count()

    def trial(self, row: Row, draws: str = "") -> Trial:
        return Trial(row, self.files, self.files / f"row{next(self.numbers)}", random.Random(draws))

    def refused(self, trial: Trial) -> str | None:
        """Returns why a row is refused; None if it runs, or fails otherwise."""
        try:
            run_config(*trial.words)  # most refusals come before a process is needed
            trial.run  # noqa: B018
        except (UserError, RefusedError) as error:
            shutil.rmtree(trial.place, ignore_errors=True)
            return str(error)
        except AssertionError:
            pass
        return None

    def refusal(self, row: Row) -> str | None:
        trial = self.trial(row)
        refusal = self.refused(trial)
        shutil.rmtree(trial.place, ignore_errors=True)
        return refusal

    def breach(self, row: Row, law: Law, draws: str) -> str | None:
        """Returns how the row breaks the law; None if it keeps it, or is refused."""
        trial = self.trial(row, draws)
        try:
            trial.run  # noqa: B018  # a command that trains in another way may show a refusal otherwise
            if law.applies(trial):
                law.check(trial)
        except RefusedError:
            pass
        except Exception as error:  # an expectation, or what a run should have left
            return described(error)
        finally:
            shutil.rmtree(trial.place, ignore_errors=True)
        return None

    def least_refused(self, row: Row, refusal: str) -> Row:
        """Returns the features of the row that are refused together, and records them."""
        named = {feature: value for feature, value in row.items() if is_named(feature, value, refusal)}
        start = {**DEFAULTS, KIND: row[KIND], **named}  # these are likely the reason, and fewer

        def is_refused(row: Row) -> bool:
            return without_numbers(self.refusal(row) or "") == without_numbers(refusal)

        least = minimal(start if is_refused(start) else row, is_refused)
        self.found.refused[without_numbers(refusal)] = least
        return least

    def check(self, number: int, row: Row) -> None:
        """Asks all laws of a row, or of what is left of it without the values that are refused.

        A row that diverges has a value that is too large, or shows a defect.
        """
        trial = self.trial(row)
        while (refusal := self.refused(trial)) is not None:
            least = self.found.refused.get(without_numbers(refusal), {})
            if not least or not least.items() <= row.items():
                least = self.least_refused(row, refusal)
            features = [feature for feature in least if feature != KIND]
            assert features, f"{least}: {refusal}"
            if refusal == DIVERGED:
                self.add(number, "converges", least, refusal)
            row = {**row, features[-1]: DEFAULTS[features[-1]]}
            trial = self.trial(row)
        for law in self.laws:
            draws = f"{self.seed} {number} {law.name}"
            trial.draw = random.Random(draws)
            if not law.applies(trial):
                continue
            self.found.checked[law.name] += 1
            try:
                trial.run  # noqa: B018
                law.check(trial)
            except RefusedError as error:
                self.found.refused_by_law.setdefault(str(error), f"{law.name} of row {number}")
            except Exception as error:
                text = described(error)
                breach = partial(self.breach, law=law, draws=draws)
                least = minimal(row, lambda smaller, breach=breach: breach(smaller) is not None)  # type: ignore[misc]
                self.add(number, law.name, least, breach({**DEFAULTS, **least}) or text)
        shutil.rmtree(trial.place, ignore_errors=True)

    def add(self, number: int, law: str, least: Row, text: str) -> None:
        self.found.broken.append((number, law, least, text))
        print(f"row {number}: {law}: {shown(least)}\n  {text}", flush=True)


def without_numbers(refusal: str) -> str:
    """Returns a message in which numbers are N: it is the same for other rows."""
    return re.sub(r"\b[0-9][0-9.]*(e-?[0-9]+)?\b", "N", refusal)


def is_named(feature: str, value: str, message: str) -> bool:
    """Returns whether a message names a key of a value, or the choice that it makes, or the class of that choice."""
    words = [word.partition("=") for word in FEATURES[feature][value].words.split()]
    plain = message.lower().replace("_", "")
    return any(
        key in message if "." in key else f"{key}={choice}" in message or choice.lower().replace("_", "") in plain
        for key, _, choice in words
    )


def described(error: Exception) -> str:
    return str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"


def minimal(row: Row, still: Callable[[Row], bool]) -> Row:
    """Returns the features of the row that are needed for `still`: without another one it does not hold.

    Leaves out halves of them, quarters, ..., and at last each alone. Its kind is the first one if that will do.
    """
    size = len(changed(row))
    while size > 1:
        size = (size + 1) // 2
        left = [feature for feature in reversed(changed(row)) if feature != KIND]
        for start in range(0, len(left), size):
            smaller = {**row, **{feature: DEFAULTS[feature] for feature in left[start : start + size]}}
            if still(smaller):
                row = smaller
    usual = {**row, KIND: DEFAULTS[KIND]}
    return changed(usual if all(is_possible(*each, usual[KIND]) for each in row.items()) and still(usual) else row)


def shown(row: Row) -> str:
    return ", ".join(f"{feature} {value}".strip() for feature, value in row.items())
