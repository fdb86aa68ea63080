"""Reading of trials from their run folders, targets, and the manifest."""

import json
import math
from dataclasses import asdict
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
from dlopt.lab.benchmark.results import to_json

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


LEVELS = [f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 9)]
BOMB = f"{{a0: &a0 [1,1], {', '.join(LEVELS)}}}"
FILES: dict[str, list[tuple[str, Any]]] = {
    "benchmark.json": [
        *((key, value) for key in ("studies", "trials") for value in ("x", 10**9, 10**18, 0, True, 1.5, None)),
        ("metric", 5), ("target", "q"), ("target", 1e300), ("optimizers", {"sgd": 5}), ("optimizers", {}),
        ("optimizers", {"../../x": {}}), ("optimizers", {"a\0": {}}), ("commands", 5), ("commands", [5]), ("full", "x"),
        ("track", "x"), ("workloads", []), ("workloads", {f"w{i}": asdict(LOSS) for i in range(3000)}),
    ],
    "sgd/w/cost.json": [("time", "x"), ("time", 0), ("low", None), ("state", [1])],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "key", "value"), [(name, *each) for name, several in FILES.items() for each in several]
)
def test_files_of_strangers_are_refused_in_one_line(name: str, key: str, value: Any, tmp_path: Path) -> None:
    write(tmp_path / "sgd/w/0-0", [0.9, 0.4])
    contents: dict[str, dict[str, Any]] = {
        "benchmark.json": asdict(manifest(trials=1000)),
        "sgd/w/cost.json": {"time": 1.0, "low": 1.0, "high": 1.0, "state": 0.0},
    }
    of_workload = contents["benchmark.json"]["workloads"]["w"]
    (of_workload if key in of_workload else contents[name])[key] = value
    for path, content in contents.items():
        (tmp_path / path).write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        found = read_manifest(tmp_path)
        assert found is not None and name != "benchmark.json"
        collect(tmp_path, found, {})
    assert f"{name}: is damaged: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "value", "updates"),
    [
        ({"overrides.yaml": f'["optimizer.lr={BOMB}"]'}, BOMB, 40),
        ({"overrides.yaml": "['optimizer.lr={[1]: 2}']"}, "{[1]: 2}", 40),
        ({"overrides.yaml": "['optimizer.lr=!!python/object/apply:os.system [id]']"}, None, 40),
        ({"overrides.yaml": "[optimizer.lr=1e-05]"}, 1e-05, 40),
        ({"overrides.yaml": f"[optimizer.lr={'9' * 99}]"}, 10**99 - 1, 40),
        ({"config.yaml": "epochs: x"}, 0.1, 0),
        ({"config.yaml": "steps: x"}, 0.1, 0),
        ({"config.yaml": "steps: 77"}, 0.1, 77),
        ({"config.yaml": "epochs: 4\nevaluate: {every_epochs: 0}"}, 0.1, 0),
        ({"summary.json": '{"status": "finished", "seconds": "x"}'}, 0.1, 40),
        ({"test.json": '{"test_loss": "x", "test_accuracy": 0.5, "a": {"b": [1]}}'}, 0.1, 40),
    ],
)
def test_trials_of_strangers(files: dict[str, str], value: Any, updates: int, tmp_path: Path) -> None:
    write(tmp_path / "sgd/w/0-0", [0.9, 0.4])
    for name, text in files.items():
        (tmp_path / "sgd/w/0-0" / name).write_text(text)
    for name in ("00-1", "0-\u0661", "9-0", "0-99", "x-y"):  # no trials of the manifest
        (tmp_path / "sgd/w" / name).mkdir()
    results = collect(tmp_path, manifest(), {})
    [record] = results.cell("sgd", "w").records
    assert len(to_json(results)) < 10_000 and results.workloads["w"].updates == updates
    assert value is None or record.values == {"optimizer.lr": value}
    assert results.cell("sgd", "w").tests == ({0: {"test_accuracy": 0.5}} if "test.json" in files else {})


@pytest.mark.parametrize(("optimizer", "expected"), [("SGD", 1.0), ("Adam", 2.0)])
def test_state_memory(optimizer: str, expected: float) -> None:
    model = torch.nn.Linear(1000, 100)
    settings: dict[str, Any] = {"momentum": 0.9} if optimizer == "SGD" else {}
    built = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1, **settings)
    model(torch.randn(3, 1000)).sum().backward()
    built.step()
    trainer: Any = SimpleNamespace(module=model, step=SimpleNamespace(optimizer=built))
    assert state_memory(trainer) == pytest.approx(expected, rel=1e-3)
