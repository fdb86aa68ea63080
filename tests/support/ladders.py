"""A ladder with known laws."""

from dlopt.lab.ladder.analysis import analyze
from dlopt.lab.ladder.family import Rules, Rung
from dlopt.lab.ladder.ladder import Contestant, Ladder, Outcome, Search, Trial
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
