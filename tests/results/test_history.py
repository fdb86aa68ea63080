"""The evaluated epochs of a run in memory."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlopt.results import ranking
from dlopt.results.history import History, columns
from dlopt.results.leaderboard import Record
from dlopt.results.reading import Damaged, read
from tests.support.folders import make_run

LINES: list[dict[str, Any]] = [
    {"epoch": 1, "step": 10, "loss": 0.5},
    {"epoch": 1.5, "step": 15, "loss": 1.0, "accuracy": 0.25},
    {"epoch": 2, "step": 20, "accuracy": 1.0},
]


def test_history_has_the_lines_that_it_was_made_of() -> None:
    history = History(LINES)
    assert history == LINES and list(history) == LINES and history[-1] == LINES[2] and history[1:] == LINES[1:]
    assert json.dumps(list(history)) == json.dumps(LINES), "integers stay integers"
    assert history != LINES[:2] and not History() and history.latest() == {**LINES[0], **LINES[1], **LINES[2]}
    with pytest.raises(IndexError):
        history[3]
    expected = [[1, 0.5], [1.5, 1.0], [2, math.nan]]
    for each in (history, LINES):
        np.testing.assert_equal(columns(each, ["epoch", "loss"]), expected)
    assert np.isnan(columns(LINES, ["none"])).all()


def test_a_line_that_is_cut_off_is_left_out_only_at_the_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    content = (run / "metrics.jsonl").read_bytes()
    for end, count in {b"": 3, b'{"epoch": 4, "st': 3, b'{"epoch": 4, "step": 40}': 4, b"x" * 3_000_000: None}.items():
        (run / "metrics.jsonl").write_bytes(content + end)
        found = read(run)
        assert (len(found.history) if isinstance(found, Record) else None) == count
    for broken in (b'{"epoch": 4, "st\n', b"\n" + content, content[:-3] + b"\n" + content):
        (run / "metrics.jsonl").write_bytes(broken)
        assert isinstance(read(run), Damaged)


def test_curves_of_many_epochs_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_MAX_POINTS", 5)
    lines = [{"epoch": i, "step": 10 * i, "seconds": i, "val_loss": 1 / i} for i in range(1, 102)]
    found = ranking.band([Record(Path("a"), "finished", {}, {}, History(lines))], "val_loss")
    assert found is not None and found.x["step"].tolist() == [10, 260, 510, 760, 1010]
    assert found.mean.tolist() == [1 / epoch for epoch in (1, 26, 51, 76, 101)]
