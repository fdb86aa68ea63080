"""The sentence below a leaderboard."""

from pathlib import Path

from dlopt.results.verdict import verdict
from tests.support.folders import make_run, table


def sentence(folder: Path, **accuracies: tuple[float, ...]) -> str:
    """Returns the verdict on rows with these accuracies by learning rate (lr1=...), one per seed."""
    for number, (name, values) in enumerate(accuracies.items()):
        for seed, value in enumerate(values):
            make_run(folder / f"{number}-{seed}", lr=float(name[2:]), seed=seed, accuracies=(0.1, value))
    ranking = table(folder)
    return verdict(ranking.ranked, lower=ranking.lower)


def test_better_than_all_others(tmp_path: Path) -> None:
    found = sentence(tmp_path, lr1=(0.90, 0.91, 0.92), lr2=(0.80, 0.815, 0.82), lr3=(0.7, 0.71, 0.725))
    assert found == "verdict: lr=1 is better than all others (95 % intervals of the paired differences)"


def test_not_distinguishable(tmp_path: Path) -> None:
    found = sentence(tmp_path, lr1=(0.90, 0.91, 0.92), lr2=(0.80, 0.97, 0.85), lr3=(0.7, 0.71, 0.725))
    assert found == (
        "verdict: lr=1 is better than 1 of 2 others, but not distinguishable from lr=2: more seeds narrow the intervals"
    )


def test_equal_differences_are_not_distinguishable(tmp_path: Path) -> None:
    found = sentence(tmp_path, lr1=(0.90, 0.91), lr2=(0.80, 0.81))
    assert found == "verdict: lr=1 is first, but not distinguishable from lr=2: more seeds narrow the intervals"


def test_a_better_row_with_harder_seeds(tmp_path: Path) -> None:
    """The first row has the best mean, because it lacks the hard seed; over common seeds it is worse."""
    for seed, value in enumerate((0.90, 0.91, 0.92)):
        make_run(tmp_path / f"easy-{seed}", lr=1.0, seed=seed, accuracies=(0.1, value))
    for seed, value in enumerate((0.93, 0.942, 0.951, 0.1)):
        make_run(tmp_path / f"all-{seed}", lr=2.0, seed=seed, accuracies=(0.1, value))
    found = verdict(table(tmp_path).ranked, lower=False)
    assert found == "verdict: lr=1 has the best mean, but over common seeds it is worse than lr=2"


def test_losses(tmp_path: Path) -> None:
    for number, losses in enumerate([(0.5, 0.51, 0.52), (0.8, 0.815, 0.82)]):
        for seed, loss in enumerate(losses):
            make_run(tmp_path / f"{number}-{seed}", lr=number + 1.0, seed=seed, accuracies=(0.5,), losses=(loss,))
    ranking = table(tmp_path, "val_loss")
    assert verdict(ranking.ranked, lower=ranking.lower).startswith("verdict: lr=1 is better than all others")


def test_names_few_of_many(tmp_path: Path) -> None:
    rows = {f"lr{number}": (0.5, 0.9 - number / 100) for number in range(1, 7)}
    assert "from lr=2, lr=3, lr=4 and 2 more" in sentence(tmp_path, **rows)


def test_long_labels_are_ranks(tmp_path: Path) -> None:
    for seed in (0, 1):
        for number, accuracy in enumerate((0.8, 0.7 + seed / 10)):
            config = {f"model.{key}": number for key in ("width", "depth", "heads", "tokens")}
            make_run(tmp_path / f"{number}-{seed}", seed=seed, accuracies=(accuracy,), config=config)
    found = verdict(table(tmp_path).ranked, lower=False)
    assert found == "verdict: #1 is first, but not distinguishable from #2: more seeds narrow the intervals"


def test_one_run_each_is_no_evidence(tmp_path: Path) -> None:
    found = sentence(tmp_path, lr1=(0.90,), lr2=(0.80,))
    assert found == "verdict: lr=1 is first, by one run each: repeat it with seed=0,1,2 to tell a gain from luck"


def test_one_row_has_no_verdict(tmp_path: Path) -> None:
    assert sentence(tmp_path, lr1=(0.90, 0.91)) == ""


def test_equal_values_of_one_run_each_are_a_tie(tmp_path: Path) -> None:
    found = sentence(tmp_path, lr1=(0.9,), lr2=(0.9,), lr3=(0.8,))
    assert (
        found == "verdict: lr=1 is tied with lr=2, by one run each: repeat it with seed=0,1,2 to tell a gain from luck"
    )
