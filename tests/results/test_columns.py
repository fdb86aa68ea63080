"""The metrics of a report."""

import json
from pathlib import Path

import pytest

from dlopt.results.columns import in_terminal, metric_columns
from dlopt.results.columns import test_columns as columns_of_tests
from dlopt.results.page_data import page_data
from dlopt.results.reading import diagnostics, read
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


def test_test_metrics_are_columns_if_the_runs_requested_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"test_macro_f1": 0.5, "test_roc_auc": 0.5}))
    assert columns_of_tests(table(tmp_path)) == ["test_accuracy", "test_loss"]
    lines = [json.loads(line) | {"val_macro_f1": 0.5} for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert columns_of_tests(table(tmp_path)) == ["test_accuracy", "test_macro_f1", "test_loss"]


def test_a_report_ranked_by_a_validation_set(runs: Path) -> None:
    ranking = table(runs, "val_shaded_loss")
    assert metric_columns(ranking)[0] == "val_shaded_loss" == in_terminal(ranking)[0]
    assert metric_columns(ranking).count("val_shaded_loss") == 1


def test_costs_of_older_runs_are_unknown(tmp_path: Path) -> None:
    for number in range(2):
        folder = make_run(tmp_path / str(number), lr=0.1 + number, accuracies=(0.5, 0.9 - number / 10))
        if number == 0:
            summary = json.loads((folder / "summary.json").read_text())
            costs = {"samples": 640, "flops": 3e9, "peak_memory": 2**30}
            (folder / "summary.json").write_text(json.dumps(summary | costs))
    ranking = table(tmp_path)
    assert {"samples", "flops", "peak_memory"} <= set(metric_columns(ranking))
    first, second = page_data(ranking, target=None, test=False, refresh=None)["rows"]
    assert [first["cells"][name][0] for name in ("samples", "flops", "peak_memory")] == [640, 3e9, 2**30]
    assert [second["cells"][name] for name in ("samples", "flops", "peak_memory")] == [[None, "unknown"]] * 3


def test_a_page_draws_diagnostics(tmp_path: Path) -> None:
    """The tags of the run with most layers, in their order; positions are interpolated between evaluations."""
    layers = {0: ("conv", "head"), 1: ("conv", "middle", "head"), 2: ()}
    for number, names in layers.items():
        folder = make_run(tmp_path / str(number), lr=0.1 + number, accuracies=(0.5, 0.9 - number / 10), seconds=4.0)
        lines = [{"step": step, **{f"gradients/norm/{name}": step / 2 for name in names}} for step in (1, 15, 20)]
        if names:
            (folder / "diagnostics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    data = page_data(table(tmp_path), target=None, test=False, refresh=None)
    assert data["tags"] == [f"gradients/norm/{name}" for name in layers[1]] == data["curves"][-3:]
    first, second, third = (row["runs"][0] for row in data["rows"])
    at, values = second["curves"]["gradients/norm/middle"]
    assert values == [0.5, 7.5, 10]
    assert second["x"][at] == {"epoch": [0.1, 1.5, 2], "step": [1, 15, 20], "seconds": [0.4, 6, 8]}
    assert "gradients/norm/middle" not in first["curves"] and first["curves"]["gradients/norm/head"][1] == values
    (tmp_path / "0/metrics.jsonl").write_text('{"epoch": 1, "step": 0, "val_loss": 1.0}\n')
    assert diagnostics(read(tmp_path / "0")) == [], "a stranger's: no position is known"
    assert not {*data["tags"]} & {*third["curves"]} and third["curves"]["val_loss"][1] == pytest.approx([0.5, 0.3])


def test_requested_metrics_are_columns(tmp_path: Path) -> None:
    """Those of single classes are not: they may be a thousand."""
    names = ["class_accuracy", "mine.metrics.kappa"]
    folder = make_run(tmp_path / "run", config={"evaluate": {"metrics": names}})
    more = {"val_worst_class_accuracy": 0.3, "val_class_accuracy/cat": 0.4, "val_kappa": 0.2, "val_other": 0.1}
    lines = [json.loads(line) | more for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"test_kappa": 0.5, "test_worst_class_accuracy": 0.2}))
    columns = metric_columns(table(tmp_path))
    assert [name for name in columns if name in more] == ["val_worst_class_accuracy", "val_kappa"]
    assert columns_of_tests(table(tmp_path))[-2:] == ["test_worst_class_accuracy", "test_kappa"]
