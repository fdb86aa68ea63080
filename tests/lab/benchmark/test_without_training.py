"""The parts of `dlopt benchmark` around the trials, with results that are not measured."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dlopt.basics.errors import UserError
from dlopt.lab.benchmark import command, costs, protocol, trials
from dlopt.lab.benchmark.protocol import Tier, Trial, WorkloadSpec, load_tier, target_of, trials_of
from dlopt.lab.benchmark.reading import Manifest
from dlopt.lab.benchmark.results import Cell, Results, TrialRecord, WorkloadTarget

LINE: Any = SimpleNamespace(composer=SimpleNamespace(config_dir=None), overrides=[])


def request_of(folder: Path, chosen: list[Trial]) -> Any:
    space = SimpleNamespace(values=lambda study, number: {"optimizer.lr": 0.1 * (number + 1)}, describe=dict)
    names = {trial.optimizer: space for trial in chosen}
    specs = {trial.workload: WorkloadSpec(experiment="e", metric="val_loss", target=0.5) for trial in chosen}
    return SimpleNamespace(folder=folder, candidates=names, workloads=specs, line=lambda trial: [trial.workload])


def test_a_dry_run_lists_the_trials_and_the_time_of_those_that_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def listed(reference: Results | None) -> list[str]:
        assert command._list(request_of(tmp_path, waiting), waiting, reference) == 0
        return capsys.readouterr().out.splitlines()

    waiting = [*trials_of(["mlp", "gpt"], ["sgd"], 1, 2)]
    assert listed(None) == [
        "sgd/mlp/0-0 optimizer.lr=0.1", "sgd/gpt/0-0 optimizer.lr=0.1", "sgd/mlp/0-1 optimizer.lr=0.2",
        "sgd/gpt/0-1 optimizer.lr=0.2", "sgd on mlp: 2 trials", "sgd on gpt: 2 trials",
        "4 trials; their time is known once some have ended",
    ]  # fmt: skip
    facts = {"core_hours": 0.01, "processor": "EPYC"}
    of_shipped = "4 trials; the 8 shipped ones took 4.5 s of a core on average (EPYC)"
    assert listed(dataclasses.replace(shipped(), facts=facts))[-1] == of_shipped
    for workload, seconds in (("mlp", 60.0), ("gpt", 120.0)):
        folder = tmp_path / f"sgd/{workload}/7-0"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"status": "finished", "seconds": seconds}))
    each = "of about 1:00, as on average in 1 that ended"
    assert listed(None)[-3:] == [
        f"sgd on mlp: 2 trials {each}", f"sgd on gpt: 2 trials {each.replace('1:', '2:')}",
        "4 trials: about 6:00 of one core",
    ]  # fmt: skip


def shipped() -> Results:
    records = [TrialRecord(0, n, {}, 100.0 + n, 100.0 + n, 2.0, 0.4, 0.4) for n in range(3)]
    missed = TrialRecord(1, 0, {}, math.inf, math.inf, 2.0, 0.9, 0.9)
    cells = {(name, "w"): Cell((*records, missed)) for name in ("sgd", "adamw")}
    return Results("small", 3, 4, {"w": WorkloadTarget("val_loss", 0.5, 1000)}, cells, {})


@pytest.mark.parametrize(
    ("updates", "code", "verdict"),
    [(0.0, 0, ": agrees"), (50.0, 0, ": agrees"), (51.0, 0, ": agrees at first"), (None, 1, ": differs")],
)
def test_check_repeats_two_trials_that_reached_their_target(
    updates: float | None, code: int, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    requested: list[Any] = []
    reference = shipped()
    monkeypatch.setattr(command, "load_reference", lambda tier, track: reference)
    monkeypatch.setattr(command, "_launch", lambda line, request: requested.append(request))
    monkeypatch.setattr(trials, "candidate", lambda *keys: SimpleNamespace(name=keys[1], describe=dict))
    monkeypatch.setattr(trials, "lengths_of", lambda *keys: {})
    tier = Tier(name="small", workloads={"w": WorkloadSpec(experiment="e", metric="val_loss", target=0.5)})
    monkeypatch.setattr(command, "load_tier", lambda name, config_dir: tier)

    def collect(folder: Path, manifest: Manifest, facts: Any) -> Results:
        assert (manifest.studies, manifest.trials, manifest.full, folder) == (3, 4, True, tmp_path / "out")
        cells = {}
        for trial in requested[0].trials:
            [record] = [each for each in reference.cell(trial.optimizer, "w").study(0) if each.trial == trial.number]
            found = [] if updates is None else [dataclasses.replace(record, updates=record.updates + updates)]
            cells[trial.optimizer, "w"] = Cell((*cells.get((trial.optimizer, "w"), Cell(())).records, *found))
        return dataclasses.replace(reference, cells=cells)

    monkeypatch.setattr(command.reading, "collect", collect)
    for seed in (1, 2, 3):
        requested.clear()
        assert command.check(LINE, seed=seed, output=str(tmp_path / "out")) == code
        [request] = requested
        assert request.full and len(request.trials) == 2 and all(trial.study == 0 for trial in request.trials)
        lines = capsys.readouterr().out.splitlines()
        compared = [line for line in lines if "; shipped: " in line]
        assert len(compared) == 2 and all(verdict in line for line in compared)
        first = request.trials[0]
        assert compared[0].startswith(f"{first.optimizer} on w, study 0, trial {first.number}: ")
        assert f"; shipped: {100 + first.number} updates to the target, best 0.4: " in compared[0]
        assert (": has not ended; " in compared[0]) == (updates is None)


def test_an_interrupted_check_returns_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load_reference", lambda tier, track: shipped())
    monkeypatch.setattr(command, "_launch", interrupt)
    monkeypatch.setattr(trials, "candidate", lambda *keys: SimpleNamespace(describe=dict))
    monkeypatch.setattr(trials, "lengths_of", lambda *keys: {})
    tier = Tier(name="small", workloads={"w": WorkloadSpec(experiment="e", metric="val_loss", target=0.5)})
    monkeypatch.setattr(command, "load_tier", lambda name, config_dir: tier)
    assert command.check(LINE, output=str(tmp_path / "out")) == command.INTERRUPTED


def test_how_far_a_trial_came() -> None:
    record = TrialRecord(0, 0, {}, 120.0, 120.0, 2.0, 0.123456, 0.2)
    assert command._to_target(record) == "120 updates to the target, best 0.1235"
    missed = dataclasses.replace(record, updates=math.inf, best=None)
    assert command._to_target(missed) == "target not reached"


def test_targets_that_were_set_after_the_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = {
        name: WorkloadSpec(experiment="e", metric="val_loss", target=target)
        for name, target in (("a", None), ("b", 0.25), ("c", None))
    }
    manifest = Manifest("t", 1, 1, specs, {}, [], True)
    tier = Tier(name="t", workloads={name: dataclasses.replace(specs[name], target=0.5) for name in ("a", "b")})
    monkeypatch.setattr(command, "load_tier", lambda name, config_dir: tier)
    found = command._with_targets(manifest, None)
    assert {name: spec.target for name, spec in found.items()} == {"a": 0.5, "b": 0.25, "c": None}

    def refuse(*_: object) -> None:
        raise UserError("unknown")

    monkeypatch.setattr(command, "load_tier", refuse)
    assert command._with_targets(manifest, None) == specs


def test_costs_and_tests_that_are_missing_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, tested = list[Any](), list[Path]()
    reference = shipped()
    cells = {**reference.cells, ("empty", "w"): Cell(())}
    monkeypatch.setattr(command.reading, "collect", lambda *_: dataclasses.replace(reference, cells=cells))

    def measure(line: Any, request: Any, optimizer: str, workload: str, path: Path) -> None:
        measured.append((optimizer, workload, path))
        if optimizer == "adamw":
            raise RuntimeError("broken")

    monkeypatch.setattr(command, "_measure_cost", measure)
    monkeypatch.setattr(costs, "test_trial", tested.append)
    request = request_of(tmp_path, [Trial("w", name, 0, 0) for name in ("sgd", "adamw", "empty")])
    manifest = Manifest("small", 3, 4, request.workloads, {}, [], False)
    command._measure(LINE, request, manifest)
    out, err = capsys.readouterr()
    assert [each[:2] for each in measured] == [("sgd", "w"), ("adamw", "w")]
    assert measured[0][2] == tmp_path / "sgd/w/cost.json"
    assert out.splitlines() == [f"measuring the time of an update: {name} on w" for name in ("sgd", "adamw")]
    assert err == "dlopt: adamw on w: cannot measure the time of an update: RuntimeError: broken\n"
    assert tested == [tmp_path / f"{name}/w/{trial}" for name in ("sgd", "adamw") for trial in ("0-0", "1-0")]
    (tmp_path / "sgd/w").mkdir(parents=True)
    (tmp_path / "sgd/w/cost.json").write_text("{}")
    command._measure(LINE, request, manifest)
    assert [each[0] for each in measured] == ["sgd", "adamw", "adamw"]


def test_the_cost_of_an_update_is_the_median_of_pairs_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order: list[Any] = []
    model = torch.nn.Linear(2, 1)
    trainer = SimpleNamespace(
        step=SimpleNamespace(optimizer=None), module=model, mode=SimpleNamespace(device="cpu"), graph_obstacle="none"
    )
    monkeypatch.setattr(costs, "build_workload", lambda config: SimpleNamespace(device="cpu", name=config))
    monkeypatch.setattr(costs, "with_teacher", lambda workload: workload)
    monkeypatch.setattr(costs, "probe_trainer", lambda workload, scratch, checks: trainer)
    names = iter(("baseline", "own"))
    monkeypatch.setattr(costs, "updates_of", lambda trainer, device: next(names))
    monkeypatch.setattr(costs, "state_bytes", lambda optimizer: 6 * 4)

    def seconds(update: str, count: int) -> float:
        order.append((update, count))
        return 2.0 if update == "baseline" else float(len(order))

    monkeypatch.setattr(costs, "seconds_of", seconds)
    found = costs.measure("a", "b", tmp_path)  # type: ignore[arg-type]
    assert order[:2] == [("baseline", 5), ("own", 5)]
    pairs = [tuple(each for each, _ in order[i : i + 2]) for i in range(2, 20, 2)]
    assert pairs == [("baseline", "own") if i % 2 == 0 else ("own", "baseline") for i in range(9)]
    assert {count for _, count in order[2:]} == {20}
    ratios = sorted((index + 1) / 2.0 for index, (name, _) in enumerate(order) if name == "own" and index > 1)
    assert found.time == ratios[4] and found.state == 2.0
    assert found.low == pytest.approx((ratios[1] + ratios[2]) / 2)
    assert found.high == pytest.approx((ratios[6] + ratios[7]) / 2)


@pytest.mark.parametrize(
    ("obstacles", "measured"),
    [
        ((None, None), [None, None]),
        (("SOAP has control flow on the host",) * 2, [None, None]),
        ((None, "SOAP has control flow on the host"), [False, False]),
        (("SGD has control flow on the host", None), [False, False]),
    ],
)
def test_both_updates_of_a_pair_are_captured_or_neither(
    obstacles: Sequence[str | None],
    measured: Sequence[bool | None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """`measured`: the key cuda_graphs, of which None is a stand-in for what was passed."""

    def build(config: SimpleNamespace, scratch: Path, *, checks: bool) -> SimpleNamespace:
        return SimpleNamespace(
            step=SimpleNamespace(optimizer=None), module=torch.nn.Linear(2, 1), mode=SimpleNamespace(device="cuda"),
            graph_obstacle=config.obstacle, cuda_graphs=config.settings.cuda_graphs,
        )  # fmt: skip

    @dataclass(frozen=True)
    class Settings:
        cuda_graphs: bool | None = None

    @dataclass(frozen=True)
    class Config:
        obstacle: str | None
        settings: Settings = Settings()

    timed: list[bool | None] = []

    def updates_of(trainer: SimpleNamespace, device: str) -> None:
        timed.append(trainer.cuda_graphs)

    monkeypatch.setattr(costs, "build_workload", lambda config: config)
    monkeypatch.setattr(costs, "with_teacher", lambda workload: workload)
    monkeypatch.setattr(costs, "probe_trainer", build)
    monkeypatch.setattr(costs, "updates_of", updates_of)
    monkeypatch.setattr(costs, "seconds_of", lambda update, count: 1.0)
    monkeypatch.setattr(costs, "state_bytes", lambda optimizer: 0)
    costs.measure(*map(Config, obstacles), tmp_path)  # type: ignore[arg-type]
    assert timed == measured


def test_facts_about_the_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, seconds in enumerate((1800.0, 5400.0, None)):
        folder = tmp_path / f"sgd/w/0-{number}"
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"status": "finished", "seconds": seconds}))
    monkeypatch.setattr(
        command.environment, "machine", lambda: {"processor": "x", "cpu_count": 2, "gpu": None, "host": 1}
    )
    facts = command._facts(tmp_path, Manifest("t", 1, 1, {}, {}, [], True, ["one", "two"]))
    assert facts["command"] == "one; two" and facts["core_hours"] == 2.0
    assert (facts["processor"], facts["cpu_count"]) == ("x", 2) and not {"gpu", "host"} & facts.keys()


def test_the_target_is_the_easier_middle_value_at_three_quarters() -> None:
    curves = [[[(75, 0.5), (76, 0.1)], [(10, 0.4)]], [[(50, 0.7), (60, math.nan)]], [[]], [[(75, 0.2)]]]
    assert target_of(curves, 100, True) == 0.7 and target_of(curves[:3], 100, True) == 0.7
    assert target_of([[[(1, 0.3)]], [[(1, 0.6)]]], 4, False) == 0.3
    assert target_of([[[(1, 0.3)]], [[(4, 0.6)]]], 4, False) == -math.inf


def test_variants_of_a_workload_are_drawn_by_the_version(tmp_path: Path) -> None:
    folder = tmp_path / "benchmark/tier"
    folder.mkdir(parents=True)
    base = {"experiment": "e", "metric": "val_loss", "target": None}
    variants = [["a=1"], ["a=2"], ["a=3"]]

    def drawn(version: int | None) -> list[Any]:
        content = {"workloads": {name: {**base, "variants": variants} for name in "xyz"} | {"plain": base}}
        (folder / "mine.yaml").write_text(json.dumps(content | ({} if version is None else {"version": version})))
        return [spec.overrides for spec in load_tier("mine", str(tmp_path)).workloads.values()]

    assert drawn(None) == drawn(1) and len({str(drawn(version)) for version in range(8)}) > 3
    assert drawn(1)[3] == [] and all(each in variants for each in drawn(1)[:3])
    for name in ("../tier/mine", ".mine"):
        assert protocol._find("tier", name, str(tmp_path)) is None
