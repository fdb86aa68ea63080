"""Stopping jobs early: what it saves, and what it must not cost."""

import math
import statistics
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from dlopt.sweeps import samplers
from dlopt.sweeps.space import suggest
from tests.sweeps.spaces import space

EPOCHS = 27
JOBS = 40
SPACE = space(
    "lr=tag(log,interval(0.0001,1))", "decay=tag(log,interval(0.000001,0.1))", "momentum=interval(0,0.99)",
    "width=tag(log,int(interval(8,512)))",
)  # fmt: skip

Values = dict[str, Any]


def accuracy(values: Values, epoch: int) -> float:
    """A learning curve. Its end is best at one point of the space; smaller rates learn more slowly, so that the order
    of two jobs may change on the way."""
    misses = (
        math.log10(values["lr"]) + 2,
        (math.log10(values["decay"]) + 4) / 1.5,
        2 * (values["momentum"] - 0.9),
        (math.log10(values["width"]) - 2) / 1.5,
    )
    final = 0.95 * math.exp(-0.3 * sum(miss**2 for miss in misses))
    pace = 0.4 + 0.1 * math.log10(values["lr"] / 0.0001)
    return final * (1 - math.exp(-pace * epoch)) + 0.01 * math.sin(1e4 * values["lr"] + epoch) / epoch


def search(pruner: optuna.pruners.BasePruner, seed: int, jobs: int, enough: float = math.inf) -> tuple[float, float]:
    """(best final figure, epochs spent) of so many jobs one after the other, or until one ends with `enough`."""
    study = optuna.create_study(direction="maximize", pruner=pruner)
    sampler, best, spent = samplers.random(space=SPACE, seed=seed), -math.inf, 0
    for number in range(jobs):
        study.sampler = sampler(number)
        trial = study.ask()
        values = {key: suggest(trial, key, each) for key, each in SPACE.searched.items()}
        for epoch in range(1, EPOCHS + 1):
            spent += 1
            figure = accuracy(values, epoch)
            trial.report(figure, epoch)
            if epoch < EPOCHS and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            best = max(best, figure)
            study.tell(trial, figure)
        if best >= enough:
            break
    return best, spent


def test_asha_needs_fewer_epochs_than_random_search_for_the_same_figure() -> None:
    """The figure that random search has after `JOBS` jobs; random search's epochs are counted up to the job that had
    it, not to the last one."""
    shares = []
    for seed in range(20):
        target, _ = search(samplers.none(), seed, JOBS)
        _, spent = search(samplers.none(), seed, JOBS, target)
        best, needed = search(samplers.asha(min_epochs=1, reduction_factor=3, grace_rungs=0), seed, 4 * JOBS, target)
        shares.append(needed / spent if best >= target else math.inf)
    assert statistics.median(shares) < 0.5, sorted(shares)


@pytest.mark.parametrize(
    "pruner",
    [
        samplers.asha(min_epochs=1, reduction_factor=3, grace_rungs=0),
        samplers.hyperband(min_epochs=1, max_epochs=EPOCHS, reduction_factor=3),
        samplers.median(startup_trials=3, warmup_epochs=1),
    ],
)
def test_what_is_hopeless_is_stopped_and_what_is_good_goes_on(pruner: optuna.pruners.BasePruner) -> None:
    best, spent = search(pruner, 0, JOBS)
    whole, all_epochs = search(samplers.none(), 0, JOBS)
    assert all_epochs == JOBS * EPOCHS
    assert spent < 0.7 * all_epochs and best > whole - 0.05
