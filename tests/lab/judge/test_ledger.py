"""A ledger numbers the changes that are proposed against a base, and shares out the error rate among them."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from dlopt.basics.errors import UserError
from dlopt.lab.judge.ledger import LEDGER, Entry, Ledger
from dlopt.lab.judge.sequential import rate_of


def propose(ledger: Ledger, key: str, seeds: int = 20) -> Entry:
    return ledger.propose(key, [f"optimizer.lr={key}"], None, 0.0, seeds)


def test_later_proposals_have_smaller_rates_and_known_ones_keep_theirs(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "base", ["model=mlp"], 0.05)
    entries = [propose(ledger, key) for key in ("1", "2", "1", "3")]
    assert [each.number for each in entries] == [1, 2, 1, 3]
    assert [each.rate for each in entries] == [rate_of(number, 0.05) for number in (1, 2, 1, 3)]
    decided = replace(entries[1], verdict="better", metric="val_loss", estimate=0.1, low=0.05, gains=(0.1, math.inf))
    ledger.record(decided)
    assert propose(ledger, "2") == replace(decided, change=["optimizer.lr=2"])
    assert [each.verdict for each in ledger.entries()] == ["undecided", "better", "undecided"]


def test_a_refused_proposal_takes_no_number_and_leaves_no_file(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "base", [], 0.05)
    with pytest.raises(UserError, match=r"^seeds=3: proposal 1 .* takes 7 pairs or more: seeds=20$"):
        propose(ledger, "1", seeds=3)
    assert not ledger.folder.exists()
    propose(ledger, "1")
    with pytest.raises(UserError, match=r"^error_rate=0.1: the changes in .* share 0.05; keep it"):
        propose(replace(ledger, rate=0.1), "2")
    assert len(ledger.entries()) == 1


def test_a_line_that_a_crash_has_cut_off_does_not_count(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, [], 0.05)
    propose(ledger, "1")
    with (tmp_path / LEDGER).open("a") as file:
        file.write('{"number": 2, "ke')
    assert propose(ledger, "2").number == 2
    assert [each.key for each in ledger.entries()] == ["1", "2"]
