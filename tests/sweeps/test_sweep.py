"""`dlopt train -m`: job processes, checks, output files and resuming."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import dlopt as package
from dlopt.basics.errors import UserError
from dlopt.config.compose import Composer
from dlopt.config.overrides import parse_overrides
from dlopt.sweeps.sweep import HydraJob
from tests.support.line import SMALL, HeldByAnotherProcess, Result, dlopt, refused
from tests.sweeps.processes import InProcess

TINY = [*[each for each in SMALL if not each.startswith("epochs")], "epochs=1", "tracking=[]", "hydra.sweep.dir=sweep"]
HERE = "hydra.sweep.dir=sweep"


def sweep(folder: Path, *arguments: str) -> Result:
    return dlopt(folder, "train", "-m", *TINY, *arguments)


def status(folder: Path) -> list[str]:
    paths = sorted((folder / "sweep").glob("[0-9]*/summary.json"))
    return [json.loads(path.read_text())["status"] for path in paths]


@pytest.fixture
def own(tmp_path: Path) -> list[str]:
    """An optimizer that terminates its process in different ways."""
    name = f"package_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        "import os, signal, sys, time, pathlib, torch\n"
        "class Odd(torch.optim.SGD):\n"
        "    def __init__(self, params, *, lr: float, end: str) -> None:\n"
        "        super().__init__(params, lr=lr)\n"
        "        self.end, self.updates = end, 0\n"
        "    def step(self, closure=None):\n"
        "        if self.end == 'raise': raise RuntimeError('broken on purpose')\n"
        "        if self.end == 'exit': os._exit(3)\n"
        "        if self.end == 'sysexit': sys.exit(0)\n"
        "        if self.end == 'kill': os.kill(os.getpid(), signal.SIGKILL)\n"
        "        if self.end == 'term': os.kill(os.getpid(), signal.SIGTERM)\n"
        "        self.updates += 1\n"
        "        if self.end == 'slow' and self.updates > 1: pathlib.Path('started').touch(); time.sleep(0.2)\n"
        "        return super().step(closure)\n"
    )
    (tmp_path / "conf/optimizer").mkdir(parents=True)
    (tmp_path / "conf/optimizer/odd.yaml").write_text(f"_target_: {name}.Odd\nlr: 0.1\nend: none\n")
    return ["--config-dir", "conf", "optimizer=odd", f"allow_packages=[{name}]"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlopt.sweeps.pool.spawn", InProcess)
    monkeypatch.setattr("dlopt.sweeps.pool.warm_up", lambda: None)


def test_jobs_are_complete_runs(tmp_path: Path) -> None:
    result = sweep(tmp_path, "optimizer.lr=0.1,0.01", "seed=1")
    assert result.code == 0, result.err
    assert status(tmp_path) == ["finished", "finished"]
    for number, rate in enumerate([0.1, 0.01]):
        run = tmp_path / "sweep" / str(number)
        assert {path.name for path in run.iterdir()} >= {
            "config.yaml", "overrides.yaml", "environment.json", "metrics.jsonl", "summary.json", "checkpoints",
            "train.log",
        }  # fmt: skip
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert (config["optimizer"]["lr"], config["seed"]) == (rate, 1)
        assert f"optimizer.lr={rate}" in yaml.safe_load((run / "overrides.yaml").read_text())
        assert json.loads((run / "environment.json").read_text())["choices"]["optimizer"] == "sgd"
    assert not (tmp_path / "outputs").exists()
    assert result.out.endswith("\nsweep folder: sweep\nnext:\n  dlopt report sweep\n")


@pytest.mark.usefixtures("quick")
def test_folds_validate_every_sample_once_and_are_one_row(tmp_path: Path) -> None:
    result = sweep(tmp_path, "data.folds=3", "data.fold=0,1,2", "optimizer=sgd,adamw", "data.subset=0.2")
    assert result.code == 0, result.err
    counts: dict[str, list[int]] = {"sgd": [], "adamw": []}
    for path in (tmp_path / "sweep").glob("[0-9]*"):
        found = json.loads((path / "environment.json").read_text())
        counts[found["choices"]["optimizer"]].append(found["data"]["validation"]["count"])
    assert sorted(counts["sgd"]) == sorted(counts["adamw"]) and max(counts["sgd"]) - min(counts["sgd"]) <= 1
    table = result.out[result.out.index("higher is better") :]
    assert table.count(" 3 folds ") == 2 and "a seed was run more than once" not in table
    assert sum(counts["sgd"]) == round(0.2 * found["data"]["identity"]["train"]["samples"])


def test_failed_job_does_not_stop_others(tmp_path: Path, own: list[str]) -> None:
    result = sweep(tmp_path, *own, "optimizer.end=raise,exit,sysexit,none")
    assert result.code == 1
    first, second, third, last = (tmp_path / "sweep" / str(i) / "summary.json" for i in range(4))
    reasons = [json.loads(path.read_text())["reason"] for path in (first, second, third)]
    assert "broken on purpose" in reasons[0] and "exit code 3" in reasons[1] and "exit code 0" in reasons[2]
    assert "broken on purpose" in (first.parent / "traceback.txt").read_text()
    end = result.out[result.out.index("sweep folder: sweep") :].splitlines()
    assert end[1:4] == ["next:", "  dlopt report sweep", "  dlopt runs sweep status=failed"]
    assert end[4].startswith("resume=auto added to this command runs the failed")
    assert status(tmp_path) == ["failed", "failed", "failed", "finished"]
    assert json.loads(last.read_text())["status"] == "finished"


def test_interrupted_job_does_not_stop_others(tmp_path: Path, own: list[str]) -> None:
    result = sweep(tmp_path, *own, "optimizer.end=term,none")
    assert result.code == 75 and "job 0 interrupted" in result.out
    assert status(tmp_path) == ["finished"]  # a job that ends before its first update leaves no summary


def test_refuses_invalid_job_before_the_first_starts(tmp_path: Path) -> None:
    assert "optimizer.lr=-1" in refused(tmp_path, "train", "-m", *TINY, "optimizer.lr=0.1,0.01,-1")


def test_refuses_a_comparison(tmp_path: Path) -> None:
    message = refused(tmp_path, "train", "-m", "experiment=lecture/warm_restarts", "seed=0,1", "threads=1")
    assert "experiment=lecture/warm_restarts: a comparison" in message and "comparison=null" in message


def test_checks_sweeps_in_files(tmp_path: Path) -> None:
    path = tmp_path / "conf/experiment/mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\nhydra: {sweeper: {params: {optimizer.momentum: '0,2'}}}\n")
    message = refused(tmp_path, "train", "-m", "--config-dir", "conf", "experiment=mine", *TINY)
    assert "optimizer.momentum=2" in message


@pytest.mark.usefixtures("quick")
def test_job_with_invalid_data_fails_alone(tmp_path: Path) -> None:
    result = sweep(tmp_path, "data.subset=9,40")
    assert result.code == 1 and "data.subset=9" in json.loads((tmp_path / "sweep/0/summary.json").read_text())["reason"]
    assert status(tmp_path) == ["failed", "finished"]


def test_refuses_launchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert "torchrun" in refused(tmp_path, "train", "-m", *TINY, "seed=0,1")


# -- resuming


@pytest.mark.usefixtures("quick")
def test_existing_sweep_folder(tmp_path: Path) -> None:
    assert sweep(tmp_path, "seed=1,2").code == 0
    assert "resume=auto" in refused(tmp_path, "train", "-m", *TINY, "seed=1,2")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = sweep(tmp_path, "seed=1,2", "resume=auto")
    assert result.code == 0 and result.out.startswith("this sweep is already finished: ")
    assert result.out.endswith("sweep\nnext:\n  dlopt report sweep\n")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.usefixtures("quick")
def test_sweep_that_would_train_at_learning_rate_0_is_refused_before_the_first_job(tmp_path: Path) -> None:
    assert sweep(tmp_path, "seed=1,2").code == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    longer = ["train", "-m", *TINY, "seed=1,2", "epochs=3", "resume=auto"]
    assert "epochs=3: the schedule of this run ends at epoch 1 with learning rate 0" in refused(tmp_path, *longer)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert sweep(tmp_path, "seed=1,2", "epochs=3", "resume=auto", "schedule_epochs=3").code == 0


def test_models_that_exceed_the_memory_are_refused_before_the_first_job(tmp_path: Path) -> None:
    error = refused(tmp_path, "train", "-m", *TINY, "model.widths=[8],[1000000000]")
    assert error.startswith("dlopt: model.widths=[1000000000]: the model's ") and "GiB are available" in error


@pytest.mark.usefixtures("quick")
def test_resume_runs_only_unfinished_jobs(tmp_path: Path) -> None:
    assert sweep(tmp_path, "seed=1,2,3").code == 0
    first, second, third = (tmp_path / "sweep" / str(i) for i in range(3))
    (second / "summary.json").unlink()
    for path in sorted(third.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    result = sweep(tmp_path, "seed=1,2,3", "resume=auto")
    assert result.code == 0, result.err
    assert status(tmp_path) == ["finished"] * 3
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    for run in (second, third):
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_shuffled_values_run_in_the_order_of_the_checked_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[list[str]] = []
    monkeypatch.setattr("dlopt.sweeps.pool.warm_up", lambda: None)
    monkeypatch.setattr(
        "dlopt.sweeps.pool.run_jobs", lambda jobs, *_: launched.extend(job.plan.texts for job in jobs) or {}
    )
    line = ["seed=shuffle(range(0,6))", "optimizer.lr=shuffle(0.1,0.2)"]
    sweep(tmp_path, *line)
    assert launched == yaml.safe_load((tmp_path / "sweep/sweep.yaml").read_text())
    seeds = [line for job in launched for line in job if line.startswith("seed=")]
    assert len(launched) == 12 and seeds != sorted(seeds)
    sweep(tmp_path, *line, "resume=auto")
    assert [[each for each in job if each != "resume=auto"] for job in launched[12:]] == launched[:12]


def test_jobs_run_as_checked_and_are_composed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[list[str]] = []
    compose = Composer._compose

    def count(self: Composer, overrides: list[str], multirun: bool = False) -> Any:
        composed.append(overrides)
        return compose(self, overrides, multirun)

    batches: list[list[Any]] = []
    monkeypatch.setattr("dlopt.sweeps.pool.warm_up", lambda: None)
    monkeypatch.setattr("dlopt.sweeps.pool.run_jobs", lambda jobs, *_: batches.append(list(jobs)) or {})
    monkeypatch.setattr(Composer, "_compose", count)
    sweep(tmp_path, "seed=1,2,3", "hydra.sweeper.max_batch_size=2", "+hydra.job.env_set.A_KEY=value")
    assert len(composed) == 4  # the sweep and its jobs
    assert [[job.number for job in batch] for batch in batches] == [[0, 1], [2]]
    assert [job.plan.saved["seed"] for batch in batches for job in batch] == [1, 2, 3]
    assert [job.label for batch in batches for job in batch] == ["seed=1", "seed=2", "seed=3"]
    assert all(job.plan.environment == {"A_KEY": "value"} for batch in batches for job in batch)
    assert [job.plan.choices["model"] for job in batches[0]] == ["mlp", "mlp"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_forwards_signals_to_jobs(number: signal.Signals, tmp_path: Path, own: list[str]) -> None:
    command = [sys.executable, "-m", "dlopt", "train", "-m", *TINY, *own, "optimizer.end=slow,none", "epochs=1000"]
    root = str(Path(package.__file__).parents[1])
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert json.loads((tmp_path / "sweep/0/summary.json").read_text())["status"] == "interrupted"
    assert (tmp_path / "sweep/0/checkpoints/last.pt").is_file()
    assert not (tmp_path / "sweep/1").exists()


@pytest.mark.usefixtures("quick")
def test_refuses_live_sweep(tmp_path: Path) -> None:
    assert sweep(tmp_path, "seed=1").code == 0
    (tmp_path / "sweep/0/summary.json").unlink()
    with HeldByAnotherProcess(tmp_path / "sweep"):
        assert "active in this folder" in refused(tmp_path, "train", "-m", *TINY, "seed=1", "resume=auto")


def test_glob_matches_choices_but_not_fragments(
    tmp_path: Path, conf_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlopt.run.dry_run.show", lambda *_, **__: None)
    result = dlopt(tmp_path, "train", "-m", "schedule=glob([_*,c*])", "dry_run=true")
    names = {path.stem for path in (conf_dir / "schedule").glob("c*.yaml")} - {"custom"}
    assert {line.partition("schedule=")[2] for line in result.out.splitlines()[1:]} == names


def test_a_launcher_of_another_package_starts_the_checked_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, list[str], str]] = []

    def record(jobs: Any, total: int, pool: object) -> dict[int, str]:
        [job] = jobs
        started.append((job.number, job.plan.texts, str(job.folder.path)))
        return {job.number: "finished"}

    monkeypatch.setattr("dlopt.sweeps.pool.run_jobs", record)
    sweep(tmp_path, "hydra/launcher=basic", "seed=shuffle(range(0,3))", "+hydra.job.env_set.A_KEY=value")
    planned = yaml.safe_load((tmp_path / "sweep/sweep.yaml").read_text())
    assert [lines for _, lines, _ in started] == planned
    assert [(number, folder) for number, _, folder in started] == [
        (number, str(tmp_path / f"sweep/{number}")) for number in range(3)
    ]
    result = sweep(tmp_path, "hydra/launcher=basic", "p=zip(seed=[1,2],data.seed=[3,4])")
    assert result.code == 2 and "p=zip(...): hydra/launcher=basic is not dlopt's" in result.err


@pytest.mark.parametrize(
    ("statuses", "code"), [(["finished"], 0), (["finished", "failed"], 1), (["interrupted"], 75), ([], 1)]
)
def test_a_sweeper_of_another_package_is_judged_by_the_runs_in_its_folder(
    statuses: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(request: object, folder: Path, overrides: list[str]) -> None:
        for number, status in enumerate(statuses):
            (folder / str(number)).mkdir()
            (folder / str(number) / "config.yaml").write_text("seed: 0\n")
            (folder / str(number) / "summary.json").write_text(json.dumps({"status": status}))

    monkeypatch.setattr("dlopt.sweeps.sweep.run_with_hydra", run)
    result = sweep(tmp_path, "hydra.sweeper._target_=hydra_plugins.mine.Sweeper")
    assert result.code == code, result.err
    assert ("dlopt runs sweep status=failed" in result.out) == ("failed" in statuses)


def test_a_job_that_hydra_composes_is_compared_with_the_command_line(tmp_path: Path) -> None:
    """Launchers and sweepers of other packages run it as a task of Hydra; `typed` is without secrets."""
    path = tmp_path / "conf/experiment/evil.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# @package _global_\nallow_packages: [tests]\n")
    config = Composer(config_dir=str(tmp_path / "conf"))._compose(parse_overrides([*SMALL, "experiment=evil"]))
    with pytest.raises(UserError, match=r"allow_packages=.*accepted from the command line only"):
        HydraJob(()).checked(config, [*SMALL, "experiment=evil"])
    assert HydraJob(("allow_packages=[tests]",)).checked(config, [*SMALL]).saved["allow_packages"] == ["tests"]
