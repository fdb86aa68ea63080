"""A run, a sweep and a search that an older version has written stay usable: evaluated, resumed, reported, forked.

98cdb308.tar.xz holds what that commit wrote for `dlopt train model=mlp model.widths=[4] optimizer=adamw
data.batch_size=512 tracking=[] threads=1 device=cpu` with:

run          epochs=2 ema=0.9
interrupted  epochs=3 ema=0.9 max_time=0.00001
sweep        -m epochs=2 optimizer.lr=0.001,0.01, of which only job 0 has run
search       -m epochs=1 hydra/sweeper=dlopt_optuna hydra.sweeper.n_trials=2 'optimizer.lr=tag(log,interval(0.001,1))'
bf16_state   epochs=3 optimizer.state_dtype=bf16 max_time=0.00001
rollback     epochs=3 on_divergence=rollback max_time=0.00001
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.line import dlopt, refused

WORDS = [
    "model=mlp", "model.widths=[4]", "optimizer=adamw", "data.batch_size=512", "tracking=[]", "threads=1", "device=cpu"
]  # fmt: skip
SWEEP = ["train", "-m", *WORDS, "epochs=2", "optimizer.lr=0.001,0.01", "output=sweep"]
SEARCH = [
    "train", "-m", *WORDS, "epochs=1", "hydra/sweeper=dlopt_optuna", "optimizer.lr=tag(log,interval(0.001,1))",
    "output=search",
]  # fmt: skip


@pytest.fixture
def older(tmp_path: Path) -> Path:
    with tarfile.open(Path(__file__).with_name("98cdb308.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def done(folder: Path, *words: str) -> str:
    result = dlopt(folder, *words)
    assert result.code == 0, result
    return result.out


def test_a_run_is_evaluated_as_it_was(older: Path) -> None:
    done(older, "eval", "checkpoint=run", "output=evaluated", "device=cpu")
    found = json.loads((older / "evaluated/eval.json").read_text())
    before = summary(older / "run")
    assert found["test_loss"] == pytest.approx(before["test_loss"], rel=1e-5)
    assert found["test_accuracy"] == pytest.approx(before["test_accuracy"], abs=1e-6)


def test_an_interrupted_run_is_resumed_to_what_one_without_a_break_reaches(older: Path) -> None:
    done(older, "train", *WORDS, "epochs=3", "ema=0.9", "resume=interrupted", "output=interrupted")
    done(older, "train", *WORDS, "epochs=3", "ema=0.9", "output=whole")
    resumed, whole = summary(older / "interrupted"), summary(older / "whole")
    assert resumed["steps"] == whole["steps"] == 9
    last = [
        json.loads((older / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("interrupted", "whole")
    ]
    assert last[0]["train_loss"] == pytest.approx(last[1]["train_loss"], rel=1e-5)
    # The gradient of a constant pixel is rounding, which differs between processors and which AdamW scales to 1. Batch
    # norm removes these weights from the training loss, not from that of an average of weights and of statistics.
    assert resumed["test_loss"] == pytest.approx(whole["test_loss"], rel=0.02)


def test_a_run_is_trained_on_and_forked(older: Path) -> None:
    done(older, "train", *WORDS, "ema=0.9", "epochs=4", "schedule_epochs=4", "resume=run", "output=longer")
    assert summary(older / "longer")["steps"] == 12
    done(older, "train", "init_from=run/checkpoints/best.pt", *WORDS, "epochs=1", "output=tuned")
    assert summary(older / "tuned")["steps"] == 3
    done(older, "train", "from=run", "seed=1", "output=forked")
    assert summary(older / "forked")["steps"] == 6


def test_a_sweep_is_continued(older: Path) -> None:
    before = (older / "sweep/0/summary.json").read_bytes()
    done(older, *SWEEP, "resume=auto")
    assert (older / "sweep/0/summary.json").read_bytes() == before
    assert summary(older / "sweep/1")["status"] == "finished"


def test_a_search_is_continued(older: Path) -> None:
    done(older, *SEARCH, "hydra.sweeper.n_trials=3", "resume=auto")
    assert summary(older / "search/2")["status"] == "finished"
    assert not (older / "search/3").exists()


def test_all_are_reported(older: Path) -> None:
    shown = json.loads(done(older, "report", ".", "--json"))
    folders = {str(Path(folder).relative_to(older)) for each in shown["configurations"] for folder in each["folders"]}
    assert folders >= {"run", "sweep/0", "search/0", "search/1"}
    assert "rollback" in done(older, "runs", ".")


@pytest.mark.parametrize(
    "folder, key", [("bf16_state", "optimizer.state_dtype=bf16"), ("rollback", "on_divergence=rollback")]
)
def test_what_is_gone_is_refused_where_it_would_train_on(older: Path, folder: str, key: str) -> None:
    for word in ("resume", "from"):
        assert f"{key}: the run" in refused(older, "train", f"{word}={folder}")
    done(older, "eval", f"checkpoint={folder}", "device=cpu")
