"""The metrics of a report."""

import json
from pathlib import Path

import pytest

from dlopt.results.columns import in_terminal, metric_columns
from tests.support.folders import make_run, table


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for lr in (0.1, 0.2):
        folder = make_run(tmp_path / f"{lr}", lr=lr, config={"validation": {"shaded": {"data": "shaded_digits"}}})
        path, lines = folder / "metrics.jsonl", []
        for text in path.read_text().splitlines():
            line = json.loads(text)
            lines.append({**line, "val_shaded_loss": 2.0, "val_shaded_accuracy": 0.4 + lr})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_metrics_on_validation_sets_with_names_are_columns(runs: Path) -> None:
    ranking = table(runs)
    names = metric_columns(ranking)
    assert names[:2] == ["val_accuracy", "val_loss"]
    assert names[-2:] == ["val_shaded_accuracy", "val_shaded_loss"]
    assert in_terminal(ranking) == ["val_accuracy", "val_loss", "val_shaded_accuracy"]
    assert [row.statistic("val_shaded_accuracy").mean for row in ranking.rows] == [0.5, 0.6000000000000001]  # type: ignore[union-attr]


def test_a_report_ranked_by_a_validation_set(runs: Path) -> None:
    ranking = table(runs, "val_shaded_loss")
    assert metric_columns(ranking)[0] == "val_shaded_loss" == in_terminal(ranking)[0]
    assert metric_columns(ranking).count("val_shaded_loss") == 1
