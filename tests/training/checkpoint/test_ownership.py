"""A run resumes from its own checkpoints and on its own data only; other commands warn."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from dlopt.training.checkpoint.checkpoints import load
from tests.support.line import dlopt
from tests.support.runs import assert_same_run, at_update, terminate
from tests.support.sizes import SMALL

MLP = [line for line in SMALL if not line.startswith("data.")] + ["checkpoint.keep=20"]
LINE = ["train", *MLP, "data=table", "data.target=kind", "data.batch_size=16", "epochs=4"]
RUN, AUTO = "hydra.run.dir=run", "resume=auto"


@pytest.fixture
def rows() -> list[str]:
    draws = np.random.default_rng(0).normal(size=(80, 3)).round(3).tolist()
    return [",".join(map(str, [*row, "ab"[sum(row) > 0]])) for row in draws]


def save(file: Path, rows: list[str]) -> str:
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(["x,y,z,kind", *rows, ""]))
    return f"data.file={file}"


@pytest.fixture
def stopped(tmp_path: Path, rows: list[str]) -> list[str]:
    """A run that has stopped after 7 of 16 updates; returns its command line."""
    line = [*LINE, save(tmp_path / "data/rows.csv", rows), RUN]
    with at_update(7, terminate):
        assert dlopt(tmp_path, *line).code == 75
    return line


def files(folder: Path) -> dict[str, bytes]:
    """The files of a run but its log and its lock."""
    names = (".lock", "train.log")
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name not in names}


def refused(folder: Path, *line: str) -> str:
    """Returns the message of a run that is not resumed, and whose folder stays as it is."""
    before = files(folder / "run")
    result = dlopt(folder, *line)
    assert result.code == 2 and result.err.startswith("dlopt: resume: ") and "Traceback" not in result.err, result
    assert files(folder / "run") == before
    return result.err


CHANGES: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "flipped": (lambda rows: [row.translate(str.maketrans("ab", "ba")) for row in rows], "other labels"),
    "shorter": (lambda rows: rows[:-10], "samples, not 64"),
}


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
def test_changed_data_are_refused(
    tmp_path: Path, stopped: list[str], rows: list[str], change: Callable[[list[str]], list[str]], message: str
) -> None:
    save(tmp_path / "data/rows.csv", change(rows))
    assert message in refused(tmp_path, *stopped, AUTO)


def test_a_checkpoint_of_choice_is_compared_too(tmp_path: Path, stopped: list[str], rows: list[str]) -> None:
    save(tmp_path / "data/rows.csv", rows[::-1])
    chosen = (*stopped[:-1], "resume=run/checkpoints/step-4.pt")
    expected = "the data have changed since the checkpoint was written: the training set has"
    assert expected in refused(tmp_path, *chosen)
    assert not (tmp_path / "outputs").exists()


def test_an_earlier_checkpoint_is_not_resumed_in_the_folder_of_later_ones(tmp_path: Path, stopped: list[str]) -> None:
    message = refused(tmp_path, *stopped, "resume=run/checkpoints/step-4.pt")
    assert "resume: the run has a later checkpoint than step-4.pt" in message


def test_moved_data_are_the_same(tmp_path: Path, stopped: list[str], rows: list[str]) -> None:
    whole = dlopt(tmp_path, *stopped[:-1], "hydra.run.dir=whole")
    moved = save(tmp_path / "elsewhere/other.csv", rows)
    shutil.rmtree(tmp_path / "data")
    line = [moved if word.startswith("data.file") else word for word in stopped]
    result = dlopt(tmp_path, *line, AUTO)
    # The name of the file is part of the config; its folder is not.
    assert (whole.code, result.code) == (0, 2) and "data.file" in result.err
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "data")
    (tmp_path / "data/other.csv").rename(tmp_path / "data/rows.csv")
    assert dlopt(tmp_path, *stopped, AUTO).code == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_every_file_of_a_run_has_its_id(tmp_path: Path, stopped: list[str]) -> None:
    def ids(folder: str) -> set[str]:
        config = yaml.safe_load((tmp_path / folder / "config.yaml").read_text())
        summary = json.loads((tmp_path / folder / "summary.json").read_text())
        states = [load(tmp_path / folder / "checkpoints" / name) for name in ("last.pt", "best.pt")]
        return {config["run_id"], summary["run_id"], *(state.run_id for state in states)}

    assert dlopt(tmp_path, *stopped[:-1], "resume=run", "hydra.run.dir=branch").code == 0
    before = ids("run")
    assert dlopt(tmp_path, *stopped, AUTO).code == 0
    assert ids("run") == before and len(before) == 1, "a resumed run is the same run"
    assert len(ids("branch")) == 1 and ids("branch") != before, "one in another folder is a new one"
    assert dlopt(tmp_path, "train", "from=run", "hydra.run.dir=again").code == 0
    assert len(ids("again") | before) == 2


@pytest.mark.parametrize("changes", [["seed=5"], []], ids=["seed", "same config"])
def test_a_foreign_checkpoint_is_refused(tmp_path: Path, stopped: list[str], changes: list[str]) -> None:
    assert dlopt(tmp_path, *stopped[:-1], *changes, "hydra.run.dir=other").code == 0
    for name in ("last.pt", "last.pt.sha256"):
        shutil.copy(tmp_path / "other/checkpoints" / name, tmp_path / "run/checkpoints" / name)
    assert "is a checkpoint of another run" in refused(tmp_path, *stopped, AUTO)


def test_a_foreign_best_model_is_not_tested(tmp_path: Path, stopped: list[str]) -> None:
    assert dlopt(tmp_path, *stopped[:-1], "seed=5", "hydra.run.dir=other").code == 0
    for name in ("best.pt", "best.pt.sha256"):
        shutil.copy(tmp_path / "other/checkpoints" / name, tmp_path / "run/checkpoints" / name)
    result = dlopt(tmp_path, "eval", "checkpoint=run")
    assert result.code == 0 and "is a checkpoint of another run" in result.err
    assert dlopt(tmp_path, *stopped, AUTO).code == 0
    assert load(tmp_path / "run/checkpoints/best.pt").config["seed"] == 0


def test_jobs_of_sweeps_compare_too(tmp_path: Path, rows: list[str]) -> None:
    line = [*LINE, save(tmp_path / "data/rows.csv", rows), "-m", "seed=0,1", "hydra.sweep.dir=sweep"]
    assert dlopt(tmp_path, *line).code == 0
    for number in (0, 1):
        (tmp_path / f"sweep/{number}/summary.json").unlink()
    for name in ("last.pt", "last.pt.sha256"):
        shutil.copy(tmp_path / "sweep/1/checkpoints" / name, tmp_path / "sweep/0/checkpoints" / name)
    assert dlopt(tmp_path, *line, AUTO).code == 1
    first, second = (json.loads((tmp_path / f"sweep/{number}/summary.json").read_text()) for number in (0, 1))
    assert first["status"] == "failed" and "is a checkpoint of another run" in first["reason"]
    assert second["status"] == "finished" and second["run_id"] != first["run_id"]


def test_eval_and_teachers_warn_of_other_data(tmp_path: Path, stopped: list[str], rows: list[str]) -> None:
    assert dlopt(tmp_path, *stopped, AUTO).code == 0
    same = dlopt(tmp_path, "eval", "checkpoint=run", "output=eval")
    assert same.code == 0 and "warning" not in same.err
    save(tmp_path / "data/rows.csv", rows[::-1])
    result = dlopt(tmp_path, "eval", "checkpoint=run", "output=eval")
    assert result.code == 0 and result.err.count("the data are not those of its run: the training set has other") == 1
    line = [*stopped[:-1], "hydra.run.dir=student", "loss=distillation", "loss.teacher=run"]
    result = dlopt(tmp_path, *line)
    assert result.code == 0 and "warning: it was trained on other data than this run's" in result.out


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_all_ranks_refuse(tmp_path: Path, stopped: list[str], rows: list[str], mode: str) -> None:
    save(tmp_path / "data/rows.csv", rows[::-1])
    message = refused(tmp_path, *stopped, AUTO, f"parallel={mode}", "parallel.processes=2", "model.norm=none")
    assert message.count("\n") == 1
