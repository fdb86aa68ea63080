"""The trials of a ladder."""

from pathlib import Path

from dlopt.lab.ladder.ladder import LadderRequest, Search
from dlopt.lab.ladder.rates import Optimum, RateFit
from tests.support.ladders import results


def test_an_interrupted_ladder_has_a_seed_of_every_optimizer_before_the_next(tmp_path: Path) -> None:
    waiting = LadderRequest(tmp_path, results(1.5).ladder).waiting()
    assert [(each.optimizer, each.rung, each.seed) for each in waiting[:5]] == [
        ("adamw", "r0", 0),
        ("mine", "r0", 0),
        ("adamw", "r0", 1),
        ("mine", "r0", 1),
        ("adamw", "r1", 0),
    ]


def test_a_searched_rung_has_its_own_learning_rate() -> None:
    search = Search({}, {"r0": Optimum(0.03, 2.0, at_end=False)}, RateFit(1.0, -0.5, None))
    assert (search.lr("r0", 1e4), search.lr("r1", 1e4)) == (0.03, 0.01)
    assert Search({}, {"r0": Optimum(0.03, 2.0, at_end=False)}, None).lr("r0", 1e4) is None  # not complete
