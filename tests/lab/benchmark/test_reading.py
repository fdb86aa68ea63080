"""Reading of trials from their run folders, targets, and the manifest."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from dlopt.basics.errors import UserError
from dlopt.lab.benchmark.costs import state_memory
from dlopt.lab.benchmark.protocol import BASELINES, WorkloadSpec, target_of
from dlopt.lab.benchmark.reading import Manifest, collect, read_manifest, targets, update_manifest

LOSS = WorkloadSpec(experiment="e", metric="val_loss", target=0.5)
ACCURACY = WorkloadSpec(experiment="e", metric="val_accuracy", target=0.5)


def write(folder: Path, values: list[float | None], *, metric: str = "val_loss", **summary: Any) -> None:
    """Writes the run folder of a trial with a validation every 10 updates of 40."""
    folder.mkdir(parents=True)
    lines = [{"epoch": i + 1, "step": 10 * (i + 1), metric: value} for i, value in enumerate(values)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"status": "finished", **summary}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"epochs": 4, "steps": None, "evaluate": {"every_epochs": 1}}))
    (folder / "overrides.yaml").write_text("[optimizer=sgd, optimizer.nesterov=true, optimizer.lr=0.1]")


def manifest(spec: WorkloadSpec = LOSS, **changed: Any) -> Manifest:
    space = {"optimizer.nesterov": "true", "optimizer.lr": "tag(log,interval(0.01,1.0))"}
    values: dict[str, Any] = {
        "tier": "t", "studies": 2, "trials": 2, "workloads": {"w": spec}, "optimizers": {"sgd": space},
        "overrides": [], "full": False,
    }  # fmt: skip
    return Manifest(**values | changed)


def test_collects_what_has_ended(tmp_path: Path) -> None:
    write(tmp_path / "sgd/w/0-0", [0.9, 0.5, 0.4], status="stopped_early")
    write(tmp_path / "sgd/w/0-1", [0.9, None], status="failed", reason="the loss became\n nan")
    write(tmp_path / "sgd/w/1-0", [0.9, 0.8, 0.7, 0.75])
    write(tmp_path / "sgd/w/1-1", [0.9], status="interrupted")
    results = collect(tmp_path, manifest(), {})
    cell = results.cell("sgd", "w")
    first, failed, missed = cell.records
    assert (first.updates, first.evaluations, first.first, first.best, first.last) == (20, 20, 0.9, 0.4, 0.4)
    assert first.values == {"optimizer.lr": 0.1}  # the fixed value is not drawn
    assert math.isinf(failed.updates) and failed.failure == "the loss became nan" and failed.last is None
    assert (missed.updates, missed.best, missed.last, missed.failure) == (math.inf, 0.7, 0.75, "")
    assert results.missing() == 1 and results.workloads["w"].updates == 40
    assert cell.curve == ((10, 0.9), (20, 0.5), (30, 0.4))  # of the fastest trial


def test_higher_is_better_for_accuracies(tmp_path: Path) -> None:
    write(tmp_path / "sgd/w/0-0", [0.3, 0.6, 0.4], metric="val_accuracy")
    record = collect(tmp_path, manifest(ACCURACY), {}).cell("sgd", "w").records[0]
    assert (record.updates, record.best, record.last) == (20, 0.6, 0.4)


def test_the_target_is_the_median_best_of_the_baselines_at_three_quarters(tmp_path: Path) -> None:
    for number, name in enumerate(BASELINES):
        for study in range(2):
            best = 0.1 * (number + 1) + 0.01 * study
            write(tmp_path / f"{name}/w/{study}-0", [0.9, 0.8, best, 0.0])  # what comes later does not count
            write(tmp_path / f"{name}/w/{study}-1", [0.95, None, None], status="failed", reason="the loss became nan")
    optimizers = {name: {"optimizer.lr": "0.1"} for name in BASELINES}
    assert targets(tmp_path, manifest(optimizers=optimizers, full=True)) == {"w": pytest.approx(0.3)}


def test_target_of_accuracies() -> None:
    curves = [[[(10, 0.2), (20, 0.4), (30, 0.9)]], [[(10, 0.6)]], [[(10, 0.5)], [(20, 0.1)]]]
    assert target_of(curves, 40, lower_is_better=False) == 0.6
    assert target_of(curves, 20, lower_is_better=False) == 0.5


def test_manifests_of_one_folder_are_merged_or_refused(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    update_manifest(tmp_path, manifest(studies=1, trials=5))
    merged = update_manifest(tmp_path, manifest(optimizers={"adamw": {"optimizer.lr": "0.1"}}))
    assert (merged.studies, merged.trials, [*merged.optimizers]) == (2, 5, ["sgd", "adamw"])
    assert read_manifest(tmp_path) == merged
    for changed in ({"full": True}, {"overrides": ["precision=fp64"]}, {"workloads": {"w": ACCURACY}}):
        with pytest.raises(UserError, match="has trials of another benchmark"):
            update_manifest(tmp_path, manifest(**changed))
    for damaged in ('{"tier": "t"}', '{"tier": "t",}', ""):
        (tmp_path / "benchmark.json").write_text(damaged)
        with pytest.raises(UserError, match=r"benchmark\.json: is damaged"):
            update_manifest(tmp_path, manifest())


@pytest.mark.parametrize(("optimizer", "expected"), [("SGD", 1.0), ("Adam", 2.0)])
def test_state_memory(optimizer: str, expected: float) -> None:
    model = torch.nn.Linear(1000, 100)
    settings: dict[str, Any] = {"momentum": 0.9} if optimizer == "SGD" else {}
    built = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1, **settings)
    model(torch.randn(3, 1000)).sum().backward()
    built.step()
    trainer: Any = SimpleNamespace(module=model, step=SimpleNamespace(optimizer=built))
    assert state_memory(trainer) == pytest.approx(expected, rel=1e-3)
