"""The tables and pictures of a test: the most wrong samples, predictions of values, what is left out or removed."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dlopt.data.samples import Dataset, InMemory, Lines
from dlopt.data.tables.columns import FeatureColumns
from dlopt.instruments import evaluation
from dlopt.metrics.declaration import Evaluated
from dlopt.tasks.classification import Classification
from dlopt.tasks.labels import MultiLabel
from dlopt.tasks.regression import Regression
from dlopt.tasks.report import TestReport
from dlopt.trained.ensemble import Tested

NAMES = ("cat", "$dog_", "fish")
NAN = torch.nan


def result_of(
    report: TestReport, samples: InMemory, names: tuple[str, ...] | None, columns: FeatureColumns | None = None
) -> Tested:
    dataset = Dataset(samples, None, samples, names, columns=columns)
    return Tested(report, "logits", names, (), len(samples), dataset=dataset)


def written(folder: Path, result: Tested, **options: Any) -> tuple[dict[str, Any], list[list[str]]]:
    evaluation.write(folder, {"split": "test"}, result, **options)
    report: dict[str, Any] = json.loads((folder / "eval.json").read_text())
    with (folder / "most_wrong.csv").open() as file:
        return report, [*csv.reader(file)]


def softmax(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.softmax(1)


def test_rows_of_a_table_with_nan_outputs(tmp_path: Path) -> None:
    outputs = torch.tensor([[4.0, 0, 0], [3, 0, 0], [NAN, 0, 0], [0, 5, 0], [0, 0, 1]])
    targets = torch.tensor([0, 1, 1, 2, 0])
    part = Evaluated(outputs, targets, 3, softmax)
    report = Classification(3).report({"test_accuracy": 0.2}, part)
    samples = InMemory(torch.arange(10.0).view(5, 2) / 4, targets, Lines(torch.arange(2, 7), "line"))
    result = result_of(report, samples, NAMES, FeatureColumns(("age", "=height"), "kind"))
    found, rows = written(tmp_path, result)
    p = part.exact_probabilities
    assert rows == [
        ["position", "source", "true", "predicted", "probability", "age", "'=height"],
        ["3", "line 5", "fish", "$dog_", str(p[3, 1].item()), "1.5", "1.75"],
        ["1", "line 3", "$dog_", "cat", str(p[1, 0].item()), "0.5", "0.75"],
        ["4", "line 6", "cat", "fish", str(p[4, 2].item()), "2", "2.25"],
    ]
    assert found["wrong"] == 3 and {path.name for path in tmp_path.iterdir()} == {
        "eval.json", "confusion.csv", "most_wrong.csv", "confusion.png", "evaluation.png",
    }  # fmt: skip
    assert evaluation.title_of(result, part) == "test set: 5 samples, 1 with NaN outputs left out, accuracy 20.00 %"
    written(tmp_path, result, draws=False)
    assert not [*tmp_path.glob("*.png")], "of the earlier test"


def test_images_with_several_labels(tmp_path: Path) -> None:
    outputs = torch.tensor([[3.0, -2, -2], [2, -1, 4], [-3, 1, -1], [NAN, 1, 1]])
    targets = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 0]])
    part = Evaluated(outputs, targets, 3, torch.sigmoid)
    report = MultiLabel(3).report({}, part)
    samples = InMemory(torch.rand(4, 3, 40, 20, generator=torch.Generator().manual_seed(0)), targets)
    found, rows = written(tmp_path, result_of(report, samples, NAMES))
    p = part.exact_probabilities
    assert rows[1:] == [
        ["1", "cat; $dog_", "cat; fish", "fish", str(p[1, 2].item())],
        ["2", "$dog_; fish", "$dog_", "fish", str(p[2, 2].item())],
    ]
    assert [each["box"][2:] for each in found["most_wrong"]] == [[66, 132]] * 2
    assert (tmp_path / "most_wrong.png").exists() and "confusion" not in found


def test_values_in_the_unit_of_the_target(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    true, predicted = draw.normal(100, 10, 50), draw.normal(100, 10, 50)
    scaled = [torch.tensor((each - 100) / 5).float() for each in (true, predicted)]
    outputs = scaled[1][:, None].clone()
    outputs[7] = NAN
    task = Regression(1)
    report = task.report({"test_r2": 0.5}, task.evaluated(outputs, scaled[0], torch.nn.Identity()))
    columns = FeatureColumns((), "price", mean=100.0, scale=5.0)
    found, rows = written(tmp_path, result_of(report, InMemory(torch.zeros(50, 2), scaled[0]), None, columns))
    errors = np.abs(true - predicted)
    errors[7] = -1
    order = np.argsort(-errors)[:24]
    assert [int(row[0]) for row in rows[1:]] == order.tolist() and rows[0][3:] == ["x1", "x2"]
    assert np.array([row[1:3] for row in rows[1:]], float) == pytest.approx(
        np.stack([true, predicted], 1)[order], rel=1e-5
    )
    pairs = np.array(found["curves"]["predicted"])
    assert pairs == pytest.approx(np.stack([true, predicted], 1)[[i for i in np.argsort(true) if i != 7]], rel=1e-6)
    assert (tmp_path / "predicted.png").exists()


@pytest.mark.parametrize(("seconds", "draws"), [(1000.0, True), (2.0, False)])
def test_the_end_of_a_run_draws_within_a_tenth_of_its_time(tmp_path: Path, seconds: float, draws: bool) -> None:
    """Of the validation set, if there is no test set."""
    targets = torch.tensor([0, 1, 2, 1])
    outputs = torch.eye(3)[targets.roll(1)]
    part = Evaluated(outputs, targets, 3, softmax)
    report = replace(Classification(3).report({"val_accuracy": 0.0}, part), split="val")
    samples = InMemory(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), targets)
    settings = SimpleNamespace(evaluate=SimpleNamespace(tta="flip", average="probabilities"))
    workload: Any = SimpleNamespace(
        dataset=Dataset(samples, samples, None, NAMES), run_config=SimpleNamespace(settings=settings)
    )
    (tmp_path / "summary.json").write_text(json.dumps({"seconds": seconds, "best_epoch": 3}))
    listed = evaluation.write_of_run(tmp_path, workload, report)
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["split"] == "validation, which chose the epoch: optimistic" and found["tta"] == {"name": "none"}
    assert found["checkpoint"] == str(tmp_path / "checkpoints/best.pt") and (found["epoch"], found["samples"]) == (3, 4)
    pictures = {path.name for path in tmp_path.glob("*.png")}
    if draws:
        assert pictures == {"confusion.png", "evaluation.png", "most_wrong.png"} and len(listed) == 3
    else:
        assert not pictures and listed == {"pictures of the test": f"`dlopt eval {tmp_path}` draws them"}
