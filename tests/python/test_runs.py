"""Runs of earlier commands from Python: `dlopt.runs` and `dlopt.open_run`."""

import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

import dlopt
from dlopt.basics.errors import UserError
from tests.support.folders import make_run
from tests.support.line import dlopt as shell
from tests.support.line import entries


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for i, lr in enumerate((0.01, 0.1, 1.0)):
        make_run(tmp_path / f"outputs/night/{i}", lr=lr, accuracies=(0.2, 0.3 * (i + 1), 0.25))
    make_run(
        tmp_path / "outputs/failed", optimizer="adamw", status="failed", accuracies=(0.1,), reason="the loss is nan"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_has_its_config_and_metrics(outputs: Path) -> None:
    failed, *night = dlopt.runs()
    assert [run.path for run in night] == [outputs / f"outputs/night/{i}" for i in range(3)]
    run = night[1]
    assert run.status == "finished" and run.overrides == ("optimizer=sgd", "optimizer.lr=0.1", "seed=0")
    assert run.config["optimizer"] == "sgd" and run.config["optimizer.lr"] == 0.1
    assert run.config["model.widths"] == (64, 64)
    assert run.best == {"val_accuracy": 0.6, "val_loss": 0.4, "best_epoch": 2}
    assert run.test == {"test_accuracy": 0.75, "test_loss": 0.25}
    assert run.metrics["train_accuracy"] == 0.6 and run.metrics["steps"] == 30  # of the best epoch, of the run
    assert (failed.status, failed.reason, failed.test) == ("failed", "the loss is nan", {})
    with pytest.raises(FrozenInstanceError):
        run.status = "failed"  # type: ignore[misc]


def test_history_and_summary_are_those_of_the_files(outputs: Path) -> None:
    path = outputs / "outputs/night/0"
    run = dlopt.open_run("outputs/night/0")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [{key: line[key] for key in lines[0]} for line in run.history] == lines
    assert run.summary == json.loads((path / "summary.json").read_text())
    (path / "curves.png").touch()
    assert run.pictures == [path / "curves.png"] and run.steps == []
    assert run == dlopt.runs("outputs/night/0")[0]


@pytest.mark.parametrize(
    ("where", "sort"),
    [
        ([], None),
        (["optimizer=sgd", "val_accuracy>0.35"], "val_accuracy"),
        (["status!=failed"], "optimizer.lr"),
        (["optimizer.lr<=0.1"], "val_loss"),
    ],
)
def test_selects_the_runs_of_the_command(outputs: Path, where: list[str], sort: str | None) -> None:
    typed = shell(outputs, "runs", "outputs", *where, *([] if sort is None else [f"sort={sort}"]), "--paths")
    found = dlopt.runs("outputs", where, sort=sort)
    assert [str(run.path.relative_to(outputs)) for run in found] == typed.out.split()


def test_several_folders(outputs: Path) -> None:
    assert len(dlopt.runs(["outputs/failed", outputs / "outputs/night"])) == 4
    (outputs / "none").mkdir()
    assert dlopt.runs("none") == [] and repr(dlopt.runs("none")) == "no runs"


def test_shown_in_one_line_each(outputs: Path) -> None:
    lines = repr(dlopt.runs()).splitlines()
    metrics = "epochs 1, val_loss 0.9000, val_accuracy 10.00 %"
    assert lines[0] == f"<failed: optimizer adamw, optimizer.lr 0.1, {metrics}; outputs/failed>"
    varying = "optimizer sgd, optimizer.lr 0.01, "
    assert lines[1].startswith(f"<finished: {varying}epochs 3, val_loss 0.7000, val_accuracy 30.00 %, test_loss 0.2500")
    assert repr(dlopt.open_run("outputs/night/0")) == lines[1].replace(varying, "")
    assert len(lines) == 4


def test_damaged_folders_are_skipped_with_a_warning(outputs: Path) -> None:
    (outputs / "outputs/night/1/summary.json").write_text("{")
    with pytest.warns(UserWarning, match=r"outputs/night/1: skipped: summary\.json is damaged"):
        assert len(dlopt.runs()) == 3
    with pytest.raises(UserError, match=r"open_run\('outputs/night/1'\): not a readable run: summary\.json is damaged"):
        dlopt.open_run("outputs/night/1")


def test_table_in_pandas(outputs: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = dlopt.runs().to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == 4
    means = frame[frame["optimizer"] == "sgd"].groupby("optimizer.lr")["val_accuracy"].mean()
    assert means.to_dict() == pytest.approx({0.01: 0.3, 0.1: 0.6, 1.0: 0.9})
    assert frame["epochs"].tolist() == [1, 3, 3, 3] == frame["config.epochs"].tolist()
    assert math.isnan(frame["test_accuracy"][0])
    assert len(dlopt.runs("outputs", ["seed=7"]).to_pandas()) == 0
    assert pandas.DataFrame(dlopt.open_run("outputs/night/0").history)["epoch"].tolist() == [1, 2, 3]


def test_without_pandas(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"to_pandas\(\): the package pandas is not .* install -e .*\[pandas\]"):
        dlopt.runs().to_pandas()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("runs('nowhere')", r"runs\('nowhere'\): no such folder"),
        ("runs(where='seed=0')", r"must be a list: where=\['seed=0'\]"),
        ("runs(where=['seed'])", "must be a condition"),
        ("runs(where=['optimzer=sgd'])", r"optimzer=sgd: unknown key; did you mean optimizer\?"),
        ("runs(where=['val_loss<small'])", "< requires a number"),
        ("runs(sort='speed')", "sort=speed: unknown key; "),
        ("open_run('nowhere')", r"open_run\('nowhere'\): no such folder"),
        ("open_run('outputs')", "config.yaml is missing; it contains runs, which dlopt.runs lists"),
    ],
)
def test_refused_in_one_line(outputs: Path, call: str, message: str) -> None:
    before = entries(outputs)
    with pytest.raises(UserError, match=message) as caught:
        eval(f"dlopt.{call}")
    assert "\n" not in str(caught.value) and entries(outputs) == before


def test_reads_runs_without_torch(outputs: Path) -> None:
    code = "import sys, dlopt; print(len(dlopt.runs()), [m for m in ('torch', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "4 []\n"


def test_a_run_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses per update from TensorBoard's files, and the model."""
    monkeypatch.chdir(tmp_path)
    lines = ["model=mlp", "model.widths=[4]", "data.subset=40", "data.batch_size=8", "epochs=2", "threads=1"]
    result = dlopt.train([*lines, "log_every_steps=2", "hydra.run.dir=run"])
    run = dlopt.open_run("run")
    assert run.summary == result.summary and len(run.history) == 2
    logged = {line["step"]: line["train/loss"] for line in run.steps if "train/loss" in line}
    assert (
        list(logged)[:-1] == list(range(2, result.summary["steps"], 2)) and list(logged)[-1] == result.summary["steps"]
    )
    assert all(map(math.isfinite, logged.values()))
    assert [line["val/loss"] for line in run.steps if "val/loss" in line] == pytest.approx(
        [line["val_loss"] for line in run.history]
    )
    assert not any(tag.startswith(("test/", "best/")) for line in run.steps for tag in line)
    assert run.model.classes == result.model.classes and run.model is run.model
