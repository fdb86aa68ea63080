"""Sweeps of the lecture: their commands run, and their metrics show what their headers claim."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.types import RunMode

from dlopt.commands.train import train as train_command
from dlopt.config import compose as composing
from dlopt.config.choices import config_folder
from dlopt.config.compose import Composer
from dlopt.config.parsing import parse
from dlopt.config.resolve import to_plain
from dlopt.data.polynomial import polynomial
from dlopt.data.samples import InMemory
from dlopt.errors import UserError
from dlopt.sweeps import jobs, pool
from dlopt.training.trainer import Run, train

RECIPES = {  # the sweeps; tests/test_comparisons.py tests the comparisons
    path.stem: path
    for path in sorted((config_folder() / "experiment" / "lecture").glob("*.yaml"))
    if path.stem[0] != "_" and "MULTIRUN" in path.read_text()
}


@dataclass(frozen=True)
class Result:
    """Results of a job."""

    summary: Mapping[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def error(self) -> float:
        """Training loss of the last epoch."""
        return float(self.metrics[-1]["train_loss"])

    @property
    def gap(self) -> float:
        return float(self.summary["test_loss"]) - self.error


Execute = Callable[..., dict[tuple[str, ...], Result]]


def grid(composer: Composer, recipe: str, **fixed: str) -> list[list[str]]:
    """Returns the jobs of a recipe; `fixed` replaces the values of swept keys."""
    config = composer.compose([f"experiment=lecture/{recipe}"], multirun=True)
    assert config.hydra.mode == RunMode.MULTIRUN
    params = {**config.hydra.sweeper.params, **fixed}
    return composing.grid(composer.parse([f"{key}={value}" for key, value in params.items()]))


@pytest.fixture
def execute(tmp_path: Path) -> Execute:
    """Runs a recipe's jobs in this process: values of the swept keys -> result."""

    def run(recipe: str, *overrides: str, **fixed: str) -> dict[tuple[str, ...], Result]:
        composer, results = Composer(), {}
        for number, job in enumerate(grid(composer, recipe, **fixed)):
            lines = [*job, f"experiment=lecture/{recipe}", "tracking=[]", *overrides]
            plain, saved = to_plain(composer.compose(lines), lines)
            folder = tmp_path / str(number)
            folder.mkdir()
            summary = train(Run(parse(plain, saved), folder), console=False)
            metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            results[tuple(line.partition("=")[2] for line in job)] = Result(summary, metrics)
        return results

    return run


def test_finds_lecture_recipes() -> None:
    assert {"overfitting_polynomial", "capacity"} < set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_values_are_valid_and_header_lists_command(recipe: str) -> None:
    composer = Composer()
    jobs = grid(composer, recipe)
    assert len(jobs) > 3
    for job in jobs:
        if sum(ours != first for ours, first in zip(job, jobs[0], strict=True)) > 1:
            continue  # test each value once
        lines = [*job, f"experiment=lecture/{recipe}"]
        parse(*to_plain(composer.compose(lines), lines))
    directive, *header = RECIPES[recipe].read_text().partition("\ndefaults:")[0].splitlines()
    assert directive == "# @package _global_" and all(line.startswith("#") for line in header)
    text = "\n".join(header)
    assert f"  dlopt train experiment=lecture/{recipe}\n" in text and f"{len(jobs)} runs" in text
    assert "two cores" in text and "metrics.jsonl" in text


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ([], [f"stopping.patience={patience} seed={seed}" for patience in (2, 20, 300) for seed in (0, 1, 2)]),
        (["seed=7"], [f"stopping.patience={patience} seed=7" for patience in (2, 20, 300)]),
        (["-m", "seed=7"], [f"stopping.patience={patience} seed=7" for patience in (2, 20, 300)]),
        (["-m", "stopping.patience=9", "seed=5,6"], [f"stopping.patience=9 seed={seed}" for seed in (5, 6)]),
    ],
)
def test_recipe_sweeps_with_and_without_multirun_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str], expected: list[str]
) -> None:
    seen = []

    def record(batch: Any, pool: object, overview: object) -> None:
        while (job := batch.next()) is not None:
            seen.append(" ".join(line for line in job.overrides if not line.startswith("experiment=")))
            job.folder.path.mkdir(parents=True, exist_ok=True)
            (job.folder.path / "summary.json").write_text('{"status": "finished"}')
            batch.ended(job, jobs.Result("finished", {}))

    monkeypatch.setattr(pool, "run", record)
    monkeypatch.chdir(tmp_path)
    assert train_command(["experiment=lecture/overfitting_polynomial", *typed]) == 0
    assert seen == expected
    [folder] = (tmp_path / "outputs" / "overfitting_polynomial").iterdir()
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {str(number) for number in range(len(seen))}


def test_several_values_require_multirun_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"seed=5,6: several values need -m"):
        train_command(["experiment=lecture/overfitting_polynomial", "seed=5,6"])
    assert not list(tmp_path.iterdir())


def test_single_run_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ["experiment=lecture/overfitting_polynomial", "hydra.mode=RUN", "epochs=1", "hydra.run.dir=run"]
    assert train_command(typed) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 1


def test_suggests_similar_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"did you mean experiment=lecture/capacity\?"):
        train_command(["experiment=lecture/capasity"])


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_overfitting(execute: Execute, seed: int) -> None:
    runs = execute("overfitting_polynomial", "epochs=100", seed=str(seed))
    little, enough, never = (runs[patience, str(seed)] for patience in ("2", "20", "300"))

    # training error falls, validation error turns
    best = never.summary["best_epoch"]
    assert never.summary["status"] == "finished" and 3 <= best <= 20
    first, turn, last = (never.metrics[epoch - 1] for epoch in (1, best, 100))
    assert first["train_loss"] > turn["train_loss"] > 1.5 * last["train_loss"]
    assert first["val_loss"] > 2 * turn["val_loss"] and last["val_loss"] > 2 * turn["val_loss"]

    # early stopping saves epochs at no worse test error
    assert enough.summary["status"] == "stopped_early" and enough.summary["epochs"] <= 40
    assert enough.summary["test_loss"] <= never.summary["test_loss"]

    # too little patience stops too early
    assert little.summary["status"] == "stopped_early" and little.summary["epochs"] < best
    assert little.summary["test_loss"] > 1.1 * enough.summary["test_loss"]


@pytest.mark.slow
def test_capacity(execute: Execute) -> None:
    runs = execute("capacity")
    optimizers, rates = ("gradient_descent", "sgd", "adam"), ("0.003", "0.03")

    # the convex model: all optimizers and learning rates end at the least-squares line
    data = polynomial(
        function="sine", interval=(-2.0, 2.0), noise=0.3, train_size=400, val_size=0, test_size=1000, seed=0
    )
    assert isinstance(data.train, InMemory) and isinstance(data.test, InMemory)
    line = np.polyfit(data.train.inputs[:, 0].double(), data.train.targets.double(), 1)
    least = [
        np.mean((np.polyval(line, part.inputs[:, 0].double()) - part.targets.double().numpy()) ** 2)
        for part in (data.train, data.test)
    ]
    for optimizer in optimizers:
        for rate in rates:
            run = runs["[]", "null", optimizer, rate]
            assert [run.error, run.summary["test_loss"]] == pytest.approx(least, rel=1e-3)
    few = [runs["[]", "20", optimizer, rate].error for optimizer in optimizers for rate in rates]
    assert max(few) == pytest.approx(min(few), rel=1e-3)

    # effective capacity: what a wide network fits in a thousand updates depends on the optimizer and its learning rate
    for count in ("20", "null"):
        errors = [
            runs["[64]", count, optimizer, rate].error
            for optimizer, rate in zip(optimizers, ("0.003", "0.03", "0.03"), strict=True)
        ]
        assert errors[0] > 2 * errors[1] > 2 * errors[2]

    # capacity grows with width; the generalization gap depends on the data
    narrow, middle, wide = (runs[width, "null", "adam", "0.03"] for width in ("[]", "[4]", "[64]"))
    assert narrow.error > 3 * middle.error > 3 * wide.error
    assert runs["[64]", "20", "adam", "0.03"].gap > 0.1 > 10 * abs(wide.gap)


@pytest.mark.slow
def test_fit_error_falls_with_width(execute: Execute) -> None:
    runs = execute("capacity_width")
    for seed in ("0", "1", "2"):
        for kind in ("train", "test"):
            result = [runs[width, seed] for width in ("[]", "[2]", "[4]", "[8]")]
            errors = [run.error if kind == "train" else run.summary["test_loss"] for run in result]
            assert all(wider < 0.8 * narrower for narrower, wider in pairwise(errors)), errors
            assert errors[-1] < 1e-2 * errors[0]


@pytest.mark.slow
def test_capacity_on_digits(execute: Execute) -> None:
    runs = execute("capacity_digits")

    def accuracies(*values: str) -> tuple[float, float]:
        run = runs[values]
        return run.metrics[-1]["train_accuracy"], run.summary["test_accuracy"]

    # with the same small network and number of updates, the learning rate determines what it can fit
    assert accuracies("[8]", "null", "sgd", "0.001")[0] < 0.8 < 0.95 < accuracies("[8]", "null", "sgd", "0.03")[0]
    # a hundred digits are memorized, all digits are not: the gap depends on the data
    for width in ("[]", "[128]"):
        (few, few_test), (many, many_test) = (accuracies(width, count, "sgd", "0.03") for count in ("100", "null"))
        assert few == 1.0 and few - few_test > 0.05 > 2 * (many - many_test)
    # capacity grows with width
    assert accuracies("[128]", "null", "sgd", "0.03")[0] > accuracies("[]", "null", "sgd", "0.03")[0]
