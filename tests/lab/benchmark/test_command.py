"""`dlopt benchmark` from end to end on tiny workloads: runs, resumes, shares, and names optimizers that do not work."""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from dlopt import cli
from dlopt.basics.errors import UserError
from dlopt.basics.folders import RunFolder
from dlopt.lab.benchmark.command import _reference, compare
from dlopt.lab.benchmark.results import Results, TrialRecord, read
from dlopt.lab.claimed_trials import refuse_protocol
from dlopt.sweeps.jobs import result_of
from tests.support.line import dlopt, refused
from tests.support.processes import start

LINE = {
    "defaults": [
        {"override /data": "linear"}, {"override /model": "mlp"}, {"override /loss": "mse"},
        {"override /normalize": "none"},
    ],
    "name": "line",
    "epochs": 6,
    "threads": 1,
    "data": {
        "intervals": [[-1.0, 1.0], [-0.2, 0.2]], "train_size": 128, "val_size": 64, "test_size": 64, "batch_size": 32
    },
    "model": {"widths": []},
}  # fmt: skip


class Plain(torch.optim.Optimizer):
    """Gradient descent of another package."""

    sign = -1.0

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=self.sign * self.rate(group))

    def rate(self, group: dict[str, Any]) -> float:
        return float(group["lr"])


class Ascent(Plain):
    """The sign of the update is wrong."""

    sign = 1.0


class Deaf(Plain):
    """Ignores its learning rate."""

    def rate(self, group: dict[str, Any]) -> float:
        return 0.05


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a config folder that has a tier of two workloads."""
    for name, epochs in (("line", 6), ("short", 3)):
        path = tmp_path / f"conf/experiment/{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("# @package _global_\n" + yaml.safe_dump({**LINE, "epochs": epochs}, sort_keys=False))
    workloads = {"line": ("line", 0.15), "short": ("short", 0.2)}
    tier = {
        name: {"experiment": experiment, "metric": "val_loss", "target": target}
        for name, (experiment, target) in workloads.items()
    }
    path = tmp_path / "conf/benchmark/tier/tiny.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# Two lines\n" + yaml.safe_dump({"workloads": tier}))
    return tmp_path


TIER = ("--config-dir", "conf", "tier=tiny", "output=out")
MINE = ("allow_packages=[tests]",)


_NAMES = ("Ascent", "Deaf", "Plain")


def named(*classes: type) -> str:
    return "optimizer=" + ",".join(f"{each.__module__}.{each.__name__}" for each in classes)


def results(place: Path) -> Results:
    return read(place / "out/results.json")


def test_compares_optimizers_continues_and_refuses_another_benchmark(place: Path) -> None:
    line = (*TIER, "workloads=[line]", "studies=2", "trials=2")
    first = dlopt(place, "benchmark", "optimizer=sgd", *line)
    assert first.code == 0, first.err
    assert "4 trials, of which 0 are done" in first.out and "4/4: 4 done, 0 failed" in first.out
    assert (place / "out/index.html").is_file() and not list(place.glob("out/sgd/line/*/checkpoints/last.pt"))
    before = {path: path.stat().st_mtime_ns for path in place.glob("out/sgd/*/*/summary.json")}
    second = dlopt(place, "benchmark", "optimizer=sgd,adamw", *line, *MINE)  # more packages: the same benchmark
    assert second.code == 0, second.err
    assert "8 trials, of which 4 are done" in second.out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    found = results(place)
    assert found.optimizers == ["sgd", "adamw"] and found.missing() == 0 and found.workloads["line"].updates == 24
    cell = found.cell("sgd", "line")
    assert cell.cost is not None and cell.cost.state == 1.0  # the momentum
    for record in cell.records:
        run = RunFolder(place / f"out/sgd/line/{record.study}-{record.trial}")
        lines = [json.loads(text) for text in (run.path / "metrics.jsonl").read_text().splitlines()]
        assert record.best == pytest.approx(min(each["val_loss"] for each in lines), rel=1e-4)
        reached = [each["step"] for each in lines if each["val_loss"] <= 0.15]
        assert record.updates == (reached[0] if reached else math.inf) and len(reached) <= 1  # it stops at the target
        config = run.config() or {}
        assert config["optimizer"]["lr"] == record.values["optimizer.lr"] and config["seed"] == record.study
        assert "test_loss" not in (run.summary() or {}) or run.summary()["test_loss"] is None  # type: ignore[index]
    assert all(set(test) == {"test_loss"} for test in cell.tests.values()) and cell.tests
    other = dlopt(place, "benchmark", "optimizer=sgd", *line, "data.batch_size=16")
    assert other.code == 2 and "has trials of another benchmark (different: overrides)" in other.err
    (place / "out/benchmark.json").unlink()
    other = dlopt(place, "benchmark", "optimizer=sgd", *line, "data.batch_size=16")
    assert other.code == 2 and "sgd/line/0-0 is no trial of this benchmark (different: data.batch_size=16)" in other.err
    again = dlopt(place, "benchmark", "optimizer=sgd", *line)
    assert again.code == 0 and "4 trials, of which 4 are done" in again.out, again
    assert "not a folder for `dlopt benchmark report`" in refused(place, "benchmark", "report", "conf")


@pytest.mark.slow
def test_lists_the_trials(place: Path) -> None:
    budget = ("studies=2", "trials=2", "dry_run=true")
    lines = dlopt(place, "benchmark", "optimizer=sgd", *TIER, "workloads=[line]", *budget).out.splitlines()
    assert sum(line.startswith("sgd/line/") for line in lines) == 4 and not (place / "out").exists()
    assert lines[-2:] == ["sgd on line: 4 trials", "4 trials; their time is known once some have ended"]


def test_self_tuning_has_one_long_trial_per_seed_with_fixed_keys(place: Path) -> None:
    space = place / "conf/benchmark/space/sgd_self_tuning.yaml"
    space.parent.mkdir(parents=True)
    space.write_text("optimizer.lr: interval(0.1,0.2)\n")
    line = ("optimizer=sgd,adamw", *TIER, "workloads=[short]", "track=self_tuning", "studies=2")
    assert "optimizer.lr: has a range, but track=self_tuning" in refused(place, "benchmark", *line)
    space.write_text("optimizer.lr: 0.2\n")
    result = dlopt(place, "benchmark", *line)
    assert result.code == 0, result.err
    assert "4 trials, of which 0 are done" in result.out and "Self-tuning: fixed keys" in result.out
    assert "Expected score of the best of N trials" not in result.out  # nothing was tuned
    for name, lr in (("sgd", 0.2), ("adamw", 0.001)):
        for seed in (0, 1):
            config = RunFolder(place / f"out/{name}/short/{seed}-0").config() or {}
            assert (config["epochs"], config["optimizer"]["lr"], config["seed"]) == (9, lr, seed)
    found = results(place)
    assert (found.track, found.trials, found.workloads["short"].updates) == ("self_tuning", 1, 36)
    assert "3 times the updates" in (place / "out/index.html").read_text()
    tuned = dlopt(place, "benchmark", "optimizer=sgd", *TIER, "workloads=[short]", "studies=1", "trials=1")
    assert tuned.code == 2 and "has trials of another benchmark (different: track" in tuned.err
    assert "targets need track=external_tuning" in refused(place, "benchmark", "targets", "out")


@pytest.mark.slow
def test_names_optimizers_that_do_not_work(place: Path) -> None:
    result = dlopt(place, "benchmark", named(Plain, Ascent, Deaf), *TIER, *MINE, "studies=1", "trials=4")
    assert result.code == 0, result.err
    prefix = f"{Plain.__module__}."
    warnings = " ".join(result.out.split()).split("warning: ")[1:]
    ascent, deaf, plain = ([line for line in warnings if line.startswith(prefix + name)] for name in _NAMES)
    assert any("sign of the update" in line for line in ascent), result.out
    assert any("ignores optimizer.lr" in line for line in deaf), result.out
    assert not any("sign of the update" in line or "ignores" in line for line in plain), result.out


@pytest.mark.parametrize(
    ("updates", "first", "verdict"),
    [
        (128, 3.0, "agrees"),
        (136, 3.0, "agrees"),
        (192, 2.6, "agrees at first (2.6; shipped: 2.63), then rounding separates the runs"),
        (math.inf, 2.6, "agrees at first (2.6; shipped: 2.63), then rounding separates the runs"),
        (192, 3.0, "differs"),
        (math.inf, None, "differs"),
    ],
)
def test_repeated_trials_agree_until_rounding_separates_them(updates: float, first: float | None, verdict: str) -> None:
    shipped = TrialRecord(0, 0, {}, updates=128, evaluations=128, first=2.63, best=0.3, last=0.3)
    assert compare(replace(shipped, updates=updates, first=first), shipped, 192) == verdict


def test_only_keys_that_change_the_workloads_prevent_a_comparison_with_the_shipped_results() -> None:
    harmless = [
        "name=x",
        "profile=true",
        "hydra/launcher=joblib",
        "data.root=x",
        "precision=bf16",
        "optimizer.eps=1e-8",
    ]
    shipped, note = _reference("small", "external_tuning", harmless)
    assert shipped is not None and note == ""
    for line in ("data.batch_size=9", "model=mlp", "+parallel.processes=2", "on_divergence=skip", "init_from=x"):
        shipped, note = _reference("small", "external_tuning", [line])
        group = line.lstrip("+").partition("=")[0].partition(".")[0]
        assert shipped is None and f"because {group} changes the workloads" in note
    refuse_protocol([*harmless, "data.batch_size=9", "optimizer.seed=1", "allow_packages=[x]"], "")
    for line in (
        "epochs=1",
        "max_time=1",
        "seed=1",
        "order_seed=1",
        "evaluate.test=true",
        "monitor=val_loss",
        "++schedule.warmup_epochs=1",
        "stopping=early",
        "checkpoint.keep=3",
        "tracking=[]",
        "experiment=x",
        "resume=auto",
        "dry_run=true",
    ):
        with pytest.raises(UserError, match="part of the protocol"):
            refuse_protocol([line], "")


def test_a_killed_trial_is_no_result(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert result_of(folder, -signal.SIGKILL).status == "failed" and not folder.has_ended(or_failed=True)
    for summary, ended in (
        ({"status": "failed", "reason": "the loss became nan at update 3"}, True),
        ({"status": "interrupted"}, False),
    ):
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        assert folder.has_ended(or_failed=True) == ended, summary


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("optimizer=sgd", "tier=tini"), "tier=tini: unknown tier; did you mean tier=tiny?"),
        (("optimizer=sgd", "workloads=[lin]"), "workloads=lin: unknown workload; did you mean workloads=line?"),
        (("optimizer=sgd,sgd",), "an optimizer is listed twice"),
        (("optimizer=sgdd",), "did you mean optimizer=sgd?"),
        (("optimizer=mine.Missing", "allow_packages=[mine]"), "mine.Missing: unknown callable"),
        (("optimizer=tests.lab.benchmark.test_command.Plain",), "only callables of"),
        (("optimizer=sgd", "seed=3"), "seed=3: part of the protocol"),
        (("optimizer=sgd", "epochs=3"), "epochs=3: part of the protocol"),
        (("optimizer=sgd", "trials=0"), "trials=0"),
        (("optimizer=sgd", "budget=huge"), "budget=huge"),
        (("tier=tiny",), "optimizer: name the optimizers"),
        (("optimizer=sgd", "optimizer=adamw"), "optimizer=adamw: optimizer is already given by optimizer=sgd"),
        (("optimizer=sgd", "optimizer.lr=0.1"), "optimizer.lr=0.1: set by the search space of sgd"),
        (
            ("optimizer=sgd", "optimizer.lr=0.1"),
            "under another name: optimizer/NAME.yaml and benchmark/space/NAME.yaml in a",
        ),
        (("optimizer=rprop", "optimizer.lr=0.1"), "to replace it, write benchmark/space/rprop.yaml in a folder"),
        (("optimizer=sgd", "optimizer._target_=a.B"), "name the class by optimizer=a.B"),
        (("optimizer=sgd", "dry_run=maybe"), "dry_run=maybe"),
        (("optimizer=sgd", "order_seed=1"), "order_seed=1: part of the protocol"),
        (("optimizer=sgd", "++schedule.warmup_fraction=0.5"), "part of the protocol"),
        (("optimizer=sgd", "track=tuned"), "track=tuned"),
        (("optimizer=sgd", "track=self_tuning", "trials=2"), "trials=2: track=self_tuning has one trial per study"),
        (("--check", "track=self_tuning"), "tier=tiny: has no shipped results of track=self_tuning"),
        (("--check", "optimizer=sgd"), "optimizer=sgd: --check repeats shipped trials, of which only the"),
        (("--check", "dry_run=true"), "dry_run=true: --check"),
        (("--check",), "tier=tiny: has no shipped results"),
    ],
)
def test_bad_input(typed: tuple[str, ...], message: str, place: Path) -> None:
    tier = () if any(each.startswith("tier=") for each in typed) else ("tier=tiny",)
    assert message in refused(place, "benchmark", "--config-dir", "conf", *tier, "output=out", *typed)


def test_targets_of_an_unfinished_benchmark_are_preliminary(tmp_path: Path) -> None:
    workloads = {"w": {"experiment": "e", "metric": "val_loss", "target": None}}
    optimizers: dict[str, Any] = {name: {} for name in ("sgd", "rmsprop", "adamw", "nadam")}
    manifest = {"tier": "t", "studies": 1, "trials": 1, "overrides": [], "full": True, "commands": []}
    (tmp_path / "benchmark.json").write_text(json.dumps({**manifest, "workloads": workloads, "optimizers": optimizers}))
    for number, value in enumerate((0.5, 0.7, 0.9, None)):
        result = dlopt(tmp_path, "benchmark", "targets", ".")
        assert f"{4 - number} of 4 trials have not ended" in result.err
        assert result.out == (
            "w: none, because most studies have no finite value in time\n" if number < 3 else "w: 0.9\n"
        )
        trial = tmp_path / [*optimizers][number] / "w/0-0"
        trial.mkdir(parents=True)
        (trial / "summary.json").write_text('{"status": "finished"}')
        (trial / "config.yaml").write_text("{epochs: 4, steps: 40}")
        (trial / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "step": 10, "val_loss": value}))
    result = dlopt(tmp_path, "benchmark", "targets", ".")
    assert result.out == "w: 0.9\n" and not result.err


@pytest.mark.slow
def test_targets_need_the_baselines(place: Path) -> None:
    line = (*TIER, "workloads=[short]", "studies=1", "trials=2", "full=true")
    assert dlopt(place, "benchmark", "optimizer=sgd,adamw", *line).code == 0
    assert "missing: rmsprop, nadam" in refused(place, "benchmark", "targets", "out")
    assert dlopt(place, "benchmark", "optimizer=rmsprop,nadam", *line).code == 0
    [text] = dlopt(place, "benchmark", "targets", "out").out.splitlines()
    best = []
    for name in ("sgd", "rmsprop", "adamw", "nadam"):
        paths = place.glob(f"out/{name}/short/*/metrics.jsonl")
        lines = [json.loads(each) for path in paths for each in path.read_text().splitlines()]
        best.append(min(each["val_loss"] for each in lines if each["step"] <= 9))  # three quarters of 12 updates
    assert text == f"short: {sorted(best)[2]:.4g}"
    tier = place / "conf/benchmark/tier/tiny.yaml"
    tier.write_text(tier.read_text().replace("0.2", "0.3"))  # full trials are continued after a target is set
    assert "2 trials, of which 2 are done" in dlopt(place, "benchmark", "optimizer=sgd", *line).out


def _benchmark(*arguments: str) -> None:
    sys.argv = ["dlopt", "benchmark", *arguments]
    cli.main()


@pytest.mark.slow
def test_kills_lose_nothing_and_two_processes_share_the_trials(
    place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    line = ("optimizer=sgd,adamw", *TIER, "studies=1", "trials=3")
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    for number in range(3):
        streams = {1: place / "log.txt", 2: place / "log.txt"}
        process = start(_benchmark, line, environment, place, streams)
        deadline = time.monotonic() + 60
        ended = len(list(place.glob("out/*/*/*/summary.json")))
        while process.is_alive() and time.monotonic() < deadline:
            if len(list(place.glob("out/*/*/*/summary.json"))) > ended or number % 2:
                break
            time.sleep(0.05)
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert dlopt(place, "benchmark", *line).code == 0
    assert results(place).missing() == 0

    other = tmp_path_factory.mktemp("whole")
    (other / "conf").symlink_to(place / "conf")
    logs = [other / f"log-{number}.txt" for number in range(2)]
    processes = [start(_benchmark, line, environment, other, {1: log, 2: log}) for log in logs]
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0], [log.read_text() for log in logs]
    assert dlopt(other, "benchmark", *line).code == 0 and results(other).missing() == 0
    starts = sum(log.read_text().count(", trial ") for log in logs)
    runs = [path.read_text().count("starts") for path in other.glob("out/*/*/*/train.log")]
    assert len(runs) == 12 and set(runs) == {1} and starts >= 12

    whole, killed = results(other), results(place)
    for key, cell in whole.cells.items():
        assert [timeless(each) for each in cell.records] == [timeless(each) for each in killed.cells[key].records]


def timeless(record: Any) -> Any:
    return (record.study, record.trial, record.values, record.updates, record.best, record.last, record.failure)
