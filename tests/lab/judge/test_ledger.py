"""A ledger numbers the changes that are proposed against a base, and shares out the error rate among them."""

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dlopt.basics.errors import UserError
from dlopt.basics.locks import locked
from dlopt.basics.stored import Stored
from dlopt.lab.judge.ledger import LEDGER, Entry, Ledger
from dlopt.lab.judge.sequential import looks, rate_of


def propose(ledger: Ledger, key: str, seeds: int = 20) -> Entry:
    return ledger.propose(key, [f"optimizer.lr={key}"], None, 0.0, seeds, "d")


def conclusion(gains: tuple[float, ...], rate: float) -> dict[str, Any]:
    """Returns the fields of an entry with these gains."""
    look = [*looks(gains, rate)][-1]
    ends = {
        name: value if math.isfinite(value := getattr(look, name)) else None for name in ("estimate", "low", "high")
    }
    return {"verdict": look.verdict, "metric": "val_loss", "gains": gains[: look.pairs], **ends}


def test_later_proposals_have_smaller_rates_and_known_ones_keep_theirs(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "base", ["model=mlp"], 0.05)
    entries = [propose(ledger, key) for key in ("1", "2", "1", "3")]
    assert [each.number for each in entries] == [1, 2, 1, 3]
    assert [each.rate for each in entries] == [rate_of(number, 0.05) for number in (1, 2, 1, 3)]
    decided = replace(entries[1], **conclusion((0.1, *[math.inf] * 9), entries[1].rate))
    ledger.record(decided)
    assert propose(ledger, "2") == replace(decided, change=["optimizer.lr=2"])
    assert [each.verdict for each in ledger.entries()] == ["undecided", "better", "undecided"]


def test_two_processes_that_propose_at_once_have_two_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path / "base", ["model=mlp"], 0.05)

    @contextmanager
    def after_another(path: Path) -> Iterator[None]:
        monkeypatch.undo()
        assert propose(ledger, "1").number == 1  # of the process that has the lock first
        with locked(path):
            yield

    monkeypatch.setattr("dlopt.lab.judge.ledger.locked", after_another)
    second = propose(ledger, "2")
    assert (second.number, second.rate) == (2, rate_of(2, 0.05))
    assert [each.key for each in ledger.entries()] == ["1", "2"]


def test_a_refused_proposal_takes_no_number_and_leaves_no_file(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "base", [], 0.05)
    with pytest.raises(UserError, match=r"^seeds=3: proposal 1 against this base takes 7 pairs or more: seeds=20$"):
        propose(ledger, "1", seeds=3)
    assert not ledger.folder.exists()
    propose(ledger, "1")
    with pytest.raises(UserError, match=r"^error_rate=0.1: the changes in .* share 0.05; keep it"):
        propose(replace(ledger, rate=0.1), "2")
    assert len(ledger.entries()) == 1


HEADER = {"base": ["model=mlp"], "error_rate": 0.05}
FIRST = {
    "number": 1,
    "key": "a",
    "change": ["x=1"],
    "code_sha256": None,
    "rate": rate_of(1, 0.05),
    "margin": 0.0,
    "data": "d",
}


def lines(*values: Any) -> str:
    return "".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: is not JSON"),
        ('{"base": [], "er', "line 1: is not JSON"),
        (lines(FIRST), "line 1: the base must be the first line, and no other"),
        (lines(HEADER, HEADER), "line 2: the base must be the first line, and no other"),
        (lines({**HEADER, "error_rate": True}), "line 1: base.error_rate: "),
        (lines({**HEADER, "error_rate": 2.0}), "line 1: base.error_rate: "),
        (lines([]), "line 1: proposal: Input should be "),
        (lines('{"base": [], "base": [], "error_rate": 0.05}'), "line 1: has a key twice"),
        (lines(HEADER, FIRST, "garbage"), "line 3: is not JSON"),
        (lines(HEADER, "", FIRST), "line 2: is not JSON"),
        (lines(HEADER, "[" * 100_000), "line 2: is nested more than 100 levels deep"),
        (lines(HEADER, {**FIRST, "number": 2}), "line 2: number: 2 follows 0"),
        (lines(HEADER, {**FIRST, "number": True}), "line 2: proposal.number: "),
        (lines(HEADER, {**FIRST, "number": 1.0}), "line 2: proposal.number: "),
        (lines(HEADER, {**FIRST, "number": 10**400}), "line 2: has an integer of more than 100 digits"),
        (lines(HEADER, f'{{"number": {"9" * 5000}}}'), "line 2: has an integer of more than 100 digits"),
        (lines(HEADER, {**FIRST, "key": 7}), "line 2: proposal.key: "),
        (lines(HEADER, {**FIRST, "key": "../.."}), "line 2: proposal.key: "),
        (lines(HEADER, {**FIRST, "change": "x=1"}), "line 2: proposal.change: "),
        (lines(HEADER, {**FIRST, "code_sha256": "x"}), "line 2: proposal.code_sha256: "),
        (lines(HEADER, {**FIRST, "rate": -0.03}), "line 2: proposal.rate: "),
        (lines(HEADER, {**FIRST, "rate": 0.04}), "line 2: rate: 0.04 is not that of proposal 1 of 0.05"),
        (lines(HEADER, {**FIRST, "margin": math.nan}), "line 2: has the number NaN, which is not finite"),
        (lines(HEADER, {**FIRST, "margin": math.inf}), "line 2: has the number Infinity, which is not finite"),
        (lines(HEADER, {**FIRST, "margin": None}), "line 2: proposal.margin: "),
        (lines(HEADER, {**FIRST, "gains": ["nan"]}), "line 2: proposal.gains.0: "),
        (lines(HEADER, {**FIRST, "gains": [[]]}), "line 2: proposal.gains.0: "),
        (lines(HEADER, json.dumps({**FIRST, "gains": [7]}).replace("[7]", "[1e999]")), "line 2: has the number 1e999"),
        (lines(HEADER, {**FIRST, "verdict": "good"}), "line 2: proposal.verdict: "),
        (lines(HEADER, {**FIRST, "metric": "\x1b[2J"}), "line 2: metric: "),
        (lines(HEADER, {**FIRST, "pairs": 3}), "line 2: proposal.pairs: "),
        (lines(HEADER, {key: value for key, value in FIRST.items() if key != "key"}), "line 2: proposal.key: "),
        (lines(HEADER, FIRST, {**FIRST, "key": "b"}), "line 3: key: is not that of the former line"),
        (lines(HEADER, {**FIRST, "verdict": "better"}), "proposal 1: the verdict better without gains"),
        (lines(HEADER, {**FIRST, "verdict": "better", "gains": [0.1, 0.1]}), "proposal 1: its verdict or its interval"),
        (lines(HEADER, {**FIRST, "gains": [0.1] * 9}), "proposal 1: its verdict or its interval"),
        ("\udcff\n", "line 1: is not text in UTF-8"),
    ],
)  # fmt: skip
def test_a_damaged_ledger_is_refused_and_stays_as_it_is(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    path.write_bytes(data := text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as error:
        Ledger(tmp_path, [], 0.05).propose("a", ["x=1"], None, 0.0, 20, "d")
    assert f"{LEDGER}: is damaged: {message}" in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).isprintable() and str(error.value).endswith("or start another with output=DIR")
    assert path.read_bytes() == data


def test_a_ledger_that_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    for make in (lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), path.mkdir):
        make()
        with pytest.raises(UserError, match=f"{LEDGER}: "):
            propose(Ledger(tmp_path, [], 0.05), "1")
        path.rmdir() if path.is_dir() else path.unlink()


def test_runs_without_their_ledger_are_refused(tmp_path: Path) -> None:
    """A new ledger would give the next change the error rate that was spent on the former ones."""
    ledger = Ledger(tmp_path, [], 0.05)
    propose(ledger, "1")
    propose(ledger, "2")
    (tmp_path / "2").mkdir()
    whole = (tmp_path / LEDGER).read_text()
    (tmp_path / LEDGER).write_text("".join(whole.splitlines(keepends=True)[:2]))
    with pytest.raises(UserError, match=f"{LEDGER}: is damaged: has 1 proposals, but .*2 has the runs of proposal 2"):
        propose(ledger, "1")
    (tmp_path / LEDGER).unlink()
    with pytest.raises(UserError, match=f"{LEDGER}: is damaged: is missing, but .*2 has the runs of proposal 2"):
        propose(ledger, "1")
    (tmp_path / LEDGER).write_text(whole)
    assert propose(ledger, "1").number == 1


def test_a_proposal_of_another_process_while_the_ledger_is_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, lines = Ledger(tmp_path, [], 0.05), Stored.lines
    propose(ledger, "1")

    def then_proposed(self: Stored[Any]) -> list[Any]:
        read = lines(self)
        with monkeypatch.context() as other:
            other.setattr(Stored, "lines", lines)
            (tmp_path / str(propose(ledger, "2").number)).mkdir(exist_ok=True)
        return read

    with monkeypatch.context() as patch:
        patch.setattr(Stored, "lines", then_proposed)
        assert len(ledger.entries()) == 1
    assert len(ledger.entries()) == 2


def test_other_data_are_another_proposal(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, [], 0.05)
    numbers = [ledger.propose("a", [], None, 0.0, 20, data).number for data in ("one", "two", "one", "")]
    assert numbers == [1, 2, 1, 3]


def test_a_full_disk_keeps_the_former_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path, [], 0.05)
    entry = propose(ledger, "1")
    before = (tmp_path / LEDGER).read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for write in (lambda: ledger.record(entry), lambda: propose(ledger, "2")):
            with pytest.raises(OSError, match=rf"No space left on device: '.*{LEDGER}'"):
                write()
    assert (tmp_path / LEDGER).read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} == {LEDGER, ".ledger.lock"}
