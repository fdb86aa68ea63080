"""`--json`: the documents of `runs`, `report`, `options` and `train`, with every key that docs/howto/json.md lists."""

import json
import os
import signal
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dlopt.basics.errors import RunError
from dlopt.basics.interruption import Interrupted
from dlopt.commands.command_table import every_command
from dlopt.commands.options import options
from dlopt.commands.shared.document import document_only, end_document, print_document
from dlopt.results.documents import front_entry
from dlopt.results.leaderboard import ParetoFront
from dlopt.tracking.metrics import read_summary
from tests.support.folders import make_run
from tests.support.line import Result, dlopt
from tests.support.processes import run_dlopt
from tests.support.sizes import TINY
from tests.sweeps.processes import InProcess

RUN = {"folder", "status", "reason", "overrides", "metrics"}
DIVERGES = ("model.norm=none", "optimizer.lr=1e38", "epochs=4")
ROW = {"rank", "label", "overrides", "folders", "ended", "failed", "difference", "remarks"}
ERROR = {"kind", "key", "value", "message", "allowed", "suggestions", "others", "log", "exit_code"}
STATISTIC = {"mean", "std", "count"}


def document(result: Result) -> dict[str, Any]:
    """Returns the document, which is all that stdout has."""
    found: dict[str, Any] = json.loads(result.out, parse_constant=pytest.fail)
    assert found.pop("format") == 1
    return found


def error(result: Result, code: int = 2) -> dict[str, Any]:
    """Returns the error of a document with nothing else."""
    [(name, found)] = document(result).items()
    assert name == "error" and found.keys() == ERROR
    assert result.code == found["exit_code"] == code and result.err.startswith("dlopt: ") == (found["log"] is None)
    return dict(found)


@pytest.fixture
def night(tmp_path: Path) -> Path:
    """Two configurations with three and two seeds, a failed run and a damaged one."""
    for i, (lr, seed) in enumerate([(0.1, 0), (0.1, 1), (0.1, 2), (0.01, 0), (0.01, 1)]):
        make_run(tmp_path / f"night/{i}", lr=lr, seed=seed, accuracies=(0.5, 0.6 + lr + seed / 30), seconds=1 / 3)
    published = {"published": [{"error": 5.0, "when": {}}]}
    make_run(tmp_path / "night/5", lr=9.0, status="failed", accuracies=(0.1, 0.1), overrides=[], config=published)
    make_run(tmp_path / "night/6")
    (tmp_path / "night/6/summary.json").write_text("{")
    return tmp_path


def test_runs(night: Path) -> None:
    skipped = [{"folder": str(night / "night/6"), "reason": "summary.json is damaged"}]
    found = document(dlopt(night, "runs", "night", "sort=val_accuracy", "limit=1", "--json"))
    assert found.keys() == {"runs", "skipped"} and found["skipped"] == skipped
    [run] = found["runs"]
    assert run.keys() == RUN | {"commit", "config"}
    assert (run["folder"], run["status"], run["reason"]) == (str(night / "night/2"), "finished", None)
    assert (run["commit"], run["overrides"]) == ("c" * 40, ["optimizer=sgd", "optimizer.lr=0.1", "seed=2"])
    assert run["config"]["optimizer"] == "sgd" and run["config"]["model.widths"] == [64, 64]
    assert run["metrics"]["val_accuracy"] == 0.6 + 0.1 + 2 / 30 and run["metrics"]["seconds"] == 2 / 3  # all digits
    found = document(dlopt(night, "runs", "night", "optimizer.lr=9", "columns=[optimizer.lr,best_val_loss]", "--json"))
    [run] = found["runs"]
    assert (run["status"], run["reason"]) == ("failed", "the loss is nan")
    assert run["config"] == {"optimizer.lr": 9} and run["metrics"].keys() == {"val_loss"}
    none = dlopt(night, "runs", "night", "optimizer.lr=7", "--json")
    assert (none.code, document(none)) == (0, {"runs": [], "skipped": skipped}) and "no run matches" in none.err


def test_curves(tmp_path: Path) -> None:
    losses = [1 / (1 + epoch) if epoch != 71 else 0.001 for epoch in range(100)]
    make_run(tmp_path / "runs/0", accuracies=tuple(1 - loss for loss in losses))
    make_run(tmp_path / "runs/1", accuracies=(0.1, 0.2, 0.3))
    found = document(dlopt(tmp_path, "runs", "runs", "curve=val_loss", "points=7", "--json"))
    assert found.keys() == {"metric", "direction", "runs", "skipped"}
    assert (found["metric"], found["direction"], found["skipped"]) == ("val_loss", "minimize", [])
    long, short = found["runs"]
    assert (long["folder"], long["status"], long["evaluations"]) == (str(tmp_path / "runs/0"), "finished", 100)
    # One sixth of 99 evaluations apart, but for the best, which replaces its neighbour (67).
    assert [point["epoch"] for point in long["points"]] == [1, 17, 34, 51, 72, 83, 100]
    assert long["points"][4] == {"epoch": 72, "step": 720, "value": pytest.approx(0.001)}
    assert [point["value"] for point in short["points"]] == pytest.approx([0.9, 0.8, 0.7])

    lines = dlopt(tmp_path, "runs", "runs", "curve=best_val_loss", "points=3").out.splitlines()
    assert lines[0].split("\t") == ["run", "epoch", "step", "val_loss"] and len(lines) == 7
    assert lines[2].split("\t")[:3] == ["runs/0", "72", "720"]
    # A diagnostic, which is measured between evaluations and after the last one.
    measured = [json.dumps({"step": step, "gradients/norm/head": 1 / step}) for step in (1, 10, 25, 36)]
    (tmp_path / "runs/1/diagnostics.jsonl").write_text("\n".join([*measured, '{"step": 40, "gra']))
    found = document(dlopt(tmp_path, "runs", "runs/1", "curve=gradients/norm/head", "--json"))
    [run] = found["runs"]
    assert (found["direction"], run["evaluations"]) == (None, 4)
    assert [tuple(point.values()) for point in run["points"]] == [
        (0.1, 1, 1),
        (1, 10, 0.1),
        (2.5, 25, 0.04),
        (3.6, 36, 1 / 36),
    ]
    wrong = error(dlopt(tmp_path, "runs", "runs", "curve=val_los", "--json"))
    assert (wrong["kind"], wrong["key"], wrong["suggestions"]) == ("unknown_name", "curve", ["curve=val_loss"])
    assert error(dlopt(tmp_path, "runs", "runs", "curve=val_loss", "points=2", "--json"))["key"] == "points"
    assert "needs curve" in error(dlopt(tmp_path, "runs", "runs", "points=5", "--json"))["message"]


def test_report(night: Path) -> None:
    found = document(dlopt(night, "report", "night", "target=0.65", "--json"))
    assert not (night / "night/report").exists()
    expected = {"by": "val_accuracy", "direction": "maximize", "target": 0.65, "files": []}
    own = {"keys", "configurations", "verdict", "findings", "best_run", "statuses", "failures", "skipped"}
    assert found.keys() == {*expected, *own}
    assert expected.items() <= found.items() and found["keys"] == ["optimizer.lr"]
    assert found["statuses"] == {"finished": 5, "failed": 1} and found["skipped"][0].keys() == {"folder", "reason"}
    assert [(each["folder"], each["reason"]) for each in found["failures"]] == [
        (str(night / "night/5"), "the loss is nan")
    ]
    assert found["findings"] == {"first": "lr=0.1", "few": ["lr=0.01"]} and "is first" in found["verdict"]
    assert found["best_run"].keys() == RUN | {"command"} and found["best_run"]["folder"] == str(night / "night/2")
    assert found["best_run"]["command"] == "dlopt train optimizer=sgd optimizer.lr=0.1 seed=2"
    best, second, last = found["configurations"]
    for row in (best, second, last):
        assert row.keys() == ROW | {"values", "tags", "metrics", "time_to_target", "published", "command"}
    assert (best["rank"], best["values"]["optimizer.lr"], best["ended"], best["failed"]) == (1, 0.1, 3, 0)
    assert best["folders"] == [str(night / f"night/{i}") for i in range(3)] and best["difference"] is None
    assert best["metrics"]["val_accuracy"] == {
        "mean": pytest.approx(0.7 + 1 / 30),
        "std": pytest.approx(1 / 30),
        "count": 3,
    }
    assert best["time_to_target"].keys() == {"reached", "runs", "steps", "seconds"}
    assert best["time_to_target"]["steps"] == {"mean": 20.0, "std": 0.0, "count": 3}
    assert best["command"] == "dlopt train -m optimizer=sgd optimizer.lr=0.1 seed=0,1,2"
    assert second["difference"].keys() == {"mean", "low", "high", "count"} and second["difference"]["count"] == 2
    assert "test_accuracy" in best["metrics"] and "test_accuracy" not in second["metrics"]
    assert last["failed"] == 1 and last["metrics"]["val_accuracy"] is None
    assert last["published"] == {"error_percent": 5.0, "measured_error_percent": None, "median_error_percent": None}
    found = document(dlopt(night, "report", "night", "by=val_loss", "test=true", "format=csv", "--json"))
    assert found["files"] == [str(night / "night/report/summary.csv")] and Path(found["files"][0]).is_file()
    assert found["direction"] == "minimize" and "test_accuracy" in found["configurations"][1]["metrics"]
    assert "--json" in error(dlopt(night, "report", "night", "--json", "--watch"))["message"]


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    def groups(*arguments: str) -> list[dict[str, Any]]:
        options([*arguments, "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found.keys() == {"format", "groups"}
        return list(found["groups"])

    [optimizer, vgg] = groups("optimizer=sgd", "model=vgg*")
    assert optimizer.keys() == {"name", "default", "commands", "choices"}
    assert (optimizer["name"], optimizer["default"], optimizer["commands"]) == ("optimizer", "sgd", ["train"])
    [sgd] = optimizer["choices"]
    assert sgd.keys() == {"name", "description", "keys"}
    lr = {"name": "optimizer.lr", "value": "0.1", "allowed": ["a number > 0"]}
    assert sgd["keys"][0] == {**lr, "comment": "learning rate"}
    assert len(vgg["choices"]) > 1 and all(each["name"].startswith("vgg") for each in vgg["choices"])
    norm = next(key for key in vgg["choices"][0]["keys"] if key["name"] == "model.norm")
    assert norm["allowed"] == ["batch", "layer", "group", "instance", "none"]
    [whole] = groups("optimizer")
    assert len(whole["choices"]) > 30 and all(lr.keys() == k.keys() for each in whole["choices"] for k in each["keys"])
    every = {each["name"]: each for each in groups()}
    assert "function" not in every and groups("function")[0]["commands"] == ["trajectory"]
    assert every["hydra/sweeper"]["commands"] == ["train -m"] and every["experiment"]["default"] is None
    assert all(choice["keys"] is None for each in every.values() for choice in each["choices"])


def test_run(tmp_path: Path) -> None:
    result = dlopt(tmp_path, "train", *TINY, "hydra.run.dir=run", "--json")
    found = document(result)
    assert "best validation" in result.err  # the tables
    summary = read_summary(tmp_path / "run")
    assert found == {"folder": str(tmp_path / "run"), "exit_code": 0, "summary": summary} and result.code == 0
    again = dlopt(tmp_path, "train", *TINY, "hydra.run.dir=run", "resume=auto", "--json")
    assert document(again) == found and "this run is already finished" in again.err
    failing = dlopt(tmp_path, "train", *TINY, *DIVERGES, "hydra.run.dir=failed", "--json")
    found = document(failing)
    assert failing.code == found["exit_code"] == 1 and found["summary"]["status"] == "failed"
    assert found["summary"]["reason"] in failing.err
    assert found["error"].keys() == ERROR and found["error"]["kind"] == "failed"
    assert found["error"]["message"] == found["summary"]["reason"] and Path(found["error"]["log"]).is_file()


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("experiment=lecture/clipping", "not available for a comparison"),
        ("--cfg=job", "--json with --cfg"),
    ],
)
def test_what_has_no_document(tmp_path: Path, typed: str, message: str) -> None:
    assert message in error(dlopt(tmp_path, "train", *TINY, typed, "--json"))["message"]


def test_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlopt.sweeps.pool.spawn", InProcess)
    monkeypatch.setattr("dlopt.sweeps.pool.warm_up", lambda: None)
    line = ("train", "-m", *TINY, *DIVERGES, "optimizer.lr=0.1,1e38", "hydra.sweep.dir=sweep", "--json")
    result = dlopt(tmp_path, *line)
    found = document(result)
    assert found.keys() == {"folder", "exit_code", "jobs", "skipped", "leaderboard", "pareto_front"}
    assert (found["folder"], found["exit_code"], result.code) == (str(tmp_path / "sweep"), 1, 1)
    assert [job["status"] for job in found["jobs"]] == ["finished", "failed"] and found["jobs"][0].keys() == RUN
    board = found["leaderboard"]
    assert board.keys() == {"metric", "direction", "rows", "verdict", "findings", "best_run"}
    assert board["findings"] is None and board["best_run"]["folder"] == found["jobs"][0]["folder"]
    assert (board["metric"], board["direction"]) == ("val_accuracy", "maximize")
    first, last = board["rows"]
    assert first.keys() == ROW | {"value"} and first["value"].keys() == STATISTIC and last["value"] is None
    assert first["overrides"] == ["optimizer.lr=0.1"] and first["folders"] == [found["jobs"][0]["folder"]]
    assert (found["skipped"], found["pareto_front"]) == ([], None) and "sweep folder: sweep" in result.err


def test_pareto_front(tmp_path: Path) -> None:
    front = ParetoFront(["val_loss", "seconds"], ["minimize", "minimize"], [("job 0: lr=1", tmp_path, (0.1, 2.0))])
    assert front_entry(front) == {
        "metrics": ["val_loss", "seconds"],
        "directions": ["minimize", "minimize"],
        "rows": [{"label": "job 0: lr=1", "folder": str(tmp_path), "values": [0.1, 2.0]}],
    }


def test_stdout_has_the_document_only(capfd: pytest.CaptureFixture[str]) -> None:
    with document_only():
        print("printed")
        os.write(1, b"of a library in C\n")
        subprocess.run(["echo", "of a child process"], check=True)
        print_document({"loss": float("nan"), "nested": [{"lr": 0.1, "most": float("inf")}]})
        print("after it")
        end_document(1, RunError("has its document already"))
    print_document({"next": 1})
    out, err = capfd.readouterr()
    assert out.replace("}\n{", "}|{").split("|") == [
        json.dumps({"format": 1, "loss": None, "nested": [{"lr": 0.1, "most": None}]}, indent=2),
        json.dumps({"format": 1, "next": 1}, indent=2) + "\n",
    ]
    assert all(each in err for each in ("printed", "of a library in C", "of a child process", "after it"))


# -- errors


@pytest.mark.parametrize("command", sorted(every_command()))
def test_every_command_ends_with_a_document(command: str, tmp_path: Path) -> None:
    found = error(dlopt(tmp_path, command, "optimizer.lrr=0.1", "--json"))
    assert found["exit_code"] == 2 and found["message"] and not found["others"]
    found = error(dlopt(tmp_path, command, "nowhere", "--json"))
    assert found["exit_code"] == 2 and found["kind"] != "internal"


def test_results_of_a_trained_model(tmp_path: Path) -> None:
    assert dlopt(tmp_path, "train", *TINY, "output=run").code == 0
    tested = document(dlopt(tmp_path, "eval", "run", "--json"))
    accuracy = (read_summary(tmp_path / "run") or {})["test_accuracy"]
    assert (tested["test_accuracy"], tested["exit_code"], len(tested["classes"])) == (accuracy, 0, 10)
    assert str(tmp_path / "run/eval.json") in tested["files"]
    several = document(dlopt(tmp_path, "eval", "checkpoint=[run,run]", "output=both", "--json"))
    assert several["samples"] == tested["samples"] and several["average"] == "probabilities"
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images/a.png")
    predicted = document(dlopt(tmp_path, "predict", "run", "images=images", "output=p.csv", "--json"))
    header = (tmp_path / "p.csv").read_text().splitlines()[0]
    assert predicted["file"] == str(tmp_path / "p.csv") and ",".join(predicted["columns"]) == header
    exported = document(dlopt(tmp_path, "export", "run", "format=torch_export", "--json"))
    assert Path(exported["file"]).is_file() and exported["classes"] == [*map(str, range(10))]
    found = document(dlopt(tmp_path, "find-lr", "model=mlp", "output=lr", "--json"))
    assert found.keys() == {"steepest", "valley", "diverged", "files", "exit_code"}
    assert all(Path(path).is_file() for path in found["files"])


def test_without_a_document_of_its_own(tmp_path: Path) -> None:
    for word, shown in (("--version", "dlopt "), ("--help", "Train a model"), ("dry_run=true", "parameters")):
        result = dlopt(tmp_path, "train", *TINY, word, "--json")
        assert (result.code, document(result)) == (0, {"exit_code": 0}) and shown in result.err


@pytest.mark.parametrize(
    ("line", "kind", "key", "value", "allowed", "suggestions"),
    [
        ("trian", "unknown_name", None, "trian", "ladder", ["train"]),
        ("train optimizer=adamww", "unknown_choice", "optimizer", "adamww", "muon", ["optimizer=adamw"]),
        ("train loss=nll", "unknown_choice", "loss", "nll", "cross_entropy", ["loss=cross_entropy"]),
        ("train batch_size=8", "unknown_key", "batch_size", "8", "epochs", ["data.batch_size=8"]),
        ("train optimizer.lrr=8", "unknown_key", "optimizer.lrr", "8", "momentum", ["optimizer.lr"]),
        ("train optimizer.lr=-1", "value", "optimizer.lr", "-1", "a number > 0", []),
        ("train optimizer.betas=[1,2,3] optimizer=adamw", "value", "optimizer.betas", "[1, 2, 3]", None, []),
        ("train ema_warmup=maybe", "value", "ema_warmup", "maybe", None, []),
        ("train model.norm=bath", "value", "model.norm", "bath", "batch", []),
        ("train on_divergence=stay", "value", "on_divergence", "stay", "stop", []),
        ("train resume=nowhere", "file", "resume", "nowhere", None, []),
        ("runs nowhere", "file", None, "nowhere", None, []),
        ("train from=nowhere", "file", "from", "nowhere", None, []),
    ],
)
def test_errors_as_data(
    tmp_path: Path, line: str, kind: str, key: str | None, value: str, allowed: str | None, suggestions: list[str]
) -> None:
    found = error(dlopt(tmp_path, *line.split(), "--json"))
    assert (found["kind"], found["key"], found["value"]) == (kind, key, value), found
    assert found["suggestions"] == suggestions
    assert allowed is None or allowed in found["allowed"], found


def test_several_errors(tmp_path: Path) -> None:
    result = dlopt(tmp_path, "train", "optimizer.lr=-1", "epocs=3", "--json")
    found = error(result)
    assert (found["key"], found["suggestions"]) == ("optimizer.lr", []) and "2 overrides" in result.err
    [other] = found["others"]
    assert (other["kind"], other["key"], other["value"], other["suggestions"]) == (
        "unknown_key",
        "epocs",
        "3",
        ["epochs"],
    )


def test_states(tmp_path: Path) -> None:
    make_run(tmp_path / "done", config={"run_id": "0"})
    (tmp_path / "done/checkpoints").mkdir(exist_ok=True)
    found = error(dlopt(tmp_path, "train", *TINY, "hydra.run.dir=done", "--json"))
    assert (found["kind"], found["key"], found["value"]) == ("state", "hydra.run.dir", str(tmp_path / "done"))


def test_failed_and_interrupted_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(raised: BaseException, *_: object) -> int:
        raise raised

    def ends_with(raised: BaseException) -> Result:
        monkeypatch.setattr("dlopt.commands.runs.runs", partial(fail, raised))
        return dlopt(tmp_path, "runs", "--json")

    failed = error(ends_with(RunError("the disk is full")), 1)
    assert (failed["kind"], failed["message"], failed["log"]) == ("failed", "the disk is full", None)
    assert error(ends_with(Interrupted(signal.SIGTERM)), 75)["kind"] == "interrupted"
    assert error(ends_with(Interrupted(signal.SIGINT)), 130)["message"] == "interrupted by SIGINT"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    ended = ends_with(SystemExit("a library's word"))
    assert (ended.code, document(ended)) == (1, {"exit_code": 1})
    result = ends_with(TypeError("a bug"))
    crash = error(result, 1)
    assert (crash["kind"], crash["message"]) == ("internal", "TypeError: a bug")
    assert "Traceback" in result.err and "TypeError: a bug" in Path(crash["log"]).read_text()


def test_a_signal_in_an_import_leaves_a_document(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    line = ("train", "optimizer=custom", "optimizer._target_=slow.Own", "allow_packages=[slow]", "--json")
    result = run_dlopt(tmp_path, *line)
    found = json.loads(result.stdout)["error"]
    assert (found["kind"], found["exit_code"], result.returncode) == ("interrupted", 75, 75)
    assert result.stderr == "dlopt: interrupted by SIGTERM\n"
