"""Synthetic results of a benchmark, from a simple model of training: no run is needed."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dlopt.lab.benchmark.results import Cell, Results, TrialRecord, UpdateCost, WorkloadTarget, read, to_json

NINE = ("mlp", "resnet", "plain", "vit", "autoencoder", "regression", "noisy_labels", "gpt", "lstm")
SPEEDS = {
    "muon": 2.2, "soap": 2.0, "shampoo": 1.8, "adamw": 1.4, "nadam": 1.45, "adopt": 1.35, "lion": 1.1, "rmsprop": 1.0,
    "sgd": 0.75, "sam": 0.8,
}  # fmt: skip
UPDATES, TARGET, POINTS = 400, 0.3, 40

Trial = Callable[[random.Random, float, float, float], list[float]]
"""(noise, learning rate, weight decay, speed) -> losses at the validations."""


def healthy(noise: random.Random, lr: float, decay: float, speed: float) -> list[float]:
    """Best at a learning rate of 0.01; diverges above 0.5."""
    if lr > 0.5:
        return [2.3, 9.0, math.nan]
    rate = speed * math.exp(-0.7 * math.log10(lr / 0.01) ** 2) * noise.uniform(0.85, 1.15) * (1 - decay)
    return [0.15 + 2.15 * math.exp(-4 * rate * (i + 1) / POINTS) for i in range(POINTS)]


def flipped(noise: random.Random, lr: float, decay: float, speed: float) -> list[float]:
    return [2.3 * (1 + lr) ** i for i in range(POINTS)] if lr < 0.1 else [2.4, math.nan]


def ignores_both(noise: random.Random, lr: float, decay: float, speed: float) -> list[float]:
    return healthy(random.Random(0), 0.01, 0.0, speed)


def ignores_lr(noise: random.Random, lr: float, decay: float, speed: float) -> list[float]:
    return healthy(random.Random(0), 0.01, decay, speed)


def make(
    speeds: Mapping[str, float] = SPEEDS,
    workloads: Sequence[str] = NINE,
    studies: int = 3,
    trials: int = 10,
    behaviours: Mapping[str, Trial] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    costs: bool = True,
) -> Results:
    """`behaviours`: by optimizer, `healthy` by default; `ranges`: of the learning rate."""
    bounds = {optimizer: (ranges or {}).get(optimizer, (1e-4, 1.0)) for optimizer in speeds}
    cells = {}
    for optimizer, speed in speeds.items():
        for name in workloads:
            behaviour = (behaviours or {}).get(optimizer, healthy)
            runs = [
                _trial(optimizer, name, study, number, trials, behaviour, speed, bounds[optimizer])
                for study in range(studies)
                for number in range(trials)
            ]
            _, curve = min(runs, key=lambda run: (run[0].updates, run[0].best or math.inf))
            noise = random.Random(f"cost of {optimizer} on {name}")
            time = noise.uniform(1.0, 1.6) * (2 if optimizer == "sam" else 1)
            cost = (
                UpdateCost(time, 0.97 * time, 1.04 * time, 2.0 if optimizer.startswith("ad") else 1.0)
                if costs
                else None
            )
            tests = {study: {"test_loss": 0.3 + noise.gauss(0, 0.01), "test_accuracy": 0.9} for study in range(studies)}
            cells[optimizer, name] = Cell(tuple(run[0] for run in runs), cost, tuple(curve), tests)
    return Results(
        "small",
        studies,
        trials,
        {name: WorkloadTarget("val_loss", TARGET, UPDATES) for name in workloads},
        cells,
        {
            optimizer: {
                "optimizer.lr": f"tag(log, interval({low}, {high}))",
                "optimizer.weight_decay": "tag(log, interval(0.0001, 0.1))",
            }
            for optimizer, (low, high) in bounds.items()
        },
        facts={"command": "dlopt benchmark optimizer=muon,sgd", "versions": {"dlopt": "0.1", "torch": "2.15.0"}},
    )


def _trial(
    optimizer: str,
    workload: str,
    study: int,
    number: int,
    trials: int,
    behaviour: Trial,
    speed: float,
    bounds: tuple[float, float],
) -> tuple[TrialRecord, list[tuple[int, float]]]:
    # A stratified learning rate: one in each interval, as quasi-random points have.
    noise = random.Random(f"{optimizer} {workload} {study} {number}")
    low, high = bounds
    lr = low * (high / low) ** ((number + noise.random()) / trials)
    decay = 10 ** noise.uniform(-4, -1)
    hardness = random.Random(f"{optimizer} on {workload}").uniform(0.6, 1.4)
    losses = behaviour(noise, lr, decay, speed * hardness)
    reached = next((i + 1 for i, loss in enumerate(losses) if loss <= TARGET), None)
    losses = losses[:reached]
    finite = [loss for loss in losses if math.isfinite(loss)]
    updates = math.inf if reached is None else reached * UPDATES / POINTS
    record = TrialRecord(
        study,
        number,
        {"optimizer.lr": float(f"{lr:.4g}"), "optimizer.weight_decay": float(f"{decay:.4g}")},
        updates,
        updates * (2 if optimizer == "sam" else 1),
        finite[0],
        min(finite),
        losses[-1] if math.isfinite(losses[-1]) else None,
        "" if math.isfinite(losses[-1]) else "the loss became nan at update 20 with a learning rate of 0.6",
    )
    return record, [((i + 1) * UPDATES // POINTS, loss) for i, loss in enumerate(losses)]


def saved_and_read(results: Results, folder: Path) -> Results:
    (folder / "r.json").write_text(to_json(results))
    found = read(folder / "r.json")
    assert found is not None
    return found
