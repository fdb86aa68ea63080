"""Tests of `epochs=5min`: the number of updates is counted once, and the run is one of `steps=N`."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import dlopt as package
from dlopt.training import budget
from dlopt.training.builders.trainer import probe_trainer
from dlopt.training.progress import Intervals
from tests.support.line import dlopt, refused
from tests.support.ranks import run_ranks
from tests.support.runs import assert_same_run, at_update, small_workload, terminate
from tests.support.sizes import SMALL, STEPS_PER_EPOCH
from tests.sweeps.processes import InProcess

RUN = [*SMALL, "augmentation=crop_flip", "model.dropout=0.3", "ema=0.9", "log_every_steps=2"]
# Each action takes 0.5 s: of 4 updates, an evaluation and a checkpoint per epoch, 12 updates take 6 + 1.5 + 1.5 s.
BUDGET, UPDATES = "epochs=10s", 12


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every action between two looks at the clock takes `clock[0]` seconds; `clock[1]` counts the looks."""
    state = [0.5, 0]

    def now(device: object) -> float:
        state[1] += 1
        return state[0] * state[1]

    monkeypatch.setattr(budget, "synchronized_time", now)
    return state


def saved(folder: Path) -> tuple[Any, int]:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return config["epochs"], config["steps"]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.mark.parametrize("rate", ["0.1", "auto"])
def test_is_the_run_of_the_counted_updates(rate: str, tmp_path: Path, clock: list[float]) -> None:
    words = [*RUN, f"optimizer.lr={rate}"]
    result = dlopt(tmp_path, "train", *words, BUDGET, "hydra.run.dir=timed")
    assert result.code == 0, result.err
    line = "epochs=10s: 500 ms per update, 0.5 s per evaluation, 0.5 s per checkpoint: 12 updates (3 epochs)"
    assert line in result.out and line in (tmp_path / "timed/train.log").read_text()
    assert saved(tmp_path / "timed") == ("10s", UPDATES)
    assert BUDGET in yaml.safe_load((tmp_path / "timed/overrides.yaml").read_text())
    assert not (tmp_path / "timed/.timed").exists()
    end = summary(tmp_path / "timed")
    assert (end["status"], end["steps"]) == ("finished", UPDATES)
    assert dlopt(tmp_path, "train", *words, f"steps={UPDATES}", "hydra.run.dir=straight").code == 0
    assert_same_run(tmp_path / "timed", tmp_path / "straight")


def test_a_run_from_its_config_is_the_same_run(tmp_path: Path, clock: list[float]) -> None:
    assert dlopt(tmp_path, "train", *RUN, BUDGET, "hydra.run.dir=timed").code == 0
    clock[0] = 0.25
    assert dlopt(tmp_path, "train", "from=timed/config.yaml", "hydra.run.dir=again").code == 0
    assert saved(tmp_path / "again") == (20, UPDATES)
    assert_same_run(tmp_path / "timed", tmp_path / "again")
    assert dlopt(tmp_path, "train", "from=timed", "epochs=1", "hydra.run.dir=short").code == 0
    assert saved(tmp_path / "short") == (1, None)


@pytest.mark.parametrize("update", [2, 6])  # before the first checkpoint, and after it
def test_a_resumed_run_keeps_its_updates(update: int, tmp_path: Path, clock: list[float]) -> None:
    assert dlopt(tmp_path, "train", *RUN, BUDGET, "hydra.run.dir=outputs/whole").code == 0
    with at_update(update + 5, terminate):  # five updates are timed
        assert dlopt(tmp_path, "train", *RUN, BUDGET, "name=killed").code == 75
    [killed] = (tmp_path / "outputs/killed").iterdir()
    clock[:] = [0.1, 0]
    other = dlopt(tmp_path, "train", *RUN, "epochs=20s", "resume=auto", f"hydra.run.dir={killed}")
    assert other.code == 2 and "has another config (epochs: saved 10s, now 20s)" in other.err
    result = dlopt(tmp_path, "train", *RUN, BUDGET, "name=killed", "resume=auto")
    assert result.code == 0, result.err
    assert saved(killed) == ("10s", UPDATES) and clock[1] == 0
    assert_same_run(tmp_path / "outputs/whole", killed)
    again = dlopt(tmp_path, "train", *RUN, BUDGET, "resume=auto", f"hydra.run.dir={killed}")
    assert again.code == 0 and "this run is already finished" in again.out


def test_a_checkpoint_in_another_folder_keeps_its_updates(tmp_path: Path, clock: list[float]) -> None:
    with at_update(6 + 5, terminate):
        assert dlopt(tmp_path, "train", *RUN, BUDGET, "hydra.run.dir=killed").code == 75
    clock[0] = 0.1
    resumed = ["resume=killed/checkpoints/last.pt", "hydra.run.dir=other"]
    assert dlopt(tmp_path, "train", *RUN, BUDGET, *resumed).code == 0
    assert saved(tmp_path / "other") == ("10s", UPDATES)


def test_runs_of_a_sweep_share_the_updates_of_a_configuration(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlopt.sweeps.pool.spawn", InProcess)
    monkeypatch.setattr("dlopt.sweeps.pool.warm_up", lambda: None)
    count = budget.count

    def slower_each_time(*arguments: Any) -> dict[str, Any]:
        found = count(*arguments)
        clock[0] *= 2
        return found

    monkeypatch.setattr(budget, "count", slower_each_time)
    words = [*RUN, BUDGET, "hydra.sweep.dir=sweep", "optimizer.lr=0.1,0.2", "seed=0,1"]
    result = dlopt(tmp_path, "train", "-m", *words)
    assert result.code == 0, result.err
    assert [saved(tmp_path / f"sweep/{job}")[1] for job in range(4)] == [12, 12, 5, 5]
    assert [summary(tmp_path / f"sweep/{job}")["steps"] for job in range(4)] == [12, 12, 5, 5]
    log = (tmp_path / "sweep/3/train.log").read_text()
    assert "epochs=10s: 1,000 ms per update" in log  # what the first run of the configuration has measured
    assert len([*(tmp_path / "sweep").glob(".updates-*.json")]) == 2
    # Finished, and with a job that was lost, the same command finds the sweep and its numbers.
    again = dlopt(tmp_path, "train", "-m", *words, "resume=auto")
    assert "this sweep is already finished" in again.out, again.err
    for name in ("summary.json", "metrics.jsonl"):
        (tmp_path / "sweep/1" / name).unlink()
    (tmp_path / "sweep/1/checkpoints").rename(tmp_path / "lost")
    assert dlopt(tmp_path, "train", "-m", *words, "resume=auto").code == 0
    assert saved(tmp_path / "sweep/1")[1] == UPDATES and clock[0] == 2
    longer = dlopt(tmp_path, "train", "-m", *[*words, "epochs=20s"], "resume=auto")
    assert longer.code == 2 and "(epochs: saved 10s, now 20s)" in longer.err


def test_all_ranks_make_the_updates_that_rank_0_counts(tmp_path: Path) -> None:
    words = [*SMALL, "parallel=ddp", "hydra.run.dir=timed", "max_time=1"]
    run_ranks("tests.support.ranks:run_command", 2, tmp_path / "ranks", str(tmp_path), "train", *words, "epochs=0.2s")
    epochs, updates = saved(tmp_path / "timed")
    assert (epochs, summary(tmp_path / "timed")["steps"]) == ("0.2s", updates)


def test_of_the_library(tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = package.train([*RUN, BUDGET, "hydra.run.dir=run"])
    assert (run.config["epochs"], run.config["steps"], run.metrics["steps"]) == ("10s", UPDATES, UPDATES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "steps=4"], "epochs=10s: steps=4 sets the number of updates; leave one out"),
        (
            ["train", "-m", "optimizer.lr=0.1,0.2", "hydra/sweeper=dlopt_optuna"],
            "epochs=10s: not in a search; set a number, or steps",
        ),
        (["train", "experiment=lecture/momentum"], "epochs=10s: not in a comparison"),
        (["diagnose", "model=mlp"], "epochs=10s: only a run counts its updates; set a number of epochs, or steps"),
        (["trajectory", "schedule=cosine"], "epochs=10s: only a run counts its updates"),
    ],
)
def test_is_refused_where_a_length_is_needed(words: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, *words, BUDGET)


INTERVALS = [
    Intervals(),
    Intervals(evaluate_every=3, save_every_epochs=2),
    Intervals(evaluate_every_steps=3, save_every_epochs=None, save_every_steps=5),
]


@pytest.mark.parametrize("intervals", INTERVALS)
@pytest.mark.parametrize("seconds", [0.1, 3.0, 20.0, 61.0])
def test_the_updates_take_the_time(intervals: Intervals, seconds: float, tmp_path: Path) -> None:
    """Against a simulation of the loop: as many as fit, but for what the end of an incomplete epoch may take."""
    trainer = probe_trainer(small_workload("epochs=1"), tmp_path)
    trainer.intervals = intervals
    update, evaluation, checkpoint = 0.2, 0.7, 0.3

    def taken(updates: int) -> float:
        total = 0.0
        for number in range(1, updates + 1):
            epoch, position = divmod(number, STEPS_PER_EPOCH)
            ends, is_last = position == 0, number == updates
            within = not ends and intervals.evaluate_every_steps and number % intervals.evaluate_every_steps == 0
            save_within = intervals.save_every_steps and number % intervals.save_every_steps == 0
            evaluates = is_last or within or (ends and epoch % intervals.evaluate_every == 0)
            at_end = ends and intervals.save_every_epochs and epoch % intervals.save_every_epochs == 0
            total += update + evaluates * evaluation + (is_last or bool(save_within or at_end)) * checkpoint
        return total

    found = budget.updates_within(seconds, trainer, update, evaluation, checkpoint)
    most = next(number for number in itertools.count(1) if taken(number + 1) > seconds)
    assert found == 1 if most == 1 else taken(found) <= seconds
    assert most == 1 or taken(found) >= 0.9 * seconds - 2 * (evaluation + checkpoint)


def test_of_a_batch_that_grows(tmp_path: Path) -> None:
    """Times are of the first batches: larger ones take as much longer."""
    trainer = probe_trainer(small_workload("accumulate={micro_batches: [1, 2], steps: [8]}", "steps=1000"), tmp_path)
    assert budget.updates_within(16.0, trainer, 1.0, 0.0, 0.0) == 8 + 4


def test_a_dry_run_prints_how_many(tmp_path: Path, clock: list[float]) -> None:
    clock[0] = 0.25
    result = dlopt(tmp_path, "train", *SMALL, BUDGET, "dry_run=true")
    shown = " ".join(result.out.split())
    assert "updates 4 per epoch 40 in all" in shown and "1 job of about 10.0 s" in shown, result.err
    assert "run 10 epochs of 4 steps" in shown
