"""The leaderboard of a sweep on the screen."""

import io
from typing import Any

import pytest

from dlopt.analysis.leaderboard import Entry, leaderboard
from dlopt.commands.report import show_front, show_leaderboard


def entry(lr: float, seed: int, accuracy: float, test: float) -> Entry:
    figures = {"status": "finished", "best_val_accuracy": accuracy, "test_accuracy": test}
    config = {"optimizer": {"lr": lr}, "seed": seed}
    return Entry(f"{lr}/{seed}", config, figures, [f"optimizer.lr={lr}", f"seed={seed}"])


def board(**more: Any) -> str:
    stream = io.StringIO()
    runs = [entry(lr, seed, 0.9 - lr + 0.01 * seed, 0.5 + lr) for lr in (0.1, 0.2) for seed in (0, 1)]
    show_leaderboard(leaderboard(runs), "test_accuracy", stream=stream, **more)
    return stream.getvalue()


def test_the_test_figure_is_that_of_the_first_row_only() -> None:
    lines = board().splitlines()
    first, second = (next(line for line in lines if f"optimizer.lr={lr}" in line) for lr in (0.1, 0.2))
    assert "80.50 % ± 0.71 %" in first and "60.00 %" in first
    assert "-10.00 % [-10.00 %, -10.00 %]" in second and "70.50 %" in second
    assert "70.00 %" not in second and "70.00 %" in board(all_tests=True)


def test_no_row_no_table() -> None:
    stream = io.StringIO()
    show_leaderboard(leaderboard([]), "test_accuracy", stream=stream)
    assert stream.getvalue() == ""


def test_a_front(capsys: pytest.CaptureFixture[str]) -> None:
    show_front([("job 1: lr=0.1", [0.5, 10.0])], ["best_val_accuracy", "seconds"])
    said = capsys.readouterr().out
    assert "50.00 %" in said and "job 1: lr=0.1" in said
