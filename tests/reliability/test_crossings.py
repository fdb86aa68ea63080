"""Crossings: a fixed covering array keeps the laws; what is broken is found, and shown with the fewest features."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.crossings.campaign import Campaign, minimal
from tests.support.crossings.features import DEFAULTS, FEATURES, KIND, array, exclusions, is_possible
from tests.support.crossings.laws import LAWS, Law
from tests.support.crossings.trial import Trial
from tests.support.ranks import ROOT

CHEAP = ["resumes", "plain_torch", "evaluated_as_logged", "measures_what_is_requested", "header_counts"]
# Compiling takes a minute of each row, and judging fourteen runs; these are tried by hand.
BY_HAND = ["compiled", "judges"]


def crossings(*arguments: str) -> None:
    command = [sys.executable, "scripts/crossings.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_first_row_keeps_the_laws() -> None:
    """Takes 20 seconds of a CPU, of which a further row would take 8."""
    crossings("--seed", "6", "--rows", "1", "--law", *CHEAP)


@pytest.mark.slow
def test_all_laws_hold_of_other_rows() -> None:
    crossings("--seed", "1", "--rows", "2", "--law", *(law.name for law in LAWS if law.name not in BY_HAND))


def test_every_pair_of_values_occurs_unless_it_is_excluded(tmp_path: Path) -> None:
    """Of a part of the features, in few rows, the same for a seed."""
    chosen = [KIND, "optimizer", "precision", "average", "accumulate", "norm"]

    def takes_part(feature: str, value: str) -> bool:
        return feature in chosen or value == DEFAULTS[feature]

    rows = [*array(1, tmp_path, takes_part=takes_part)]
    assert rows == [*array(1, tmp_path, takes_part=takes_part)]
    excluded = exclusions(tmp_path, {feature: [*FEATURES[feature]] for feature in chosen})
    possible = {
        frozenset(pair)
        for one, other in itertools.combinations(chosen, 2)
        for pair in itertools.product([(one, value) for value in FEATURES[one]], [(other, v) for v in FEATURES[other]])
    }
    covered = {frozenset(pair) for row in rows for pair in itertools.combinations(row.items(), 2)}
    assert possible - excluded <= covered and not covered & excluded
    assert frozenset({("average", "ema"), ("precision", "bf16_pure")}) in excluded  # by the table of conflicts
    assert len(rows) <= 1.4 * len(FEATURES[KIND]) * len(FEATURES["optimizer"])
    assert all(is_possible(*choice, row[KIND]) for row in rows for choice in row.items())


def test_a_broken_law_is_shown_with_the_features_that_break_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refused value is left out first."""

    def breaks(trial: Trial) -> None:
        if trial.has("average", "ema") and trial.has("clip", "norm"):
            raise AssertionError("ema and clip: 1 instead of 2")

    def refused(self: Campaign, trial: Trial) -> str | None:
        return "adapt=lora with dropout" if trial.has("adapt", "lora") and trial.has("dropout", "0.2") else None

    monkeypatch.setattr(Campaign, "refused", refused)
    monkeypatch.setattr(Trial, "run", None)
    campaign = Campaign(tmp_path, [Law(breaks)], seed=0)
    row = {**DEFAULTS, "dropout": "0.2", "adapt": "lora", "average": "ema", "clip": "norm", "schedule": "cosine"}
    campaign.check(3, row)
    assert campaign.found.refused == {"adapt=lora with dropout": {KIND: "mlp", "dropout": "0.2", "adapt": "lora"}}
    [(number, law, least, text)] = campaign.found.broken
    assert (number, law, text) == (3, "breaks", "ema and clip: 1 instead of 2")
    assert least == {KIND: "mlp", "clip": "norm", "average": "ema"}
    assert "row 3: breaks: kind mlp, clip norm, average ema" in capsys.readouterr().out


def test_the_smallest_row() -> None:
    row = {**DEFAULTS, KIND: "vit", "clip": "norm", "average": "ema", "layers": "decay", "tta": "flip"}
    assert minimal(row, lambda each: each["layers"] == "decay" and each[KIND] == "vit") == {
        KIND: "vit",
        "layers": "decay",
    }
