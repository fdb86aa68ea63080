"""The order in which the trials of a ladder run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dlopt.basics.errors import UserError
from dlopt.lab.ladder import running
from dlopt.lab.ladder.ladder import LadderRequest, Trial
from tests.support.ladders import results


def test_small_rungs_come_first_also_those_that_have_waited_for_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def label(plan_job: Any, folder: Any, overrides: Any, number: int, label: str) -> SimpleNamespace:
        return SimpleNamespace(label=label, composed=UserError("no branch"))

    monkeypatch.setattr("dlopt.lab.claimed_trials.build_job", label)
    request = LadderRequest(tmp_path, results(1.5).ladder)
    known = [*request.waiting()]
    possible = [each for each in known if each.optimizer == "adamw"]

    def waiting(self: LadderRequest) -> list[Trial]:
        return possible

    monkeypatch.setattr(LadderRequest, "waiting", waiting)
    source = running._Ladder(request, None)  # type: ignore[arg-type]
    assert [source.next().label for _ in range(3)] == [
        "adamw, r0, seed 0: lr=0.1",
        "adamw, r0, seed 1: lr=0.1",
        "adamw, r1, seed 0: lr=0.1",
    ]
    possible = known  # the search of the other optimizer has ended
    assert [source.next().label for _ in range(4)] == [
        "mine, r0, seed 0: lr=0.1",
        "mine, r0, seed 1: lr=0.1",
        "mine, r1, seed 0: lr=0.1",
        "adamw, r1, seed 1: lr=0.1",
    ]


def test_earlier_results_are_counted_and_no_time_left_is_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The largest runs come last: the times of the others say nothing about them."""
    found = results(1.5)
    known = dict([*found.outcomes.items()][:-3])
    monkeypatch.setattr("dlopt.lab.ladder.ladder.recorded", lambda folder: known)
    request = LadderRequest(tmp_path, found.ladder)
    overview = running._Ladder(request, None).overview  # type: ignore[arg-type]
    overview.started(0, "mine")
    overview.ended(0, "mine", "finished", {})
    assert (request.expected(), len(request.known())) == (20, 17)
    [line] = [line for line in "".join(capsys.readouterr()).splitlines() if "finished" in line]
    assert line.endswith(" | 18/20: 18 done, 0 failed")
