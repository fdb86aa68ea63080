"""Ladders with known laws."""

import math
from collections.abc import Sequence

from dlopt.lab.ladder.analysis import analyze
from dlopt.lab.ladder.arms import OVERRIDES
from dlopt.lab.ladder.family import Rules, Rung
from dlopt.lab.ladder.ladder import Contestant, Ladder, LadderRequest, Outcome, Search, Trial
from dlopt.lab.ladder.rates import RateFit
from dlopt.lab.ladder.results import Results, measured


def results(speed: float, rungs: int = 5) -> Results:
    """A ladder on which an optimizer needs the compute of the baseline divided by `speed`."""
    sizes = {f"r{i}": Rung([], 1000 * 2**i, 100, 1000, 1e12 * 4**i, 0.1) for i in range(rungs)}
    contestants = {name: Contestant({}, 0.1, []) for name in ("adamw", "mine")}
    ladder = Ladder(
        "f", "e", "val_loss", "bytes", Rules(width="w", depth="d", batch="b", schedule="s"), 20.0, sizes, [], 2,
        contestants, [],
    )  # fmt: skip
    outcomes = {
        Trial(name, rung, seed): Outcome(1.2 + 60 * (factor * each.compute) ** -0.12 + 0.001 * seed, 1.0)
        for name, factor in (("adamw", 1.0), ("mine", speed))
        for rung, each in sizes.items()
        for seed in range(2)
    }
    searches = {name: Search({}, {}, RateFit(0.1, 0.0, None)) for name in contestants}
    return Results(ladder, searches, {}, outcomes, analyze(measured(ladder, outcomes), resamples=20), {})


def with_arms(arms: Sequence[str], rungs: int = 3) -> Ladder:
    """A ladder of two optimizers with these arms, whose widths double."""
    sizes = {
        f"r{i}": Rung([f"model.width={16 * 2**i}"], 1000 * 4**i, 100, 1000, 1e12 * 16**i, 0.1) for i in range(rungs)
    }
    contestants = {
        f"{name}.{arm}": Contestant({"optimizer.lr": 0.01}, None, list(OVERRIDES.get(arm, ())), name, arm)
        for name in ("adamw", "mine")
        for arm in arms
    }
    rules = Rules(width="w", depth="d", batch="b", schedule="s")
    return Ladder("f", "e", "val_loss", "bytes", rules, 20.0, sizes, [*sizes][:3], 2, contestants, [])


def simulate(request: LadderRequest, scaled: float) -> list[Trial]:
    """Runs all trials of a ladder whose best decay is `scaled` / width; returns them in order.

    The loss is a parabola in the logarithms of rate and decay; `mine` needs half the compute of `adamw`.
    """
    done: list[Trial] = []
    while waiting := request.waiting():
        for trial in waiting:
            contestant, rung = request.ladder.contestant(trial), request.ladder.rungs[trial.rung]
            decay = request.decay(trial)
            gap = 0.0 if not decay or rung.width is None else math.log(decay * rung.width / scaled)
            compute = rung.compute * (2 if contestant.choice == "mine" else 1)
            tuning = 0.01 * math.log(request.lr(trial) / 0.02) ** 2 + 0.002 * gap**2
            request._known[trial] = Outcome(1.2 + 60 * compute**-0.12 + tuning + 0.001 * trial.seed, 1.0)
            done.append(trial)
    return done
